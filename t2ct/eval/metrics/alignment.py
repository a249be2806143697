"""Do volumes and reports meet in the space of CLIP3D? Embeddings are unit rows, (N, E)."""

from __future__ import annotations

import numpy as np

PRESENT, ABSENT = "{} is present.", "{} is not present."  # the sentences of CT-CLIP's zero-shot classifier
RANKS = (1, 5, 10, 50)


def zero_shot_scores(volumes: np.ndarray, present: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """(N, L): how much nearer a volume is to "X is present." than to "X is not present."

    volumes (N, E); present, absent (L, E). The softmax over the two that CT-CLIP takes (Hamamci et al. 2024) grows with
    this difference, so that it has the same AUC.
    """
    return volumes @ (present - absent).T


def found_within(texts: np.ndarray, volumes: np.ndarray, k: int) -> np.ndarray:
    """(N,) of 0 and 1: is the volume of report i among the k volumes nearest to report i?

    Row i of both belong together. What is equally near counts as nearer, so that embeddings which are all alike find
    nothing. The mean is Recall@K of report→volume; by chance it is k/N.
    """
    if texts.shape != volumes.shape:
        raise ValueError(f"embeddings: wanted as many reports as volumes, got {texts.shape} and {volumes.shape}")
    nearness = texts @ volumes.T
    own = nearness.diagonal()[:, None]
    return ((nearness >= own).sum(1) <= k).astype(float)


def shared_findings(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, M) Jaccard index of the findings of two sets, labels (N, L) and (M, L); 0 where neither has any."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    both = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - both
    return both / np.maximum(either, 1)


def precision_at(
    queries: np.ndarray, query_labels: np.ndarray, gallery: np.ndarray, gallery_labels: np.ndarray, k: int,
    same: bool = False, itself: bool = False,
) -> np.ndarray:  # fmt: skip
    """Mean Jaccard index of a query's findings and those of its k nearest volumes: (Q,), its mean is "MAP@K".

    As CT-CLIP's released script computes volume→volume MAP@K. The gallery is the volumes with at least one finding.
    same: queries and gallery are one set, and a volume does not find itself. itself: it does, as in that script, where
    MAP@1 is then the share of volumes that have any finding; and queries without findings, which share none with
    anything, count as 0, while otherwise they are left out. NaN alone where nothing can be found.
    """
    query_labels, gallery_labels = np.asarray(query_labels, bool), np.asarray(gallery_labels, bool)
    nearness = queries @ gallery.T
    if same and not itself:
        np.fill_diagonal(nearness, -np.inf)
    asked = np.ones(len(queries), bool) if itself else query_labels.any(1)
    kept = gallery_labels.any(1)
    if asked.sum() == 0 or kept.sum() < k + same:
        return np.array([np.nan])
    nearness = nearness[asked][:, kept]
    shared = shared_findings(query_labels[asked], gallery_labels[kept])
    nearest = np.argsort(-nearness, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(shared, nearest, 1).mean(1)


def clip_scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N,): 100 times the cosine of row i of both, not below 0; the mean is the CLIP score of Hessel et al. 2021.

    As the VLM3D challenge uses it: generated volumes with their reports, and with the real volumes of these.
    """
    return np.maximum(100 * (a * b).sum(1), 0)
