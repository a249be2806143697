"""Secondary pulmonary lobules: polyhedra of one to two centimetres with septa between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from t2ct.data.phantoms.canvas import Array, f32
from t2ct.data.phantoms.findings.base import Scene


@dataclass
class Lobules:
    """Cells of the nearest of many seeds (Worley 1996). nearest, second: squared mm; value: of the nearest seed."""

    pitch: float
    nearest: Array
    second: Array
    value: Array

    def septum(self) -> Array:
        """Distance (mm, about) to the wall of the cell."""
        return (self.second - self.nearest) * np.float32(0.5 / self.pitch)


def lobules(scene: Scene, pitch: float, rng: np.random.Generator, patch: float = 45.0) -> Lobules:
    """Lobules of about `pitch` mm all over the lungs.

    `value` has unit variance, varies from lobule to lobule and, more, over `patch` mm."""
    canvas, a = scene.canvas, scene.anatomy
    grid = [np.arange(low, high, pitch) for low, high in ((-140, 140), (-125, 120), (-160, 135))]
    seeds = np.stack(np.meshgrid(*grid, indexing="ij"), -1).reshape(-1, 3)
    seeds[:, 0] += np.where(np.rint(seeds[:, 2] / pitch) % 2, pitch / 2, 0)
    seeds = f32(seeds + rng.uniform(-0.42, 0.42, seeds.shape) * pitch)
    waves = rng.normal(0, 1, (6, 3)) * (2 * np.pi / patch / 1.7)
    smooth = np.sin(seeds @ f32(waves).T + f32(rng.uniform(0, 6.28, 6))).sum(1) / np.sqrt(3)
    value = f32(0.85 * smooth + 0.53 * rng.normal(0, 1, len(seeds)))
    keep = a.lungs(*seeds.T) < pitch
    seeds, value = canvas.frame.to_scanner(seeds[keep]), value[keep]
    nearest = np.full(canvas.size, 1e6, np.float32)
    second, which = nearest.copy(), np.zeros(canvas.size, np.float32)
    reach = np.float32(1.45 * pitch)
    first = np.floor((seeds - reach - canvas.origin) / canvas.spacing).astype(int)
    last = np.ceil((seeds + reach - canvas.origin) / canvas.spacing).astype(int) + 1
    first, last = np.clip(first, 0, canvas.size), np.clip(last, 0, canvas.size)
    gx, gy, gz = canvas.axes
    for c, v, (i, j, k), (ii, jj, kk) in zip(seeds, value, first.tolist(), last.tolist(), strict=True):
        if i >= ii or j >= jj or k >= kk:
            continue
        box = (slice(i, ii), slice(j, jj), slice(k, kk))
        near, next_ = nearest[box], second[box]
        flat = (gx[i:ii, None] - c[0]) ** 2 + (gy[None, j:jj] - c[1]) ** 2
        d = flat[:, :, None] + (gz[k:kk] - c[2]) ** 2
        np.minimum(next_, np.maximum(near, d), out=next_)
        np.copyto(which[box], v, where=d < near)
        np.minimum(near, d, out=near)
    return Lobules(pitch, nearest, second, which)
