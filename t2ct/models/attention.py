"""Heads of attention as a view of the channels; attention itself is t2ct.ops.attention."""

from torch import Tensor


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads·D) -> (B, heads, L, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, D) -> (B, L, heads·D)."""
    return x.transpose(1, 2).flatten(2)
