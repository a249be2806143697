"""The plan: the largest micro-batch that fits, and whether blocks compute their insides again for the gradient."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from t2ct.train.config import CLIPTraining, Training
from t2ct.train.memory.count import count_update, pace_of, seconds_of
from t2ct.train.memory.measure import fixed_bytes, measure
from t2ct.train.memory.recipes import probe_recipe
from t2ct.train.parts.machine import find_precision

UNITS = {"": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}


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

    def text(self) -> str:
        """The plan in a few lines."""
        hours = self.seconds * self.steps / 3600
        cut = f"{self.share} samples an update and device, {self.micro} at once"
        return "\n".join((
            f"plan: {cut}, blocks {'computed again' if self.checkpoint else 'kept'} for the gradient",
            f"predicted peak: {write_size(self.peak)}, of them {write_size(self.fixed)} weights, optimiser, average"
            + (f"; limit {write_size(self.limit)}" if self.limit else ""),
            f"predicted speed: {self.seconds:.3g} s an update, {hours:.3g} h for {self.steps} updates",
        ))  # fmt: skip


def read_size(words: str) -> float:
    """ "24GB" or "800 MiB" in bytes."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]i?B|)\s*", words, re.IGNORECASE)
    if not match or not float(match[1]) > 0:
        raise ValueError(f"memory: wanted a size such as 24GB, got {words!r}")
    return float(match[1]) * UNITS[match[2].upper()]


def write_size(size: float) -> str:
    """Bytes as people write them, rounded up."""
    unit, name = (1e9, "GB") if size >= 1e9 else (1e6, "MB")
    return f"{math.ceil(10 * size / unit) / 10:g} {name}"


def make_plan(
    kind: str, config: Training, device: torch.device, world: int = 1, told: Callable[[str], None] = lambda _: None
) -> Plan:  # fmt: skip
    """The largest micro-batch that fits config.memory, with blocks kept if that fits; without a limit, as configured.

    told: is handed a line before everything that takes a moment. ValueError names the least memory where nothing fits.
    """
    share = max(1, config.batch // world)
    limit = read_size(config.memory) if config.memory else 0.0
    predict = (_measured if device.type == "cuda" else _counted)(kind, replace(config, batch=share, memory=""), device)
    smallest = math.inf
    with torch.random.fork_rng(devices=[]):
        for blocks in (True,) if config.checkpoint_blocks else (False, True):
            for micro in [config.micro] if config.micro else [m for m in range(share, 0, -1) if share % m == 0]:
                told(f"plan: {micro} at once, blocks {'computed again' if blocks else 'kept'}: what does it take?")
                fixed, peak, seconds = predict(micro, blocks)
                smallest = min(smallest, peak)
                if not limit or peak <= limit:
                    return Plan(micro, share, blocks, fixed, peak, seconds(), limit, config.steps)
    raise ValueError(f"memory: wanted at least {write_size(smallest)} for this network, got {config.memory}")


Prediction = Callable[[int, bool], tuple[float, float, Callable[[], float]]]


def _counted(kind: str, config: Training, device: torch.device) -> Prediction:
    """(micro, blocks) -> bytes that stand still, bytes at most, and how to learn the seconds of an update."""

    def predict(micro: int, blocks: bool) -> tuple[float, float, Callable[[], float]]:
        cost = count_update(kind, config, micro, blocks, device)
        precision = find_precision(config.precision, device)
        return cost.fixed, cost.peak, lambda: seconds_of(cost.work, pace_of(precision))

    return predict


def _measured(kind: str, config: Training, device: torch.device) -> Prediction:
    """As `_counted`, by running small updates on the device."""
    fixed = fixed_bytes(config, probe_recipe(kind, config, device), config.batch)
    known: dict[bool, Callable[[int], tuple[float, float]]] = {}

    def predict(micro: int, blocks: bool) -> tuple[float, float, Callable[[], float]]:
        if blocks not in known:
            known[blocks] = measure(kind, config, device, blocks)
        activations, seconds = known[blocks](micro)
        cached = isinstance(config, CLIPTraining) and micro < config.batch
        return fixed, fixed + activations, lambda: seconds * (config.batch // micro) * (2 if cached else 1)

    return predict
