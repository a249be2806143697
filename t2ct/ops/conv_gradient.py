"""The gradient of a 3x3x3 convolution with padding 1 on a CPU, where torch's own way is slow.

Few voxels under many weights: matrix products, which read or write the weights once; torch reorders them several times.
A single small float32 volume: oneDNN, which torch asks for batches alone
(else it writes every voxel 27 times); two halves of the volume are a batch. benchmarks/bench_training.py measures it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.ops import conv_cpu
from t2ct.ops.conv_cpu import MANY_WEIGHTS, TORCH_SMALL
from t2ct.ops.dispatch import EMULATED, channels_last, forced, large_pages, watched, why_not

FEW = 64  # voxels
NARROW = 2
Gradients = tuple[Tensor | None, Tensor | None]
ONES = [1, 1, 1]


def few(x: Tensor, weight: Tensor) -> bool:
    """Are x (N, C, X, Y, Z) so few voxels under so many weights that matrix products pay?"""
    plain = x.device.type == "cpu" and weight.dtype is torch.float32 and weight.is_contiguous() and forced() is None
    return plain and len(x) * x.shape[2:].numel() <= FEW and weight.numel() >= MANY_WEIGHTS


def forward_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution itself, in float32, channels-last."""
    y = _product(_columns(x), weight.flatten(1))
    y = y if bias is None else y.add_(bias)
    return y.view(len(x), *x.shape[2:], -1).movedim(-1, 1)


def backward_few(dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> Gradients:
    """Gradients of x and of the weight, in float32: to convert the weights would take as long as the products."""
    rows, dx, dw = dy.float().movedim(1, -1).flatten(0, 3), None, None
    if wanted[1]:
        dw = _product(rows.T, _columns(x).T).view(weight.shape)
    if wanted[0]:
        n, c, *size = x.shape
        taps = _product(rows, weight.flatten(1).T).view(-1, c, 27)
        taps = taps.permute(2, 0, 1).contiguous().view(27, n, *size, c)
        padded = taps.new_zeros(n, *(m + 2 for m in size), c)
        for i, tap in enumerate(taps):
            at = [slice(k, k + m) for k, m in zip((i // 9, i // 3 % 3, i % 3), size, strict=True)]
            padded[:, at[0], at[1], at[2]] += tap
        dx = padded[:, 1:-1, 1:-1, 1:-1].movedim(-1, 1)
    return dx, dw


def _columns(x: Tensor) -> Tensor:
    """What the 27 taps see of every channel: (voxels, C * 27) float32."""
    seen = F.pad(x.float(), (1,) * 6).unfold(2, 3, 1).unfold(3, 3, 1).unfold(4, 3, 1)
    return seen.permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(-1, x.shape[1] * 27)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) times b (N, K) transposed, float32, by oneDNN: of few rows MKL, which torch asks, takes a multiple."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "") if _onednn() else a @ b.T


def _onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)


def narrow(x: Tensor, size: Iterable[int]) -> bool:
    """Is a result of `size` voxels so narrow that oneDNN's bfloat16 gradient of the weight is wrong? It is up to two
    voxels (torch 2.13 on AVX512-BF16: numbers up to 1e36), and right from three on."""
    return x.device.type == "cpu" and min(size) <= NARROW


def in_float32(x: Tensor, size: Iterable[int]) -> bool:
    """Is the gradient of a convolution of x, in bfloat16 or float16, with a result of `size` voxels made in float32?"""
    return narrow(x, size) or (x.device.type == "cpu" and x.dtype in EMULATED)


def backward(dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> Gradients:
    """Gradients of x and of the weight, all of one dtype, by torch; a single small volume in two halves. That of x is a
    convolution of dy, which Winograd's form computes where it is faster."""
    if wanted[0] and _filtered(dy, weight):
        dx = conv_cpu.winograd(channels_last(dy), weight.flip(2, 3, 4).transpose(0, 1), None, 1)
        return dx, backward(dy, x, weight, (False, True))[1] if wanted[1] else None
    if dy.itemsize < 4 and in_float32(dy, dy.shape[2:]):
        made = _torch(dy.float(), x.float(), weight.float(), 1, wanted)
        return None if made[0] is None else made[0].to(x.dtype), None if made[1] is None else made[1].to(weight.dtype)
    if not _halves(x):
        return _torch(dy, x, weight, 1, wanted)
    h = x.shape[2] // 2  # each half with the planes beside it, so that it needs no padding along X
    padded = F.pad(x, (0, 0, 0, 0, 1, 1))
    pair = channels_last(torch.cat((padded[:, :, : h + 2], padded[:, :, h:])))
    dpair, dw = _torch(channels_last(torch.cat(dy.split(h, 2))), pair, weight, 0, wanted)
    if dpair is None:
        return None, dw
    dx = large_pages(torch.empty_like(x, memory_format=torch.channels_last_3d))
    dx[:, :, :h], dx[:, :, h:] = dpair[0, :, 1 : h + 1], dpair[1, :, 1 : h + 1]
    dx[:, :, h] += dpair[0, :, h + 1]
    dx[:, :, h - 1] += dpair[1, :, 0]
    return dx, dw


def _filtered(dy: Tensor, weight: Tensor) -> bool:
    plain = dy.device.type == "cpu" and weight.shape[2:].numel() == 27 and forced() in (None, "cpu") and not watched(dy)
    n, o, *size = dy.shape
    served = plain and conv_cpu.filters(o, weight.shape[1], (n * size[0], *size[1:]), dy.dtype)
    return served and why_not("cpu", "cpu", dy.dtype) is None


def _halves(x: Tensor) -> bool:
    small = len(x) == 1 and x.shape[:4].numel() <= TORCH_SMALL and x.shape[2] % 2 == 0 and x.shape[2:].numel() > 2 * FEW
    return x.device.type == "cpu" and x.dtype is torch.float32 and small and _onednn()


def _torch(dy: Tensor, x: Tensor, weight: Tensor, padding: int, wanted: tuple[bool, bool]) -> Gradients:
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, ONES, [padding, 1, 1], ONES, False, [0, 0, 0], 1, [*wanted, False]
    )[:2]
