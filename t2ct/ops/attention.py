"""attention: softmax(scale q k^T + bias) v, the one function through which every network of this package attends."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.ops.dispatch import UNPROVEN, Table, candidates, forced, kernel, watched, why_not

_forward, _backward = kernel("attention", "attention"), kernel("attention_backward", "attention_backward")
MAX_HEAD_DIM, MAX_GRID_WIDTH = 128, 128  # of the Triton kernels
Relative = tuple[Tensor, tuple[int, int]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    *,
    relative_bias: Relative | None = None,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v, differentiable.

    q, k, v         (B, H, N, D), (B, H, M, D), (B, H, M, Dv), one floating dtype, any strides
    bias            added to the logits, broadcasts to (B, H, N, M); cast to q's dtype
    scale           default 1/sqrt(D)
    causal          hides keys after the query; wants N == M
    relative_bias   (table (H, (2h-1)(2w-1)), (h, w)): added to the logits by the offset of query and key on an h x w
                    grid, N == M == h·w; row-major offsets from (1-h, 1-w) on (CT-ViT's continuous position bias)
    q_scale, k_scale  (D,) both or neither: q and k are brought to unit length, then multiplied by them
    Returns         (B, H, N, Dv) in q's dtype; 0 where the bias forbids every key
    Raises          ValueError for other shapes, dtypes and devices; RuntimeError for a forced backend that cannot run

    Backends: triton (never stores N x M), sdpa (torch's), xformers, reference (the formula in float32 or wider).
    """
    _check(q, k, v, bias, causal, relative_bias, q_scale, k_scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    backend = _choose(q, k, v, scale, relative_bias)
    table, grid = relative_bias or (None, (1, 1))
    if backend == "triton":
        # No row beyond: views of a projection stay views, and nothing of N x M is made.
        call = _op if watched(q) else _Eager.apply
        return call(q, k, v, bias, table, q_scale, k_scale, scale, causal, grid[1])[0]
    if q_scale is not None and k_scale is not None:
        q, k = F.normalize(q, dim=-1) * q_scale, F.normalize(k, dim=-1) * k_scale
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast learned scales promote to float32
    if table is not None:
        grown = expand_relative(table, *grid)
        bias = grown if bias is None else bias + grown
    return TABLE[backend](q, k, v, None if bias is None else bias.to(q.dtype), scale, causal)


def expand_relative(table: Tensor, height: int, width: int) -> Tensor:
    """(H, (2h-1)(2w-1)) -> (1, H, h·w, h·w): the bias of every pair of tokens, rows the queries."""
    row = torch.arange(height, device=table.device).repeat_interleave(width)
    column = torch.arange(width, device=table.device).repeat(height)
    index = (row[:, None] - row + height - 1) * (2 * width - 1) + (column[:, None] - column + width - 1)
    return table[:, index].unsqueeze(0)


def _future(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)


def _reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    s = scale * (q.to(wide) @ k.to(wide).transpose(-1, -2))
    if bias is not None:
        s = s + bias.to(wide)
    if causal:
        s = s.masked_fill(_future(q, k), float("-inf"))
    if bias is None:
        return (s.softmax(-1) @ v.to(wide)).to(q.dtype)
    dead = (s == float("-inf")).all(-1, keepdim=True)  # no key is allowed: 0, as from the other backends, not NaN
    return (s.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0) @ v.to(wide)).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    if causal and bias is not None:  # torch takes a bias or is_causal, not both
        bias = bias.masked_fill(_future(q, k), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, is_causal=causal and bias is None)


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, causal: bool) -> Tensor:
    """As xformers documents memory_efficient_attention: tensors (B, N, H, D), attn_bias (B, H, N, M) or a causal mask.
    No GPU has run this: a stand-in of that signature has, and xformers checked what it is handed (tests)."""
    from xformers import ops

    if torch.is_grad_enabled() and bias is not None and bias.requires_grad:
        q = q if q.requires_grad or k.requires_grad or v.requires_grad else q.detach().requires_grad_()  # else no graph
    if causal and bias is not None:
        bias = bias.masked_fill(_future(q, k), float("-inf"))
    mask: Any = ops.LowerTriangularMask() if causal and bias is None else bias
    if isinstance(mask, Tensor):  # its kernels want rows of bias at multiples of 8 numbers
        m = mask.shape[-1]
        mask = F.pad(mask, (0, -m % 8)).expand(*q.shape[:3], -1)[..., :m]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale).transpose(1, 2)


TABLE: Table = {"triton": _forward, "xformers": _xformers, "sdpa": _sdpa, "reference": _reference}
TABLES = {"attention": TABLE}


def why_not_attention(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """As dispatch.why_not; attention has no memory format to speak of."""
    if backend == "xformers":
        if find_spec("xformers") is None:
            return "xformers is not installed: pip install t2ct[gpu]"
        if device != "cuda":
            return f"the tensors are on {device}"
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"it takes float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    return why_not(backend, device, dtype)


def _choose(q: Tensor, k: Tensor, v: Tensor, scale: float, relative_bias: Relative | None) -> str:
    if q.device.type != "cuda" and forced() not in TABLE:
        return "sdpa"
    reason: str | None = None
    backend = ""
    for backend in candidates(TABLE):
        if backend == "triton" and q.is_meta:
            return backend  # shapes alone: the custom op has them
        reason = why_not_attention(backend, q.device.type, q.dtype)
        if backend == "triton" and reason is None:
            reason = _shapes(q, v, scale, relative_bias)
        reason = reason or (None if forced() == backend else UNPROVEN.get(backend))
        if reason is None:
            return backend
    raise RuntimeError(f"attention: backend {backend!r} cannot run: {reason}")


def _shapes(q: Tensor, v: Tensor, scale: float, relative_bias: Relative | None) -> str | None:
    if not 1 <= q.shape[-1] <= MAX_HEAD_DIM or v.shape[-1] != q.shape[-1]:
        return f"it has head dims 1 to {MAX_HEAD_DIM}, one for q, k and v, not {q.shape[-1]} and {v.shape[-1]}"
    if scale <= 0:
        return f"it wants a positive scale, not {scale}"
    if relative_bias is not None and relative_bias[1][1] > MAX_GRID_WIDTH:
        return f"its relative bias has grids up to {MAX_GRID_WIDTH} wide, not {relative_bias[1][1]}"
    return None


def _rows_first(x: Tensor) -> Tensor:
    b, h, n, d = x.shape
    return x.new_empty(b, n, h, d).transpose(1, 2)


@torch.library.custom_op("t2ct::attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, table: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, scale: float, causal: bool, width: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _forward(q, k, v, bias, table, q_scale, k_scale, scale, causal, width)


@_op.register_fake
def _(q, k, v, bias, table, q_scale, k_scale, scale, causal, width):
    return _rows_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("t2ct::attention_backward", mutates_args=())
def _op_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, table: Tensor | None, q_scale: Tensor | None,
    k_scale: Tensor | None, out: Tensor, lse: Tensor, scale: float, causal: bool, width: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    made = _backward(do, q, k, v, bias, table, q_scale, k_scale, out, lse, scale, causal, width, needs)
    return [g for g, wanted in zip(made, needs, strict=True) if wanted]


@_op_backward.register_fake
def _(do, q, k, v, bias, table, q_scale, k_scale, out, lse, scale, causal, width, needs):
    rest = (None if t is None else t.new_empty(t.shape) for t in (bias, table, q_scale, k_scale))
    like = [_rows_first(q), _rows_first(k), _rows_first(k), *rest]
    return [t for t, wanted in zip(like, needs, strict=True) if wanted]


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.causal, ctx.width = inputs
    ctx.save_for_backward(*tensors, *output)


def _arguments(ctx):
    needs = [bool(n) for n in ctx.needs_input_grad[:7]]
    return (*ctx.saved_tensors, ctx.scale, ctx.causal, ctx.width, needs), needs


def _gradient(ctx, do, _):
    arguments, needs = _arguments(ctx)
    made = iter(_op_backward(do, *arguments))
    return *(next(made) if wanted else None for wanted in needs), None, None, None


_op.register_autograd(_gradient, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The custom op without its machinery."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, _):
        arguments, needs = _arguments(ctx)
        made = _backward(do, *arguments)
        return *(g if wanted else None for g, wanted in zip(made, needs, strict=True)), None, None, None


def _check(q, k, v, bias, causal, relative_bias, q_scale, k_scale) -> None:
    got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
    fit = q.ndim == k.ndim == v.ndim == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    if not fit or k.shape[2] != v.shape[2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: wanted q, k, v of shape (B, heads, N, D), (B, heads, M, D), (B, heads, M, Dv), "
                         f"got {got}")  # fmt: skip
    if not (q.numel() and k.numel() and v.numel()):
        raise ValueError(f"attention: wanted tensors that are not empty, got {got}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"attention: wanted q, k, v of one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"attention: causal wants as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    wanted = (*q.shape[:3], k.shape[2])
    if bias is not None:
        shape = tuple(bias.shape)
        if len(shape) > 4 or any(m not in (1, n) for m, n in zip(shape[::-1], wanted[::-1], strict=False)):
            raise ValueError(f"attention: bias must broadcast to {wanted}, got {shape}")
    if (q_scale is None) != (k_scale is None):
        raise ValueError("attention: wanted q_scale and k_scale both or neither, got one")
    for name, t in (("q_scale", q_scale), ("k_scale", k_scale)):
        if t is not None and t.shape != q.shape[3:]:
            raise ValueError(f"attention: {name} must be ({q.shape[3]},), got {tuple(t.shape)}")
    table = None
    if relative_bias is not None:
        table, (h, w) = relative_bias
        rows = (q.shape[1], (2 * h - 1) * (2 * w - 1))
        if table.shape != rows or q.shape[2] != h * w or k.shape[2] != h * w:
            raise ValueError(f"attention: relative_bias on a {h} x {w} grid wants a table {rows} and {h * w} tokens, "
                             f"got {tuple(table.shape)} and {q.shape[2]}, {k.shape[2]}")  # fmt: skip
    named = {"k": k, "v": v, "bias": bias, "relative_bias": table, "q_scale": q_scale, "k_scale": k_scale}
    for name, t in named.items():
        if t is not None and t.device != q.device:
            raise ValueError(f"attention: {name} must be on {q.device}, got {t.device}")
