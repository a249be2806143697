"""conv3d and upsample_conv3d on x of shape (N, C, X, Y, Z).

Gradients, compilation and whatever no kernel here serves are torch's own convolution; the faster forms are for
inference on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.ops import conv_cpu
from t2ct.ops.dispatch import choose, forced, is_channels_last, watched

# csrc reads a convolution's weights once where oneDNN, which reorders them, moves them three times; that pays where
# there are many weights and few voxels (benchmarks/bench_conv.py).
SMALL_VOXELS, MANY_WEIGHTS = 512, 400_000
# Folding makes 64 weights of 27, each time anew: not worth it for few voxels.
FOLD_VOXELS = 1024


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(x, weight, bias, padding=1)


CONV = {"cpu": conv_cpu.conv3d, "reference": _reference}
TABLES = {"conv3d": CONV}
LIMITS = {("conv3d", "cpu"): f", without gradient up to {SMALL_VOXELS} voxels; beyond them plain torch"}


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 1) -> Tensor:
    """Convolution, differentiable.

    x       (N, C, X, Y, Z), floating, any memory format
    weight  (O, C, K, K, K); bias (O,) or None; both in x's dtype
    Returns (N, O, X', Y', Z') in x's dtype, channels-last where x is. Raises ValueError for other shapes; RuntimeError
            from torch for mixed dtypes or devices.
    """
    _check("conv3d", x, weight, bias)
    if _small(x, weight, bias, stride, padding):
        return choose("conv3d", CONV, x)[1](x, weight, bias)
    return F.conv3d(x, weight, bias, stride, padding)


def upsample_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nearest-neighbour doubling of every axis, then a 3x3x3 convolution with padding 1; differentiable.

    x       (N, C, X, Y, Z), floating, any memory format
    weight  (O, C, 3, 3, 3); bias (O,) or None; both in x's dtype
    Returns (N, O, 2X, 2Y, 2Z) in x's dtype, channels-last where x is. Raises ValueError for other shapes.

    For inference on a CPU the two are folded: each of the eight phases of the result sees 2x2x2 voxels of x under sums
    of the 27 weights, 8 multiplications instead of 27, and the doubled volume is never written.
    """
    _check("upsample_conv3d", x, weight, bias)
    if tuple(weight.shape[2:]) != (3, 3, 3):
        raise ValueError(f"upsample_conv3d: weight must be (O, C, 3, 3, 3), got {tuple(weight.shape)}")
    if _inference(x, weight, bias) and x.device.type == "cpu" and forced() != "reference":
        if x.shape[2:].numel() >= FOLD_VOXELS:
            return _folded(x, weight, bias)
    return conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias)


def _folded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Phase a of an axis: y[2i + a] = w[a][0] x[i - 1 + a] + w[a][1] x[i + a]. One convolution of 2x2x2 taps with
    padding 1 computes all phases at every i from 0 to X; phase a is its part from a on."""
    o, channels = weight.shape[:2]
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis in (2, 4, 6):  # after each turn the axis is (phase, tap)
        first, middle, last = w.unbind(axis)
        w = torch.stack((torch.stack((first, middle + last), axis), torch.stack((first + middle, last), axis)), axis)
    w = w.permute(2, 4, 6, 0, 1, 3, 5, 7).reshape(8 * o, channels, 2, 2, 2).to(weight.dtype)
    phases = F.conv3d(x, w, None if bias is None else bias.repeat(8), padding=1)
    like = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
    y = torch.empty(len(x), o, *(2 * n for n in x.shape[2:]), dtype=x.dtype, memory_format=like)
    for p in range(8):
        at = (p >> 2, p >> 1 & 1, p & 1)
        part = tuple(slice(a, a + n) for a, n in zip(at, x.shape[2:], strict=True))
        a, b, c = at
        y[:, :, a::2, b::2, c::2] = phases[:, p * o : (p + 1) * o, part[0], part[1], part[2]]
    return y


def _inference(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if watched(x) or torch.is_autocast_enabled(x.device.type):
        return False
    learns = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return not (torch.is_grad_enabled() and learns)


def _small(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> bool:
    """May a kernel of the table run? What it does not do at all goes to torch even where it is forced."""
    if tuple(weight.shape[2:]) != (3, 3, 3) or (stride, padding) != (1, 1) or not _inference(x, weight, bias):
        return False
    if weight.dtype != x.dtype or not weight.is_contiguous() or (bias is not None and bias.dtype != x.dtype):
        return False
    if forced() in CONV:
        return True
    voxels = x.shape[0] * x.shape[2:].numel()
    return voxels <= SMALL_VOXELS and weight.numel() >= MANY_WEIGHTS and conv_cpu.takes(x)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() != 5 or not x.numel() or not x.is_floating_point():
        raise ValueError(f"{op}: x must be non-empty, floating (N, C, X, Y, Z), got {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 5 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight must be (O, {x.shape[1]}, K, K, K), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
