"""Scaled dot-product attention: the one function through which every network of this package attends."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale · q kᵀ + bias) v.

    q is (B, heads, Lq, D); k is (B, heads, Lk, D); v is (B, heads, Lk, Dv); all of one floating dtype.
    bias is additive and broadcasts to (B, heads, Lq, Lk); it is cast to the dtype of q.
    scale defaults to 1/sqrt(D). causal hides keys after the query and wants Lq == Lk.
    Returns (B, heads, Lq, Dv) in the dtype of q. Raises ValueError on other shapes.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        got = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"attention: wanted q, k, v of shape (B, heads, L, D), got {got}")
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"attention: causal wants as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
    if bias is not None:
        bias = bias.to(q.dtype)
        if causal:
            # torch takes a bias or is_causal, not both, so the triangle is written into the bias.
            future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            bias = bias.masked_fill(future, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, is_causal=causal and bias is None)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads·D) -> (B, heads, L, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads·D)."""
    return x.transpose(1, 2).flatten(2)
