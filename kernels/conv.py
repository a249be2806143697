"""3-D convolution over channels-last volumes as an implicit matrix product: rows are output voxels, columns channels.

A tile of rows is a box of voxels, so neighbouring taps read what is already near. One kernel serves every form, because
each is "taps of a window over x, weights of one phase, written to every first or second voxel of y":

  form                                  window  stride  phases  what x and the weights are
  convolution                           1 or 3  1 or 2  1       themselves
  nearest x2, then 3^3 (folded)         2       1       8       weights summed over the taps that see one voxel
  trilinear x2, then 3^3 (folded)       3       1       8       weights times the interpolation; border faces anew
  gradient of x, stride 1               1 or 3  1       1       dy, flipped weights
  gradient of x, stride 2               2       1       8       dy, the taps of one parity
  gradient of x, nearest x2 folded      4       2       1       dy, phases and taps in one window

Accumulation is float32, offsets are int64 per tile and int32 within it. No atomics: same input, same bits.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from t2ct.kernels import fold
from t2ct.kernels.norm import _coefficients, silu_of, silu_slope
from t2ct.kernels.plan import POINTER, Launch, box, launch, stored
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)  # whose bfloat16 products are wrong


@triton.jit
def _row(t, tiles_h, tiles_w, TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """First voxel of box t, and the place of every row in it."""
    r = tl.arange(0, TD * TH * TW)
    d0 = t // (tiles_h * tiles_w) * TD
    h0 = t // tiles_w % tiles_h * TH
    w0 = t % tiles_w * TW
    return d0, h0, w0, r // (TH * TW), r // TW % TH, r % TW


@triton.jit
def conv_kernel(
    x, weight, y, bias, channel_bias, residual, n_mean, n_rstd, n_weight, n_bias, mean, m2, count,
    D, H, W, C, YD, YH, YW, O, tiles_d, tiles_h, tiles_w, groups,
    K: tl.constexpr, S: tl.constexpr, PAD0: tl.constexpr, PAD1: tl.constexpr, PHASES: tl.constexpr,
    CLAMP: tl.constexpr, PROLOGUE: tl.constexpr, BIAS: tl.constexpr, CHANNEL_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, STATS: tl.constexpr, SUMS: tl.constexpr, TMA: tl.constexpr, EVEN_C: tl.constexpr,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One box of TD x TH x TW rows by BN channels of y (N, YD, YH, YW, O); x (N, D, H, W, C) or its descriptor.

    weight (PHASES, O, K^3, C) or its descriptor (PHASES * O, K^3 * C). PAD0, PAD1: how far the window reaches before
    the row's voxel in an even and an odd phase. n_mean, n_rstd (N, groups) float32, n_weight, n_bias (C,): GroupNorm's,
    applied to x on its way in; the zeros around the volume come after it. mean, m2 (N, PHASES * tiles, O), count
    (PHASES * tiles): of y. SUMS: y is instead the gradient of a norm's result before SiLU, residual that norm's input
    and n_* its own, and mean (N, tiles, 2, O) receives the sums of y and y * xhat.
    """
    BM: tl.constexpr = TD * TH * TW
    OS: tl.constexpr = 2 if PHASES == 8 else 1
    blocks = tl.cdiv(O, BN)
    pid = tl.program_id(0)
    tile = pid // blocks  # the columns of one box run one after the other and share its x in the cache
    n = pid % blocks * BN + tl.arange(0, BN)
    sample = tl.program_id(1) // PHASES
    phase = tl.program_id(1) % PHASES
    pa, pb, pc = phase // 4, phase // 2 % 2, phase % 2
    pad_d, pad_h, pad_w = PAD0 + (PAD1 - PAD0) * pa, PAD0 + (PAD1 - PAD0) * pb, PAD0 + (PAD1 - PAD0) * pc
    d0, h0, w0, rd, rh, rw = _row(tile, tiles_h, tiles_w, TD, TH, TW)
    d, h, w = d0 + rd, h0 + rh, w0 + rw
    xd0, xh0, xw0 = d0 * S - pad_d, h0 * S - pad_h, w0 * S - pad_w  # where the box's window begins in x
    k = tl.arange(0, BK)
    c_blocks = tl.cdiv(C, BK)
    if not TMA:
        x += sample.to(tl.int64) * D * H * W * C
        start = ((xd0.to(tl.int64) * H + xh0) * W + xw0) * C
        rows = ((rd * S * H + rh * S) * W + rw * S) * C
        weight += (phase * O).to(tl.int64) * (K * K * K * C)
        columns = n.to(tl.int64) * (K * K * K * C)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(K * K * K * c_blocks):
        tap, c0 = i // c_blocks, i % c_blocks * BK
        kd, kh, kw = tap // (K * K), tap // K % K, tap % K
        ok = (xd0 + rd * S + kd >= 0) & (xd0 + rd * S + kd < D) & (xh0 + rh * S + kh >= 0) & (xh0 + rh * S + kh < H)
        ok = ok & (xw0 + rw * S + kw >= 0) & (xw0 + rw * S + kw < W)
        if TMA:
            a = x.load([sample, xd0 + kd, xh0 + kh, xw0 + kw, c0]).reshape(BM, BK)
            b = weight.load([phase * O + pid % blocks * BN, tap * C + c0]).T
        else:
            if CLAMP:  # the edge voxel goes on outside: how trilinear interpolation reads
                cd = tl.minimum(tl.maximum(xd0 + rd + kd, 0), D - 1).to(tl.int64)
                ch = tl.minimum(tl.maximum(xh0 + rh + kh, 0), H - 1)
                cw = tl.minimum(tl.maximum(xw0 + rw + kw, 0), W - 1)
                at = x + (((cd * H + ch) * W + cw) * C)[:, None] + (c0 + k)[None, :]
                inside = (rd >= 0)[:, None]  # every row: what lies outside was clamped inside
            else:
                at = x + (start + ((kd.to(tl.int64) * H + kh) * W + kw) * C + c0) + rows[:, None] + k[None, :]
                inside = ok[:, None]
            wat = weight + (tap * C + c0) + columns[None, :] + k[:, None]
            if EVEN_C:
                a = tl.load(at, mask=inside, other=0.0)
                b = tl.load(wat, mask=(n < O)[None, :], other=0.0)
            else:
                a = tl.load(at, mask=inside & (c0 + k < C)[None, :], other=0.0)
                b = tl.load(wat, mask=(n < O)[None, :] & (c0 + k < C)[:, None], other=0.0)
        if PROLOGUE > 0:
            mu, r, g, s = _coefficients(n_mean, n_rstd, n_weight, n_bias, sample, c0 + k, C, groups)
            z = (a.to(tl.float32) - mu) * (r * g) + s
            if PROLOGUE > 1:
                z = silu_of(z)
            a = tl.where(ok[:, None], z, 0.0).to(a.dtype)  # zero is padded after the activation: silu(shift) is not 0
        if INTERPRET:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    if CHANNEL_BIAS:
        acc += tl.load(channel_bias + sample * O + n, mask=n < O, other=0.0).to(tl.float32)[None, :]
    yd, yh, yw = d * OS + pa, h * OS + pb, w * OS + pc
    valid = (yd < YD) & (yh < YH) & (yw < YW)
    first = ((sample.to(tl.int64) * YD + d0 * OS + pa) * YH + h0 * OS + pb) * YW + w0 * OS + pc
    within = ((rd * OS * YH + rh * OS) * YW + rw * OS) * O
    y += first * O
    residual += first * O
    out = within[:, None] + n[None, :]
    mask = valid[:, None] & (n < O)[None, :]
    if SUMS:
        mu, r, g, s = _coefficients(n_mean, n_rstd, n_weight, n_bias, sample, n, O, groups)
        v = tl.load(residual + out, mask=mask, other=0.0).to(tl.float32)
        acc = tl.where(mask, acc * silu_slope((v - mu) * (r * g) + s), 0.0)
    if RESIDUAL:
        acc += tl.load(residual + out, mask=mask, other=0.0).to(tl.float32)
    rounded = acc.to(y.dtype.element_ty)
    tl.store(y + out, rounded, mask=mask)
    if SUMS:
        v = tl.load(residual + out, mask=mask, other=0.0).to(tl.float32)  # again: registers are short
        at_s = (sample * (tiles_d * tiles_h * tiles_w) + tile).to(tl.int64) * 2 * O + n
        tl.store(mean + at_s, tl.sum(acc, 0), mask=n < O)
        tl.store(mean + at_s + O, tl.sum(acc * ((v - mu) * r), 0), mask=n < O)
    if STATS:  # of what was written, so that whoever reads y finds them exact
        v = rounded.to(tl.float32)
        total = tl.sum(valid.to(tl.float32))
        mu = tl.sum(tl.where(valid[:, None], v, 0.0), 0) / tl.maximum(total, 1.0)
        e = tl.where(valid[:, None], v - mu[None, :], 0.0)
        slot = phase * (tiles_d * tiles_h * tiles_w) + tile
        at_s = (sample * PHASES * (tiles_d * tiles_h * tiles_w) + slot).to(tl.int64) * O + n
        tl.store(mean + at_s, mu, mask=n < O)
        tl.store(m2 + at_s, tl.sum(e * e, 0), mask=n < O)
        if (sample == 0) & (pid % blocks == 0):
            tl.store(count + slot, total)


def _boxes(x: Tensor, channels: int, size, phases: int, stride: int, rows: int):
    """(voxels of a box of rows along each axis, boxes along each axis) for y (N, channels, *size). Where planes are so
    large that int32 does not reach across a box it is flat."""
    step = 2 if phases == 8 else 1
    plane = max(stride * x.shape[1] * x.shape[3] * x.shape[4], step * channels * size[1] * size[2])
    grid = [-(-m // step) for m in size]
    dims = box(grid, rows, 1 + 2**30 // plane)
    return dims, [-(-m // b) for m, b in zip(grid, dims, strict=True)]


def _last(n: int, channels: int, size, like: Tensor) -> Tensor:
    """An empty (n, channels, *size), channels-last."""
    last = torch.channels_last_3d
    return torch.empty(n, channels, *size, dtype=stored(like.dtype), device=like.device, memory_format=last)


def _descriptors(x: Tensor, weight: Tensor, at: Launch, dims: tuple[int, int, int]):
    """x and the weights as the tensor descriptors that TMA reads through; None where their rows are not of 16 bytes."""
    c = x.shape[1]
    if not at.tma or c * x.element_size() % 16 or x.data_ptr() % 16 or weight.data_ptr() % 16:
        return None
    phases, o, taps, _ = weight.shape
    n, _, d, h, w = x.shape
    steps = [d * h * w * c, h * w * c, w * c, c, 1]  # an axis of one voxel may have any stride, which TMA would refuse
    volume = TensorDescriptor(x, [n, d, h, w, c], steps, [1, *dims, at.bk])
    return volume, TensorDescriptor.from_tensor(weight.view(phases * o, taps * c), [at.bn, at.bk])


def _conv(
    x: Tensor,
    weight: Tensor,
    size: tuple[int, int, int],
    k: int,
    stride: int = 1,
    pads: tuple[int, int] = (1, 1),
    *,
    bias: Tensor | None = None,
    channel_bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor, Tensor, int] | None = None,
    silu: bool = True,
    stats: bool = False,
    behind: Tensor | None = None,
    clamp: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """(y, partial statistics of y or None). x (N, C, D, H, W) channels-last, weight (phases, O, K^3, C), size of y.

    behind: y is the gradient of silu(norm(behind)), which becomes norm's, and the statistics are its (sums,)."""
    n, c, *spatial = x.shape
    phases, o = weight.shape[:2]
    at = launch(x.device, x.dtype, c, o, stats=stats, sums=behind is not None)
    dims, tiles = _boxes(x, o, size, phases, stride, at.bm)
    count = tiles[0] * tiles[1] * tiles[2]
    y = _last(n, o, size, x)
    parts = None
    if stats:
        mean = torch.empty(n, phases * count, o, device=x.device)
        parts = mean, torch.empty_like(mean), torch.empty(phases * count, device=x.device)
    if behind is not None:
        parts = (torch.empty(n, count, 2, o, device=x.device),)
        residual = behind
    mean, m2, counts = parts if stats and parts else (*(parts or (y,)), y, y)
    bias, channel_bias = (None if t is None else t.contiguous() for t in (bias, channel_bias))
    tma = None if stride > 1 or clamp else _descriptors(x, weight, at, dims)
    affine, groups = ([t.contiguous() for t in norm[:4]], norm[4]) if norm else ([y] * 4, 1)
    conv_kernel[(count * triton.cdiv(o, at.bn), n * phases)](
        *(tma or (x, weight)), y, y if bias is None else bias, y if channel_bias is None else channel_bias,
        y if residual is None else residual, *affine, mean, m2, counts,
        *spatial, c, *size, o, *tiles, groups,
        K=k, S=stride, PAD0=pads[0], PAD1=pads[1], PHASES=phases, CLAMP=clamp,
        PROLOGUE=0 if norm is None or behind is not None else 1 + silu, BIAS=bias is not None,
        CHANNEL_BIAS=channel_bias is not None, RESIDUAL=residual is not None and behind is None, STATS=stats,
        SUMS=behind is not None, TMA=tma is not None, EVEN_C=c % at.bk == 0,
        TD=dims[0], TH=dims[1], TW=dims[2], BN=at.bn, BK=at.bk, num_warps=at.warps, num_stages=at.stages,
    )  # fmt: skip
    return y.to(x.dtype), parts


def conv3d(x, weight, bias=None, stride=1, padding=1, **fused):
    """y, or (y, partial statistics) with stats=True. x (N, C, D, H, W) channels-last, weight (O, C, K, K, K), K 1 or 3.

    fused: residual like y; channel_bias (N, O); norm=(mean, rstd, weight, bias, groups), the first two (N, groups),
    float32, and silu for x on its way in.
    """
    k = weight.shape[2]
    size = tuple((m + 2 * padding - k) // stride + 1 for m in x.shape[2:])
    y, parts = _conv(x, fold.taps_last(weight), size, k, stride, (padding, padding), bias=bias, **fused)
    return (y, parts) if fused.get("stats") else y


def upsample_conv3d(x, weight, bias=None, mode="nearest"):
    """x doubled along each axis, then a 3x3x3 convolution with padding 1, without writing the doubled volume."""
    size = tuple(2 * m for m in x.shape[2:])
    if mode == "nearest":
        return _conv(x, fold.fold(weight, fold.NEAREST), size, 2, pads=(1, 0), bias=bias)[0]
    y, _ = _conv(x, fold.fold(weight, fold.TRILINEAR), size, 3, bias=bias, clamp=True)
    for axis, n in enumerate(x.shape[2:], 2):  # where the window reaches over the border the folded weights are wrong
        for end in (0, 1):
            slab = x.narrow(axis, end * max(n - 2, 0), min(n, 2))
            up = F.interpolate(slab.float(), scale_factor=2.0, mode="trilinear").to(x.dtype)
            up = up.narrow(axis, end * (up.shape[axis] - 2), 2).contiguous(memory_format=torch.channels_last_3d)
            face = conv3d(up, weight, bias).select(axis, end)
            y.select(axis, end * (2 * n - 1)).copy_(face)
    return y


SIZES = ((64, 64), (128, 128), (256, 256), (512, 512))  # channels of the published networks, in and out


def launches(arch: int, dtype: torch.dtype = torch.float16):
    """What benchmarks/aot.py compiles: every row of the launch table, forward, fused, folded and both gradients."""
    from t2ct.kernels import conv_backward  # which imports this module

    ints = dict.fromkeys(("D", "H", "W", "C", "YD", "YH", "YW", "O", "tiles_d", "tiles_h", "tiles_w",
                          "groups"), "i32")
    pointers = dict.fromkeys(("bias", "channel_bias", "residual", "y", "n_weight", "n_bias"), POINTER[dtype])
    pointers |= dict.fromkeys(("n_mean", "n_rstd", "mean", "m2", "count"), "*fp32")
    forms = {
        "conv": {},
        "conv, statistics": {"RESIDUAL": True, "CHANNEL_BIAS": True, "STATS": True},
        "conv, normalised on the way in": {"PROLOGUE": 2},
        "gradient behind a norm": {"SUMS": True, "BIAS": False},
        "conv, stride 2": {"S": 2, "PAD0": 0, "PAD1": 0},
        "nearest x2, conv": {"K": 2, "PAD1": 0, "PHASES": 8},
        "trilinear x2, conv": {"PHASES": 8, "CLAMP": True},
    }
    for c, o in SIZES:
        for name, form in forms.items():
            at = launch(arch, dtype, c, o, stats="STATS" in form, sums="SUMS" in form)
            dims = dict(zip(("TD", "TH", "TW"), box((64, 64, 64), at.bm), strict=True))
            shape = ", ".join(map(str, (1, *dims.values(), at.bk)))
            tma = at.tma and not form.get("CLAMP") and form.get("S", 1) == 1
            kinds = (POINTER[dtype],) * 2
            if tma:
                kinds = tuple(f"tensordesc<{kinds[0][1:]}[{block}]>" for block in (shape, f"{at.bn}, {at.bk}"))
            constants = {"K": 3, "S": 1, "PAD0": 1, "PAD1": 1, "PHASES": 1, "CLAMP": False, "PROLOGUE": 0, "BIAS": True}
            constants |= dict.fromkeys(("CHANNEL_BIAS", "RESIDUAL", "STATS", "SUMS"), False)
            constants |= {"TMA": tma, "EVEN_C": True, **dims, "BN": at.bn, "BK": at.bk, **form}
            yield {
                "name": f"{name}, {c} to {o}",
                "kernel": conv_kernel,
                "signature": {"x": kinds[0], "weight": kinds[1]} | pointers | ints,
                "constexprs": constants,
                "num_warps": at.warps,
                "num_stages": at.stages,
                "divisible": ["C", "O", *pointers, *(() if tma else ("x", "weight"))],
            }
    yield from conv_backward.launches(arch, dtype)
