"""The gradient of a streamed network inside a memory budget.

The forward pass keeps nothing but the statistics of its norms. The backward pass computes the network once more, keeps
what its plan says, and goes through the nodes from the last to the first, tile by tile: a tile's input is read or
computed again, its gradient added to that of the nodes it came from. A norm's statistics depend on the whole volume;
what they pass on is, for every number of the node they were taken of, a channel's constant and a channel's multiple of
the number itself, and is added when that node's own turn comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from t2ct import ops
from t2ct.ops import smooth_conv
from t2ct.ops.conv_gradient import in_float32
from t2ct.stream.budget import enough_bytes, format_bytes
from t2ct.stream.graph import Graph
from t2ct.stream.plan import INPUT, Plan, segments
from t2ct.stream.run import Again, Run, Tiles, planes_of, volume
from t2ct.stream.simulate import AGAIN, HELD, MEMORY, SPOOL, WORKSPACE, Pass, chain_of

WINDOWS = 10  # float32 copies of what a tile reads that its gradient takes: normalised, activated, padded, and theirs
THINNER = 2  # a tile's gradient takes so much more than the tile that it is made of this part of its planes


@dataclass(frozen=True)
class BackwardPlan:
    """Where every node lies during the backward pass of a sample, and the most bytes that this takes."""

    graph: Graph
    place: tuple[str, ...]
    peak: int


def step_of(graph: Graph, n: int) -> int:
    """Planes of node n whose gradient is computed at a time."""
    return max(2, graph.tile(n) // THINNER)


def plan_backward(graph: Graph, room: int, spool: bool, beside: int) -> BackwardPlan:
    """The first that fits `room` bytes of: everything in memory; the ends of blocks; the ends of grids, what is between
    computed again; the same in a spool. ValueError where none does; beside: bytes that the budget holds besides."""
    ends = {segment[-1] for segment in segments(graph)}
    blocks = ends | {m for node in graph.nodes[1:] for m in (node.residual,) if m is not None} | {len(graph.nodes) - 1}
    nodes = range(1, len(graph.nodes))
    tried = [[MEMORY] * len(nodes)]
    tried += [[MEMORY if n in kept else AGAIN for n in nodes] for kept in (blocks, ends)]
    if spool:
        tried += [[SPOOL] * len(nodes), [SPOOL if n in ends else AGAIN for n in nodes]]
    plans = [BackwardPlan(graph, (INPUT, *p), _peak(graph, (INPUT, *p))) for p in tried]
    for plan in plans:
        if plan.peak <= room:
            return plan
    least = min(plan.peak for plan in plans)
    raise ValueError(
        f"memory_budget: wanted at least {enough_bytes(least + beside)} for the gradient of {graph.size} voxels, got "
        f"{format_bytes(room + beside)}"
    )


def _peak(graph: Graph, place: Sequence[str]) -> int:
    """The most bytes at once: nodes in memory, gradients that wait for their turn, and what a tile takes."""
    waiting: set[int] = set()
    most = 0
    for n in range(len(graph.nodes) - 1, 0, -1):
        node = graph.nodes[n]
        waiting |= {n, *node.inputs}
        held = sum(graph.costs[m].bytes for m in range(1, n + 1) if place[m] == MEMORY)
        held += sum(graph.costs[m].bytes for m in waiting)
        chain = chain_of(graph, place, n)
        again = sum(HELD * graph.costs[m].tile + graph.costs[m].window + graph.costs[m].kept for m in chain)
        costs = [graph.costs[m] for m in (*chain, n)]
        library = [max(c.direct, c.weights + c.reordered + c.made) for c in costs]
        most = max(most, held + again + max(library) + _tile_bytes(graph, n) + WORKSPACE)
        waiting.discard(n)
    return most


def _tile_bytes(graph: Graph, n: int) -> int:
    """What the gradient of one tile of node n takes."""
    node, planes = graph.nodes[n], min(step_of(graph, n), graph.sizes[n][0])
    _, y, z = graph.sizes[n]
    reads = {"": (planes + 2) * (y + 2) * (z + 2), "up": (planes + 2) * (y + 2) * (z + 2),
             "down": (2 * planes + 1) * (2 * y + 1) * (2 * z + 1)}[node.resample]  # fmt: skip
    numbers = reads * graph.nodes[node.source].channels
    if node.residual is not None:
        numbers += planes * y * z * graph.nodes[node.residual].channels
    weights = node.kernel**3 * graph.nodes[node.source].channels * node.channels
    return 4 * (WINDOWS * numbers + 4 * planes * y * z * node.channels + 4 * weights)


class Kept(Run):
    """One sample's nodes for the backward pass, every one where the plan says; buffers are allocated as they come."""

    def __init__(self, plan: BackwardPlan, parameters: Mapping[str, Tensor], source: Tensor, stats, folder):
        simulated = Plan(plan.graph, plan.place, (), (), 0, 0, 0)
        super().__init__(simulated, parameters, source, source[:0], folder)
        self.stats = stats

    def __call__(self) -> None:
        for n in range(1, len(self.graph.nodes)):
            if self.plan.place[n] != AGAIN:
                chain = chain_of(self.graph, self.plan.place, n)
                self._pass(n, Pass(n, True, chain, None, 0, 0, 0))
        for spool in self.spools.values():
            spool.wait()

    def buffer(self, key, shape) -> Tensor:
        return torch.empty(shape, dtype=self.source.dtype, device=self.source.device)

    def drop(self, n: int) -> None:
        """Node n is not read any more."""
        self.memory.pop(n, None)
        if n in self.spools:
            self.spools.pop(n).close()


class Backward:
    """The backward pass of one sample. grads: the parameters' gradients, float32 or wider, which it adds to."""

    def __init__(self, kept: Kept, dy: Tensor, grads: dict[str, Tensor]):
        self.kept, self.graph, self.grads = kept, kept.graph, grads
        self.dy: dict[int, Tensor] = {len(self.graph.nodes) - 1: dy}
        self.affine: dict[int, tuple[Tensor, Tensor]] = {}  # node -> what its norm's statistics add: a + b * number

    def __call__(self) -> Tensor:
        """The gradient of the input's planes."""
        try:
            self.kept()
            for n in range(len(self.graph.nodes) - 1, 0, -1):
                self._node(n)
                self.kept.drop(n)
                del self.dy[n]
        finally:
            for n in list(self.kept.spools):
                self.kept.drop(n)
        return self.dy[0]

    def _node(self, n: int) -> None:
        node, run = self.graph.nodes[n], self.kept
        chain = chain_of(self.graph, run.plan.place, n)
        again: dict[int, Again] = {}
        again |= {m: Again(run, m, n, again) for m in chain}
        reader = Reader(run, n, again)
        for m in node.inputs:
            if m not in self.dy:
                size = (*self.graph.sizes[m], self.graph.nodes[m].channels)
                self.dy[m] = torch.zeros(size, dtype=run.source.dtype, device=run.source.device)
        scale, shift, norm = self._norm(n)
        x, step = self.graph.sizes[n][0], step_of(self.graph, n)
        for start in range(0, x, step):
            self._tile(n, start, min(start + step, x), reader, scale, shift)
        for m in list(again):
            again.pop(m).close()
        if norm is not None:
            self._statistics(n, scale, shift, norm)

    def _norm(self, n: int):
        """What a channel is multiplied by and what is added to it, with what they come from."""
        node = self.graph.nodes[n]
        if not node.norm:
            return None, None, None
        mean, rstd = (s.to(self._wide).detach().requires_grad_() for s in self.kept.stats[node.source])
        weight, bias = (p.detach().to(self._wide).requires_grad_() for p in self._parameters(node.norm))
        with torch.enable_grad():
            each = len(weight) // node.groups
            scale = rstd[0].repeat_interleave(each) * weight
            shift = bias - mean[0].repeat_interleave(each) * scale
        leaves = scale.detach().requires_grad_(), shift.detach().requires_grad_()
        self._sums = [torch.zeros_like(leaf) for leaf in leaves]
        return *leaves, (scale, shift, mean, rstd, weight, bias)

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.kept.source.dtype, torch.float32)

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self.kept.parameters[name + ".weight"], self.kept.parameters[name + ".bias"]

    def _tile(self, n: int, start: int, stop: int, reader: Reader, scale, shift) -> None:
        node, graph = self.graph.nodes[n], self.graph
        first, last = _reads(graph, n, start, stop)
        low = reader.view(node.source, first, last).detach().requires_grad_()
        with torch.enable_grad():
            h = _prepared(graph, n, start, stop, first, low, scale, shift)
        dy = self.dy[n][start:stop]
        if n in self.affine:
            a, b = self.affine[n]
            dy = dy + (a + b * reader.own(start, stop, h.detach())).to(dy.dtype)
        out = volume(dy)
        stride, pads = (2, [0, 0, 0]) if node.resample == "down" else (1, [0, node.kernel // 2, node.kernel // 2])
        dh = self._convolution(node.name, out, h.detach(), stride, pads)
        leaves = [low] if scale is None else [low, scale, shift]
        dlow, *others = torch.autograd.grad(h, leaves, dh)
        self.dy[node.source][first:last] += dlow
        for total, part in zip(self._sums if others else [], others, strict=True):
            total += part
        if node.residual is not None:
            self._residual(n, start, stop, reader, out)

    def _residual(self, n: int, start: int, stop: int, reader: Reader, out: Tensor) -> None:
        node = self.graph.nodes[n]
        into = self.dy[node.residual][start:stop]  # type: ignore[index]
        if not node.shortcut:
            into += planes_of(out)
            return
        x = volume(reader.view(node.residual, start, stop))  # type: ignore[arg-type]
        into += planes_of(self._convolution(node.shortcut, out, x, 1, [0] * 3))

    def _convolution(self, name: str, out: Tensor, x: Tensor, stride: int, pads: list[int]) -> Tensor:
        """The gradient of a convolution's input from that of its result; those of its parameters are added up."""
        weight = self._parameters(name)[0]
        if x.itemsize < 4 and in_float32(x, out.shape[2:]):
            out, x, weight = out.float(), x.float(), weight.float()
        dx, dw, db = torch.ops.aten.convolution_backward(
            out, x, weight, [len(weight)], [stride] * 3, pads, [1] * 3, False, [0] * 3, 1, [True] * 3
        )
        self._add(name, dw, db)
        return dx.to(self.kept.source.dtype)

    def _add(self, name: str, *gradients: Tensor) -> None:
        for kind, gradient in zip(("weight", "bias"), gradients, strict=True):
            self.grads[f"{name}.{kind}"] += gradient

    def _statistics(self, n: int, scale, shift, norm) -> None:
        """From the gradients of scale and shift to those of the norm's parameters, and to what the source gets."""
        node = self.graph.nodes[n]
        made, moved, mean, rstd, weight, bias = norm
        dmean, drstd, dweight, dbias = torch.autograd.grad((made, moved), (mean, rstd, weight, bias), self._sums)
        self._add(node.norm, dweight, dbias)
        source = self.graph.nodes[node.source]
        x, y, z = self.graph.sizes[node.source]
        each = source.channels // node.groups
        count = x * y * z * each
        # mean = sum(x) / count, rstd = (sum((x - mean)^2) / count + eps) ** -0.5
        b = -drstd[0] * rstd[0].detach() ** 3 / count
        a = dmean[0] / count - b * mean[0].detach()
        self.affine[node.source] = a.repeat_interleave(each), b.repeat_interleave(each)


class Reader(Tiles):
    """What tiles of node n read, without the buffers of a forward pass."""

    def __init__(self, run: Kept, n: int, again: Mapping[int, Again]):
        self.run, self.n, self.p, self.again = run, n, n, again
        self.node, self.graph = run.graph.nodes[n], run.graph

    def own(self, start: int, stop: int, h: Tensor) -> Tensor:
        """Planes [start, stop) of node n itself, of whose convolution h is the input."""
        if self.run.plan.place[self.n] != AGAIN:
            return self.view(self.n, start, stop)
        stride, half = (2, 0) if self.node.resample == "down" else (1, self.node.kernel // 2)
        y = planes_of(ops.conv3d(h, *self._weights(self.node.name), stride, (0, half, half)))
        if self.node.residual is not None:
            part = self.view(self.node.residual, start, stop)
            if self.node.shortcut:
                part = planes_of(ops.conv3d(volume(part), *self._weights(self.node.shortcut), 1, 0))
            y = y + part
        return y


def _reads(graph: Graph, n: int, start: int, stop: int) -> tuple[int, int]:
    """The planes of its source that planes [start, stop) of node n see."""
    node, x = graph.nodes[n], graph.sizes[graph.nodes[n].source][0]
    if node.resample == "up":
        return smooth_conv.sources(start, stop, x)
    if node.resample == "down":
        return 2 * start, min(2 * stop + 1, x)
    half = node.kernel // 2
    return max(0, start - half), min(x, stop + half)


def _prepared(graph: Graph, n: int, start: int, stop: int, first: int, low: Tensor, scale, shift) -> Tensor:
    """The input of node n's convolution for planes [start, stop), zeros beyond the volume's ends along X (and, for a
    stride of 2, at the end of every axis); differentiable. low: the planes from `first` on."""
    node, x = graph.nodes[n], graph.sizes[n][0]
    h = volume(low)
    if node.norm:
        z = h.to(scale.dtype) * scale.view(-1, 1, 1, 1) + shift.view(-1, 1, 1, 1)
        h = (F.silu(z) if node.silu else z).to(low.dtype)
    if node.resample == "down":
        return F.pad(h, (0, 1, 0, 1, 0, int(2 * stop + 1 > graph.sizes[node.source][0])))
    if node.resample == "up":
        h = ops.upsample(h, "trilinear", (max(start - 1, 0) - 2 * first, min(stop + 1, x) - 2 * first))
    if node.kernel == 1:
        return h
    return F.pad(h, (0, 0, 0, 0, int(start == 0), int(stop == x)))


class _Streamed(torch.autograd.Function):
    """The network over a batch; its inputs are x and the parameters in the order of `names`."""

    @staticmethod
    def forward(ctx, forward, plan, folder, names, x, *parameters):
        y, ctx.stats = forward(dict(zip(names, parameters, strict=True)), x)
        ctx.save_for_backward(x, *parameters)
        ctx.rest = plan, folder, names
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, *parameters = ctx.saved_tensors
        plan, folder, names = ctx.rest
        wide = torch.promote_types(x.dtype, torch.float32)
        values = dict(zip(names, parameters, strict=True))
        grads = {name: torch.zeros_like(p, dtype=wide) for name, p in values.items()}
        dx = []
        for sample, gradient, stats in zip(x.split(1), dy.split(1), ctx.stats, strict=True):
            kept = Kept(plan, values, planes_of(sample), stats, folder)
            dx.append(volume(Backward(kept, planes_of(gradient), grads)()))
        of_parameters = (grads[name].to(p.dtype) for name, p in values.items())
        return None, None, None, None, torch.cat(dx), *of_parameters


def differentiable(forward, plan: BackwardPlan, folder: str | Path | None, parameters: Mapping[str, Tensor], x: Tensor):
    """forward(parameters, x) -> (output, statistics of every sample), as a function with a gradient."""
    return _Streamed.apply(forward, plan, folder, tuple(parameters), x, *parameters.values())
