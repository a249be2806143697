"""The compiled CPU backend of t2ct.ops.conv: 3x3x3 over small channels-last volumes, without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from t2ct.ops import norm_cpu
from t2ct.ops.dispatch import is_channels_last, native, why_not

# Up to how many voxels the kernel was measured to make a UNet's pass faster (benchmarks/bench_conv.py has it alone).
FAST_VOXELS = {"avx512": 512, "avx2": 512}


def fast_voxels() -> int:
    """The row of FAST_VOXELS that holds here."""
    return 0 if native() is None else FAST_VOXELS.get(native().isas()[norm_cpu.ISA], 0)


def refusal(x: Tensor) -> str | None:
    """Why the compiled kernel does not take x, or None."""
    reason = why_not("cpu", x.device.type, x.dtype, is_channels_last(x))
    if reason is None and x.dtype == torch.bfloat16:
        if not native().conv3d_bfloat16:
            return "bfloat16 wants a processor with AVX512-BF16"
        if x.shape[1] % 2:
            return f"bfloat16 wants an even number of channels, not {x.shape[1]}"
    return reason


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    reason = refusal(x)
    if reason:
        raise RuntimeError(f"conv3d: backend 'cpu' cannot run: {reason}")
    n, c, *size = x.shape
    weight = weight.contiguous()
    y = torch.empty(n, len(weight), *size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    shift = None if bias is None else bias.detach().float().contiguous()
    shape = (n, *size, c, len(weight), x.dtype == torch.bfloat16)
    native().conv3d(shape, x.data_ptr(), weight.data_ptr(), 0 if shift is None else shift.data_ptr(), y.data_ptr(),
                    torch.get_num_threads(), norm_cpu.ISA)
    return y
