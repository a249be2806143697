"""What a streamed network is: a list of convolutions, each with what comes before it and what is added to it.

Nothing here touches a tensor: a plan is made of shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from t2ct.ops import conv_cpu, norm, smooth_conv

Size = tuple[int, int, int]

# Numbers that a tile, a run of whole planes, reads or writes: so many that a convolution's call costs nothing beside
# its work, and so few that what a tile reads is still in the cache when it is read again. It never depends on the
# budget: every plan makes the same calls, which is why every plan gives the same bits.
TILE = {"cpu": 2**22, "cuda": 2**27}
DOUBLED = 8  # planes that are doubled at a time: the generic form makes some around them, which then stay few
STATISTICS = 16  # bytes of the statistics of one group of one tile: mean and M2 in float64


@dataclass(frozen=True)
class Node:
    """One tensor of the network: conv(silu(norm(resampled source))) + residual.

    name: prefix of the convolution's parameters; "" for the input, which is nodes[0]. source, residual: indices of
    nodes. resample: "up" (trilinear x2, before the convolution), "down" (a zero plane after the end of each axis, then
    stride 2) or "". norm, shortcut: prefixes of the parameters of the GroupNorm and of the residual's 1x1x1
    convolution, "" for none.
    """

    name: str
    source: int
    channels: int
    kernel: int = 3
    resample: str = ""
    norm: str = ""
    groups: int = 1
    eps: float = 1e-6
    silu: bool = True
    residual: int | None = None
    shortcut: str = ""

    @property
    def inputs(self) -> tuple[int, ...]:
        """The nodes that it reads."""
        return (self.source,) if self.residual is None else (self.source, self.residual)


@dataclass(frozen=True)
class Costs:
    """Bytes of a node whole, of one tile, of its tiles' statistics, of its weights, of these as a library blocks them,
    of the window that a tile convolves, of what is made on the way to a tile, of what is kept from tile to tile, of the
    buffers for reading its source and its residual from a spool; operations of its convolutions. direct: of weights,
    these once more and what is made where a gradient follows, which torch's convolutions have."""

    bytes: int
    tile: int
    statistics: int
    weights: int
    reordered: int
    window: int
    flops: int
    made: int
    direct: int
    kept: int
    read_source: int
    read_residual: int


@dataclass(frozen=True)
class Graph:
    """Nodes on grids: input of `size` voxels, `itemsize` bytes a number, on a device of kind "cpu" or "cuda".

    generic: norms and doubling run as plain torch, which makes tensors on the way that the compiled forms do without.
    emulated: convolutions run in float32 and are rounded (`t2ct.ops.dispatch.EMULATED`).
    threads: of a CPU; each works in memory of its own.
    """

    nodes: tuple[Node, ...]
    size: Size
    itemsize: int
    device: str = "cpu"
    generic: bool = False
    emulated: bool = False
    threads: int = 1

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """(X, Y, Z) of every node."""
        sizes = [self.size]
        for node in self.nodes[1:]:
            x, y, z = sizes[node.source]
            sizes.append({"": (x, y, z), "up": (2 * x, 2 * y, 2 * z), "down": (x // 2, y // 2, z // 2)}[node.resample])
        return tuple(sizes)

    @cached_property
    def consumers(self) -> tuple[tuple[int, ...], ...]:
        """The nodes that read each node."""
        return tuple(tuple(m for m, other in enumerate(self.nodes) if m and n in other.inputs)
                     for n in range(len(self.nodes)))  # fmt: skip

    @cached_property
    def normed(self) -> tuple[Node | None, ...]:
        """Per node the consumer whose GroupNorm wants its statistics, or None."""
        found: list[Node | None] = [None] * len(self.nodes)
        for node in self.nodes[1:]:
            if node.norm:
                found[node.source] = node
        return tuple(found)

    @cached_property
    def halves(self) -> dict[int, tuple[int, int]]:
        """Nodes that nothing reads but a residual block of half their channels: node -> the block's first convolution
        and its last, whose shortcut reads the node too. In its memory both have room, plane by plane."""
        found: dict[int, tuple[int, int]] = {}
        for m, consumers in enumerate(self.consumers):
            if m == 0 or len(consumers) != 2 or self.sizes[m][1] % 2:
                continue
            a, b = consumers
            first, last = self.nodes[a], self.nodes[b]
            reads = first.source == m and first.norm and not first.resample and last.residual == m and last.shortcut
            if reads and first.residual is None and 2 * first.channels == 2 * last.channels == self.nodes[m].channels:
                found[m] = a, b
        return found

    @cached_property
    def _steps(self) -> dict[Size, int]:
        """Planes of a tile on every grid: a power of two, at least 2, from its widest node."""
        widest: dict[Size, int] = {}
        for n, node in enumerate(self.nodes):
            (_, y, z), into = self.sizes[n], self.nodes[max(node.source, 0)].channels
            reads = 2 * (2 * y + 1) * (2 * z + 1) * into if node.resample == "down" else y * z * into
            widest[self.sizes[n]] = max(widest.get(self.sizes[n], 1), reads, y * z * node.channels)
        planes = {size: max(2, TILE[self.device] // numbers) for size, numbers in widest.items()}
        return {size: 1 << (count.bit_length() - 1) for size, count in planes.items()}

    def tile(self, n: int) -> int:
        """Planes of a tile of node n; nodes on one grid have the same."""
        return self._steps[self.sizes[n]]

    def tiles(self, n: int) -> list[tuple[int, int]]:
        """The planes [start, stop) of every tile of node n."""
        x, step = self.sizes[n][0], self.tile(n)
        return [(start, min(start + step, x)) for start in range(0, x, step)]

    def thickest(self, n: int) -> int:
        """Planes of the largest tile of node n."""
        return min(self.tile(n), self.sizes[n][0])

    def plane(self, n: int) -> int:
        """Bytes of one plane of node n."""
        _, y, z = self.sizes[n]
        return y * z * self.nodes[n].channels * self.itemsize

    @cached_property
    def costs(self) -> tuple[Costs, ...]:
        """What every node takes; a search asks for it thousands of times."""
        return tuple(self._costs(n) for n in range(len(self.nodes)))

    def _costs(self, n: int) -> Costs:
        x, y, z = self.sizes[n]
        node, normed = self.nodes[n], self.normed[n]
        whole = x * self.plane(n)
        if n == 0:
            return Costs(whole, *[0] * 11)
        taps = node.kernel**3 * self.nodes[node.source].channels
        shortcut = self.nodes[node.residual].channels if node.shortcut and node.residual is not None else 0
        window = self.window_shape(n) or (0, 0, 0, 0)
        into = self.nodes[node.source].channels
        weights = taps * node.channels
        reordered = node.kernel**3 * smooth_conv.padded(into) * smooth_conv.padded(node.channels)
        work, flops = smooth_conv.Work(0, self._generic(n)), 2 * x * y * z * node.channels * taps
        one_by_one = weights, reordered
        if self.smooth(n):
            source, weights, reordered = self.sizes[node.source], 0, 0  # the form has its own
            one_by_one = 0, 0
            work = smooth_conv.work(self.thickest(n), source, into, node.channels, self.itemsize, self.emulated)
            flops = smooth_conv.flops(source, into, node.channels)
        elif self.filtered(n):
            tile = (self.thickest(n) + 2, y, z)
            weights = weights * 4 // self.itemsize
            reordered = conv_cpu.winograd_bytes(1, tile, into, node.channels, 0, self.threads) // self.itemsize
            flops = flops * conv_cpu.WINOGRAD // conv_cpu.DIRECT
        made = work.made + self._widened(n, weights, reordered)
        direct = work.made + self._widened(n, *one_by_one, direct=True) + sum(one_by_one) * self.itemsize
        return Costs(
            bytes=whole,
            tile=self.thickest(n) * self.plane(n),
            statistics=STATISTICS * normed.groups * len(self.tiles(n)) if normed else 0,
            weights=weights * self.itemsize,
            reordered=reordered * self.itemsize,
            window=window[0] * window[1] * window[2] * window[3] * self.itemsize,
            flops=flops + 2 * x * y * z * node.channels * shortcut,
            made=made,
            direct=direct,
            kept=work.kept,
            read_source=self._read_source(n),
            read_residual=0 if node.residual is None else self.thickest(n) * self.plane(node.residual),
        )

    def _generic(self, n: int) -> int:
        """Bytes of plain torch's intermediate tensors: float32 and float64 of what it takes at once of a tile or a
        window, and the planes around those that are doubled."""
        if not self.generic:
            return 0
        planes, y, z, c = self.window_shape(n) or (0, 0, 0, 0)
        numbers = max(planes * y * z * c, self.thickest(n) * self.plane(n) // self.itemsize)
        one = max(y * z * c, self.plane(n) // self.itemsize)
        normed = 40 * min(numbers, max(norm.AT_ONCE, one))
        return max(normed, 12 * (DOUBLED + 4) * y * z * c if self.nodes[n].resample == "up" else 0)

    def _widened(self, n: int, weights: int, reordered: int, direct: bool = False) -> int:
        """Bytes more where convolutions run in float32: what they read, their weights as they are, as torch and as
        oneDNN lays them, and their result, before the tile is there to which that is rounded."""
        if not self.emulated or self.smooth(n):
            return 0
        node, source = self.nodes[n], self.sizes[self.nodes[n].source]
        read = (min(self.thickest(n), source[0]), *source[1:], self.nodes[node.source].channels)
        tile = self.thickest(n) * self.plane(n)
        counted = (weights + reordered) * self.itemsize + tile * (1 + bool(node.shortcut))
        made = 4 * (prod(self.window_shape(n) or read) + 2 * weights + reordered + tile // self.itemsize)
        made = 0 if self.filtered(n) and not direct else made  # which reads and writes bfloat16
        if node.shortcut and node.residual is not None:
            into = self.nodes[node.residual].channels
            blocks = smooth_conv.padded(into) * smooth_conv.padded(node.channels)
            voxels = tile // (self.itemsize * node.channels)
            other = voxels * (into + node.channels) + 2 * into * node.channels + blocks
            made = max(made, 4 * other + tile)
        return max(0, made - counted)

    def _read_source(self, n: int) -> int:
        node, planes = self.nodes[n], self.thickest(n)
        if node.resample == "up":
            planes = planes // 2 + 2
        elif node.resample == "down":
            planes = 2 * planes + 1
        elif self.window_shape(n):  # planes go straight into the window
            planes = 0
        return min(planes, self.sizes[node.source][0]) * self.plane(node.source)

    def smooth(self, n: int) -> bool:
        """Is node n's doubling folded with its convolution (`t2ct.ops.smooth_conv`)?"""
        node = self.nodes[n]
        return (
            node.resample == "up"
            and self.device == "cpu"
            and not self.generic
            and smooth_conv.serves(node.channels, self.sizes[node.source])
        )

    def filtered(self, n: int) -> bool:
        """Is node n convolved by Winograd's form (`t2ct.ops.conv_cpu.winograd`)?"""
        node, (_, y, z) = self.nodes[n], self.sizes[n]
        if self.device != "cpu" or self.generic or node.kernel != 3 or node.resample == "down" or self.smooth(n):
            return False
        dtype = torch.float32 if self.itemsize == 4 else torch.bfloat16
        into = self.nodes[node.source].channels
        return conv_cpu.filters(into, node.channels, (self.thickest(n), y, z), dtype)

    def single(self, n: int) -> bool:
        """Is node n's volume one tile?"""
        return self.tile(n) >= self.sizes[n][0]

    def window_shape(self, n: int) -> tuple[int, int, int, int] | None:
        """(X, Y, Z, C) of what one tile of node n convolves: its planes and the neighbours (or zeros) before and after.

        None where the convolution reads its source as it lies.
        """
        node, planes = self.nodes[n], self.thickest(n)
        (_, y, z), c = self.sizes[node.source], self.nodes[node.source].channels
        if self.smooth(n):
            return smooth_conv.window_shape(planes, self.sizes[node.source], c, node.channels)
        if node.resample == "down":
            return 2 * planes + 1, y + 1, z + 1, c
        halo = 0 if self.single(n) else 2
        if node.resample == "up":
            return planes + halo, 2 * y, 2 * z, c
        if node.kernel == 1 or not (halo or node.norm):
            return None
        return planes + halo, y, z, c
