"""Trilinear doubling, then a 3x3x3 convolution, by the compiled CPU backend in 8 multiplications instead of 27.

Along an axis trilinear doubling is nearest doubling followed by the weights 1/4, 1/2, 1/4, x going on beyond its border
as its edge. Both are convolutions, so the weights may as well come last:

    conv(trilinear(x)) = smooth(conv(nearest(x))),

and a convolution of a nearest-doubled volume sees x under sums of its weights, 2x2x2 of them for each of eight phases.
Only at the border do the two sides differ, where the convolution on the left reads zeros: from voxels of the six faces
what their weights beyond the border have added is taken off again. Nothing here has a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct.kernels.fold import NEAREST, fold
from t2ct.ops import norm_cpu
from t2ct.ops.conv import convolve
from t2ct.ops.conv_cpu import LANES
from t2ct.ops.dispatch import is_channels_last, large_pages, native, why_not
from t2ct.ops.resample import upsample

CELLS = NEAREST[::-1]  # cell i holds voxels 2i - 1 and 2i of the doubled volume; voxels i - 1 and i of x reach both
WORTH = 0.5  # of the plain form's multiplications: what is gained must also pay for the smoothing
LAST = torch.channels_last_3d


def cost(size: tuple[int, int, int]) -> float:
    """Multiplications beside those of the plain form, over x of `size` voxels: 8 of 27 a cell, 9 of 27 on faces."""
    cells = 8 / 27
    for n in size:
        cells *= 1 + 1 / n
    return cells + sum(9 / 27 / n for n in size)


def serves(channels: int, size: tuple[int, int, int]) -> bool:
    """Is this form for a result of so many channels, from x of `size` voxels? It wants at least two along each axis."""
    return channels % LANES == 0 and min(size) > 1 and cost(size) <= WORTH


def padded(channels: int) -> int:
    """Channels as oneDNN blocks them: in sixteens."""
    return -(-channels // LANES) * LANES


def refusal(x: Tensor, channels: int) -> str | None:
    """Why this form is not for x (N, C, X, Y, Z) and a result of so many channels, or None."""
    reason = why_not("cpu", x.device.type, x.dtype, is_channels_last(x))
    if reason is None and not serves(channels, tuple(x.shape[2:])):  # type: ignore[arg-type]
        reason = f"it wants channels in sixteens and more than a few voxels, not {channels} and {tuple(x.shape[2:])}"
    return reason


@dataclass(frozen=True)
class Folded:
    """A convolution's weights as they are, (O, C, 3, 3, 3), and folded with nearest doubling, (8 O, C, 2, 2, 2)."""

    weight: Tensor
    bias: Tensor | None
    cells: Tensor
    shift: Tensor | None


def prepare(weight: Tensor, bias: Tensor | None) -> Folded:
    """Fold a convolution; worth keeping where it runs more than once."""
    weight = weight.detach()
    o, c = weight.shape[:2]
    cells = weight.new_empty(8, o, 8, c)
    for some in range(0, o, LANES):  # folding takes several times its float32 result
        cells[:, some : some + LANES] = fold(weight[some : some + LANES], CELLS)
    cells = cells.view(8 * o, 2, 2, 2, c).permute(0, 4, 1, 2, 3)
    return Folded(weight, bias, cells, None if bias is None else bias.detach().repeat(8))


@dataclass(frozen=True)
class Work:
    """Bytes for a tile beside window and result. kept: the folded weights and the plane of cells that wait for the next
    tile; made: more than these, at the worst moment."""

    kept: int
    made: int


def part(planes: int, size: tuple[int, int, int], channels: int, outputs: int) -> int:
    """Of a tile of `planes` planes, those that one convolution computes: few, for its result is larger than theirs, but
    with twice as many numbers as there are weights, which it lays anew."""
    return min(planes, max(2, 2 * -(-2 * 64 * channels // (8 * (size[1] + 1) * (size[2] + 1)))))


def work(
    planes: int, size: tuple[int, int, int], channels: int, outputs: int, itemsize: int, emulated: bool = False
) -> Work:  # fmt: skip
    """Upper bounds for a tile of `planes` planes, from x of `size` voxels; emulated: convolutions run in float32, on
    copies of what they read, and leave a result that is rounded."""
    _, y, z = size
    plane = 8 * outputs * (y + 1) * (z + 1)
    cells = part(planes, size, channels, outputs) // 2 * plane
    blocks, weights = padded(outputs) * padded(channels), outputs * channels  # of one tap, as oneDNN lays them
    wide, copies = (4, 4) if emulated else (itemsize, 0)  # bytes of a number while it is convolved, and of its copy
    window = prod(window_shape(planes, size, channels, outputs))
    begun = cells + plane  # a first tile makes one plane more, in the place of the one that others keep
    laid = wide * (begun + 64 * blocks) + copies * (window + 64 * weights)
    made = max(laid, begun * (copies + itemsize)) - plane * itemsize
    made = max(made, (cells + plane) * itemsize) + 32 * outputs * wide  # and biases, for every phase
    for n, m in ((y, z), (planes // 2 + 1, y), (planes // 2 + 1, z)):  # faces
        edge, doubled, around = n * m * channels, 8 * n * m * channels, 4 * (n + 1) * (m + 1) * channels
        # once more as it is convolved, weights, result
        convolved = wide * (around + 18 * blocks + 4 * n * m * outputs)
        if emulated:  # and what was copied to float32: the plane, the nine weights cut out of 27
            convolved += itemsize * (around + 9 * weights)
        made = max(made, (plane + edge + around) * itemsize + max(doubled * itemsize, convolved))
    folding = 128 * 4 * LANES * channels  # in float32
    return Work((64 * outputs * channels + plane) * itemsize, max(made, folding))


def flops(size: tuple[int, int, int], channels: int, outputs: int) -> int:
    """Operations of the convolutions over the whole of x."""
    x, y, z = size
    faces = 2 * 4 * (x * y + y * z + x * z)
    return 2 * channels * outputs * (64 * (x + 1) * (y + 1) * (z + 1) + 9 * faces)


def window_shape(planes: int, size: tuple[int, int, int], channels: int, outputs: int) -> tuple[int, int, int, int]:
    """Of the window through which a tile of `planes` planes sees x of `size`: (X, Y, Z, C)."""
    return part(planes, size, channels, outputs) // 2 + 2, size[1] + 2, size[2] + 2, channels


def sources(start: int, stop: int, planes: int) -> tuple[int, int]:
    """The planes of x, of `planes`, that planes [start, stop) of the result see."""
    return max(0, start // 2 - 1), min(planes, stop // 2 + 1)


def tile(
    folded: Folded, low: Tensor, start: int, stop: int, planes: int, before: Tensor | None = None,
    window: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Planes [start, stop) of the result.

    low      (1, C, n, Y, Z), channels-last: the planes `sources(start, stop, planes)` of x, which has `planes`
    before   the last plane of cells of the tile before this one, which is then not computed again; None at start 0
    window   (X, Y, Z, C), of `window_shape` or longer: memory to work in
    out      where the result goes, of its shape and channels-last
    Returns  (1, O, stop - start, 2Y, 2Z), channels-last; and the last plane of cells, for the tile that follows.
    """
    o, c = folded.weight.shape[:2]
    size = planes, *low.shape[3:]
    if window is None:
        window = low.new_empty(window_shape(stop - start, size, c, o))  # type: ignore[arg-type]
    y = out
    if y is None:
        shape = 1, o, stop - start, *(2 * n for n in size[1:])
        y = large_pages(torch.empty(shape, dtype=low.dtype, memory_format=LAST))
    step = part(stop - start, size, c, o)  # type: ignore[arg-type]
    first = sources(start, stop, planes)[0]
    for a in range(start, stop, step):
        b = min(a + step, stop)
        before = _cells(folded, low, a, b, planes, first, before, window, y[:, :, a - start : b - start])
    _faces(folded, low, y, start, stop, planes)
    assert before is not None
    return y, before


def _cells(
    folded: Folded, low: Tensor, start: int, stop: int, planes: int, first: int, before: Tensor | None, window: Tensor,
    y: Tensor,
) -> Tensor:  # fmt: skip
    """Planes [start, stop) of the result into y, but for the faces; returns the last plane of cells. first: the plane
    of x that is low's first."""
    begin = start // 2 - (before is None)
    count = stop // 2 - begin + 1
    source = low[0].permute(1, 2, 3, 0)
    for i in range(count):
        plane = window[i]
        plane[1:-1, 1:-1] = source[min(max(begin + i, 0), planes - 1) - first]
        plane[0, 1:-1], plane[-1, 1:-1] = plane[1, 1:-1], plane[-2, 1:-1]
        plane[:, 0], plane[:, -1] = plane[:, 1], plane[:, -2]
    cells = convolve(window[:count].unsqueeze(0).permute(0, 4, 1, 2, 3), folded.cells, folded.shift, 1, 0)
    shape = (1, count - 1 + (before is not None), *cells.shape[3:], y.shape[1], low.dtype == torch.bfloat16)
    native().smooth(shape, 0 if before is None else before.data_ptr(), cells.data_ptr(), y.data_ptr(),
                    torch.get_num_threads(), norm_cpu.ISA)  # fmt: skip
    return cells[:, :, -1:].clone(memory_format=LAST)


def _faces(folded: Folded, low: Tensor, y: Tensor, start: int, stop: int, planes: int) -> None:
    """Take from y's voxels on the volume's border what its weights that reach beyond it have added there: what lies
    beyond is the edge again in the smoothed form, and zero in the definition. Where two faces meet the one along the
    earlier axis takes what both would."""
    first = sources(start, stop, planes)[0]
    a, b = max(start - 1, 0), min(stop + 1, 2 * planes)
    for axis in (0, 1, 2):
        for end in (0, 1):
            at = (0, low.shape[2 + axis] - 1)[end]
            if axis == 0 and (start, stop)[end] != (0, 2 * planes)[end]:
                continue
            edge = low.narrow(2 + axis, at, 1).contiguous(memory_format=LAST)
            near = (0, 1) if axis == 0 else (a - 2 * first, b - 2 * first)
            plane = upsample(edge, "trilinear", near).narrow(2 + axis, 0, 1).squeeze(2 + axis)  # (1, C, P, Q)
            if axis:  # along X the neighbours of this tile's planes, zeros beyond the volume
                plane = F.pad(plane, (0, 0, int(start == 0), int(stop == 2 * planes)))
                plane = F.pad(plane, (1, 1, 0, 0), "replicate" if axis == 1 else "constant")
            else:
                plane = F.pad(plane, (1, 1, 1, 1), "replicate")
            weight = folded.weight.select(2 + axis, 2 * end).unsqueeze(2).contiguous()
            beyond = convolve(plane.unsqueeze(2).contiguous(memory_format=LAST), weight, None, 1, 0).squeeze(2)
            y.select(2 + axis, y.shape[2 + axis] - 1 if end else 0).sub_(beyond)


def whole(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv(trilinear(x)) + bias for x (1, C, X, Y, Z), channels-last, that `refusal` takes."""
    planes = x.shape[2]
    return tile(prepare(weight, bias), x, 0, 2 * planes, planes)[0]
