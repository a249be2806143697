"""Trilinear doubling by t2ct._C, with its gradient: a custom op where something watches, else direct.

Both directions are linear and each is the other's gradient, of any order. Callers have checked shapes; `choose` has
checked device, dtype and layout of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from t2ct.ops import norm_cpu
from t2ct.ops.dispatch import channels_last, large_pages, native, watched

LAST = torch.channels_last_3d


def _shape(x: Tensor) -> tuple[int, int, int, int, int, bool]:
    n, c, d, h, w = x.shape
    return n, d, h, w, c, x.dtype == torch.bfloat16


def _empty(like: Tensor, *size: int) -> Tensor:
    return large_pages(torch.empty((*like.shape[:2], *size), dtype=like.dtype, device=like.device, memory_format=LAST))


def double(x: Tensor, planes: tuple[int, int], out: Tensor | None = None) -> Tensor:
    """Planes [start, stop) along X of x doubled, into `out` where it is given. No gradient."""
    y = _empty(x, planes[1] - planes[0], 2 * x.shape[3], 2 * x.shape[4]) if out is None else out
    native().upsample(_shape(x), *planes, x.data_ptr(), y.data_ptr(), out is None, torch.get_num_threads(),
                      norm_cpu.ISA)
    return y


def _adjoint(dy: Tensor, planes: tuple[int, int], planes_of_x: int) -> Tensor:
    """The gradient of x from that of the doubled planes."""
    if planes != (0, 2 * planes_of_x):
        every = _empty(dy, 2 * planes_of_x, *dy.shape[3:]).zero_()
        every[:, :, planes[0] : planes[1]] = dy
        dy = every
    dy = channels_last(dy)
    dx = _empty(dy, *(m // 2 for m in dy.shape[2:]))
    native().upsample_backward(_shape(dx), dy.data_ptr(), dx.data_ptr(), torch.get_num_threads(), norm_cpu.ISA)
    return dx


@torch.library.custom_op("t2ct::trilinear", mutates_args=())
def _op(x: Tensor, start: int, stop: int, planes_of_x: int, adjoint: bool) -> Tensor:
    return _adjoint(x, (start, stop), planes_of_x) if adjoint else double(channels_last(x), (start, stop))


@_op.register_fake
def _(x, start, stop, planes_of_x, adjoint):
    if adjoint:
        return _empty(x, planes_of_x, x.shape[3] // 2, x.shape[4] // 2)
    return _empty(x, stop - start, 2 * x.shape[3], 2 * x.shape[4])


def _save(ctx, inputs, output):
    _, *ctx.planes, ctx.adjoint = inputs


_op.register_autograd(lambda ctx, dy: (_op(dy, *ctx.planes, not ctx.adjoint), None, None, None, None),
                      setup_context=_save)


class _Eager(torch.autograd.Function):
    """The custom op without its machinery."""

    @staticmethod
    def forward(ctx, x, planes, planes_of_x, adjoint):
        ctx.rest = planes, planes_of_x, not adjoint
        return _adjoint(x, planes, planes_of_x) if adjoint else double(x, planes)

    @staticmethod
    def backward(ctx, dy):
        return _Eager.apply(channels_last(dy), *ctx.rest), None, None, None


def upsample(x: Tensor, planes: tuple[int, int]) -> Tensor:
    """Planes [start, stop) along X of x doubled; differentiable."""
    if watched(x):
        return _op(x, *planes, x.shape[2], False)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Eager.apply(x, planes, x.shape[2], False)
    return double(x, planes)
