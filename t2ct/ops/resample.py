"""upsample and average_pool: doubling and halving of every axis of x of shape (N, C, X, Y, Z)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.ops.dispatch import Table, channels_last, choose, forced, kernel, watched


def _upsample_reference(x: Tensor, mode: str) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode=mode)


def _pool_reference(x: Tensor) -> Tensor:
    """Three strided additions: on a CPU torch's avg_pool3d leaves channels-last, is an order slower and has no
    bfloat16. Rounded once to x's dtype."""
    h = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    h = h[:, :, ::2] + h[:, :, 1::2]
    h = h[:, :, :, ::2] + h[:, :, :, 1::2]
    return ((h[..., ::2] + h[..., 1::2]) * 0.125).to(x.dtype)


UPSAMPLE: Table = {"triton": kernel("resample", "upsample"), "reference": _upsample_reference}
POOL: Table = {"triton": kernel("resample", "average_pool"), "reference": _pool_reference}
TABLES = {"upsample": UPSAMPLE, "average_pool": POOL}
_upsample_backward = kernel("resample", "upsample_backward")
_pool_backward = kernel("resample", "average_pool_backward")


@torch.library.custom_op("t2ct::resample", mutates_args=())
def _op(x: Tensor, mode: str, adjoint: bool) -> Tensor:
    """mode "nearest", "trilinear" or "pool"; adjoint: its gradient instead, x being that of the result."""
    if mode == "pool":
        return (_pool_backward if adjoint else POOL["triton"])(channels_last(x))
    return (_upsample_backward if adjoint else UPSAMPLE["triton"])(channels_last(x), mode)


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
        return POOL["triton"](x) if mode == "pool" else UPSAMPLE["triton"](x, mode)

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


def upsample(x: Tensor, mode: str = "nearest") -> Tensor:
    """Every axis doubled, differentiable.

    x       (N, C, X, Y, Z), floating, any memory format
    mode    "nearest", or "trilinear" with align_corners=False
    Returns (N, C, 2X, 2Y, 2Z) in x's dtype. Raises ValueError on other shapes and modes.
    """
    _check("upsample", x)
    if mode not in ("nearest", "trilinear"):
        raise ValueError(f'upsample: mode must be "nearest" or "trilinear", got {mode!r}')
    return _run("upsample", UPSAMPLE, x, mode, mode)


def average_pool(x: Tensor) -> Tensor:
    """The mean of every 2x2x2 voxels, rounded once to x's dtype; differentiable.

    x       (N, C, X, Y, Z), floating, even axes, any memory format
    Returns (N, C, X/2, Y/2, Z/2) in x's dtype. Raises ValueError on other shapes.
    """
    _check("average_pool", x)
    if any(m % 2 for m in x.shape[2:]):
        raise ValueError(f"average_pool: the axes of x must be even, got {tuple(x.shape[2:])}")
    return _run("average_pool", POOL, x, "pool")
