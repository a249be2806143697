"""group_norm_silu_conv3d: half a residual block as one op, whose gradient recomputes what it would else have kept."""

from __future__ import annotations

import torch
from torch import Tensor

from t2ct.kernels import block_plan
from t2ct.kernels.chips import chip_of
from t2ct.ops import conv, conv_gradient, norm
from t2ct.ops.conv_autograd import bias_gradient, channel_bias_gradient
from t2ct.ops.dispatch import channels_last, choose, kernel, large_pages, watched

Stats = tuple[Tensor, Tensor]  # mean and rstd of every group, (N, groups), float32 or wider


def group_norm_silu_conv3d(
    x: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    groups: int,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    channel_bias: Tensor | None = None,
) -> Tensor:
    """conv3d(silu(group_norm(x))) [+ channel_bias] [+ residual], 3x3x3 with padding 1; differentiable.

    x                   (N, C, X, Y, Z), floating, any memory format; channels-last is fast
    gn_weight, gn_bias  (C,); conv_weight (O, C, 3, 3, 3); conv_bias (O,) or None
    residual            (N, O, X, Y, Z), added; channel_bias (N, O), added at every voxel (a time embedding)
    Returns             (N, O, X, Y, Z) in x's dtype; under autocast in its dtype
    Raises              ValueError and TypeError as `group_norm` and `conv3d`

    For the gradient x and the statistics of its groups are kept; the activated tensor is made again. Under Triton
    kernels/block_plan.py decides what of the norm runs inside the convolutions; see `t2ct explain`.
    """
    return group_norm_silu_conv3d_stats(
        x, gn_weight, gn_bias, conv_weight, conv_bias, groups, eps, residual, channel_bias=channel_bias
    )[0]


def group_norm_silu_conv3d_stats(
    x: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    groups: int,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    *,
    channel_bias: Tensor | None = None,
    stats: Stats | None = None,
    next_groups: int = 0,
    overwrite: bool = False,
) -> tuple[Tensor, Stats | None]:
    """`group_norm_silu_conv3d` in a chain: takes the statistics of x where they are known, and returns those of y for a
    GroupNorm of next_groups groups and the same eps, or None where they are not free (only Triton's are). overwrite:
    nobody needs x any more, so without a gradient its memory may hold the activated tensor."""
    op = "group_norm_silu_conv3d"
    norm._check(op, x, gn_weight, gn_bias, groups)
    conv.check(op, x, conv_weight, conv_bias, residual, channel_bias)
    if tuple(conv_weight.shape[2:]) != (3, 3, 3):
        raise ValueError(f"{op}: conv_weight must be (O, C, 3, 3, 3), got {tuple(conv_weight.shape)}")
    if watched(x):  # a compiler sees the pieces, and decides itself what to keep
        a = norm.group_norm_silu(x, gn_weight, gn_bias, groups, eps)
        return conv.conv3d(a, conv_weight, conv_bias, residual=residual, channel_bias=channel_bias), None
    tensors = (x, gn_weight, gn_bias, conv_weight, conv_bias, residual, channel_bias)
    mean, rstd = stats or (None, None)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, *following = _NormConv.apply(*tensors, mean, rstd, groups, eps, next_groups)
    else:
        y, *following = _forward(*tensors, mean, rstd, groups, eps, next_groups, overwrite)[0]
    return y, tuple(following) or None


def _forward(
    x, gn_weight, gn_bias, weight, bias, residual, channel_bias, mean, rstd, groups, eps, next_groups, overwrite=False,
    learns=False,
):  # fmt: skip
    """((y,) or (y, mean, rstd) of y's groups), then mean and rstd of x's. learns: a gradient follows."""
    op, x = "group_norm_silu_conv3d", norm._dense(x)
    way, in_epilogue = "apply", bool(next_groups)
    if conv.by_triton(op, x, conv.autocast(weight)[0]):
        voxels = len(x) * x.shape[2:].numel()
        chip = chip_of(x.device)
        way, in_epilogue = block_plan.forward(chip, x.dtype, voxels, x.shape[1], len(weight), in_epilogue)
    affine = None
    if way == "prologue":
        if mean is None:
            mean, rstd = kernel("norm", "merge_stats")(*kernel("norm", "partial_stats")(x), groups, eps)
        a, affine = x, (mean.float(), rstd.float(), gn_weight, gn_bias, groups)
    elif mean is None and not overwrite:
        a, mean, rstd = choose("group_norm", norm.FORWARD, x)[1](x, gn_weight, gn_bias, groups, eps, True)
    else:
        if mean is None:
            mean, m2, count = norm.group_stats(x, groups)
            rstd = (m2 / count + eps).rsqrt()
        out = x if overwrite else large_pages(torch.empty_like(x))
        a = choose("group_apply", norm.APPLY, x)[1](x, mean, rstd, gn_weight, gn_bias, groups, True, out)
    if learns and conv_gradient.few(a, weight):
        y = conv_gradient.forward_few(a, weight, bias)
        if channel_bias is not None:
            y += channel_bias[:, :, None, None, None]
        y = y if residual is None else y + residual
        return (y.to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype),), mean, rstd
    a, weight, bias, residual, channel_bias = conv.autocast(a, weight, bias, residual, channel_bias)
    if not conv.by_triton(op, a, weight):
        with torch.autocast(x.device.type, enabled=False):
            return (conv.conv3d(a, weight, bias, residual=residual, channel_bias=channel_bias),), mean, rstd
    fused = {"residual": None if residual is None else channels_last(residual), "channel_bias": channel_bias,
             "norm": affine}  # fmt: skip
    launch = kernel("conv", "conv3d")
    if not in_epilogue:
        return (launch(a, weight, bias, 1, 1, **fused),), mean, rstd
    y, parts = launch(a, weight, bias, 1, 1, **fused, stats=True)
    return (y, *kernel("norm", "merge_stats")(*parts, next_groups, eps)[:2]), mean, rstd


class _NormConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gn_weight, gn_bias, weight, bias, residual, channel_bias, mean, rstd, groups, eps, following):
        out, mean, rstd = _forward(
            x, gn_weight, gn_bias, weight, bias, residual, channel_bias, mean, rstd, groups, eps, following, learns=True
        )
        ctx.save_for_backward(norm._dense(x), gn_weight, gn_bias, weight, bias, channel_bias, mean, rstd)
        ctx.groups, ctx.dtype = groups, out[0].dtype
        ctx.residual = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, *_):
        x, gn_weight, gn_bias, weight, bias, channel_bias, mean, rstd = ctx.saved_tensors
        wanted, affine = ctx.needs_input_grad, (mean, rstd, gn_weight, gn_bias)
        w = weight if conv_gradient.few(x, weight) else weight.to(ctx.dtype)
        dx = dgw = dgb = dw = None
        of_norm = any(wanted[:3])
        if of_norm and _sums_in_epilogue(x, w):
            dy, of_norm = channels_last(dy), False
            statistics = mean.float(), rstd.float()
            dz, sums = kernel("conv_backward", "conv3d_backward_norm_silu")(
                dy, x, w, 1, *statistics, gn_weight, gn_bias, ctx.groups
            )  # fmt: skip
            dx, dgw, dgb = kernel("norm_backward", "from_sums")(
                dz, x, gn_weight, gn_bias, *statistics, sums, ctx.groups
            )  # fmt: skip
        if of_norm or wanted[3]:
            out = large_pages(torch.empty_like(x))
            a = choose("group_apply", norm.APPLY, x)[1](x, *affine, ctx.groups, True, out)
            da, dw = _conv_gradient(dy, a, w, (of_norm, wanted[3]))
            if da is not None:
                dx, dgw, dgb = choose("group_norm_backward", norm.BACKWARD, x)[1](
                    da.to(x.dtype), x, gn_weight, gn_bias, mean, rstd, ctx.groups, True
                )
        dw = None if dw is None else dw.to(weight.dtype)
        residual = None if ctx.residual is None else dy.to(ctx.residual)
        return (dx, dgw, dgb, dw, bias_gradient(dy, bias), residual, channel_bias_gradient(dy, channel_bias),
                None, None, None, None, None)  # fmt: skip


def _sums_in_epilogue(x: Tensor, weight: Tensor) -> bool:
    """Does the gradient of the convolution's input take the sums of the norm's along? Only Triton's can."""
    if not conv.by_triton("group_norm_silu_conv3d", x, weight):
        return False
    voxels = len(x) * x.shape[2:].numel()
    return block_plan.gradient(chip_of(x.device), x.dtype, voxels, x.shape[1], len(weight))


def _conv_gradient(dy: Tensor, a: Tensor, weight: Tensor, wanted: tuple[bool, bool]):
    if conv_gradient.few(a, weight):
        return conv_gradient.backward_few(dy, a, weight, wanted)
    a = a.to(weight.dtype)
    if conv.by_triton("group_norm_silu_conv3d", a, weight):
        return kernel("conv_backward", "conv3d_backward")(channels_last(dy), a, weight, 1, 1, wanted)
    return conv_gradient.backward(dy, a, weight, wanted)
