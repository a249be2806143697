"""GroupNorm [+ SiLU] over channels-last volumes: memory is (N, S, C), S voxels; a program holds voxels x channels.

Statistics are split over space, so that any volume fills the chip: `partial_stats` writes mean and M2 of every channel
over every tile of voxels (a convolution's epilogue writes the same), `merge_stats` merges tiles and the channels of a
group by Chan's formula, `apply` makes one pass. The gradient takes two passes over (x, dy). Sums are float32 within a
tile and float64 between tiles, in an order given by the shape alone: no atomics, same input, same bits. Offsets are
int64 per tile, int32 within it.

x is float16, bfloat16 or float32; weight and bias are of any floating dtype.
"""

import torch
import triton
import triton.language as tl
from t2ct.kernels.plan import POINTER, stored
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret  # its bfloat16 arithmetic is wrong: only float32 is computed and stored

PROGRAMS = 2112  # 16 for each of 132 multiprocessors: the last wave is a small part of the whole. Not measured.
MOST_TILES = 4096  # more tiles than this are first merged into FOLDED: a program per group would read too long
FOLDED = 1024
ROWS = 1024  # numbers that a merging program takes at once


@triton.jit
def silu_of(z):
    """Two MUFU (ex2, rcp), which bandwidth hides. tanh.approx would be one, but its error of 2^-11 shows in float16.

    Within 4 ulp of float32; below zero within 4 + 2 |z|, because the argument of exp2 is rounded.
    """
    return z / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def silu_slope(z):
    s = 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def _chan(n, mean, m2, n_b, mean_b, m2_b):
    """The union of two disjoint sets given as (count, mean, M2); empty ones are allowed."""
    total = n + n_b
    share = n_b / tl.maximum(total, 1.0)
    d = mean_b - mean
    return total, mean + d * share, m2 + m2_b + d * d * n * share


@triton.jit
def _place(C, block, S, BC: tl.constexpr):
    """(tile, first voxel in the sample, end of its voxels, channels) of this program."""
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    first = (pid // blocks).to(tl.int64) * block
    return pid // blocks, first, tl.minimum(first + block, S), pid % blocks * BC + tl.arange(0, BC)


@triton.jit
def _within(first, end, c, S, C, BS: tl.constexpr):
    """(offset of voxel `first`, offsets within the tile, mask, how many voxels it has)."""
    r = tl.arange(0, BS)
    left = tl.minimum(end - first, BS).to(tl.int32)
    start = (tl.program_id(1).to(tl.int64) * S + first) * C
    return start, r[:, None] * C + c[None, :], (r < left)[:, None] & (c < C)[None, :], left


@triton.jit
def stats_kernel(x, mean, m2, count, S, C, block, T, BS: tl.constexpr, BC: tl.constexpr):
    """mean, m2 (N, T, C) of x (N, S, C) per tile of `block` voxels, count (T): mean first, then squares of x - mean."""
    tile, first, end, c = _place(C, block, S, BC)
    n = tl.zeros((BC,), tl.float32)
    mu = tl.zeros((BC,), tl.float32)
    squares = tl.zeros((BC,), tl.float32)
    for voxel in range(first, end, BS):
        start, offsets, mask, left = _within(voxel, end, c, S, C, BS)
        v = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
        here = left.to(tl.float32)
        rough = tl.sum(v, 0) / here
        e = tl.where(mask, v - rough[None, :], 0.0)
        rest = tl.sum(e, 0)  # not 0: what rounding cost the mean
        n, mu, squares = _chan(n, mu, squares, here, rough + rest / here, tl.sum(e * e, 0) - rest * rest / here)
    at = (tl.program_id(1).to(tl.int64) * T + tile) * C + c
    tl.store(mean + at, mu, mask=c < C)
    tl.store(m2 + at, squares, mask=c < C)
    if (tl.program_id(1) == 0) & (tl.program_id(0) % tl.cdiv(C, BC) == 0):
        tl.store(count + tile, (end - first).to(tl.float32))


@triton.jit
def _tiles(mean, m2, count, t, exists, at, mask):
    """Tiles in float64; one of 0 voxels counts for nothing, whatever it holds."""
    n = tl.maximum(tl.load(count + t, mask=exists, other=0.0).to(tl.float64), 0.0)
    m = tl.where(n > 0, tl.load(mean + at, mask=mask, other=0.0).to(tl.float64), 0.0)
    return n, m, tl.where(n > 0, tl.load(m2 + at, mask=mask, other=0.0).to(tl.float64), 0.0)


@triton.jit
def fold_kernel(mean, m2, count, mean_out, m2_out, count_out, T, C, tiles, BT: tl.constexpr, BC: tl.constexpr):
    """(N, T, C) -> (N, gridsize, C) float64: every `tiles` tiles merged into one."""
    out, blocks = tl.program_id(0) // tl.cdiv(C, BC), tl.cdiv(C, BC)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    sample = tl.program_id(1).to(tl.int64)
    n = tl.zeros((BC,), tl.float64)
    mu = tl.zeros((BC,), tl.float64)
    squares = tl.zeros((BC,), tl.float64)
    end = tl.minimum((out + 1) * tiles, T)
    for first in range(out * tiles, end, BT):
        t = first + tl.arange(0, BT)[:, None]
        at = (sample * T + t) * C + c[None, :]
        n_t, m, s = _tiles(mean, m2, count, t, t < end, at, (t < end) & (c < C)[None, :])
        n_b = tl.sum(n_t, 0)
        m_b = tl.sum(n_t * m, 0) / tl.maximum(n_b, 1.0)
        d = m - m_b[None, :]
        n, mu, squares = _chan(n, mu, squares, n_b, m_b, tl.sum(s + n_t * d * d, 0))
    at = (sample * (tl.num_programs(0) // blocks) + out) * C + c
    tl.store(mean_out + at, mu, mask=c < C)
    tl.store(m2_out + at, squares, mask=c < C)
    if (sample == 0) & (tl.program_id(0) % blocks == 0):  # every channel has the same count
        tl.store(count_out + out, tl.max(n, 0))


@triton.jit
def merge_kernel(mean, m2, count, mean_out, rstd, mean64, m2_64, T, C, groups, eps, BLOCK: tl.constexpr):
    """One group of one sample: its tiles and channels, BLOCK at a time, into (N, groups)."""
    size = C // groups
    sample = (tl.program_id(0) // groups).to(tl.int64)
    c0 = tl.program_id(0) % groups * size
    n = tl.full((), 0.0, tl.float64)
    mu = tl.full((), 0.0, tl.float64)
    squares = tl.full((), 0.0, tl.float64)
    for first in range(0, T * size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        t = i // size
        inside = i < T * size
        n_t, m, s = _tiles(mean, m2, count, t, inside, (sample * T + t) * C + c0 + i % size, inside)
        n_b = tl.sum(n_t, 0)
        m_b = tl.sum(n_t * m, 0) / tl.maximum(n_b, 1.0)
        d = m - m_b
        n, mu, squares = _chan(n, mu, squares, n_b, m_b, tl.sum(s + n_t * d * d, 0))
    tl.store(mean_out + tl.program_id(0), mu.to(tl.float32))
    tl.store(mean64 + tl.program_id(0), mu)
    tl.store(m2_64 + tl.program_id(0), squares)
    tl.store(rstd + tl.program_id(0), (1.0 / tl.sqrt(squares / n + eps)).to(tl.float32))


@triton.jit
def _coefficients(mean, rstd, weight, bias, sample, c, C, groups):
    """mean, rstd, weight and bias of channels c of a sample in float32."""
    at = sample * groups + c // (C // groups)
    m = tl.load(mean + at, mask=c < C, other=0.0)
    r = tl.load(rstd + at, mask=c < C, other=0.0)
    w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    return m[None, :], r[None, :], w[None, :], tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def apply_kernel(
    x, y, mean, rstd, weight, bias, S, C, block, groups, SILU: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr
):
    """y = [silu]((x - mean) * rstd * weight + bias), both (N, S, C); y may be x."""
    _, first, end, c = _place(C, block, S, BC)
    m, r, w, b = _coefficients(mean, rstd, weight, bias, tl.program_id(1), c, C, groups)
    scale = r * w
    for voxel in range(first, end, BS):
        start, offsets, mask, _ = _within(voxel, end, c, S, C, BS)
        z = (tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32) - m) * scale + b
        if SILU:
            z = silu_of(z)
        tl.store(y + start + offsets, z.to(y.dtype.element_ty), mask=mask)


def channel_block(c: int) -> int:
    """Channels that a program takes: whole cache lines, and where it can be no idle lanes."""
    whole = [b for b in (128, 64, 32) if c % b == 0]
    return whole[0] if whole else min(128, triton.next_power_of_2(c))


def tile(c: int, elements: int, voxels: int) -> tuple[int, int]:
    """(voxels, channels) that a program holds at once: `elements` numbers, or the next power of two above the volume's
    own. A step of the interpreter costs the same whatever its size."""
    bc = channel_block(c)
    return min((65536 if INTERPRETED else elements) // bc, triton.next_power_of_2(voxels)), bc


def tile_voxels(n: int, voxels: int, c: int, bs: int, bc: int) -> int:
    """Voxels of one program: as few of the held tiles as make PROGRAMS programs, each of at least one."""
    wanted = max(1, PROGRAMS // (n * triton.cdiv(c, bc)))
    return bs * max(1, triton.cdiv(voxels, bs * wanted))


def sizes(x: Tensor) -> tuple[int, int, int]:
    n, c = x.shape[:2]
    return n, x.numel() // (n * c), c


def writable(x: Tensor) -> Tensor:
    """An empty tensor like x for a kernel to write."""
    return torch.empty_like(x, dtype=stored(x.dtype))


def as_float(t: Tensor) -> Tensor:
    return t.detach().to(torch.float32).contiguous()


HELD = {"stats": (8192, 8), "apply": (4096, 4)}  # numbers a program holds, warps


def partial_stats(x: Tensor, block: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of every channel over tiles of `block` consecutive voxels, by default as many as fill a chip.

    x        (N, C, *spatial), channels-last
    Returns  mean and M2 = sum((x - mean)^2), float32 (N, T, C), and the voxels of each tile, float32 (T,).
    """
    n, voxels, c = sizes(x)
    elements, warps = HELD["stats"]
    bs, bc = tile(c, elements, block or voxels)
    block = block or tile_voxels(n, voxels, c, bs, bc)
    tiles = triton.cdiv(voxels, block)
    mean = torch.empty(n, tiles, c, device=x.device)
    m2, count = torch.empty_like(mean), torch.empty(tiles, device=x.device)
    stats_kernel[(tiles * triton.cdiv(c, bc), n)](
        x, mean, m2, count, voxels, c, block, tiles, BS=bs, BC=bc, num_warps=warps
    )
    return mean, m2, count


def _merge(mean: Tensor, m2: Tensor, count: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean and rstd float32, mean and M2 float64, all (N, groups)."""
    n, tiles, c = mean.shape
    if tiles > MOST_TILES:
        each = triton.cdiv(tiles, FOLDED)
        bc = channel_block(c)
        out = torch.empty(n, triton.cdiv(tiles, each), c, device=mean.device, dtype=torch.float64)
        folded = out, torch.empty_like(out), torch.empty(out.shape[1], device=mean.device, dtype=torch.float64)
        fold_kernel[(out.shape[1] * triton.cdiv(c, bc), n)](
            mean, m2, count, *folded, tiles, c, each, BT=ROWS // bc, BC=bc, num_warps=4
        )
        (mean, m2, count), tiles = folded, out.shape[1]
    mean32 = torch.empty(n, groups, device=mean.device)
    mean64 = torch.empty(n, groups, device=mean.device, dtype=torch.float64)
    rstd, m2_64 = torch.empty_like(mean32), torch.empty_like(mean64)
    merge_kernel[(n * groups,)](
        mean, m2, count, mean32, rstd, mean64, m2_64, tiles, c, groups, eps, BLOCK=ROWS, num_warps=4
    )
    return mean32, rstd, mean64, m2_64


def merge_stats(mean: Tensor, m2: Tensor, count: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """mean and rstd = (M2 / count + eps) ** -0.5, float32 (N, groups), of contiguous partial statistics."""
    return _merge(mean, m2, count, groups, eps)[:2]


def apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, out: Tensor
) -> Tensor:
    """[silu]((x - mean) * rstd * weight + bias) into out, which has x's strides and dtype and may be x."""
    n, voxels, c = sizes(x)
    elements, warps = HELD["apply"]
    bs, bc = tile(c, elements, voxels)
    block = tile_voxels(n, voxels, c, bs, bc)
    y = writable(out) if INTERPRETED and out.dtype == torch.bfloat16 else out
    apply_kernel[(triton.cdiv(voxels, block) * triton.cdiv(c, bc), n)](
        x, y, as_float(mean), as_float(rstd), weight.contiguous(), bias.contiguous(), voxels, c, block, groups,
        SILU=silu, BS=bs, BC=bc, num_warps=warps,
    )  # fmt: skip
    return out if y is out else out.copy_(y)


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like x, then mean and rstd, float32 (N, groups)."""
    mean, rstd = merge_stats(*partial_stats(x), groups, eps)
    return apply(x, mean, rstd, weight, bias, groups, silu, torch.empty_like(x)), mean, rstd


def group_stats(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """mean and M2 of every group, float64 (N, groups)."""
    return _merge(*partial_stats(x), groups, 1.0)[2:]


def group_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool, out: Tensor
) -> Tensor:
    return apply(x, mean, rstd, weight, bias, groups, silu, out)


CHANNELS = (64, 128, 256, 512)  # of the published networks


def launches(arch: int = 90, dtype: torch.dtype = torch.float16):
    """What benchmarks/aot.py compiles: every kernel at the published widths, its gradient's included."""
    from t2ct.kernels import norm_backward  # which imports this module

    ints = dict.fromkeys(("S", "C", "block", "T", "groups", "tiles"), "i32")
    floats = dict.fromkeys(("mean", "m2", "count", "rstd", "mean_out"), "*fp32")
    partial = {"*fp32": floats, "*fp64": floats | dict.fromkeys(("mean", "m2", "count"), "*fp64")}
    for c in CHANNELS:
        bs, bc = tile(c, HELD["stats"][0], 1 << 20)
        yield {
            "name": f"statistics, {c}", "kernel": stats_kernel, "signature": {"x": POINTER[dtype]} | floats | ints,
            "constexprs": {"BS": bs, "BC": bc}, "num_warps": HELD["stats"][1], "num_stages": 3,
            "divisible": ["x", "mean", "m2", "count", "C"],
        }  # fmt: skip
        for silu in (True, False):
            bs, bc = tile(c, HELD["apply"][0], 1 << 20)
            yield {
                "name": f"apply{', SiLU' * silu}, {c}", "kernel": apply_kernel,
                "signature": dict.fromkeys(("x", "y", "weight", "bias"), POINTER[dtype]) | floats | ints,
                "constexprs": {"SILU": silu, "BS": bs, "BC": bc}, "num_warps": HELD["apply"][1], "num_stages": 3,
                "divisible": ["x", "y", "weight", "bias", "mean", "rstd", "C"],
            }  # fmt: skip
    outs = dict.fromkeys(("mean_out", "m2_out", "count_out", "mean64", "m2_64"), "*fp64")
    bc = channel_block(64)
    yield {
        "name": "fold", "kernel": fold_kernel, "signature": floats | ints | outs,
        "constexprs": {"BT": ROWS // bc, "BC": bc}, "num_warps": 4, "num_stages": 3,
        "divisible": ["mean", "m2", "count", "mean_out", "m2_out", "count_out", "C"],
    }  # fmt: skip
    for kind, types in partial.items():
        yield {
            "name": f"merge {kind[1:]}", "kernel": merge_kernel, "signature": ints | outs | types | {"eps": "fp32"},
            "constexprs": {"BLOCK": ROWS}, "num_warps": 4, "num_stages": 3,
            "divisible": ["mean", "m2", "count", "C"],
        }  # fmt: skip
    yield from norm_backward.launches(arch, dtype)
