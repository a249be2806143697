"""Carry out a plan: tile after tile, every convolution over a window of whole planes with its true neighbours.

Tensors are planes here, (X, Y, Z, C) and contiguous: what channels-last memory of one sample is. What one call computes
never depends on the plan, which only says where a tile comes from and goes to: so every plan gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2ct import ops
from t2ct.ops import smooth_conv
from t2ct.ops.dispatch import channels_last, large_pages
from t2ct.stream.budget import give_back
from t2ct.stream.graph import DOUBLED
from t2ct.stream.plan import Plan
from t2ct.stream.simulate import HELD, OUTPUT, SPOOL, Pass, aligned, direct
from t2ct.stream.spool import FileSpool, PinnedSpool


def volume(planes: Tensor) -> Tensor:
    """(X, Y, Z, C) -> (1, C, X, Y, Z), channels-last; a view. The axis of one sample has the stride that a batch's has:
    oneDNN takes no other for channels-last, and would copy."""
    return planes.unsqueeze(0).permute(0, 4, 1, 2, 3)


def planes_of(x: Tensor) -> Tensor:
    """(1, C, X, Y, Z) -> (X, Y, Z, C), contiguous; a view where x is channels-last."""
    return channels_last(x)[0].permute(1, 2, 3, 0)


class Run:
    """One sample through one plan.

    parameters: by their names in the state dict, in the dtype of the computation. source: the input's planes. result:
    planes for the output. convert: a tile of the last node -> what is stored in `result`. step: called after each tile.
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Mapping[str, Tensor],
        source: Tensor,
        result: Tensor,
        folder: str | Path | None = None,
        convert: Callable[[Tensor], Tensor] | None = None,
        step: Callable[[int], None] | None = None,
    ):
        self.plan, self.graph, self.parameters = plan, plan.graph, parameters
        self.source, self.result, self.folder = source, result, folder
        self.convert, self.step = convert, step
        self.stats: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory: dict[int, Tensor] = {}
        self.spools: dict[int, FileSpool | PinnedSpool | Halves] = {}
        self.shortcuts: dict[int, Tensor] = {}  # computed with the pass before: what is added to a node's tiles
        self.offsets = {b.key: b.offset for b in plan.buffers}
        self.home = {0: 0}  # whose buffer a node lies in
        self.arena = large_pages(torch.empty(aligned(plan.arena) or 1, dtype=torch.uint8, device=source.device))

    def __call__(self) -> None:
        last = {m: p for p, step in enumerate(self.plan.passes) for r in step.runs for m in self.graph.nodes[r].inputs}
        try:
            for p, step in enumerate(self.plan.passes):
                self._pass(p, step)
                for m in [m for m in self.spools if last.get(m) == p]:
                    self.spools.pop(m).close()
        finally:
            for spool in self.spools.values():
                spool.close()

    def _pass(self, p: int, step: Pass) -> None:
        n = step.node
        again: dict[int, Again] = {}
        again |= {m: Again(self, m, p, again) for m in step.chain}
        if step.store:
            self._open(n, step)
        for spool in self.spools.values():
            spool.wait()
        kept = []
        tiles = Tiles(self, n, p, again)
        if step.shortcut is not None:
            x, y, z = self.graph.sizes[n]
            shape = (x, y, z, self.graph.nodes[step.shortcut].channels)
            self.shortcuts[step.shortcut] = self.buffer((step.shortcut, "shortcut", 0), shape)
            tiles.shortcut = step.shortcut
        if step.store and not step.halved and direct(self.graph, n, self.plan.place[n]):
            tiles.into = self.memory[n]
        for start, stop in self.graph.tiles(n):
            tile = next(tiles)
            if self._wants_stats(n):
                kept.append(self._tile_stats(n, tile))
            if step.store and tiles.into is None:
                self._store(n, start, stop, tile)
            del tile
            if self.step is not None:
                self.step(sum(self.graph.costs[r].flops for r in step.runs) // len(self.graph.tiles(n)))
        for m in list(again):  # they hold one another: nothing would be freed before the garbage collector runs
            again.pop(m).close()
        if kept:
            self._merge(n, kept)
        del tiles
        if not self.source.is_cuda:
            give_back()

    def _wants_stats(self, n: int) -> bool:
        return self.graph.normed[n] is not None and n not in self.stats

    def _tile_stats(self, n: int, tile: Tensor):
        node = self.graph.normed[n]
        return ops.group_stats(volume(tile), node.groups)  # type: ignore[union-attr]

    def _merge(self, n: int, kept) -> None:
        mean, m2, count = ops.merge_stats(*kept)
        self.stats[n] = mean, (m2 / count + self.graph.normed[n].eps).rsqrt()  # type: ignore[union-attr]

    def _open(self, n: int, step: Pass) -> None:
        """Make the place of node n."""
        x, y, z = self.graph.sizes[n]
        shape, dtype = (y, z, self.graph.nodes[n].channels), self.source.dtype
        place = self.plan.place[n]
        if place == OUTPUT:
            self.memory[n] = self.result
        elif step.halved:
            other = self.graph.halves[n][1]
            self.home[n] = n
            self.spools[n] = Halves(*(self.buffer(key, (x, y // 2, *shape[1:]))
                                      for key in ((n, "node", 0), (other, "shortcut", 0))))  # fmt: skip
        elif place == SPOOL:
            if self.source.is_cuda:
                self.spools[n] = PinnedSpool(self.source.device, x, shape, dtype)
            else:
                assert self.folder is not None  # a plan spools on a CPU only where there is a folder
                self.spools[n] = FileSpool(self.folder, x, shape, dtype)
        else:
            self.home[n] = n if step.in_place is None else self.home[step.in_place]
            self.memory[n] = self.buffer((self.home[n], "node", 0), (x, *shape))

    def _store(self, n: int, start: int, stop: int, tile: Tensor) -> None:
        if n in self.spools:
            self.spools[n].write(start, tile)
        elif self.plan.place[n] == OUTPUT and self.convert is not None:
            self.memory[n][start:stop] = self.convert(tile)
        else:
            self.memory[n][start:stop] = tile

    def buffer(self, key: tuple[int, str, int], shape: tuple[int, ...]) -> Tensor:
        """A tensor in the arena, where the plan has put it."""
        dtype, start = self.source.dtype, self.offsets[key]
        count = torch.Size(shape).numel() * dtype.itemsize
        return self.arena[start : start + count].view(dtype).view(shape)


class Halves:
    """A node's planes in two halves, [:, :Y/2] and [:, Y/2:], read and written as a spool is. Once planes were read,
    those of two other nodes with half the channels can take their place."""

    def __init__(self, low: Tensor, high: Tensor):
        self.parts = low, high

    def write(self, start: int, tile: Tensor) -> None:
        for part, half in zip(self.parts, tile.chunk(2, 1), strict=True):
            part[start : start + len(tile)] = half

    def read(self, start: int, into: Tensor) -> None:
        for part, half in zip(self.parts, into.chunk(2, 1), strict=True):
            half.copy_(part[start : start + len(into)])

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Tiles:
    """The tiles of node n in order, (x, Y, Z, C) each; `next` computes one. again: this pass's recomputed nodes."""

    def __init__(self, run: Run, n: int, p: int, again: Mapping[int, Again]):
        self.run, self.n, self.p, self.again = run, n, p, again
        self.node, self.graph = run.graph.nodes[n], run.graph
        self.ranges = iter(self.graph.tiles(n))
        self.single = self.graph.single(n)
        shape = self.graph.window_shape(n)
        self.window = None if shape is None else run.buffer((n, "window", p), shape)
        if self.node.resample == "down" and self.window is not None:
            self.window[:, -1].zero_()  # the plane after the end of each axis
            self.window[:, :, -1].zero_()
        self.weight, self.bias = self._weights(self.node.name)
        self.folded = smooth_conv.prepare(self.weight, self.bias) if self.graph.smooth(n) else None
        self.cells: Tensor | None = None  # of the tile before, where the doubling is folded
        self.into: Tensor | None = None  # the whole node, where tiles are written to it
        self.shortcut: int | None = None  # the node whose shortcut reads what this one reads, and is computed along

    def __next__(self) -> Tensor:
        start, stop = next(self.ranges)
        if self.folded is not None:
            return self._folded(start, stop)
        read = {"": self._same, "up": self._same, "down": self._down}[self.node.resample]
        x, padding = read(start, stop)
        if self.shortcut is not None:
            self._shortcut(self.shortcut, start, stop)
        stride = 2 if self.node.resample == "down" else 1
        y = ops.conv3d(volume(x), self.weight, self.bias, stride, padding)
        y = planes_of(y)
        if self.n in self.run.shortcuts:
            y += self.run.shortcuts[self.n][start:stop]
        elif self.node.residual is not None:
            at = start
            for piece in self.pieces(self.node.residual, start, stop):
                part = y[at - start : at - start + len(piece)]
                at += len(piece)
                if self.node.shortcut:
                    part += planes_of(ops.conv3d(volume(piece), *self._weights(self.node.shortcut), 1, 0))
                else:
                    part += piece
        return y

    def _folded(self, start: int, stop: int) -> Tensor:
        planes = self.graph.sizes[self.node.source][0]
        low = volume(self.view(self.node.source, *smooth_conv.sources(start, stop, planes)))
        assert self.folded is not None
        out = None if self.into is None else volume(self.into[start:stop])
        y, self.cells = smooth_conv.tile(self.folded, low, start, stop, planes, self.cells, self.window, out)
        return planes_of(y)

    def _shortcut(self, n: int, start: int, stop: int) -> None:
        """Tile [start, stop) of node n's shortcut, over the planes it is computed of."""
        shape = (stop - start, *self.graph.sizes[n][1:], self.graph.nodes[self.node.source].channels)
        whole = self.run.buffer((self.n, "whole", self.p), shape)
        self.run.spools[self.node.source].read(start, whole)
        y = ops.conv3d(volume(whole), *self._weights(self.graph.nodes[n].shortcut), 1, 0)
        self.run.shortcuts[n][start:stop] = planes_of(y)

    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        return self.run.parameters[name + ".weight"], self.run.parameters[name + ".bias"]

    def _same(self, start: int, stop: int):
        """The window of planes [start - 1, stop + 1), zeros beyond the ends, and the padding still to be done."""
        x = self.graph.sizes[self.n][0]
        padding = self.node.kernel // 2
        if self.window is None:
            return self.view(self.node.source, start, stop), padding
        if self.single:
            self.fill(0, x, self.window)
            return self.window, padding
        window, have = self.window, start
        if start:
            window[:2] = window[-2:].clone()  # planes start - 1 and start: every tile before the last is a full one
            have = start + 1
        else:
            window[0].zero_()
        until = min(stop + 1, x)
        self.fill(have, until, window[have - start + 1 : until - start + 1])
        if stop == x:
            window[stop - start + 1].zero_()
        return window[: stop - start + 2], (0, padding, padding)

    def _down(self, start: int, stop: int):
        """Planes [2 start, 2 stop + 1) of the source, with a zero after the end of every axis."""
        window, x = self.window, self.graph.sizes[self.node.source][0]
        assert window is not None
        have = 2 * start
        if start:
            window[0] = window[-1]
            have += 1
        until = min(2 * stop + 1, x)
        at = have - 2 * start
        for piece in self.pieces(self.node.source, have, until):
            window[at : at + len(piece), :-1, :-1] = piece
            at += len(piece)
        if 2 * stop + 1 > x:
            window[2 * (stop - start)].zero_()
        return window[: 2 * (stop - start) + 1], 0

    def fill(self, start: int, stop: int, into: Tensor) -> None:
        """Planes [start, stop) of what is convolved: doubled, or normalised and activated, or as they are."""
        if start == stop:  # the last plane of a volume: it was the neighbour of the tile before
            return
        if self.node.resample == "up":
            self._double(start, stop, into)
            return
        at = 0
        for piece in self.pieces(self.node.source, start, stop, into):
            part = into[at : at + len(piece)]
            at += len(piece)
            if self.node.norm:
                mean, rstd = self.run.stats[self.node.source]
                ops.group_apply(volume(piece), mean, rstd, *self._weights(self.node.norm), self.node.groups,
                                self.node.silu, out=volume(part))  # fmt: skip
            elif part.data_ptr() != piece.data_ptr():
                part.copy_(piece)

    def _double(self, start: int, stop: int, into: Tensor) -> None:
        """Trilinear interpolation of planes [start, stop) from the low ones around them."""
        first = max(0, (start - 1) // 2)
        low = self.view(self.node.source, first, min(stop // 2 + 1, self.graph.sizes[self.node.source][0]))
        for a in range(start, stop, DOUBLED):
            b = min(a + DOUBLED, stop)
            ops.upsample(volume(low), "trilinear", planes=(a - 2 * first, b - 2 * first),
                         out=volume(into[a - start : b - start]))  # fmt: skip

    def view(self, m: int, start: int, stop: int) -> Tensor:
        """Planes [start, stop) of node m in one tensor."""
        pieces = list(self.pieces(m, start, stop))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def pieces(self, m: int, start: int, stop: int, into: Tensor | None = None) -> Iterator[Tensor]:
        """Planes [start, stop) of node m, in pieces as they lie. What is spooled is read into `into`, or a buffer."""
        if m == 0:
            yield self.run.source[start:stop]
        elif m in self.again:
            yield from self.again[m].pieces(start, stop)
        elif m in self.run.spools:
            if into is None:
                into = self._reading(m, stop - start)
            self.run.spools[m].read(start, into)
            yield into
        else:
            yield self.run.memory[m][start:stop]

    def _reading(self, m: int, count: int) -> Tensor:
        """The buffer through which spooled planes are read."""
        what = "residual" if m == self.node.residual else "source"
        return self.run.buffer((self.n, what, self.p), (count, *self.graph.sizes[m][1:], self.graph.nodes[m].channels))


class Again:
    """A node that lies nowhere: its tiles are computed when they are read, in order, and the last few are held."""

    def __init__(self, run: Run, n: int, p: int, again: Mapping[int, Again]):
        self.run, self.n, self.p, self.again = run, n, p, again
        self.ranges = run.graph.tiles(n)
        self.held: dict[int, Tensor] = {}
        self.tiles: Tiles | None = None

    def close(self) -> None:
        """Let go of everything."""
        self.held.clear()
        self.tiles = None

    def pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        step = self.run.graph.tile(self.n)
        for k in range(start // step, -(-stop // step)):
            first = self.ranges[k][0]
            yield self.tile(k)[max(start - first, 0) : stop - first]

    def tile(self, k: int) -> Tensor:
        while k not in self.held:
            made = max(self.held, default=-1) + 1
            self.held.pop(made - HELD, None)
            if self.tiles is None:
                self.tiles = Tiles(self.run, self.n, self.p, self.again)
            self.held[made] = next(self.tiles)
        return self.held[k]
