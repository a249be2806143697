"""A figure with its interval: the bootstrap over volumes, and half-samples where the bootstrap would mislead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Statistic = Callable[[np.ndarray], float]  # of the volumes with these indices

REPEATS, HALVES, LEVEL = 1000, 50, 0.95


@dataclass(frozen=True)
class Estimate:
    """A value, the limits of its 95 % interval, and the number of volumes (or queries) that it rests on.

    A limit is NaN where no interval could be computed.
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: what is not finite is None."""
        plain = {"value": float(self.value), "low": float(self.low), "high": float(self.high)}
        return {k: v if np.isfinite(v) else None for k, v in plain.items()} | {"n": int(self.n)}

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return "not measurable"
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if np.isfinite(self.low) else "")


def bootstrap(statistic: Statistic, n: int, repeats: int = REPEATS, seed: int = 0) -> Estimate:
    """`statistic` of all `n` volumes, and its percentile interval over resamples with replacement (Efron 1979).

    A resample in which the statistic is NaN (it happened to hold no positive case) is left out. Fewer than two
    volumes: no interval.
    """
    return bootstrap_of(lambda i: np.array([statistic(i)]), n, repeats, seed)[0]


def bootstrap_of(
    statistics: Callable[[np.ndarray], np.ndarray], n: int, repeats: int = REPEATS, seed: int = 0
) -> list[Estimate]:
    """`bootstrap` of several statistics (S,) that are computed together, of the same resamples."""
    values = np.asarray(statistics(np.arange(n)), float)
    rng = np.random.default_rng([seed, n])
    some = n > 1 and np.isfinite(values).any()
    drawn = np.array([statistics(rng.integers(n, size=n)) for _ in range(repeats if some else 0)], float)
    return [
        Estimate(float(v), *_percentiles(drawn[:, k] if some and np.isfinite(v) else drawn[:0]), n)
        for k, v in enumerate(values)
    ]


def mean(values: np.ndarray, repeats: int = REPEATS, seed: int = 0) -> Estimate:
    """Mean of `values` (N,) with its bootstrap interval."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return Estimate(float(values.mean()) if n else float("nan"), float("nan"), float("nan"), n)
    rng = np.random.default_rng([seed, n])
    means = np.concatenate([values[rng.integers(n, size=(50, n))].mean(1) for _ in range(-(-repeats // 50))])
    return Estimate(float(values.mean()), *_percentiles(means[:repeats]), n)


def half_samples(statistic: Statistic, n: int, halves: int = HALVES, seed: int = 0) -> Estimate:
    """`statistic` of all `n` volumes, with a normal interval from random halves without replacement.

    For distances between distributions: a resample with replacement holds copies, and a set with copies is further
    from any other set than the set itself, so the bootstrap's interval may not even contain the value. The variance
    over halves estimates that of the whole (the delete-d jackknife at d = n/2, Shao and Wu 1989). Fewer than eight
    volumes: no interval.
    """
    return half_samples_of(lambda i: np.array([statistic(i)]), n, halves, seed)[0]


def half_samples_of(
    statistics: Callable[[np.ndarray], np.ndarray], n: int, halves: int = HALVES, seed: int = 0
) -> list[Estimate]:
    """`half_samples` of several statistics (S,) that are computed together."""
    values = np.asarray(statistics(np.arange(n)), float)
    reach = np.full(len(values), np.nan)
    if n >= 8 and np.isfinite(values).all():
        rng = np.random.default_rng([seed, n])
        drawn = np.array([statistics(rng.permutation(n)[: n // 2]) for _ in range(halves)])
        reach = 1.96 * drawn.std(0, ddof=1)
    return [Estimate(float(v), float(v - r), float(v + r), n) for v, r in zip(values, reach, strict=True)]


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
