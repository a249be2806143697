"""The compiled CPU backend of t2ct.ops.conv: 3x3x3 over channels-last volumes, small ones, large ones by Winograd's
minimal filtering, and of any size to few channels. Without gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from t2ct.ops import norm_cpu
from t2ct.ops.dispatch import EMULATED, is_channels_last, large_pages, native, why_not

# csrc reads a convolution's weights once where oneDNN, which reorders them, moves them three times; that pays where
# there are many weights and few voxels (benchmarks/bench_conv.py).
MANY_WEIGHTS = 400_000
# Up to this N * C * X * Y torch's convolution does not ask oneDNN (use_mkldnn in ATen/native/Convolution.cpp).
TORCH_SMALL = 20480
# Up to how many voxels the kernel was measured to make a UNet's pass faster (benchmarks/bench_conv.py has it alone).
# In bfloat16, which oneDNN multiplies twice as fast as float32, fewer, but where it would lay out so many weights anew
# that a pass takes more memory than MONAI's.
FAST_VOXELS = {"avx512": 512, "avx2": 512}
FAST_BFLOAT16, VERY_MANY_WEIGHTS = 128, 2_000_000

# To at most so many channels `narrow` was measured to be faster than oneDNN (benchmarks/bench_conv.py).
NARROW = 4
LAST = torch.channels_last_3d
LANES = 16  # csrc takes channels in sixteens

# Multiplications a number and channel, of the direct form and of Winograd's; more of these where squares of 2 x 2 stand
# over or do not fill the EIGHT that are multiplied at once. Up to this share it was measured to be faster.
DIRECT, WINOGRAD = 27, 12
FILTERED, EIGHT = 0.5, 8


def fast_voxels() -> int:
    """The row of FAST_VOXELS that holds here."""
    return 0 if native() is None else FAST_VOXELS.get(native().isas()[norm_cpu.ISA], 0)


def few(voxels: int, weights: int, dtype: torch.dtype) -> bool:
    """Are the voxels of a 3x3x3 convolution so few under so many weights that `conv3d` is for it?"""
    most = fast_voxels()
    if dtype is torch.bfloat16 and weights < VERY_MANY_WEIGHTS:
        most = min(most, FAST_BFLOAT16)
    return voxels <= most and weights >= MANY_WEIGHTS


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
    y = large_pages(y)
    shift = None if bias is None else bias.detach().float().contiguous()
    shape = (n, *size, c, len(weight), x.dtype == torch.bfloat16)
    native().conv3d(shape, x.data_ptr(), weight.data_ptr(), 0 if shift is None else shift.data_ptr(), y.data_ptr(),
                    torch.get_num_threads(), norm_cpu.ISA)
    return y


def narrow_refusal(x: Tensor, padding: tuple[int, int, int]) -> str | None:
    """Why `narrow` does not take a convolution of stride 1, or None."""
    reason = why_not("cpu", x.device.type, x.dtype, is_channels_last(x))
    if reason is None and (x.shape[1] % LANES or not set(padding) <= {0, 1}):
        reason = f"it wants channels in sixteens and padding of 0 or 1, not {x.shape[1]} and {padding}"
    if reason is None and any(n + 2 * p < 3 for n, p in zip(x.shape[2:], padding, strict=True)):
        reason = f"nothing is left of {tuple(x.shape[2:])} voxels"
    return reason


def narrow(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int]) -> Tensor:
    """3x3x3 of stride 1 to few channels, padding 0 or 1 of each axis; what `narrow_refusal` takes."""
    n, c, *size = x.shape
    taps = weight.detach().permute(0, 2, 3, 4, 1).float().contiguous()
    made = [m + 2 * p - 2 for m, p in zip(size, padding, strict=True)]
    y = torch.empty(n, len(weight), *made, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    y = large_pages(y)
    shift = None if bias is None else bias.detach().float().contiguous()
    shape = (n, *size, c, len(weight), x.dtype == torch.bfloat16)
    native().conv3d_narrow(shape, padding, x.data_ptr(), taps.data_ptr(), 0 if shift is None else shift.data_ptr(),
                           y.data_ptr(), torch.get_num_threads(), norm_cpu.ISA)
    return y


def filters(channels: int, outputs: int, size: Sequence[int], dtype: torch.dtype) -> bool:
    """Is Winograd's form for a 3x3x3 convolution of stride 1 with a result of `size` voxels, padded along Y and Z?

    In bfloat16 it computes in float32, and is for processors that have no products of bfloat16 alone.
    """
    wide = dtype is torch.float32 or (dtype is torch.bfloat16 and dtype in EMULATED)
    if not fast_voxels() or channels % LANES or outputs % LANES or not wide:  # where nothing was measured: torch's own
        return False
    squares = -(-size[1] // 2) * -(-size[2] // 2)
    direct = few(prod(size), DIRECT * channels * outputs, dtype)
    return not direct and WINOGRAD * 4 * EIGHT * -(-squares // EIGHT) <= FILTERED * DIRECT * size[1] * size[2]


def winograd_bytes(n: int, size: Sequence[int], channels: int, outputs: int, pad: int, threads: int) -> int:
    """Bytes that `winograd` works in beside its tensors and its weights in float32, for x of `size` voxels."""
    return native().winograd_bytes((n, *size, channels, outputs, False), pad, threads)


def winograd(
    x: Tensor, weight: Tensor, bias: Tensor | None, pad: int, residual: Tensor | None = None,
    channel_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """3x3x3 of stride 1 with padding (pad, 1, 1), plus channel_bias and residual, where it `filters`; x channels-last.

    Sums are float32, along chains of 64 channels: over a volume the error against float64 is the direct form's or less,
    though a large voxel may leave a rounding error where the direct form multiplies it by zero. An infinity gives NaN.
    A slab of x gives the bits of the whole.
    """
    n, c, *size = x.shape
    made = size[0] + 2 * pad - 2
    if made < 1:
        raise ValueError(f"winograd: wanted planes for a result, got {size[0]} with padding {pad}")
    threads = torch.get_num_threads()
    taps = weight.detach().permute(0, 2, 3, 4, 1).float().contiguous()
    shift = torch.zeros(n, len(weight), dtype=torch.float32, device=x.device)
    for added in (bias, channel_bias):
        if added is not None:
            shift += added.detach()
    y = torch.empty(n, len(weight), made, *size[1:], dtype=x.dtype, device=x.device, memory_format=LAST)
    work = torch.empty(winograd_bytes(n, size, c, len(weight), pad, threads), dtype=torch.uint8, device=x.device)
    if residual is not None:
        residual = residual.contiguous(memory_format=LAST)
    native().conv3d_winograd((n, *size, c, len(weight), x.dtype == torch.bfloat16), pad, x.data_ptr(), taps.data_ptr(),
                             shift.data_ptr(), 0 if residual is None else residual.data_ptr(),
                             large_pages(y).data_ptr(), work.data_ptr(), threads, norm_cpu.ISA)
    return y
