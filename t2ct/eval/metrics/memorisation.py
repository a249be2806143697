"""Does a model repeat what it was trained on? Nearest training volumes, in embedding and in pixel space."""

from __future__ import annotations

import numpy as np

from t2ct.eval.metrics.estimate import Estimate, mean

CLOSE = 0.05  # share of unseen real volumes that lie as close to a training volume by chance
BLOCK = 512  # rows compared at once


def nearest(queries: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every row of queries (Q, F) the nearest row of known (N, F): indices (Q,) and root mean square distances (Q,).

    Exact differences where it matters: the two nearest candidates by |x|² - 2xy + |y|² are measured again, since that
    form loses the digits of small distances, which are the ones of interest.
    """
    q, k = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (queries, known))
    if q.shape[1] != k.shape[1] or not len(k):
        raise ValueError(f"nearest: wanted rows of one length and some known ones, got {q.shape} and {k.shape}")
    squares = (k * k).sum(1)
    index, distance = np.empty(len(q), int), np.empty(len(q))
    for start in range(0, len(q), BLOCK):
        part = q[start : start + BLOCK]
        rough = squares[None] - 2 * part @ k.T
        few = np.argsort(rough, axis=1)[:, :2]
        exact = np.sqrt(((part[:, None] - k[few]) ** 2).mean(2))
        best = exact.argmin(1)
        rows = np.arange(len(part))
        index[start : start + BLOCK], distance[start : start + BLOCK] = few[rows, best], exact[rows, best]
    return index, distance


def too_close(generated: np.ndarray, unseen: np.ndarray) -> Estimate:
    """Share of generated volumes nearer to a training volume than 95 % of unseen real ones are: by chance 0.05.

    generated, unseen: distances to the nearest training volume. Near 1: the model copies.
    """
    limit = np.quantile(unseen, CLOSE)
    return mean((np.asarray(generated) < limit).astype(float))
