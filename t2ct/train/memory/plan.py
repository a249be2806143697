"""The plan: the largest micro-batch that fits, whether blocks compute their insides again for the gradient, and what
a GPU leaves to the host's memory where nothing else helps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch

from t2ct.stream import parse_bytes
from t2ct.train.config import OFFLOADS, SHARDS, CLIPTraining, Training
from t2ct.train.memory.count import count_update, pace_of, seconds_of
from t2ct.train.memory.measure import fixed_bytes, measure, whole_bytes
from t2ct.train.memory.recipes import probe_recipe
from t2ct.train.parts.machine import find_precision

LEFT = {
    "none": "",
    "average": ", the average in the host's memory",
    "optimiser": ", average and optimisers in the host's memory",
}
SHARED = {"none": "", "optimiser": ", optimisers shared out", "all": ", weights, gradients and optimisers shared out"}


@dataclass(frozen=True)
class Plan:
    """How an update is cut up, and what it costs where that was measured. Bytes and seconds; 0: not measured."""

    micro: int
    share: int  # samples of a device in an update
    checkpoint: bool = False
    fixed: float = 0.0
    peak: float = 0.0
    seconds: float = 0.0
    limit: float = 0.0
    steps: int = 0
    offload: str = "none"
    shard: str = "none"

    def text(self) -> str:
        """The plan in a few lines."""
        hours = self.seconds * self.steps / 3600
        cut = f"{self.share} samples an update and device, {self.micro} at once"
        return "\n".join((
            f"plan: {cut}, blocks {'computed again' if self.checkpoint else 'kept'} for the gradient"
            f"{SHARED[self.shard]}{LEFT[self.offload]}",
            f"predicted peak: {write_size(self.peak)}, of them {write_size(self.fixed)} weights, optimiser, average"
            + (f"; limit {write_size(self.limit)}" if self.limit else ""),
            f"predicted speed: {self.seconds:.3g} s an update, {hours:.3g} h for {self.steps} updates",
        ))  # fmt: skip


def read_size(words: str) -> float:
    """ "24GB", "800 MiB" or "6e9" in bytes, as everywhere."""
    return float(parse_bytes(words, "memory"))


def write_size(size: float) -> str:
    """Bytes as people write them, rounded up."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{math.ceil(10 * size / unit) / 10:g} {name}"


def make_plan(
    kind: str, config: Training, device: torch.device, world: int = 1, told: Callable[[str], None] = lambda _: None
) -> Plan:  # fmt: skip
    """The largest micro-batch that fits config.memory, with blocks kept if that fits, as little shared out among
    several devices as fits, and on a GPU with average and optimisers there if that fits; without a limit, as
    configured.

    told: is handed a line before everything that takes a moment. ValueError names the least memory where nothing fits.
    """
    share = max(1, config.batch // world)
    limit = read_size(config.memory) if config.memory else 0.0
    by = _measured if device.type == "cuda" else _counted
    predict = by(kind, replace(config, batch=share, memory=""), device, world)
    smallest = math.inf
    tried = _ways(config, device, world) if limit else [(config.shard, config.offload)]
    with torch.random.fork_rng(devices=[]):
        for (shard, offload), blocks in product(tried, (True,) if config.checkpoint_blocks else (False, True)):
            for micro in _micros(config, share, bool(limit)):
                again = "computed again" if blocks else "kept"
                told(f"plan: {micro} at once, blocks {again}{SHARED[shard]}{LEFT[offload]}: what does it take?")
                fixed, peak, seconds = predict(micro, blocks, offload, shard)
                smallest = min(smallest, peak)
                if not limit or peak <= limit:
                    return Plan(micro, share, blocks, fixed, peak, seconds(), limit, config.steps, offload, shard)
    raise ValueError(f"memory: wanted at least {write_size(smallest)} for this network, got {config.memory}")


def _micros(config: Training, share: int, limited: bool) -> list[int]:
    """Micro-batches to try, the largest first; without a limit the one that is configured."""
    most = min(config.micro or share, share)
    return [m for m in range(most, 0, -1) if share % m == 0] if limited else [config.micro or share]


def _ways(config: Training, device: torch.device, world: int) -> list[tuple[str, str]]:
    """What to share out and what to leave to the host, the least first: other devices are nearer than the host."""
    shards = [s for s in SHARDS[SHARDS.index(config.shard) :] if s != "all" or config.optimiser_bits == 32]
    shards = shards if world > 1 else [config.shard]
    first, *more = _offloads(config, device)
    return [(s, first) for s in shards] + [(shards[-1], o) for o in more]


def _offloads(config: Training, device: torch.device) -> list[str]:
    """What to leave to the host, the least first; a CPU's own memory is the host's, and nothing is won."""
    if device.type != "cuda":
        return [config.offload]
    return [o for o in OFFLOADS[OFFLOADS.index(config.offload) :] if o != "average" or config.ema]


Prediction = Callable[[int, bool, str, str], tuple[float, float, Callable[[], float]]]


def _counted(kind: str, config: Training, device: torch.device, world: int = 1) -> Prediction:
    """(micro, blocks, offload, shard) -> bytes that stand still, bytes at most, and how to learn the seconds of an
    update."""

    def predict(micro: int, blocks: bool, offload: str, shard: str) -> tuple[float, float, Callable[[], float]]:
        left, others, at_work, between = replace(config, offload=offload, shard=shard), 0.0, 0.0, 0.0
        cost = count_update(kind, replace(left, shard="none"), micro, blocks, device, shard == "all" and world > 1)
        if shard != "none" and world > 1:
            recipe = probe_recipe(kind, config, torch.device("meta"))
            others = fixed_bytes(left, recipe, 0) - fixed_bytes(left, recipe, 0, world)
            at_work, between = whole_bytes(left, recipe, world)
        precision, fixed = find_precision(config.precision, device), cost.fixed - others
        peak = max(cost.peak - others + at_work, fixed + between)
        return fixed, peak, lambda: seconds_of(cost.work, pace_of(precision))

    return predict


def _measured(kind: str, config: Training, device: torch.device, world: int = 1) -> Prediction:
    """As `_counted`, by running small updates on the device."""
    recipe = probe_recipe(kind, config, torch.device("meta"))  # for its sizes alone
    known: dict[bool, Callable[[int], tuple[float, float]]] = {}

    def predict(micro: int, blocks: bool, offload: str, shard: str) -> tuple[float, float, Callable[[], float]]:
        left = replace(config, offload=offload, shard=shard)
        # Micro-batches wait in the host's memory, but those whose volumes a critic sees again.
        held = config.batch if kind == "vae" else min(config.batch, 2 * micro)
        fixed = fixed_bytes(left, recipe, held, world)
        at_work, between = whole_bytes(left, recipe, world)
        if blocks not in known:
            known[blocks] = measure(kind, config, device, blocks)
        activations, seconds = known[blocks](micro)
        cached = isinstance(config, CLIPTraining) and micro < config.batch
        peak = fixed + max(activations + at_work, between)
        return fixed, peak, lambda: seconds * (config.batch // micro) * (2 if cached else 1)

    return predict
