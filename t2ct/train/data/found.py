"""Findings that count for more than their few voxels, where it is known which voxels they are."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms import LABELS


def finding_weights(cells: np.ndarray, share: float, most: float) -> np.ndarray:
    """cells (X, Y, Z), a bit for each of `LABELS` that lies there -> (X, Y, Z) float32, weights of errors: 1, and for
    each finding so much more that all of it counts as `share` of the volume, but `most` at most."""
    weights = np.ones(cells.shape, np.float32)
    for bit in range(len(LABELS)):
        inside = cells & cells.dtype.type(1 << bit) != 0
        if count := int(inside.sum()):
            weights[inside] += min(share * cells.size / count, most)
    return weights


def stretched(weights: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of cells of 2^3 voxels -> of the voxels, (X, Y, Z); an odd last plane has 1."""
    made = np.ones(shape, np.float32)
    x, y, z = (2 * n for n in weights.shape)
    made[:x, :y, :z] = weights.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    return made


def coarser(cells: np.ndarray, by: int) -> np.ndarray:
    """cells (X, Y, Z) of bits -> (X/by, Y/by, Z/by) int32: what lies anywhere in the larger cell."""
    x, y, z = (n // by for n in cells.shape)
    blocks = cells[: by * x, : by * y, : by * z].reshape(x, by, y, by, z, by)
    return np.bitwise_or.reduce(blocks, axis=(1, 3, 5)).astype(np.int32)
