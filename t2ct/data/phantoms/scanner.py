"""What a scanner makes of the tissue: slice thickness, point spread, noise."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.canvas import Array


def _smooth(volume: Array, axis: int, sigma: float) -> Array:
    """Three-tap smoothing by `sigma` voxels (at most one), edges repeated."""
    side = np.float32(min(0.5 * sigma * sigma, 0.25))
    if side < 0.01:
        return volume
    v = np.moveaxis(volume, axis, 0)
    out = v * (1 - 2 * side)
    out[1:] += side * v[:-1]
    out[:-1] += side * v[1:]
    out[0] += side * v[0]
    out[-1] += side * v[-1]
    return np.moveaxis(out, 0, axis)


def scan(hu: Array, spacing: tuple[float, float, float], rng: np.random.Generator) -> Array:
    """(X, Y, Z) float32 HU of tissue -> int16 HU as scanned, in [-1024, 3071].

    Draws the point spread (standard deviation 0.6-1.6 mm in the slice), the slice profile (1-6 mm) and a noise of
    8-24 HU in a 38 mm^3 voxel, which averages down in larger voxels.
    """
    blur = float(rng.uniform(0.6, 1.6))
    slab = float(rng.uniform(1.0, 6.0)) / 2.355
    noise = float(rng.uniform(8, 24))
    for axis, sigma in ((0, blur), (1, blur), (2, slab)):
        hu = _smooth(hu, axis, sigma / spacing[axis])
    scale = noise * float(np.clip(np.sqrt(2.75 * 2.75 * 5 / np.prod(spacing)), 0.2, 3.0))
    grain = rng.standard_normal(hu.shape, dtype=np.float32)
    grain = _smooth(_smooth(grain, 0, 0.45), 1, 0.45)
    # Shoulders and the upper abdomen let fewer photons through.
    profile = 1 + 0.35 * np.linspace(-1, 1, hu.shape[2], dtype=np.float32) ** 2
    hu = hu + grain * (profile * np.float32(scale * 1.25))
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
