"""The published system's way to decode large latents: overlapping windows, blended. Kept for comparison: it is not the
network's own function, since every GroupNorm sees its window alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from t2ct.stream import enough_bytes, parse_bytes

ROI, OVERLAP = (80, 80, 80), 0.4  # latent voxels and share, as the published code decodes
SIGMA = 0.125  # of the Gaussian that blends windows, in windows


def starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of the windows along an axis: (1 - overlap) of a window apart, the last against the end."""
    if window >= size:
        return [0]
    step = max(1, int(window * (1 - overlap)))
    count = math.ceil((size - window) / step) + 1
    return [min(i * step, size - window) for i in range(count)]


def importance(window: Sequence[int]) -> Tensor:
    """(X, Y, Z) float32: the product of a Gaussian along each axis, nowhere below a thousandth of its largest."""
    axes = []
    for n in window:
        x = torch.arange(n, dtype=torch.float32) - (n - 1) / 2
        axes.append(torch.exp(-(x**2) / (2 * (SIGMA * n) ** 2)))
    blend = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    return blend.clamp(min=max(float(blend[blend > 0].min()), 1e-3))


def window_room(memory_budget: str | float, z: Tensor, factor: int) -> int:
    """What is left of a budget for one window beside the sums, weights and result of all of them. ValueError."""
    voxels, batch = factor**3 * z[0, 0].numel(), len(z)
    beside = voxels * (2 * 4 * batch + 4 + z.itemsize * batch)
    room = parse_bytes(memory_budget) - beside
    if room < 1:
        told = f"wanted more than {enough_bytes(beside)} for the sums of windows, got {memory_budget!r}"
        raise ValueError(f"memory_budget: {told}")
    return room


def decode_windows(
    decode: Callable[[Tensor], Tensor],
    z: Tensor,
    factor: int,
    roi: Sequence[int] = ROI,
    overlap: float = OVERLAP,
) -> Tensor:
    """Every window of z (B, C, X, Y, Z) decoded by itself, the results averaged with Gaussian weights.

    decode: latents -> volumes `factor` times as large. Returns (B, 1, factor X, …), float32 sums in z's dtype. A latent
    that is smaller than `roi` along an axis is one window there.
    """
    size = tuple(z.shape[2:])
    window = [min(r, n) for r, n in zip(roi, size, strict=True)]
    blend = importance(window).to(z.device)
    for axis in range(3):  # the published inferer makes its weights for latents, and repeats them
        blend = blend.repeat_interleave(factor, axis)
    total = torch.zeros(z.shape[0], 1, *(factor * n for n in size), device=z.device)
    weight = torch.zeros(total.shape[2:], device=z.device)
    for corner in product(*(starts(n, w, overlap) for n, w in zip(size, window, strict=True))):
        low = tuple(slice(a, a + w) for a, w in zip(corner, window, strict=True))
        high = tuple(slice(factor * a, factor * (a + w)) for a, w in zip(corner, window, strict=True))
        total[(..., *high)] += blend * decode(z[(..., *low)]).float()  # type: ignore[index]
        weight[high] += blend
    return (total / weight).to(z.dtype)
