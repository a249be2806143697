"""What a choice of places for the nodes of a graph takes: passes, buffers, bytes, operations. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from t2ct.stream.graph import Graph

MEMORY, SPOOL, AGAIN, OUTPUT = "memory", "spool", "recompute", "output"
HELD = 3  # tiles of a recomputed node that its readers may still want: see `run.Again`
WORKSPACE = 2**15  # bytes of a convolution's scratch, weights apart


@dataclass(frozen=True)
class Pass:
    """Every tile of `node` once. store: keep them where the node's place is; otherwise only its statistics are wanted.

    chain: the recomputed nodes that run along. in_place: the node whose memory this one takes over, tile by tile.
    outside: bytes that the convolutions allocate beside the arena. halved: the node lies in two halves of its planes,
    which `shortcut`, of the pass after it, and that pass's own node take over: see `Graph.halves`.
    """

    node: int
    store: bool
    chain: tuple[int, ...]
    in_place: int | None
    outside: int
    flops: int
    spooled: int
    halved: bool = False
    shortcut: int | None = None  # the node whose shortcut is computed along, and kept until it is added

    @property
    def runs(self) -> tuple[int, ...]:
        """All nodes that are computed."""
        return (*self.chain, self.node)


@dataclass(frozen=True)
class Buffer:
    """`bytes` of the arena that are taken from pass `first` to pass `last`. key: (node, what, pass), what being "node",
    "window", "source" or "residual" for reading these from the spool, "shortcut" for what is kept of it, "whole" for
    reading a halved source; pass is 0 for a node's own."""

    key: tuple[int, str, int]
    bytes: int
    first: int
    last: int
    offset: int = 0


class Totals:
    """What passes and their buffers come to."""

    passes: tuple[Pass, ...]
    buffers: tuple[Buffer, ...]

    @property
    def flops(self) -> int:
        """Operations of all convolutions."""
        return sum(p.flops for p in self.passes)

    @property
    def spooled(self) -> int:
        """Bytes that are written to the spool or read from it."""
        return sum(p.spooled for p in self.passes)

    def live(self, p: int) -> int:
        """Bytes of the arena in use during pass p."""
        return sum(b.bytes for b in self.buffers if b.first <= p <= b.last)

    def held(self, outside: int) -> int:
        """The peak if packing loses nothing, where `outside` bytes are allocated beside the arena at least once."""
        return max((self.live(i) + max(p.outside, outside) for i, p in enumerate(self.passes)), default=0)


@dataclass(frozen=True)
class Simulation(Totals):
    """The passes in order, what they hold, and the most bytes that lie in the spool at once."""

    passes: tuple[Pass, ...]
    buffers: tuple[Buffer, ...]
    spool: int


def chain_of(graph: Graph, place: Sequence[str], n: int) -> tuple[int, ...]:
    """The recomputed nodes that node n needs, in order."""
    found: set[int] = set()
    todo = list(graph.nodes[n].inputs)
    while todo:
        m = todo.pop()
        if m and place[m] == AGAIN and m not in found:
            found.add(m)
            todo += graph.nodes[m].inputs
    return tuple(sorted(found))


def direct(graph: Graph, n: int, place: str) -> bool:
    """Are node n's tiles written to where it lies, without a tensor of their own?"""
    return place == MEMORY and graph.smooth(n)


def _outside(graph: Graph, runs: Sequence[int], place: str, halved: bool) -> int:
    """Bytes beside the arena: the tiles that convolutions return, of recomputed nodes all that are held; what is kept
    from tile to tile; and of the convolution that takes most its weights, channels-last and once more as the library
    wants them, and what it makes on the way."""
    *chain, n = runs
    costs = graph.costs
    held = sum(costs[r].kept + costs[r].statistics for r in runs) + sum(HELD * costs[r].tile for r in chain)
    own = 0 if direct(graph, n, place) and not halved else costs[n].tile * (1 + bool(graph.nodes[n].shortcut))
    meanwhile = own if graph.nodes[n].residual in chain else 0  # what is read into the window is there before the tile

    def making(r: int) -> int:
        tiles = own if r == n else meanwhile + costs[r].tile * bool(graph.nodes[r].shortcut)
        return tiles + costs[r].weights + costs[r].reordered + costs[r].made

    return held + max(map(making, runs)) + WORKSPACE


def simulate(graph: Graph, place: Sequence[str], nodes: range) -> Simulation:
    """Compute `nodes` of the graph with every node in its place; place[n] is MEMORY, SPOOL, AGAIN or OUTPUT.

    Nodes before the range that it reads are there already, and are held until they were read.
    """
    steps = [(n, place[n] != AGAIN) for n in nodes if place[n] != AGAIN or graph.normed[n]]
    chains = [chain_of(graph, place, n) for n, _ in steps]
    halves = {m: pair for m, pair in graph.halves.items() if place[m] == place[pair[0]] == MEMORY}

    def stored(r: int) -> list[int]:  # what node r reads of what is stored: ~r is its shortcut
        return [~r if m in halves and halves[m][1] == r else m for m in graph.nodes[r].inputs if place[m] != AGAIN]

    reads = [{m for r in (n, *chain) for m in stored(r)} for (n, _), chain in zip(steps, chains, strict=True)]
    last = {m: p for p, read in enumerate(reads) for m in read}
    spooled = tuple(where == SPOOL for where in place)

    passes: list[Pass] = []
    held: dict[int, Buffer] = {
        m: Buffer((m, "node", 0), graph.costs[m].bytes, 0, last[m])
        for m in last
        if 0 <= m < nodes.start and place[m] == MEMORY
    }
    done: list[Buffer] = []
    files = {m: graph.costs[m].bytes for m in last if 0 <= m < nodes.start and place[m] == SPOOL}
    most = sum(files.values())
    for p, ((n, store), chain) in enumerate(zip(steps, chains, strict=True)):
        runs = (*chain, n)
        moved = sum(graph.costs[m].bytes for r in runs for m in graph.nodes[r].inputs if spooled[m])
        in_place, halved = None, store and n in halves
        shortcut = next((other for first, other in halves.values() if first == n and store), None)
        if store and place[n] == SPOOL:
            moved += graph.costs[n].bytes
            files[n] = graph.costs[n].bytes
            most = max(most, sum(files.values()))
        elif store and place[n] == MEMORY:
            in_place = _in_place(graph, n, p, last, held, chain)
            until = last.get(n, len(steps) - 1)  # unread in this range: the next one wants it
            if halved:
                other, half = halves[n][1], graph.costs[n].bytes // 2
                held[n] = Buffer((n, "node", 0), half, p, until)
                held[~other] = Buffer((other, "shortcut", 0), half, p, last[~other])
            elif in_place is None:
                held[n] = Buffer((n, "node", 0), graph.costs[n].bytes, p, until)
            else:
                held[n] = replace(held.pop(in_place), last=until)
        for r in runs:
            for kind, size in _scratch(graph, r, spooled):
                if size:
                    done.append(Buffer((r, kind, p), size, p, p))
        if shortcut is not None:
            done.append(Buffer((n, "whole", p), graph.costs[shortcut].read_residual, p, p))
        for m in [m for m, b in held.items() if b.last == p]:
            done.append(held.pop(m))
        files = {m: size for m, size in files.items() if last.get(m, len(steps)) > p}
        passes.append(Pass(
            n, store, chain, in_place,
            _outside(graph, runs, place[n], halved), sum(graph.costs[r].flops for r in runs), moved, halved, shortcut,
        ))  # fmt: skip
    return Simulation(tuple(passes), (*done, *held.values()), most)


def _scratch(graph: Graph, n: int, spooled: Sequence[bool]) -> Sequence[tuple[str, int]]:
    """What tiles of node n take of the arena while they are computed."""
    node, cost = graph.nodes[n], graph.costs[n]
    residual = node.residual is not None and spooled[node.residual]
    return (("window", cost.window), ("source", cost.read_source if spooled[node.source] else 0),
            ("residual", cost.read_residual if residual else 0))  # fmt: skip


def _in_place(graph: Graph, n: int, p: int, last, held: dict[int, Buffer], chain: tuple[int, ...]) -> int | None:
    """The node over whose memory node n can be written while it is read: a tile's neighbours were read before it.

    Its source, of which the window keeps the planes still wanted; or its residual, read voxel by voxel, which
    recomputed nodes between read further ahead than n writes.
    """
    node = graph.nodes[n]
    for m in (node.source, node.residual):
        if m is None or last.get(m) != p or m not in held or held[m].bytes != graph.costs[n].bytes or node.resample:
            continue
        elsewhere = m == node.residual or any(m in graph.nodes[r].inputs for r in chain)
        if m == node.source and (node.kernel == 1 or elsewhere):
            continue
        if m == node.residual and node.shortcut:
            continue
        return m
    return None


def pack(buffers: Sequence[Buffer]) -> tuple[tuple[Buffer, ...], int]:
    """The buffers with offsets in one arena, and its size: each as low as nothing is in its way, in the best of three
    orders: the largest, the longest held or the earliest first."""
    orders = (lambda b: (-b.bytes, b.first, b.key), lambda b: (b.first - b.last, -b.bytes, b.key),
              lambda b: (b.first, -b.bytes, b.key))  # fmt: skip
    return min((_pack(sorted(buffers, key=order)) for order in orders), key=lambda found: found[1])


def _pack(buffers: Sequence[Buffer]) -> tuple[tuple[Buffer, ...], int]:
    placed: list[Buffer] = []
    for buffer in buffers:
        offset = 0
        for other in sorted((b for b in placed if b.first <= buffer.last and buffer.first <= b.last),
                            key=lambda b: b.offset):  # fmt: skip
            if offset + buffer.bytes <= other.offset:
                break
            offset = max(offset, aligned(other.offset + other.bytes))
        placed.append(replace(buffer, offset=offset))
    return tuple(placed), max((b.offset + b.bytes for b in placed), default=0)


def aligned(count: int) -> int:
    """Rounded up to 64 bytes: a cache line, and more than any dtype or vector wants."""
    return -(-count // 64) * 64
