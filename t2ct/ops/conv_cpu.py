"""The compiled CPU backend of t2ct.ops.conv: 3x3x3 over small channels-last volumes, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from t2ct.ops import norm_cpu
from t2ct.ops.dispatch import is_channels_last, native


def takes(x: Tensor) -> bool:
    """Does the compiled kernel serve x? bfloat16 wants a processor that multiplies it, and pairs of channels."""
    if native() is None or x.device.type != "cpu" or not is_channels_last(x):
        return False
    if x.dtype == torch.bfloat16:
        return native().conv3d_bfloat16 and x.shape[1] % 2 == 0
    return x.dtype == torch.float32


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not takes(x):
        raise RuntimeError(f"conv3d: backend 'cpu' takes an even number of channels, and bfloat16 only where the "
                           f"processor has AVX512-BF16, got {tuple(x.shape)} {x.dtype}")
    n, c, *size = x.shape
    y = torch.empty(n, len(weight), *size, dtype=x.dtype, memory_format=torch.channels_last_3d)
    shift = None if bias is None else bias.detach().float().contiguous()
    shape = (n, *size, c, len(weight), x.dtype == torch.bfloat16)
    native().conv3d(shape, x.data_ptr(), weight.data_ptr(), 0 if shift is None else shift.data_ptr(), y.data_ptr(),
                    torch.get_num_threads(), norm_cpu.ISA)
    return y
