"""How the convolution kernels are launched: a function of architecture, dtype and shape; nothing is tuned at run time.

The table was reasoned, not measured: benchmarks/tune.py measures it on the GPU it runs on and prints rows for it.
"""

from dataclasses import dataclass
from functools import cache

import torch

POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}  # what Triton's compiler calls them
FILL = 528  # programs that keep the largest chips busy: four for each of 132 multiprocessors


@dataclass(frozen=True)
class Launch:
    """bm rows (voxels; of a weight gradient: output channels) by bn columns, bk channels a step."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    tma: bool = False


# (architecture, columns up to) -> launch for 16-bit tensors; the first row that fits counts.
TABLE = {
    80: ((32, Launch(128, 32, 32, 4, 4)), (64, Launch(128, 64, 64, 4, 3)), (1 << 30, Launch(128, 128, 32, 8, 4))),
    90: (
        (32, Launch(128, 32, 64, 4, 4)),
        (64, Launch(128, 64, 64, 4, 4)),
        (128, Launch(128, 128, 64, 8, 3)),
        (1 << 30, Launch(128, 256, 64, 8, 3)),
    ),
    100: (
        (32, Launch(128, 32, 64, 4, 4)),
        (64, Launch(128, 64, 64, 4, 4)),
        (1 << 30, Launch(128, 128, 64, 8, 4)),
    ),
}
FLOAT32, FLOAT32_GRADIENT = Launch(64, 64, 32, 4, 2), Launch(64, 64, 16, 4, 2)
GRADIENT = {80: Launch(64, 64, 32, 4, 4), 90: Launch(128, 128, 64, 8, 3), 100: Launch(128, 128, 64, 8, 3)}


def interpreted() -> bool:
    """Do the kernels run in Triton's interpreter?"""
    import triton  # here: the launch table is of use without it

    return triton.knobs.runtime.interpret


def stored(dtype: torch.dtype) -> torch.dtype:
    """What a kernel writes for `dtype`: the interpreter would truncate to bfloat16, so there it writes float32."""
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


@cache
def architecture(device: torch.device | int) -> int:
    """The row of TABLE for a device: 80, 90 or 100. Consumer chips (8.6, 8.9, 12.0) have the tensor cores of 80."""
    if isinstance(device, int):  # compiling ahead of time
        return device
    if device.type != "cuda":
        return 80
    major = torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100}.get(major, 80)


def power(n: int, least: int = 16, most: int = 1 << 30) -> int:
    """The power of two from n on, within bounds."""
    return min(most, max(least, 1 << (n - 1).bit_length()))


def launch(
    device: torch.device | int, dtype: torch.dtype, c: int, o: int, gradient=False, stats=False, sums=False
) -> Launch:
    """The launch for C -> O channels; blocks never wider than the channels there are.

    With statistics of y in the epilogue, or sums of a norm's gradient, a block has at most 128 columns: at 256 the
    registers run out. For sums eight warps share it.
    """
    arch = architecture(device)
    if not isinstance(device, int) and interpreted():  # a step costs the same whatever its size
        return Launch(64, power(c), 128, 4, 1) if gradient else Launch(256, power(o, most=64), power(c, most=64), 4, 1)
    if dtype == torch.float32:
        at = FLOAT32_GRADIENT if gradient else FLOAT32
    elif gradient:
        at = GRADIENT[arch]
    else:
        at = next(row for most, row in TABLE[arch] if o <= most)
    if gradient:
        return Launch(power(o, 16, at.bm), power(c, 16, at.bn), at.bk, at.warps, at.stages)
    bn = min(at.bn, 128) if stats or sums else at.bn
    tma, warps = arch >= 90 and dtype != torch.float32, 8 if sums else at.warps
    return Launch(at.bm, power(o, 16, bn), power(c, 16, at.bk), warps, at.stages, tma)


def box(grid, rows: int, deep: int = 1 << 30) -> tuple[int, int, int]:
    """Powers of two (d, h, w) with product `rows`: near a cube, no longer than the grid while another axis has room,
    d at most `deep`."""
    dims = [1, 1, 1]
    while dims[0] * dims[1] * dims[2] < rows:
        room = [i for i in (2, 1, 0) if dims[i] < grid[i] and (i or 2 * dims[0] <= deep)] or [0]
        dims[min(room, key=lambda i: dims[i])] *= 2
    return dims[0], dims[1], dims[2]


def splits_of(programs: int, boxes: int) -> int:
    """Into how many parts a sum over boxes is cut so that the chip is full; never more than there are boxes."""
    return max(1, min(boxes, -(-FILL // programs)))
