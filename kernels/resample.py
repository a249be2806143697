"""Doubling and halving of channels-last volumes: memory is (N, D, H, W, C), a program holds voxels of a plane.

Each kernel gathers, so that no two programs write to one place: same input, same bits.

  repeat       every voxel to 2x2x2 voxels, times a scale: nearest x2 (1), gradient of the average pool (1/8)
  pool         the sum of 2x2x2 voxels, times a scale: average pool (1/8), gradient of nearest x2 (1)
  trilinear    x2 with align_corners=False: 8 neighbours make the 8 voxels that lie between them
  its gradient each voxel from the 4x4x4 that it went into

x is float16, bfloat16 or float32, sums are float32, offsets int64.
"""

import torch
import triton
import triton.language as tl
from t2ct.kernels.norm import CHANNELS, INTERPRETED, channel_block
from t2ct.kernels.plan import POINTER, stored
from torch import Tensor


@triton.jit
def _place(height, width, C, BS: tl.constexpr, BC: tl.constexpr):
    """(sample, plane, rows, columns, which voxels exist, channels) of this program, of planes height x width."""
    blocks, parts = tl.cdiv(C, BC), tl.cdiv(height * width, BS)
    pid = tl.program_id(0)
    v = pid // blocks % parts * BS + tl.arange(0, BS)
    plane = pid // blocks // parts
    c = pid % blocks * BC + tl.arange(0, BC)
    return tl.program_id(1).to(tl.int64), plane, v // width, v % width, v < height * width, c


@triton.jit
def _at(sample, plane, h, w, c, D, H, W, C):
    """Offsets of voxels x channels in a volume (N, D, H, W, C)."""
    first = (sample * D + plane) * H * W * C
    return first + ((h * W + w).to(tl.int64) * C)[:, None] + c[None, :]


@triton.jit
def repeat_kernel(x, y, D, H, W, C, scale, BS: tl.constexpr, BC: tl.constexpr):
    """y (N, 2D, 2H, 2W, C) = scale * x (N, D, H, W, C), each voxel to eight."""
    sample, d, h, w, inside, c = _place(H, W, C, BS, BC)
    mask = inside[:, None] & (c < C)[None, :]
    v = tl.load(x + _at(sample, d, h, w, c, D, H, W, C), mask=mask, other=0.0).to(tl.float32) * scale
    v = v.to(y.dtype.element_ty)
    for i in tl.static_range(8):
        at = _at(sample, 2 * d + i // 4, 2 * h + i // 2 % 2, 2 * w + i % 2, c, 2 * D, 2 * H, 2 * W, C)
        tl.store(y + at, v, mask=mask)


@triton.jit
def pool_kernel(x, y, D, H, W, C, scale, BS: tl.constexpr, BC: tl.constexpr):
    """y (N, D, H, W, C) = scale * the sum of eight voxels of x (N, 2D, 2H, 2W, C), rounded once."""
    sample, d, h, w, inside, c = _place(H, W, C, BS, BC)
    mask = inside[:, None] & (c < C)[None, :]
    total = tl.zeros((BS, BC), tl.float32)
    for i in tl.static_range(8):
        at = _at(sample, 2 * d + i // 4, 2 * h + i // 2 % 2, 2 * w + i % 2, c, 2 * D, 2 * H, 2 * W, C)
        total += tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + _at(sample, d, h, w, c, D, H, W, C), (total * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _clamp(i, n):
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit
def _between(a, b):
    """The two values between neighbours: a quarter of the way from each."""
    return 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b


@triton.jit
def trilinear_kernel(x, y, D, H, W, C, BS: tl.constexpr, BC: tl.constexpr):
    """y (N, 2D, 2H, 2W, C) of x (N, D, H, W, C).

    Cell i of an axis lies between x[i - 1] and x[i] and holds y[2i - 1] and y[2i]. There is one cell more than voxels:
    beyond the border the edge voxel goes on.
    """
    sample, d, h, w, inside, c = _place(H + 1, W + 1, C, BS, BC)
    wide = inside[:, None] & (c < C)[None, :]
    d0, d1 = _clamp(d - 1, D), _clamp(d, D)
    h0, h1, w0, w1 = _clamp(h - 1, H), _clamp(h, H), _clamp(w - 1, W), _clamp(w, W)
    x000 = tl.load(x + _at(sample, d0, h0, w0, c, D, H, W, C), mask=wide, other=0.0).to(tl.float32)
    x001 = tl.load(x + _at(sample, d0, h0, w1, c, D, H, W, C), mask=wide, other=0.0).to(tl.float32)
    x010 = tl.load(x + _at(sample, d0, h1, w0, c, D, H, W, C), mask=wide, other=0.0).to(tl.float32)
    x011 = tl.load(x + _at(sample, d0, h1, w1, c, D, H, W, C), mask=wide, other=0.0).to(tl.float32)
    x100 = tl.load(x + _at(sample, d1, h0, w0, c, D, H, W, C), mask=wide, other=0.0).to(tl.float32)
    x101 = tl.load(x + _at(sample, d1, h0, w1, c, D, H, W, C), mask=wide, other=0.0).to(tl.float32)
    x110 = tl.load(x + _at(sample, d1, h1, w0, c, D, H, W, C), mask=wide, other=0.0).to(tl.float32)
    x111 = tl.load(x + _at(sample, d1, h1, w1, c, D, H, W, C), mask=wide, other=0.0).to(tl.float32)
    x000, x001 = _between(x000, x001)
    x010, x011 = _between(x010, x011)
    x100, x101 = _between(x100, x101)
    x110, x111 = _between(x110, x111)
    x000, x010 = _between(x000, x010)
    x001, x011 = _between(x001, x011)
    x100, x110 = _between(x100, x110)
    x101, x111 = _between(x101, x111)
    _pair(y, sample, d, 2 * h - 1, 2 * w - 1, inside, c, D, H, W, C, x000, x100)
    _pair(y, sample, d, 2 * h - 1, 2 * w, inside, c, D, H, W, C, x001, x101)
    _pair(y, sample, d, 2 * h, 2 * w - 1, inside, c, D, H, W, C, x010, x110)
    _pair(y, sample, d, 2 * h, 2 * w, inside, c, D, H, W, C, x011, x111)


@triton.jit
def _pair(y, sample, d, h, w, inside, c, D, H, W, C, a, b):
    """y[2d - 1] and y[2d] at (h, w) of the doubled plane, between a and b."""
    a, b = _between(a, b)
    good = inside & (h >= 0) & (h < 2 * H) & (w >= 0) & (w < 2 * W)
    mask = good[:, None] & (c < C)[None, :]
    at = _at(sample, 2 * d - 1, h, w, c, 2 * D, 2 * H, 2 * W, C)
    tl.store(y + at, a.to(y.dtype.element_ty), mask=mask & (d > 0))
    at = _at(sample, 2 * d, h, w, c, 2 * D, 2 * H, 2 * W, C)
    tl.store(y + at, b.to(y.dtype.element_ty), mask=mask & (d < D))


@triton.jit
def trilinear_backward_kernel(dy, dx, D, H, W, C, BS: tl.constexpr, BC: tl.constexpr):
    """dx (N, D, H, W, C) of dy (N, 2D, 2H, 2W, C): x[i] went into y[2i - 1 ... 2i + 2] by 1/4, 3/4, 3/4, 1/4, and at a
    border into its edge by both."""
    sample, d, h, w, inside, c = _place(H, W, C, BS, BC)
    mask = inside[:, None] & (c < C)[None, :]
    total = tl.zeros((BS, BC), tl.float32)
    for i in range(16):  # not unrolled: 64 loads in flight would take all registers
        j, k = i // 4, i % 4
        share = tl.where((j == 1) | (j == 2), 0.75, 0.25) * tl.where((k == 1) | (k == 2), 0.75, 0.25)
        plane, row = _clamp(2 * d - 1 + j, 2 * D), _clamp(2 * h - 1 + k, 2 * H)
        line = tl.zeros((BS, BC), tl.float32)
        for m in tl.static_range(4):
            at = _at(sample, plane, row, _clamp(2 * w - 1 + m, 2 * W), c, 2 * D, 2 * H, 2 * W, C)
            line += tl.load(dy + at, mask=mask, other=0.0).to(tl.float32) * (0.75 if 0 < m and m < 3 else 0.25)
        total += line * share
    tl.store(dx + _at(sample, d, h, w, c, D, H, W, C), total.to(dx.dtype.element_ty), mask=mask)


HELD = {"repeat": (2048, 4), "pool": (2048, 4), "trilinear": (1024, 4), "trilinear_backward": (1024, 4)}
KERNELS = {"repeat": repeat_kernel, "pool": pool_kernel, "trilinear": trilinear_kernel,
           "trilinear_backward": trilinear_backward_kernel}  # fmt: skip


def tile(name: str, c: int, plane: int) -> tuple[int, int]:
    """(voxels of a plane, channels) that a program holds; in the interpreter many, a step costs the same there."""
    bc = channel_block(c)
    return min((65536 if INTERPRETED else HELD[name][0]) // bc, triton.next_power_of_2(plane)), bc


def _launch(name: str, x: Tensor, small, size, *scale: float) -> Tensor:
    """KERNELS[name] from x into a new (N, C, *size), channels-last; small: the lesser of the two sizes."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    n, c = x.shape[:2]
    y = torch.empty(n, c, *size, dtype=stored(x.dtype), device=x.device, memory_format=torch.channels_last_3d)
    cells = [m + (name == "trilinear") for m in small]
    bs, bc = tile(name, c, cells[1] * cells[2])
    grid = (cells[0] * triton.cdiv(cells[1] * cells[2], bs) * triton.cdiv(c, bc), n)
    KERNELS[name][grid](x, y, *small, c, *scale, BS=bs, BC=bc, num_warps=HELD[name][1])
    return y.to(x.dtype)


def _double(name: str, x: Tensor, *scale: float) -> Tensor:
    return _launch(name, x, x.shape[2:], [2 * m for m in x.shape[2:]], *scale)


def _halve(name: str, x: Tensor, *scale: float) -> Tensor:
    half = [m // 2 for m in x.shape[2:]]
    return _launch(name, x, half, half, *scale)


def upsample(x: Tensor, mode: str) -> Tensor:
    """(N, C, D, H, W) -> (N, C, 2D, 2H, 2W); "nearest", or "trilinear" with align_corners=False."""
    return _double("repeat", x, 1.0) if mode == "nearest" else _double("trilinear", x)


def upsample_backward(dy: Tensor, mode: str) -> Tensor:
    return _halve("pool", dy, 1.0) if mode == "nearest" else _halve("trilinear_backward", dy)


def average_pool(x: Tensor) -> Tensor:
    """(N, C, D, H, W), even axes -> (N, C, D/2, H/2, W/2), the means of 2x2x2 voxels."""
    return _halve("pool", x, 0.125)


def average_pool_backward(dy: Tensor) -> Tensor:
    return _double("repeat", dy, 0.125)


def launches(arch: int = 90, dtype: torch.dtype = torch.float16):
    """What benchmarks/aot.py compiles: every kernel at the published widths, and for axes of one voxel, which Triton
    compiles as constants."""
    for c, one in (*((c, ()) for c in CHANNELS), (64, ("D", "H", "W"))):
        for name, kernel in KERNELS.items():
            bs, bc = tile(name, c, 1 << 12)
            source, target = kernel.arg_names[:2]
            yield {
                "name": f"{name}, {c}{', one voxel' if one else ''}", "kernel": kernel,
                "signature": dict.fromkeys((source, target), POINTER[dtype]) | {"scale": "fp32"} | dict.fromkeys(
                    "DHWC", "i32"),
                "constexprs": {"BS": bs, "BC": bc} | dict.fromkeys(one, 1), "num_warps": HELD[name][1],
                "num_stages": 3, "divisible": [source, target, "C"],
            }  # fmt: skip
