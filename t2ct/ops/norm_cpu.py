"""The compiled CPU backend of t2ct.ops.norm: passes addresses and sizes of channels-last tensors to t2ct._C.

Callers have checked shapes; `why_not("cpu", ...)` has checked device, dtype and layout.
"""

import torch
from torch import Tensor

from t2ct.ops.dispatch import large_pages, native

ISA = 0  # index into native().isas(): 0 is the best one that this machine has; the tests walk through the others


def _shape(x: Tensor, groups: int) -> tuple[int, int, int, int, bool]:
    n, c = x.shape[:2]
    return n, x.numel() // (n * c), c, groups, x.dtype == torch.bfloat16


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """`tensor` in x's dtype with x's strides, copied only where it differs."""
    if tensor.stride() == x.stride() and tensor.dtype == x.dtype:
        return tensor
    return torch.empty_like(x).copy_(tensor)


def _float(tensor: Tensor) -> Tensor:
    if tensor.dtype is torch.float32 and tensor.is_contiguous():
        return tensor
    return tensor.detach().to(torch.float32).contiguous()


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
               silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, y = _float(weight), _float(bias), large_pages(torch.empty_like(x))
    mean = torch.empty(x.shape[0], groups, device=x.device)
    rstd = torch.empty_like(mean)
    native().group_norm(_shape(x, groups), x.data_ptr(), y.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps, silu,
                        mean.data_ptr(), rstd.data_ptr(), torch.get_num_threads(), ISA)
    return y, mean, rstd


def group_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int,
                        silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    dy, w, b, mean, rstd = _like(dy, x), _float(weight), _float(bias), _float(mean), _float(rstd)
    dx, dw, db = large_pages(torch.empty_like(x)), torch.empty_like(w), torch.empty_like(b)
    native().group_norm_backward(
        _shape(x, groups), dy.data_ptr(), x.data_ptr(), dx.data_ptr(), mean.data_ptr(), rstd.data_ptr(), w.data_ptr(),
        b.data_ptr(), silu, dw.data_ptr(), db.data_ptr(), torch.get_num_threads(), ISA)
    return dx, dw.to(weight.dtype), db.to(bias.dtype)


def group_stats(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    mean = torch.empty(x.shape[0], groups, dtype=torch.float64, device=x.device)
    m2 = torch.empty_like(mean)
    native().group_stats(_shape(x, groups), x.data_ptr(), mean.data_ptr(), m2.data_ptr(), torch.get_num_threads(), ISA)
    return mean, m2


def group_apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, silu: bool,
                out: Tensor) -> Tensor:
    mean, rstd, weight, bias = _float(mean), _float(rstd), _float(weight), _float(bias)
    native().group_apply(_shape(x, groups), x.data_ptr(), out.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
                         weight.data_ptr(), bias.data_ptr(), silu, torch.get_num_threads(), ISA)
    return out
