"""How far the generated volumes, as a distribution of features, are from the real ones.

Features are (N, F), one row a volume, or (N, K, F), K slices of each volume: what is drawn at random is the volume,
with all its slices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from t2ct.eval.metrics.estimate import Estimate, half_samples_of, mean

STRATUM = 4  # pairs whose FVD the VLM3D challenge computes at a time
INNER = 2  # pairs of halves that the extrapolation averages over


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the Gaussians with the means and (unbiased) covariances of two sets of features.

    a (N, F) or (N, K, F), b likewise, at least two rows each. |m - n|² + tr(A + B - 2 (AB)^½), Dowson and Landau 1982;
    called FID by Heusel et al. 2017. The root is never formed: the eigenvalues of AB are the squared singular values of
    X Yᵀ, X and Y being the centred features over the roots of their degrees of freedom, so that tr (AB)^½ is the sum of
    the singular values. That is exact for singular covariances (fewer volumes than features), where the usual
    square root of a product loses half of the digits. Raises ValueError.
    """
    a, b = _rows("a", a), _rows("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features: wanted as many in both sets, got {a.shape[1]} and {b.shape[1]}")
    x, y = (_factor(s) for s in (a, b))
    roots = float(np.linalg.svd(x @ y.T, compute_uv=False).sum())
    between = a.mean(0) - b.mean(0)
    return float(between @ between + (x * x).sum() + (y * y).sum() - 2 * roots)


def frechet_infinity(a: np.ndarray, b: np.ndarray, seed: int = 0) -> float:
    """`frechet` extrapolated to infinitely many volumes, by a line in 1/N through N volumes and N/2.

    The distance of N volumes is too large by about c/N (Chong and Forsyth 2020). Both sets are cut to the same halves
    of their volumes, `INNER` times two, whose mean stands for N/2. May fall below 0, as an unbiased estimate must. With
    fewer rows than features the bias is not yet a line in 1/N, and part of it stays. Needs four volumes in each.
    """
    whole = frechet(a, b)
    if min(len(a), len(b)) < 4:
        raise ValueError(f"frechet_infinity: wanted at least 4 volumes in each set, got {len(a)} and {len(b)}")
    rng = np.random.default_rng([seed, len(a), len(b)])
    parts = []
    for _ in range(INNER):
        p = rng.permutation(len(a))
        q = p if len(b) == len(a) else rng.permutation(len(b))  # volumes of one report stay together
        m, n = len(p) // 2, len(q) // 2
        parts += [frechet(a[p[:m]], b[q[:n]]), frechet(a[p[m : 2 * m]], b[q[n : 2 * n]])]
    half = float(np.mean(parts))
    return 2 * whole - half


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel inception distance: squared maximum mean discrepancy with the kernel (x·y / F + 1)³, unbiased.

    Bińkowski et al. 2018, equation 4, over all rows at once. Its expectation does not depend on the number of volumes,
    so it says what a Fréchet distance of few volumes cannot. Needs two rows in each. Raises ValueError.
    """
    a, b = _rows("a", a), _rows("b", b)
    m, n = len(a), len(b)
    aa, bb, ab = _kernel(a, a), _kernel(b, b), _kernel(a, b)
    within = (aa.sum() - np.trace(aa)) / (m * (m - 1)) + (bb.sum() - np.trace(bb)) / (n * (n - 1))
    return float(within - 2 * ab.mean())


def fvd_in_strata(real: np.ndarray, generated: np.ndarray, size: int = STRATUM) -> Estimate:
    """The VLM3D challenge's FVD: the mean Fréchet distance of successive groups of four pairs (real, generated).

    real, generated (N, F), row i of both from report i. With four volumes a group this measures mostly the bias of
    four samples; it is here to be compared with the challenge's figures, not to be believed. n counts volumes.
    """
    starts = range(0, len(real) - size + 1, size)
    values = np.array([frechet(real[i : i + size], generated[i : i + size]) for i in starts])
    found = mean(values)
    return Estimate(found.value, found.low, found.high, size * len(values))


Between = Callable[[np.ndarray, np.ndarray], float]


def distance(statistic: Between, a: np.ndarray, b: np.ndarray, seed: int = 0) -> Estimate:
    """`statistic(a, b)` with an interval from halves of the volumes; n is the smaller number of volumes.

    Sets of equal size are halved alike, since their volumes come in pairs of one report.
    """
    return _halved(lambda x, y: np.array([statistic(x, y)]), a, b, seed)[0]


def distance_by_plane(statistic: Between, a: np.ndarray, b: np.ndarray, seed: int = 0) -> list[Estimate]:
    """`distance` for (N, P, K, F), K slices in each of P planes: the mean over the planes, then every plane."""

    def planes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        values = [statistic(x[:, p], y[:, p]) for p in range(x.shape[1])]
        return np.array([np.mean(values), *values])

    return _halved(planes, a, b, seed)


def _halved(
    statistics: Callable[[np.ndarray, np.ndarray], np.ndarray], a: np.ndarray, b: np.ndarray, seed: int
) -> list[Estimate]:
    n, m = len(a), len(b)
    if n == m:
        return half_samples_of(lambda i: statistics(a[i], b[i]), n, seed=seed)
    few, many = sorted((n, m))
    rng = np.random.default_rng([seed, many])

    def of(i: np.ndarray) -> np.ndarray:
        other = np.arange(many) if len(i) == few else rng.permutation(many)[: many // 2]
        return statistics(a[i], b[other]) if n < m else statistics(a[other], b[i])

    return half_samples_of(of, few, seed=seed)


def _rows(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x.reshape(-1, x.shape[-1])
    if len(x) < 2:
        raise ValueError(f"{name}: wanted features of at least 2 samples, got {len(x)}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: wanted finite features, got NaN or infinity")
    return x


def _factor(x: np.ndarray) -> np.ndarray:
    """R with RᵀR the covariance of the rows of x, as small as that can be."""
    return np.linalg.qr(x - x.mean(0), mode="r") / np.sqrt(len(x) - 1)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
