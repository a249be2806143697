"""Doubling and halving of channels-last volumes, and their gradients: each a gather of few taps an axis, no atomics."""

import torch
import triton
import triton.language as tl
from t2ct.kernels.plan import interpreted, power
from torch import Tensor

NEAREST, TRILINEAR, SUM, TRILINEAR_GRADIENT = 0, 1, 2, 3
TAPS = {NEAREST: 1, TRILINEAR: 2, SUM: 2, TRILINEAR_GRADIENT: 4}


@triton.jit
def _tap(o, q, size, MODE: tl.constexpr):
    """Where tap q of the result's place o reads along an axis of `size`, and its weight."""
    if MODE == 0:  # nearest doubling
        i, w = o // 2, tl.full(o.shape, 1.0, tl.float32)
    elif MODE == 1:  # 1/4 of one neighbour and 3/4 of the other; the edge goes on outside
        i = tl.minimum(tl.maximum((o + 1) // 2 - 1 + q, 0), size - 1)
        w = tl.where((o + q) % 2 == 0, 0.25, 0.75)
    elif MODE == 2:  # both halves
        i, w = 2 * o + q, tl.full(o.shape, 1.0, tl.float32)
    else:  # the adjoint of mode 1: an edge voxel is also what its neighbours outside stand for
        i = 2 * o - 1 + q
        w = tl.where((q == 1) | (q == 2), 0.75, 0.25)
        w = tl.where(((i == 0) & (o == 0)) | ((i == size - 1) & (2 * o + 2 == size)), 1.0, w)
        w = tl.where((i < 0) | (i >= size), 0.0, w)
        i = tl.minimum(tl.maximum(i, 0), size - 1)
    return i, w


@triton.jit
def resample_kernel(
    x, y, scale, C, D, H, W, YD, YH, YW,
    MODE: tl.constexpr, TAPS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BR voxels by BC channels of y (N, YD, YH, YW, C) from x (N, D, H, W, C); sums in float32."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    sample = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    w, h, d = r % YW, r // YW % YH, r // (YW * YH)
    mask = (d < YD)[:, None] & (c < C)[None, :]
    d = tl.minimum(d, YD - 1)
    acc = tl.zeros((BR, BC), tl.float32)
    for q in range(TAPS * TAPS * TAPS):
        i, a = _tap(d, q // (TAPS * TAPS), D, MODE)
        j, b = _tap(h, q // TAPS % TAPS, H, MODE)
        k, g = _tap(w, q % TAPS, W, MODE)
        at = (((sample * D + i) * H + j) * W + k) * C
        v = tl.load(x + at[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        acc += v * (a * b * g)[:, None]
    at = (sample * YD * YH * YW + r) * C
    tl.store(y + at[:, None] + c[None, :], (acc * scale).to(y.dtype.element_ty), mask=mask)


def _resample(x: Tensor, mode: int, size, scale: float = 1.0) -> Tensor:
    n, c, *spatial = x.shape
    # the interpreter would truncate to bfloat16: it gets float32
    dtype = torch.float32 if interpreted() and x.dtype == torch.bfloat16 else x.dtype
    y = torch.empty(n, c, *size, dtype=dtype, device=x.device, memory_format=torch.channels_last_3d)
    bc = power(c, 1, 64)
    br = 4096 // bc if interpreted() else max(1, 2048 // bc)
    grid = triton.cdiv(size[0] * size[1] * size[2], br), triton.cdiv(c, bc), n
    resample_kernel[grid](x, y, scale, c, *spatial, *size, MODE=mode, TAPS=TAPS[mode], BR=br, BC=bc, num_warps=4)
    return y.to(x.dtype)


def upsample(x: Tensor, mode: str) -> Tensor:
    """(N, C, X, Y, Z) channels-last -> (N, C, 2X, 2Y, 2Z); "nearest", or "trilinear" with align_corners=False."""
    return _resample(x, NEAREST if mode == "nearest" else TRILINEAR, [2 * m for m in x.shape[2:]])


def upsample_backward(dy: Tensor, mode: str) -> Tensor:
    return _resample(dy, SUM if mode == "nearest" else TRILINEAR_GRADIENT, [m // 2 for m in dy.shape[2:]])


def average_pool(x: Tensor) -> Tensor:
    """(N, C, X, Y, Z) channels-last, even axes -> the means of 2x2x2 voxels."""
    return _resample(x, SUM, [m // 2 for m in x.shape[2:]], 0.125)


def average_pool_backward(dy: Tensor) -> Tensor:
    return _resample(dy, NEAREST, [2 * m for m in dy.shape[2:]], 0.125)


def launches(arch: int = 90):
    """What benchmarks/aot.py compiles."""
    for name, mode in (("nearest", NEAREST), ("trilinear", TRILINEAR), ("sum", SUM), ("adjoint", TRILINEAR_GRADIENT)):
        for c in (64, 256):
            ints = dict.fromkeys(("C", "D", "H", "W", "YD", "YH", "YW"), "i32")
            yield {
                "name": f"{name}, {c}",
                "kernel": resample_kernel,
                "signature": {"x": "*fp16", "y": "*fp16", "scale": "fp32"} | ints,
                "constexprs": {"MODE": mode, "TAPS": TAPS[mode], "BR": 2048 // power(c, 1, 64), "BC": power(c, 1, 64)},
                "num_warps": 4,
                "num_stages": 3,
                "divisible": ["x", "y", "C"],
            }
