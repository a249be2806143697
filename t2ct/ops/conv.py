"""conv3d on x of shape (N, C, X, Y, Z).

Triton's forms have gradients and run where they are forced or, once measured, preferred. The other fast forms are for
inference on a CPU; gradients, compilation, autocast and shapes that they do not serve are torch's own convolution. A
forced form that cannot run raises.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.ops import conv_autograd, conv_cpu, conv_gradient
from t2ct.ops.conv_cpu import MANY_WEIGHTS, TORCH_SMALL
from t2ct.ops.dispatch import (
    EMULATED,
    Table,
    candidates,
    choose,
    forced,
    is_channels_last,
    refusal,
    watched,
    why_not,
)

MKLDNN = torch.backends.mkldnn.is_available()
Padding = int | tuple[int, int, int]


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(x, weight, bias, padding=1)


CONV: Table = {"triton": conv_autograd.conv3d, "cpu": conv_cpu.conv3d, "reference": _reference}
TABLES = {"conv3d": CONV}
NOTES = {  # for explain(); {what} is what runs
    ("conv3d", "cpu"): "{what}: 3x3x3 without gradient, by Winograd's filtering in float32; of at most "
    f"{conv_cpu.fast_voxels()} voxels (in bfloat16 {conv_cpu.FAST_BFLOAT16} under fewer than "
    f"{conv_cpu.VERY_MANY_WEIGHTS:,} weights) and at least {MANY_WEIGHTS:,} weights, or to at most "
    f"{conv_cpu.NARROW} outputs, "
    "directly; else torch's",
}


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: Padding = 1,
           residual: Tensor | None = None, *, channel_bias: Tensor | None = None) -> Tensor:
    """Convolution [+ channel_bias] [+ residual], differentiable.

    x            (N, C, X, Y, Z), floating, any memory format
    weight       (O, C, K, K, K); bias (O,) or None; both in x's dtype and on its device
    padding      zeros around x, of all axes or of each
    residual     like the result, added; channel_bias (N, O), added at every voxel
    Returns      (N, O, X', Y', Z') in x's dtype, in the memory format that the form which ran gives it.
    Raises       ValueError for other shapes and devices; RuntimeError for mixed dtypes (torch's own) and for a forced
                 backend that cannot run.
    """
    check("conv3d", x, weight, bias, residual, channel_bias, stride, padding)
    if perhaps_triton(x):
        x, weight, bias, residual, channel_bias = autocast(x, weight, bias, residual, channel_bias)
        if by_triton("conv3d", x, weight, stride):
            if isinstance(padding, int):
                return conv_autograd.conv3d(x, weight, bias, residual, channel_bias, stride, padding)
            return _cropped(x, weight, bias, residual, channel_bias, stride, padding)
    pads = (padding,) * 3 if isinstance(padding, int) else padding
    if _filtered(x, weight, bias, stride, pads, residual, channel_bias):
        return conv_cpu.winograd(x, weight, bias, pads[0], residual, channel_bias)
    y = convolve(x, weight, bias, stride, padding)
    if channel_bias is not None:
        y += channel_bias[:, :, None, None, None]  # in place: no gradient needs a convolution's output
    if residual is not None:
        y += residual
    return y


def _cropped(x, weight, bias, residual, channel_bias, stride, padding):
    """Triton's kernel pads every axis alike: the planes that this makes too many are cut off."""
    if stride != 1:
        raise RuntimeError(f"conv3d: backend 'triton' cannot run: it pads axes unlike {padding} with stride 1 only")
    most = max(padding)
    y = conv_autograd.conv3d(x, weight, bias, None, channel_bias, 1, most)
    for axis, p in enumerate(padding, 2):
        y = y.narrow(axis, most - p, y.shape[axis] - 2 * (most - p))
    return y if residual is None else y + residual


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: Padding) -> Tensor:
    pads = (padding,) * 3 if isinstance(padding, int) else padding
    if _narrow(x, weight, bias, stride, pads):
        return conv_cpu.narrow(x, weight, bias, pads)
    if inference(x, weight, bias) and tuple(weight.shape[2:]) == (3, 3, 3) and (stride, padding) == (1, 1):
        voxels = x.shape[0] * x.shape[2:].numel()
        pays = conv_cpu.few(voxels, weight.numel(), x.dtype) and weight.is_contiguous()
        if forced() == "cpu" or (forced() not in CONV and pays and conv_cpu.refusal(x) is None):
            return choose("conv3d", {"cpu": CONV["cpu"]}, x)[1](x, weight, bias)
    if _onednn(x, weight):
        return torch.mkldnn_convolution(x, weight, bias, pads, (stride,) * 3, (1, 1, 1), 1)
    if x.device.type == "cpu":
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if x.dtype != torch.float64 and (low in EMULATED or _wrong(low, x, weight, stride, pads)):
            with torch.autocast("cpu", enabled=False):  # once more from above, where float32 has faster forms
                bias = None if bias is None else bias.float()
                return convolve(x.float(), weight.float(), bias, stride, padding).to(low)
    return F.conv3d(x, weight, bias, stride, padding)


def _wrong(low: torch.dtype, x: Tensor, weight: Tensor, stride: int, pads: tuple[int, int, int]) -> bool:
    """Would the gradient of the weight be wrong? See conv_gradient.narrow."""
    if not (torch.is_grad_enabled() and weight.requires_grad) or max(weight.shape[2:]) == 1 or watched(x):
        return False
    axes = zip(x.shape[2:], weight.shape[2:], pads, strict=True)
    return low is torch.bfloat16 and conv_gradient.narrow(x, [(n + 2 * p - k) // stride + 1 for n, k, p in axes])


def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, pads: tuple[int, int, int]) -> bool:
    """Few outputs without gradient on a CPU, and no other backend forced."""
    few = len(weight) <= conv_cpu.NARROW and tuple(weight.shape[2:]) == (3, 3, 3) and stride == 1
    if not few or forced() in CONV.keys() - {"cpu"} or not inference(x, weight, bias):
        return False
    return conv_cpu.narrow_refusal(x, pads) is None


def _filtered(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, pads: tuple[int, int, int],
              *added: Tensor | None) -> bool:
    """Does Winograd's form run? Without gradient on a CPU, where no other backend is forced."""
    plain = (tuple(weight.shape[2:]), stride, pads[1:]) == ((3, 3, 3), 1, (1, 1)) and pads[0] in (0, 1)
    if not plain or forced() in CONV.keys() - {"cpu"} or not inference(x, weight, bias, *added):
        return False
    size = (x.shape[2] + 2 * pads[0] - 2, *x.shape[3:])
    served = size[0] > 0 and conv_cpu.filters(x.shape[1], len(weight), (len(x) * size[0], *size[1:]), x.dtype)
    return served and why_not("cpu", x.device.type, x.dtype, is_channels_last(x)) is None


def _onednn(x: Tensor, weight: Tensor) -> bool:
    """Where torch takes a float32 volume for too small for oneDNN it writes every voxel 27 times and multiplies
    matrices: several times slower (benchmarks/bench_conv.py), and 27 times the memory. Few voxels under many weights
    alone are better off so."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or watched(x) or torch.is_autocast_enabled("cpu"):
        return False
    small = x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3] <= TORCH_SMALL
    few = x.shape[0] * x.shape[2:].numel() <= conv_cpu.FAST_VOXELS["avx2"] and weight.numel() >= MANY_WEIGHTS
    return bool(small and not few and weight.dtype == x.dtype and torch.backends.mkldnn.enabled and MKLDNN)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of the autocast region, where there is one: as torch casts for its own convolutions."""
    kind = next(t.device.type for t in tensors if t is not None)
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def perhaps_triton(x: Tensor) -> bool:
    return x.device.type == "cuda" or forced() == "triton"


def by_triton(op: str, x: Tensor, weight: Tensor, stride: int = 1) -> bool:
    """Does Triton's kernel run? Where it is forced and cannot, RuntimeError says why."""
    if "triton" not in candidates(CONV) or weight.dtype != x.dtype:  # mixed dtypes: torch's own error
        return False
    reason = refusal("triton", x)
    if reason is None and (weight.shape[2:].numel(), stride) not in ((1, 1), (27, 1), (27, 2)):
        reason = f"it has 3x3x3 of stride 1 and 2, and 1x1x1, not {tuple(weight.shape[2:])} of stride {stride}"
    if reason is not None and forced() == "triton":
        raise RuntimeError(f"{op}: backend 'triton' cannot run: {reason}")
    return reason is None


def inference(x: Tensor, *others: Tensor | None) -> bool:
    """Plain tensors of one dtype, which nothing watches and no gradient wants."""
    tensors = [x, *(t for t in others if t is not None)]
    if any(watched(t) or t.dtype != x.dtype or t.is_neg() for t in tensors):
        return False
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not learns and not torch.is_autocast_enabled(x.device.type)


def check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None,
          channel_bias: Tensor | None = None, stride: int = 1, padding: Padding = 1) -> None:
    """ValueError unless the shapes and devices of a convolution's arguments fit."""
    if x.dim() != 5 or not x.numel() or not x.is_floating_point():
        raise ValueError(f"{op}: x must be non-empty, floating (N, C, X, Y, Z), got {tuple(x.shape)} {x.dtype}")
    if weight.dim() != 5 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight must be (O, {x.shape[1]}, K, K, K), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if channel_bias is not None and channel_bias.shape != (len(x), len(weight)):
        raise ValueError(f"{op}: channel_bias must be ({len(x)}, {len(weight)}), got {tuple(channel_bias.shape)}")
    if residual is not None:
        pads = (padding,) * 3 if isinstance(padding, int) else padding
        axes = zip(x.shape[2:], weight.shape[2:], pads, strict=True)
        size = ((m + 2 * p - k) // stride + 1 for m, k, p in axes)
        wanted = (len(x), len(weight), *size)
        if residual.shape != wanted:
            raise ValueError(f"{op}: residual must be {wanted}, got {tuple(residual.shape)}")
    for name, t in (("weight", weight), ("bias", bias), ("residual", residual), ("channel_bias", channel_bias)):
        if t is not None and t.device != x.device:  # torch would take a meta weight and make up numbers
            raise ValueError(f"{op}: {name} must be on {x.device}, got {t.device}")
