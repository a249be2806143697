"""How GroupNorm, SiLU and a 3x3x3 convolution run as a chain, by chip, channels and size: a model, not measured.

Three questions, each answered by the smaller sum of seconds:

  norm on the way in    "prologue": where the convolution loads x, the activated tensor is never written; but once a tap
                        and block of columns, 27 ceil(O / BN) times, two special functions each. "apply": in a pass of
                        its own, x read and the activated tensor written once.
  statistics of y       in the epilogue, or by a pass that reads y. An epilogue has at most 128 columns: where 256
                        would do, twice the weights' traffic from L2 may cost more than the pass.
  gradient's sums       GroupNorm's and SiLU's share in the epilogue of the gradient of the convolution's input (which
                        reads x there), or by a pass over both.

A convolution takes as long as its slowest level: matrix units, memory, L2 to shared memory (BM + BN numbers a step for
BM x BN products), and the share of elementwise work that does not hide (`Chip.hidden`). A chip that the programs do not
fill takes as long as one that they do.
"""

import torch
from t2ct.kernels.chips import LAUNCH, Chip, Work
from t2ct.kernels.plan import Launch, launch

TAPS = 27
SURE = 0.95  # the prologue must promise this share of the other way's time: a pass's cost is sure, what hides is not


def blocks_of(at: Launch, outputs: int) -> int:
    return -(-outputs // at.bn)


def conv_work(
    at: Launch, voxels: float, c: int, o: int, dtype: torch.dtype, taps: int = TAPS, prologue: bool = False
) -> Work:
    """Of one convolution as launched: padded columns are computed, tiles of x and weights come from L2 every step."""
    blocks, size = blocks_of(at, o), dtype.itemsize
    products = 2.0 * taps * c * voxels * blocks * at.bn
    wide = dtype == torch.float32
    return Work(
        (voxels * (c + o) + taps * c * o) * size,
        0.0 if wide else products,
        2.0 * taps * blocks * c * voxels if prologue else 0.0,
        taps * c * size * voxels * blocks * (1 + at.bn / at.bm),
        products if wide else 0.0,
    )


def conv_seconds(chip: Chip, work: Work, hidden: float) -> float:
    """The slowest level; of the shorter of products and special functions the part that is not hidden comes on top."""
    times = work.times(chip)
    short, long = sorted((times["matrix"], times["exp"]))
    return max(times["memory"], times["L2"], long + (1 - hidden) * short)


def _hidden(chip: Chip, dtype: torch.dtype) -> float:
    return 0.0 if dtype == torch.float32 else chip.hidden  # its products want the units that the arithmetic wants


def _filled(chip: Chip, at: Launch, voxels: int, o: int) -> float:
    return max(voxels, chip.sms * at.bm / blocks_of(at, o))


def _pass(chip: Chip, numbers: float, dtype: torch.dtype, tensors: int, exps: int) -> float:
    return LAUNCH + Work(tensors * numbers * dtype.itemsize, exps=exps * numbers).seconds(chip)


def forward_seconds(
    chip: Chip, dtype: torch.dtype, voxels: int, c: int, o: int, norm: str, stats: bool | None = None
) -> float:
    """Predicted, of the chain from x with its statistics known; stats: in the epilogue, by a pass, or not wanted."""
    at = launch(chip.table, dtype, c, o, stats=bool(stats))
    many = _filled(chip, at, voxels, o)
    work = conv_work(at, many, c, o, dtype, prologue=norm == "prologue")
    seconds = LAUNCH + conv_seconds(chip, work, _hidden(chip, dtype))
    if norm == "apply":
        seconds += _pass(chip, many * c, dtype, 2, 2)
    if stats is False:
        seconds += _pass(chip, many * o, dtype, 1, 0)
    return seconds


def forward(chip: Chip, dtype: torch.dtype, voxels: int, c: int, o: int, stats: bool) -> tuple[str, bool]:
    """("apply" or "prologue", statistics in the epilogue?) for `voxels` voxels in all and C -> O channels."""
    best = {}
    for norm in ("apply", "prologue"):
        ways = (True, False) if stats else (None,)
        best[norm] = min((forward_seconds(chip, dtype, voxels, c, o, norm, where), bool(where)) for where in ways)
    norm = "prologue" if best["prologue"][0] <= SURE * best["apply"][0] else "apply"
    return norm, best[norm][1]


def gradient_seconds(chip: Chip, dtype: torch.dtype, voxels: int, c: int, o: int, fused: bool) -> float:
    """Predicted, of the gradient of the convolution's input C -> O and the sums of its norm."""
    at = launch(chip.table, dtype, o, c, sums=fused)
    many = _filled(chip, at, voxels, c)
    work = conv_work(at, many, o, c, dtype)
    if not fused:
        return LAUNCH + conv_seconds(chip, work, 1.0) + _pass(chip, many * c, dtype, 2, 2)
    work += Work(many * c * dtype.itemsize)
    return LAUNCH + conv_seconds(chip, work, 1.0) + 2 * many * c / chip.exps  # once, after the products


def gradient(chip: Chip, dtype: torch.dtype, voxels: int, c: int, o: int) -> bool:
    """Are the sums of the norm's gradient taken in the epilogue of the convolution's?"""
    fused, apart = (gradient_seconds(chip, dtype, voxels, c, o, way) for way in (True, False))
    return fused < apart
