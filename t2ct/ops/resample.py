"""upsample and average_pool: doubling and halving of every axis of x of shape (N, C, X, Y, Z)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.ops import resample_cpu
from t2ct.ops.dispatch import (
    Table,
    candidates,
    channels_last,
    choose,
    forced,
    is_channels_last,
    kernel,
    refusal,
    watched,
)


def _upsample_reference(x: Tensor, mode: str) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode=mode)


def _pool_reference(x: Tensor) -> Tensor:
    """Three strided additions: on a CPU torch's avg_pool3d leaves channels-last, is an order slower and has no
    bfloat16. Rounded once to x's dtype."""
    h = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    h = h[:, :, ::2] + h[:, :, 1::2]
    h = h[:, :, :, ::2] + h[:, :, :, 1::2]
    return ((h[..., ::2] + h[..., 1::2]) * 0.125).to(x.dtype)


NEAREST: Table = {"triton": kernel("resample", "upsample"), "reference": _upsample_reference}
TRILINEAR: Table = {"triton": NEAREST["triton"], "cpu": resample_cpu.upsample, "reference": _upsample_reference}
POOL: Table = {"triton": kernel("resample", "average_pool"), "reference": _pool_reference}
UPSAMPLE = {"nearest": NEAREST, "trilinear": TRILINEAR}
TABLES = {"upsample_nearest": NEAREST, "upsample_trilinear": TRILINEAR, "average_pool": POOL}
_upsample_backward = kernel("resample", "upsample_backward")
_pool_backward = kernel("resample", "average_pool_backward")


@torch.library.custom_op("t2ct::resample", mutates_args=())
def _op(x: Tensor, mode: str, adjoint: bool) -> Tensor:
    """mode "nearest", "trilinear" or "pool"; adjoint: its gradient instead, x being that of the result."""
    if mode == "pool":
        return (_pool_backward if adjoint else POOL["triton"])(channels_last(x))
    return (_upsample_backward if adjoint else NEAREST["triton"])(channels_last(x), mode)


@_op.register_fake
def _(x, mode, adjoint):
    size = [m // 2 if (mode == "pool") != adjoint else 2 * m for m in x.shape[2:]]
    return channels_last(x.new_empty(*x.shape[:2], *size))


def _save(ctx, inputs, output):
    _, ctx.mode, ctx.adjoint = inputs


_op.register_autograd(lambda ctx, dy: (_op(dy, ctx.mode, not ctx.adjoint), None, None), setup_context=_save)


class _Eager(torch.autograd.Function):
    """The custom op without its machinery; linear, so nothing is kept."""

    @staticmethod
    def forward(ctx, x, mode):
        ctx.mode = mode
        return POOL["triton"](x) if mode == "pool" else NEAREST["triton"](x, mode)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dy = channels_last(dy)
        return _pool_backward(dy) if ctx.mode == "pool" else _upsample_backward(dy, ctx.mode), None


def _check(op: str, x: Tensor) -> None:
    if x.dim() != 5 or not x.numel() or not x.is_floating_point():
        raise ValueError(f"{op}: x must be non-empty, floating (N, C, X, Y, Z), got {tuple(x.shape)} {x.dtype}")


def _run(op: str, table: Table, x: Tensor, mode: str, *arguments: str) -> Tensor:
    if x.device.type != "cuda" and forced() != "triton":  # plain torch, which a compiler may fuse
        return table["reference"](x, *arguments)
    backend, run = choose(op, table, x)
    if backend != "triton":
        return run(x, *arguments)
    return _op(x, mode, False) if watched(x) else _Eager.apply(x, mode)


def _sources(x: Tensor, planes: tuple[int, int]) -> tuple[int, int]:
    """The planes of x that `planes` of the doubled volume see; two where x has them, so that one alone never looks
    like another memory format to torch, which computes by that."""
    first, last = (planes[0] + 1) // 2 - 1, planes[1] // 2 + 1
    return max(0, min(first, x.shape[2] - 2)), min(x.shape[2], max(last, 2))


def _by_cpu(x: Tensor, mode: str) -> bool:
    """Does the compiled form run? Unasked only where nothing watches: plain torch has every transform, and a compiler
    may fuse it. The size is no reason, though below 10,000 numbers torch is some microseconds faster: a slab of a
    volume has the bits of the whole."""
    if mode != "trilinear" or "cpu" not in candidates(TRILINEAR):
        return False
    if forced() == "cpu":  # or choose raises
        return choose("upsample", TRILINEAR, x)[0] == "cpu"
    return not watched(x) and refusal("cpu", x) is None


def _upsample(x: Tensor, mode: str, planes: tuple[int, int]) -> Tensor:
    if _by_cpu(x, mode):
        return resample_cpu.upsample(x, planes)
    if planes == (0, 2 * x.shape[2]):
        return _run("upsample", UPSAMPLE[mode], x, mode, mode)
    first, last = _sources(x, planes)
    layout = torch.channels_last_3d if is_channels_last(x) else torch.contiguous_format
    x = x[:, :, first:last].contiguous(memory_format=layout)
    doubled = _run("upsample", UPSAMPLE[mode], x, mode, mode)
    return doubled[:, :, planes[0] - 2 * first : planes[1] - 2 * first]


def _check_planes(x: Tensor, planes: tuple[int, int] | None) -> tuple[int, int]:
    every = (0, 2 * x.shape[2])
    if planes is None:
        return every
    pair = isinstance(planes, (tuple, list)) and len(planes) == 2 and all(isinstance(p, int) for p in planes)
    if not pair or not 0 <= planes[0] < planes[1] <= every[1]:
        raise ValueError(f"upsample: planes must be (start, stop), 0 <= start < stop <= {every[1]}, got {planes!r}")
    return planes[0], planes[1]


def _check_out(x: Tensor, out: Tensor, planes: tuple[int, int]) -> None:
    shape = (*x.shape[:2], planes[1] - planes[0], 2 * x.shape[3], 2 * x.shape[4])
    if (out.shape, out.dtype, out.device) != (shape, x.dtype, x.device) or not is_channels_last(out):
        raise ValueError(f"upsample: out must be {x.dtype} {shape} on {x.device} in channels-last memory, "
                         f"got {out.dtype} {tuple(out.shape)} on {out.device} with strides {out.stride()}")
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        raise ValueError("upsample: out must come without a gradient, got x or out that requires one")
    if not watched(x) and out.data_ptr() < _end(x) and x.data_ptr() < out.data_ptr() + out.nbytes:
        raise ValueError("upsample: out must be memory apart from x, got tensors that overlap")


def _end(x: Tensor) -> int:
    """The address after x's last number."""
    last = sum((m - 1) * s for m, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size()


def upsample(x: Tensor, mode: str = "nearest", planes: tuple[int, int] | None = None, *,
             out: Tensor | None = None) -> Tensor:
    """Every axis doubled, differentiable.

    x       (N, C, X, Y, Z), floating, any memory format
    mode    "nearest", or "trilinear" with align_corners=False
    planes  (start, stop): only these planes along X of the doubled volume, 0 <= start < stop <= 2X; the same bits as
            `upsample(x, mode)[:, :, start:stop]`, without the others' work
    out     where the result goes: its shape, x's dtype and device, channels-last memory apart from x's (strides of axes
            of one voxel or sample are free, so it may be planes of a larger volume where N = 1); without gradient
    Returns (N, C, 2X or stop - start, 2Y, 2Z) in x's dtype. Raises ValueError on other shapes, modes, planes and outs.
    """
    _check("upsample", x)
    if mode not in ("nearest", "trilinear"):
        raise ValueError(f'upsample: mode must be "nearest" or "trilinear", got {mode!r}')
    some = _check_planes(x, planes)
    if out is None:
        return _upsample(x, mode, some)
    _check_out(x, out, some)
    with torch.no_grad():
        if _by_cpu(x, mode) and not watched(x):
            return resample_cpu.double(x, some, out)
        return out.copy_(_upsample(x, mode, some))


def average_pool(x: Tensor) -> Tensor:
    """The mean of every 2x2x2 voxels, rounded once to x's dtype; differentiable.

    x       (N, C, X, Y, Z), floating, even axes, any memory format
    Returns (N, C, X/2, Y/2, Z/2) in x's dtype. Raises ValueError on other shapes.
    """
    _check("average_pool", x)
    if any(m % 2 for m in x.shape[2:]):
        raise ValueError(f"average_pool: the axes of x must be even, got {tuple(x.shape[2:])}")
    return _run("average_pool", POOL, x, "pool")
