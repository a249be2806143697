"""Cutting patches and changing them as a scanner, a patient on the table and a window might."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ANGLE, ZOOM, SCALE, SHIFT = math.pi / 12, 0.1, 0.1, 0.05  # at most; radians, shares, and a share of the window


def cut(hu: np.ndarray, size: tuple[int, int, int], rng: torch.Generator | None) -> np.ndarray:
    """A patch of `size` voxels of hu (…, X, Y, Z): anywhere, or without rng the middle one."""
    corners = []
    for n, p in zip(hu.shape[-3:], size, strict=True):
        room = n - p
        corners.append(room // 2 if rng is None else int(torch.randint(room + 1, (1,), generator=rng)))
    x, y, z = (slice(c, c + p) for c, p in zip(corners, size, strict=True))
    return np.ascontiguousarray(hu[..., x, y, z])


def augment(x: Tensor, rng: torch.Generator) -> Tensor:
    """x (1, X, Y, Z) in [0, 1]: flips, quarter turns of the axial plane, a small turn and zoom, brightness, contrast.

    As MAISI's recipe has them, each drawn from rng alone.
    """
    u = torch.rand(12, generator=rng).tolist()
    x = x.flip([d for d in (1, 2, 3) if u[d] < 0.5])
    if x.shape[1] == x.shape[2]:
        x = torch.rot90(x, int(u[4] * 4), (1, 2))
    if u[5] < 0.3:
        angle, zoom = ANGLE * (2 * u[6] - 1), 1 + ZOOM * (2 * u[7] - 1)
        c, s = math.cos(angle) / zoom, math.sin(angle) / zoom
        turn = torch.tensor([[1 / zoom, 0, 0, 0], [0, c, -s, 0], [0, s, c, 0]])  # grid_sample's order is (Z, Y, X)
        grid = F.affine_grid(turn[None], [1, *x.shape], align_corners=False)
        x = F.grid_sample(x[None], grid, padding_mode="border", align_corners=False)[0]
    if u[8] < 0.3:
        x = (x * (1 + SCALE * (2 * u[9] - 1)) + SHIFT * (2 * u[10] - 1)).clamp(0, 1)
    return x.contiguous()
