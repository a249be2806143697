"""Do the volumes show what their reports say? A classifier's scores against the labels: AUC, precision, calibration.

scores, labels: (N, L), a row a volume, a column a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from t2ct.eval.metrics.estimate import Estimate, bootstrap_of

Figures = Callable[[np.ndarray, np.ndarray], np.ndarray]  # scores, labels -> (L,)
THRESHOLD = 0.5  # of a probability, above which a finding counts as predicted
BINS = 15  # of the calibration error


def auc(scores: Sequence[float] | np.ndarray, present: Sequence[bool] | np.ndarray) -> float:
    """Area under the ROC curve: how often a present one scores above an absent one, ties counting half.

    From mid-ranks (Mann and Whitney 1947). NaN without both kinds. Raises ValueError for unequal lengths or scores that
    are not finite.
    """
    s, y = np.asarray(scores, float), np.asarray(present, bool)
    if s.ndim != 1 or s.shape != y.shape or not np.isfinite(s).all():
        raise ValueError(f"scores: wanted as many finite numbers as present, got {s.shape} and {y.shape}")
    return float(aucs(s[:, None], y[:, None])[0])


def aucs(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`auc` of every finding, (L,); NaN where a finding is never, or always, present."""
    s, y = np.asarray(scores, float).T, np.asarray(labels, bool).T
    order = np.argsort(s, axis=1)
    s, y = (np.take_along_axis(v, order, 1) for v in (s, y))
    n = s.shape[1]
    step = s[:, 1:] != s[:, :-1]  # where a group of equal scores ends and the next begins
    edge = np.ones((len(s), 1), bool)
    place = np.arange(n)
    first = np.maximum.accumulate(np.where(np.concatenate([edge, step], 1), place, 0), 1)
    ends = np.where(np.concatenate([step, edge], 1), place, n)
    last = np.minimum.accumulate(ends[:, ::-1], 1)[:, ::-1]
    ranks = (first + last) / 2 + 1
    cases = y.sum(1)
    area = (ranks * y).sum(1) - cases * (cases + 1) / 2
    pairs = cases * (n - cases)
    return np.where(pairs > 0, area / np.maximum(pairs, 1), np.nan)


def precisions(probabilities: np.ndarray, labels: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Share of the volumes predicted to have a finding that have it, (L,).

    A finding that is never predicted has 0, as in scikit-learn; one that is never or always present NaN, as its AUC.
    """
    predicted, y = np.asarray(probabilities) > threshold, np.asarray(labels, bool)
    right = (predicted & y).sum(0) / np.maximum(predicted.sum(0), 1)
    return np.where(y.any(0) & ~y.all(0), right, np.nan)


def macro(values: np.ndarray) -> float:
    """Mean over the findings that could be measured; NaN if there are none."""
    known = np.isfinite(values)
    return float(values[known].mean()) if known.any() else float("nan")


def macro_auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """`macro` of `aucs`."""
    return macro(aucs(scores, labels))


def weighted(values: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the findings that could be measured, each weighed by how many volumes have it."""
    known, weight = np.isfinite(values), np.asarray(labels, bool).sum(0)
    return float(np.average(values[known], weights=weight[known])) if known.any() else float("nan")


def averaged(figures: Figures, scores: np.ndarray, labels: np.ndarray) -> tuple[Estimate, Estimate, list[Estimate]]:
    """Macro mean, weighted mean and each finding's `figures(scores, labels)`, with bootstrap intervals."""

    def all_of_them(i: np.ndarray) -> np.ndarray:
        values = figures(scores[i], labels[i])
        return np.array([macro(values), weighted(values, labels[i]), *values])

    over, by_cases, *each = bootstrap_of(all_of_them, len(labels))
    return over, by_cases, each


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of predicted probability and frequency, over equal bins, all findings
    pooled (Guo et al. 2017, each finding a problem of two classes)."""
    p, _, gap = _reliability(probabilities, labels, bins)
    return float((p * gap).sum())


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[tuple[float, float]]:
    """(mean probability, frequency) of every bin that is not empty: a calibrated classifier lies on the diagonal."""
    share, points, _ = _reliability(probabilities, labels, bins)
    return [point for point, s in zip(points, share, strict=True) if s > 0]


def _reliability(
    probabilities: np.ndarray, labels: np.ndarray, bins: int
) -> tuple[np.ndarray, list[tuple[float, float]], np.ndarray]:
    p, y = np.asarray(probabilities, float).ravel(), np.asarray(labels, float).ravel()
    if p.size == 0 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities: wanted numbers from 0 to 1, got others or none")
    at = np.minimum((p * bins).astype(int), bins - 1)
    count = np.bincount(at, minlength=bins)
    confidence, frequency = (np.bincount(at, v, bins) / np.maximum(count, 1) for v in (p, y))
    return count / p.size, list(zip(confidence.tolist(), frequency.tolist(), strict=True)), abs(confidence - frequency)
