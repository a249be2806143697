"""The grid on which volumes are measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MEASURED_AT = (5.5, 5.5, 10.0)  # mm


def shares(fine: int, coarse: int) -> np.ndarray:
    """(coarse, fine) matrix whose row i holds the share of every fine cell in coarse cell i, both covering the same."""
    edges = np.arange(coarse + 1) * (fine / coarse)
    cells = np.arange(fine)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return np.clip(overlap, 0, None) * (coarse / fine)


def coarsen(hu: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, tuple[float, ...]]:
    """A volume (X, Y, Z) and its spacing in mm -> float32 HU averaged over the cells of a grid of about `MEASURED_AT`
    that covers the same field, and that grid's spacing. A grid as coarse already is returned as it is."""
    hu = np.asarray(hu, np.float32)
    new = []
    for axis, (n, mm, wanted) in enumerate(zip(hu.shape, spacing, MEASURED_AT, strict=True)):
        m = min(n, max(1, round(n * mm / wanted)))
        if m < n:
            hu = np.moveaxis(np.tensordot(shares(n, m).astype(np.float32), hu, (1, axis)), 0, axis)
        new.append(mm * n / m)
    return hu, tuple(new)
