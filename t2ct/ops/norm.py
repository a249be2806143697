"""group_norm and group_norm_silu on x of shape (N, C, *spatial), in whatever memory format x has."""

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.ops import norm_cpu
from t2ct.ops.dispatch import choose, is_channels_last, kernel, large_pages, watched

# Numbers that the parts of a norm, statistics and apply, work on at a time where no kernel of ours runs: plain torch
# makes copies of them, in float64 and float32.
AT_ONCE = 2**22


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, voxels), contiguous, in `dtype`. torch's channels-last kernel on the CPU takes E[x^2] - E[x]^2 (2e-5 off
    on 64 channels of 64^3 voxels, other bits with other threads): the reference never shows it channels-last memory."""
    return x.to(dtype).reshape(x.shape[0], x.shape[1], -1).contiguous()


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """y in x's shape and dtype, and in the strides that torch.empty_like gives it."""
    y, like = y.to(x.dtype).view(x.shape), torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)


def _reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
               silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    acc = torch.promote_types(x.dtype, torch.float32)
    flat = _flat(x, acc)
    n, c, voxels = flat.shape
    z, mean, rstd = torch.native_group_norm(flat, weight.to(acc), bias.to(acc), n, c, voxels, groups, eps)
    return _shaped(F.silu(z, inplace=True) if silu else z, x), mean, rstd


def _backward_reference(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int,
                        silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    acc = mean.dtype
    dz, flat, w = _flat(dy, acc), _flat(x, acc), weight.to(acc)
    if silu:
        m, r = (s.repeat_interleave(x.shape[1] // groups, 1)[..., None] for s in (mean, rstd))
        dz = torch.ops.aten.silu_backward(dz, (flat - m) * r * w[:, None] + bias.to(acc)[:, None])
    dx, dw, db = torch.ops.aten.native_group_norm_backward(dz, flat, mean, rstd, w, *flat.shape, groups, [True] * 3)
    return _shaped(dx, x), dw.to(weight.dtype), db.to(bias.dtype)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """x in runs of whole planes of about AT_ONCE numbers."""
    return x.split(max(1, AT_ONCE // x[:, :, 0].numel()), 2) if x.dim() > 2 else (x,)


def _stats_reference(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    parts = []
    for piece in _pieces(x):
        variance, mean = torch.var_mean(piece.double().reshape(x.shape[0], groups, -1), dim=2, correction=0)
        count = piece[0].numel() // groups
        parts.append((mean, variance * count, count))
    return parts[0][:2] if len(parts) == 1 else merge_stats(*parts)[:2]


def _apply_reference(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool,
                     out: Tensor) -> Tensor:
    acc, shape = torch.promote_types(x.dtype, torch.float32), (*x.shape[:2], *[1] * (x.dim() - 2))
    scale = rstd.double().repeat_interleave(x.shape[1] // groups, 1) * weight.double()
    shift = bias.double() - mean.double().repeat_interleave(x.shape[1] // groups, 1) * scale
    for piece, into in zip(_pieces(x), _pieces(out), strict=True):
        z = torch.addcmul(shift.to(acc).view(shape), piece.to(acc), scale.to(acc).view(shape))
        into.copy_(F.silu(z, inplace=True) if silu else z)
    return out


# Backends in order of preference; every one returns the same tensors, statistics in float32 or wider.
FORWARD = {"triton": kernel("norm", "group_norm"), "cpu": norm_cpu.group_norm, "reference": _reference}
BACKWARD = {"triton": kernel("norm_backward", "group_norm_backward"), "cpu": norm_cpu.group_norm_backward,
            "reference": _backward_reference}
STATS = {"triton": kernel("norm", "group_stats"), "cpu": norm_cpu.group_stats, "reference": _stats_reference}
APPLY = {"triton": kernel("norm", "group_apply"), "cpu": norm_cpu.group_apply, "reference": _apply_reference}
TABLES = {"group_norm": FORWARD, "group_norm_backward": BACKWARD, "group_stats": STATS, "group_apply": APPLY}


@torch.library.custom_op("t2ct::group_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
             silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    return choose("group_norm", FORWARD, x)[1](x, weight, bias, groups, eps, silu)


@_forward.register_fake
def _(x, weight, bias, groups, eps, silu):
    stat = x.new_empty((x.shape[0], groups), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), stat, torch.empty_like(stat)


@torch.library.custom_op("t2ct::group_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int,
              silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    return choose("group_norm_backward", BACKWARD, x)[1](dy, x, weight, bias, mean, rstd, groups, silu)


@_backward.register_fake
def _(dy, x, weight, bias, mean, rstd, groups, silu):
    return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _gradient(ctx, dy, _mean, _rstd):
    return *_backward(dy, *ctx.saved_tensors, ctx.groups, ctx.silu), None, None, None


_forward.register_autograd(_gradient, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The custom op's forward and gradient without its machinery, for eager mode: see `watched`."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        x = _dense(x)
        y, mean, rstd = choose("group_norm", FORWARD, x)[1](x, weight, bias, groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.constants = groups, silu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        saved = ctx.saved_tensors  # once: activation checkpointing computes them when they are asked for
        kernel = choose("group_norm_backward", BACKWARD, saved[0])[1]
        return *kernel(dy, *saved, *ctx.constants), None, None, None


def _dense(x: Tensor) -> Tensor:
    """x, or its copy without gaps (channels-last where x's channels are adjacent), for the kernels."""
    return x if x.is_contiguous() or is_channels_last(x) else x.clone()


def _check_x(op: str, x: Tensor, groups: int) -> None:
    if x.dim() < 3 or groups < 1 or x.shape[1] % groups or not x.numel():
        raise ValueError(f"{op}: x must be non-empty, (N, C, *spatial), C a multiple of groups={groups}, "
                         f"got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must be floating point, got {x.dtype}")


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    _check_x(op, x, groups)
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != x.shape[1:2] or p.device != x.device:
            raise ValueError(f"{op}: {name} must be ({x.shape[1]},) on {x.device}, got {tuple(p.shape)} on {p.device}")


def _group_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    _check(op, x, weight, bias, groups)
    if watched(x):
        return _forward(x, weight, bias, groups, eps, silu)[0]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return _Eager.apply(x, weight, bias, groups, eps, silu)
    x = _dense(x)
    return choose("group_norm", FORWARD, x)[1](x, weight, bias, groups, eps, silu)[0]


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """Group normalisation, differentiable.

    x             (N, C, *spatial), float16, bfloat16, float32 or float64, any memory format
    weight, bias  (C,), any of these dtypes
    Returns       x's shape, dtype and memory format; statistics in float32 or wider.
    Raises        ValueError on a bad shape or device, TypeError where x is not floating point.
    """
    return _group_norm("group_norm", x, weight, bias, groups, eps, False)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    """silu(group_norm(x)), one op instead of two passes over a volume; arguments and errors as `group_norm`."""
    return _group_norm("group_norm_silu", x, weight, bias, groups, eps, True)


def group_stats(x: Tensor, groups: int) -> tuple[Tensor, Tensor, int]:
    """The statistics of every group, in a form that can be merged over slabs with `merge_stats`. No gradient.

    x        (N, C, *spatial), any floating dtype
    Returns  mean and M2 = sum((x - mean)^2), float64 (N, groups), and the count of numbers in one group.
    """
    _check_x("group_stats", x, groups)
    x = _dense(x.detach())
    mean, m2 = choose("group_stats", STATS, x)[1](x, groups)
    return mean, m2, x[0].numel() // groups


def merge_stats(*parts: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor, int]:
    """(mean, M2, count) of the union of disjoint parts, each as `group_stats` returns it, merged in the order given."""
    count = sum(n for _, _, n in parts)
    mean = torch.zeros_like(parts[0][0])
    m2 = torch.zeros_like(mean)
    for m, _, n in parts:
        mean += m * (n / count)
    for m, s, n in parts:
        m2 += s + n * (m - mean).square()
    return mean, m2, count


def group_apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool = False,
                out: Tensor | None = None) -> Tensor:
    """[silu]((x - mean) * rstd * weight + bias) with statistics that are given. No gradient.

    x             (N, C, *spatial), any floating dtype
    mean, rstd    (N, groups), rstd = (M2 / count + eps) ** -0.5
    weight, bias  (C,)
    out           where the result goes: x's shape, dtype, device and strides; x itself normalises in place
    Returns       out, or a new tensor with x's memory format.
    """
    _check("group_apply", x, weight, bias, groups)
    for name, p in (("mean", mean), ("rstd", rstd)):
        if p.shape != (x.shape[0], groups) or p.device != x.device:
            raise ValueError(f"group_apply: {name} must be ({x.shape[0]}, {groups}) on {x.device}, "
                             f"got {tuple(p.shape)} on {p.device}")
    if out is None:
        x = _dense(x.detach())
        out = large_pages(torch.empty_like(x))
    elif (out.shape, out.dtype, out.device, out.stride()) != (x.shape, x.dtype, x.device, x.stride()):
        raise ValueError(f"group_apply: out must be like x, {x.dtype} {tuple(x.shape)} with strides {x.stride()}, "
                         f"got {out.dtype} {tuple(out.shape)} with strides {out.stride()}")
    with torch.no_grad():
        return choose("group_apply", APPLY, x)[1](x, mean, rstd, weight, bias, groups, silu, out)
