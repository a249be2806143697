"""upsample_conv3d: doubling of every axis and a 3x3x3 convolution, on x of shape (N, C, X, Y, Z).

Doubled first, then convolved, or folded: the doubled volume is then never written, and 8 multiplications are made
instead of 27. The folded forms are for inference on a CPU; Triton's has gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2ct.kernels.fold import NEAREST, fold
from t2ct.ops import conv_autograd, smooth_conv
from t2ct.ops.conv import autocast, by_triton, check, conv3d, convolve, inference, perhaps_triton
from t2ct.ops.dispatch import Table, choose, forced, is_channels_last, large_pages
from t2ct.ops.resample import upsample

# Folding makes 64 weights of 27, each time anew: not worth it for few voxels.
FOLD_VOXELS = 1024


def _doubled(x: Tensor, weight: Tensor, bias: Tensor | None, mode: str = "nearest") -> Tensor:
    return conv3d(upsample(x, mode), weight, bias)


def _folded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Phase a of an axis: y[2i + a] = w[a][0] x[i - 1 + a] + w[a][1] x[i + a]. One convolution of 2x2x2 taps with
    padding 1 computes all phases at every i from 0 to X; phase a is its part from a on."""
    o = len(weight)
    w = fold(weight, NEAREST).view(8 * o, 2, 2, 2, -1).permute(0, 4, 1, 2, 3)
    phases = convolve(x, w, None if bias is None else bias.repeat(8), 1, 1)
    like = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
    size = [2 * n for n in x.shape[2:]]
    y = large_pages(torch.empty(len(x), o, *size, dtype=x.dtype, device=x.device, memory_format=like))
    for p in range(8):
        a, b, c = p >> 2, p >> 1 & 1, p & 1
        part = (slice(k, k + n) for k, n in zip((a, b, c), x.shape[2:], strict=True))
        y[:, :, a::2, b::2, c::2] = phases[:, p * o : (p + 1) * o][(slice(None), slice(None), *part)]
    return y


UPSAMPLE: Table = {"triton": conv_autograd.upsample_conv3d, "cpu": _folded, "reference": _doubled}
TABLES = {"upsample_conv3d": UPSAMPLE}
NOTES = {  # for explain(); {what} is what runs
    ("upsample_conv3d", "cpu"): f"folded: without gradient, nearest from {FOLD_VOXELS} voxels on, trilinear where "
    "borders are few; else doubled, then conv3d",
}


def upsample_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, mode: str = "nearest") -> Tensor:
    """Doubling of every axis, then a 3x3x3 convolution with padding 1; differentiable.

    x       (N, C, X, Y, Z), floating, any memory format
    weight  (O, C, 3, 3, 3); bias (O,) or None; both in x's dtype and on its device
    mode    "nearest" or "trilinear" (align_corners=False)
    Returns (N, O, 2X, 2Y, 2Z) in x's dtype, in the memory format that the form which ran gives it.
    Raises  ValueError for other shapes, devices and modes; RuntimeError as `conv3d`.

    Folded, each of the eight phases of the result sees x under sums of the 27 weights, and the doubled volume is never
    written: nearest takes 8 multiplications instead of 27. So does trilinear on a CPU, which is nearest and then a
    smoothing that commutes with the convolution (`t2ct.ops.smooth_conv`); Triton's trilinear form takes 27.
    """
    check("upsample_conv3d", x, weight, bias)
    if tuple(weight.shape[2:]) != (3, 3, 3):
        raise ValueError(f"upsample_conv3d: weight must be (O, C, 3, 3, 3), got {tuple(weight.shape)}")
    if mode not in ("nearest", "trilinear"):
        raise ValueError(f'upsample_conv3d: mode must be "nearest" or "trilinear", got {mode!r}')
    if perhaps_triton(x):
        x, weight, bias = autocast(x, weight, bias)
        if by_triton("upsample_conv3d", x, weight):
            return conv_autograd.upsample_conv3d(x, weight, bias, mode)
    if x.device.type == "cpu" and forced() not in UPSAMPLE.keys() - {"cpu"} and inference(x, weight, bias):
        if mode == "trilinear":
            refused = smooth_conv.refusal(x, len(weight))
            if refused is None:
                return torch.cat([smooth_conv.whole(part, weight, bias) for part in x.split(1)])
        elif forced() == "cpu":
            return choose("upsample_conv3d", UPSAMPLE, x)[1](x, weight, bias)
        elif x.shape[2:].numel() >= FOLD_VOXELS:
            return _folded(x, weight, bias)
    return _doubled(x, weight, bias, mode)
