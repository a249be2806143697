"""The gradient of GroupNorm [+ SiLU] over channels-last volumes, in two passes over (x, dy); see kernels/norm.py.

With z = weight * xhat + bias and dz = dy [* silu'(z)], per group of one sample:
dx = rstd * (weight * dz - mean(weight * dz) - xhat * mean(weight * dz * xhat)).
The first pass leaves sums of dz and dz * xhat per channel and tile, which also make dweight and dbias. Where the
gradient of a convolution writes dz it leaves them as well (kernels/conv_backward.py), and one pass remains.
"""

import torch
import triton
import triton.language as tl
from t2ct.kernels.norm import (
    CHANNELS,
    FOLDED,
    MOST_TILES,
    _coefficients,
    _place,
    _within,
    as_float,
    silu_slope,
    sizes,
    tile,
    tile_voxels,
    writable,
)
from t2ct.kernels.plan import POINTER
from torch import Tensor


@triton.jit
def _load_gradient(x, dy, at, mask, m, r, w, b, SILU: tl.constexpr):
    """(dz, xhat): the gradient before weight and bias are applied, silu's derivative included."""
    xhat = (tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - m) * r
    dz = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        dz *= silu_slope(xhat * w + b)
    return dz, xhat


@triton.jit
def backward_sums_kernel(
    dy, x, mean, rstd, weight, bias, sums, S, C, block, T, groups,
    SILU: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """sums (N, T, 2, C): of dz and of dz * xhat over every tile of `block` voxels."""
    tile, first, end, c = _place(C, block, S, BC)
    m, r, w, b = _coefficients(mean, rstd, weight, bias, tl.program_id(1), c, C, groups)
    sum_dz = tl.zeros((BC,), tl.float32)
    sum_dzx = tl.zeros((BC,), tl.float32)
    for voxel in range(first, end, BS):
        start, offsets, mask, _ = _within(voxel, end, c, S, C, BS)
        dz, xhat = _load_gradient(x, dy, start + offsets, mask, m, r, w, b, SILU)  # dz is 0 outside
        sum_dz += tl.sum(dz, 0)
        sum_dzx += tl.sum(dz * xhat, 0)
    at = (tl.program_id(1).to(tl.int64) * T + tile) * 2 * C + c
    tl.store(sums + at, sum_dz, mask=c < C)
    tl.store(sums + at + C, sum_dzx, mask=c < C)


@triton.jit
def backward_merge_kernel(sums, weight, totals, means, inverse, T, C, groups, BT: tl.constexpr, BC: tl.constexpr):
    """One group of one sample: totals (N, 2, C) over the tiles, and means (N, 2, groups) of weight * them, float32.

    inverse: of the count of numbers in a group.
    """
    size = C // groups
    sample = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    mean_dz = tl.full((), 0.0, tl.float64)
    mean_dzx = tl.full((), 0.0, tl.float64)
    for c0 in range(0, size, BC):
        k = c0 + tl.arange(0, BC)
        c = group * size + k
        dz = tl.zeros((BC,), tl.float64)
        dzx = tl.zeros((BC,), tl.float64)
        for first in range(0, T, BT):
            t = first + tl.arange(0, BT)
            mask = (t < T)[:, None] & (k < size)[None, :]
            at = sums + ((sample * T + t) * 2 * C)[:, None] + c[None, :]
            dz += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), 0)
            dzx += tl.sum(tl.load(at + C, mask=mask, other=0.0).to(tl.float64), 0)
        w = tl.load(weight + c, mask=k < size, other=0.0).to(tl.float64)
        tl.store(totals + sample * 2 * C + c, dz.to(tl.float32), mask=k < size)
        tl.store(totals + sample * 2 * C + C + c, dzx.to(tl.float32), mask=k < size)
        mean_dz += tl.sum(w * dz, 0)
        mean_dzx += tl.sum(w * dzx, 0)
    tl.store(means + sample * 2 * groups + group, (mean_dz * inverse).to(tl.float32))
    tl.store(means + sample * 2 * groups + groups + group, (mean_dzx * inverse).to(tl.float32))


@triton.jit
def backward_kernel(
    dy, x, dx, mean, rstd, weight, bias, means, S, C, block, groups,
    SILU: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (weight * dz - mean(weight * dz) - xhat * mean(weight * dz * xhat)), means over the group."""
    _, first, end, c = _place(C, block, S, BC)
    m, r, w, b = _coefficients(mean, rstd, weight, bias, tl.program_id(1), c, C, groups)
    at = means + tl.program_id(1) * 2 * groups + c // (C // groups)
    mean_dz = tl.load(at, mask=c < C, other=0.0)[None, :]
    mean_dzx = tl.load(at + groups, mask=c < C, other=0.0)[None, :]
    for voxel in range(first, end, BS):
        start, offsets, mask, _ = _within(voxel, end, c, S, C, BS)
        dz, xhat = _load_gradient(x, dy, start + offsets, mask, m, r, w, b, SILU)
        g = r * (w * dz - mean_dz - xhat * mean_dzx)
        tl.store(dx + start + offsets, g.to(dx.dtype.element_ty), mask=mask)


HELD = {"sums": (4096, 8), "dx": (4096, 8)}  # numbers a program holds of x and of dy, warps
TILES = 64  # that the merging program reads at once


def _merge_block(size: int) -> tuple[int, int]:
    return TILES, min(64, triton.next_power_of_2(size))


def group_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx like x, dweight and dbias (C,) in their dtypes. x channels-last, dy of any strides; mean, rstd (N, groups)."""
    if dy.stride() != x.stride() or dy.dtype != x.dtype:
        dy = torch.empty_like(x).copy_(dy)
    w, b, mean, rstd = weight.detach().contiguous(), bias.detach().contiguous(), as_float(mean), as_float(rstd)
    n, voxels, c = sizes(x)
    bs, bc = tile(c, HELD["sums"][0], voxels)
    block = tile_voxels(n, voxels, c, bs, bc)
    tiles, blocks = triton.cdiv(voxels, block), triton.cdiv(c, bc)
    sums = torch.empty(n, tiles, 2, c, device=x.device)
    backward_sums_kernel[(tiles * blocks, n)](
        dy, x, mean, rstd, w, b, sums, voxels, c, block, tiles, groups,
        SILU=silu, BS=bs, BC=bc, num_warps=HELD["sums"][1],
    )  # fmt: skip
    return _from_sums(dy, x, w, b, mean, rstd, sums, groups, silu)


def from_sums(
    dz: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, sums: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_norm_backward` where the sums (N, tiles, 2, C) of dz and dz * xhat, float32, came with dz, the gradient
    of weight * xhat + bias (SiLU's slope included): one pass over (x, dz)."""
    if dz.stride() != x.stride() or dz.dtype != x.dtype:
        dz = torch.empty_like(x).copy_(dz)
    tiles = sums.shape[1]
    if tiles > MOST_TILES:  # a program per group would read too long
        each = triton.cdiv(tiles, FOLDED)
        whole = tiles // each * each
        parts = [sums[:, :whole].unflatten(1, (-1, each)).sum(2, dtype=torch.float64)]
        if whole < tiles:
            parts.append(sums[:, whole:].sum(1, keepdim=True, dtype=torch.float64))
        sums = torch.cat(parts, 1)
    w, b = weight.detach().contiguous(), bias.detach().contiguous()
    return _from_sums(dz, x, w, b, as_float(mean), as_float(rstd), sums, groups, False)


def _from_sums(dy, x, weight, bias, mean, rstd, sums, groups, silu):
    n, voxels, c = sizes(x)
    totals, means = torch.empty(n, 2, c, device=x.device), torch.empty(n, 2, groups, device=x.device)
    rows, columns = _merge_block(c // groups)
    backward_merge_kernel[(n * groups,)](
        sums, weight, totals, means, groups / (voxels * c), sums.shape[1], c, groups, BT=rows, BC=columns, num_warps=4
    )
    dx = writable(x)
    bs, bc = tile(c, HELD["dx"][0], voxels)
    block = tile_voxels(n, voxels, c, bs, bc)
    backward_kernel[(triton.cdiv(voxels, block) * triton.cdiv(c, bc), n)](
        dy, x, dx, mean, rstd, weight, bias, means, voxels, c, block, groups,
        SILU=silu, BS=bs, BC=bc, num_warps=HELD["dx"][1],
    )  # fmt: skip
    dw, db = totals[:, 1].sum(0), totals[:, 0].sum(0)  # two tensors: what an operator returns may not share memory
    return dx.to(x.dtype), dw.to(weight.dtype), db.to(bias.dtype)


def launches(arch: int = 90, dtype: torch.dtype = torch.float16):
    """What benchmarks/aot.py compiles, by way of kernels/norm.py."""
    ints = dict.fromkeys(("S", "C", "block", "T", "groups"), "i32")
    floats = dict.fromkeys(("mean", "rstd", "sums", "totals", "means"), "*fp32")
    halves = dict.fromkeys(("dy", "x", "dx", "weight", "bias"), POINTER[dtype])
    for c in CHANNELS:
        for name, kernel, silu in (("sums", backward_sums_kernel, True), ("dx", backward_kernel, True),
                                   ("dx", backward_kernel, False)):  # fmt: skip
            bs, bc = tile(c, HELD[name][0], 1 << 20)
            yield {
                "name": f"gradient, {name}{'' if silu else ' of dz'}, {c}", "kernel": kernel,
                "signature": halves | floats | ints, "constexprs": {"SILU": silu, "BS": bs, "BC": bc},
                "num_warps": HELD[name][1], "num_stages": 3,
                "divisible": [n for n in kernel.arg_names if n in halves or n in floats or n == "C"],
            }  # fmt: skip
        rows, columns = _merge_block(c // 32)
        yield {
            "name": f"gradient, merge, {c}", "kernel": backward_merge_kernel,
            "signature": halves | floats | ints | {"inverse": "fp32"},
            "constexprs": {"BT": rows, "BC": columns}, "num_warps": 4, "num_stages": 3,
            "divisible": ["sums", "weight", "totals", "C"],
        }  # fmt: skip
