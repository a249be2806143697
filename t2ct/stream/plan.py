"""Where every tensor of a streamed network lies, so that all of them fit a budget and the least work is done twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from t2ct.stream.budget import enough_bytes, format_bytes
from t2ct.stream.graph import Graph
from t2ct.stream.simulate import AGAIN, MEMORY, OUTPUT, SPOOL, Buffer, Pass, Totals, pack, simulate

# Rates that weigh recomputing against spooling: operations a second, and bytes a second to and from the spool. They are
# round figures of the processors this was written on; a plan's bytes do not depend on them.
RATES = {"cpu": (2e11, 1e9), "cuda": (3e14, 2e10)}
INPUT = "input"
SEARCHES = 48  # a tenth of a second each, of a network of 30 nodes


@dataclass(frozen=True)
class Plan(Totals):
    """How a network runs over a volume. Every plan of one network and input gives the same bits.

    place[n]: where node n lies, "memory", "spool" (a file, or pinned memory of a GPU's host), "recompute" (nowhere: its
    tiles are made when they are read), "input" or "output". buffers: their offsets in one arena of `arena` bytes.
    output: bytes of the result. spool: the most bytes that lie in the spool at once.
    """

    graph: Graph
    place: tuple[str, ...]
    passes: tuple[Pass, ...]
    buffers: tuple[Buffer, ...]
    arena: int
    output: int
    spool: int

    @property
    def peak(self) -> int:
        """Bytes that are allocated beyond weights and input, at most."""
        return self.arena + self.output + self.outside

    @property
    def outside(self) -> int:
        """Bytes beside arena and result, at most."""
        return max(p.outside for p in self.passes)

    @property
    def work(self) -> float:
        """Operations over those of a plan that recomputes nothing: 1.0 and more."""
        return self.flops / sum(self.graph.costs[n].flops for n in range(1, len(self.graph.nodes)))

    def used(self, p: int) -> int:
        """Bytes in use during pass p, of the arena what is taken then."""
        return self.live(p) + self.output + self.passes[p].outside

    def table(self) -> str:
        """One line a pass: what is computed, its size, where it lies, what is recomputed for it, bytes in use."""
        rows = [("pass", "size", "lies in", "planes", "computed again", "in use")]
        for p, step in enumerate(self.passes):
            where = self.place[step.node] if step.store else "nowhere: its statistics alone"
            if step.in_place is not None:
                where += f", over {self.label(step.in_place)}"
            if step.halved:
                where += ", in two halves"
            if step.shortcut is not None:
                where += f", with {self.graph.nodes[step.shortcut].shortcut.replace('.conv.conv', '')}"
            shape = (self.graph.nodes[step.node].channels, *self.graph.sizes[step.node])
            rows.append((
                self.label(step.node), "x".join(map(str, shape)), where, str(self.graph.thickest(step.node)),
                ", ".join(map(self.label, step.chain)) or "-", format_bytes(self.used(p)),
            ))  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        spool = f", {format_bytes(self.spooled)} through a spool of {format_bytes(self.spool)}" if self.spool else ""
        lines.append(
            f"at most {format_bytes(self.peak)} beyond weights and input, {self.work:.2f}x the operations of a plan "
            f"that recomputes nothing ({self.flops / 1e12:.3g} TFLOP){spool}"
        )
        return "\n".join(lines)

    def label(self, n: int) -> str:
        """A short name of node n: its convolution's, without the levels that only the state dict wants."""
        return self.graph.nodes[n].name.replace(".conv.conv", "") or INPUT


@lru_cache(maxsize=64)
def make_plan(graph: Graph, budget: int, spool: bool, output_itemsize: int, beside: int = 0) -> Plan:
    """The plan of least predicted time within `budget` bytes; spool: may tensors be spooled?

    output_itemsize: bytes of one number of the result. beside: bytes of the budget that others take. Raises ValueError
    where no plan fits, with the least that would.
    """
    given, budget = budget, budget - beside
    whole = _packed(graph, _all_in_memory(graph), output_itemsize)
    if whole.peak <= budget:
        return whole
    room = budget - whole.output
    for turn in range(SEARCHES):
        place = _search(graph, room, spool, whole.outside)
        if place is None:
            break
        plan = _packed(graph, place, output_itemsize)
        if plan.peak <= budget:
            return plan
        # Packing loses something between buffers. The next best plan is the best of those that need less than this one;
        # where many are alike, what is lost is taken off the budget, which may pass one by.
        room = min(room, plan.held(whole.outside)) - (1 if turn < SEARCHES // 2 else plan.peak - budget)
    least = smallest_plan(graph, spool, output_itemsize)
    if least.peak <= budget:
        return least
    with_spool = ""
    if not spool:
        with_spool = f", with a spool {enough_bytes(smallest_plan(graph, True, output_itemsize).peak + beside)}"
    others = f", {format_bytes(beside)} of other samples" if beside else ""
    raise ValueError(
        f"memory_budget: wanted at least {enough_bytes(least.peak + beside)}{with_spool} for {graph.size} voxels "
        f"(tiles of whole planes, the result of {format_bytes(least.output)} and its least inputs{others}), got "
        f"{format_bytes(given)}"
    )


@lru_cache(maxsize=64)
def smallest_plan(graph: Graph, spool: bool, output_itemsize: int) -> Plan:
    """The plan of the least peak, whatever it recomputes."""
    whole = _packed(graph, _all_in_memory(graph), output_itemsize)
    # What lies beside the arena is least where nothing is held for recomputing: two searches, with and without it.
    places = [_search(graph, None, spool, outside) for outside in (0, whole.outside)]
    found = [_packed(graph, place, output_itemsize) for place in places if place is not None]
    return min([whole, *found], key=lambda plan: (plan.peak, plan.flops, plan.spooled))


def _all_in_memory(graph: Graph) -> tuple[str, ...]:
    return (INPUT, *[MEMORY] * (len(graph.nodes) - 2), OUTPUT)


def _packed(graph: Graph, place: tuple[str, ...], output_itemsize: int) -> Plan:
    simulation = simulate(graph, place, range(1, len(graph.nodes)))
    buffers, arena = pack(simulation.buffers)
    output = graph.costs[-1].bytes // graph.itemsize * output_itemsize
    return Plan(graph, place, simulation.passes, buffers, arena, output, simulation.spool)


def segments(graph: Graph) -> list[range]:
    """Runs of nodes on one grid. Their last node is always stored: from there the next grid is recomputed."""
    starts = [n for n in range(1, len(graph.nodes)) if n == 1 or graph.sizes[n] != graph.sizes[n - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(graph.nodes)], strict=True)]


def _search(graph: Graph, room: int | None, spool: bool, outside: int) -> tuple[str, ...] | None:
    """The places of least predicted time whose every pass fits `room` bytes; with None those of the least peak."""
    rate, speed = RATES[graph.device]
    # Where the nodes so far lie -> (what it costs, places), for both places of the last one.
    states: dict[str, tuple[tuple[float, float], tuple[str, ...]]] = {INPUT: ((0.0, 0.0), (INPUT,))}
    for segment in segments(graph):
        following: dict[str, tuple[tuple[float, float], tuple[str, ...]]] = {}
        for (cost, before), inside in product(states.values(), _choices(graph, segment, spool)):
            place = (*before, *inside, *[MEMORY] * (len(graph.nodes) - len(before) - len(inside)))
            found = simulate(graph, place, segment)
            peak = found.held(outside)
            if room is not None and peak > room:
                continue
            seconds = cost[1] + found.flops / rate + found.spooled / speed
            score = (max(cost[0], peak) if room is None else 0.0, seconds)
            if inside[-1] not in following or score < following[inside[-1]][0]:
                following[inside[-1]] = score, (*before, *inside)
        states = following
    return min(states.values())[1] if states else None


def _choices(graph: Graph, segment: range, spool: bool) -> Sequence[tuple[str, ...]]:
    """All places of a segment's nodes."""
    stored = (MEMORY, SPOOL) if spool else (MEMORY,)
    end = (OUTPUT,) if segment[-1] == len(graph.nodes) - 1 else stored
    return list(product(*[(*stored, AGAIN)] * (len(segment) - 1), end))
