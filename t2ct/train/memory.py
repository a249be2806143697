"""How much memory a run takes, before it takes it.

Small steps are run and their peaks measured on the very device, with its kernels: batches of one to three, two depths.
Peaks grow linearly with samples and with voxels, so few of them give the peak of any step; what stands still (weights,
optimiser, average, input) is counted.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from t2ct.models import CLIP3D, VAE, UNet
from t2ct.models.judge import Judge
from t2ct.models.text import TextLayer
from t2ct.models.unet_blocks import ResBlock, SpatialTransformer
from t2ct.models.vae import ResBlock as VAEBlock
from t2ct.models.vision import CosineAttention
from t2ct.train.config import CLIPTraining, JudgeTraining, LDMTraining, Training, VAETraining
from t2ct.train.loop import find_precision
from t2ct.train.recipe import Recipe

MARGIN = 1.1  # over the line through what is measured: small steps choose other kernels, allocators round up
PROBE = 1 / 8  # of a volume's depth, at least
CPU_VOXELS = 2**14  # of a probe on a CPU, about
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
        days = self.seconds * self.steps / 3600
        cut = f"{self.share} samples an update and device, {self.micro} at once"
        return "\n".join((
            f"plan: {cut}, blocks {'computed again' if self.checkpoint else 'kept'} for the gradient",
            f"predicted peak: {write_size(self.peak)}, of them {write_size(self.fixed)} weights, optimiser, average"
            + (f"; limit {write_size(self.limit)}" if self.limit else ""),
            f"predicted speed: {self.seconds:.3g} s an update, {days:.3g} h for {self.steps} updates",
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


def checkpoint_blocks(parts: Mapping[str, nn.Module]) -> None:
    """Blocks compute their insides again for the gradient: only what goes in is kept. In place; same values."""
    kinds = (ResBlock, SpatialTransformer, VAEBlock, TextLayer, CosineAttention)
    for part in parts.values():
        for module in part.modules():
            feed_forward = isinstance(module, nn.Sequential) and len(module) == 5  # the vision tower's
            if isinstance(module, kinds) or feed_forward:
                again = partial(checkpoint, type(module).forward, module, use_reentrant=False, preserve_rng_state=False)
                module.forward = _when_trained(module, again)  # type: ignore[method-assign]


def _when_trained(module: nn.Module, again: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return again(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    return forward


def probe_recipe(kind: str, config: Training, device: torch.device) -> Recipe:
    """The recipe of a configuration without its data, for measuring."""
    from t2ct.train.clip import CLIPRecipe
    from t2ct.train.judge import JudgeRecipe
    from t2ct.train.ldm import LDMRecipe
    from t2ct.train.vae import VAERecipe

    if isinstance(config, VAETraining):
        return VAERecipe(config, VAE(config.model.vae).to(device), None)
    if isinstance(config, CLIPTraining):
        return CLIPRecipe(config, CLIP3D(config.model.clip).to(device), None, None)
    if isinstance(config, JudgeTraining):
        return JudgeRecipe(config, Judge(config.model).to(device), None)
    assert isinstance(config, LDMTraining)
    return LDMRecipe(config, UNet(config.model.unet).to(device), None, None, None, None)


def fixed_bytes(config: Training, recipe: Recipe, share: int) -> float:
    """Weights, gradients, optimiser and average of a recipe, networks that are only used, `share` samples of input."""
    total = float(share * sum(v.nbytes for v in recipe.example(torch.device("cpu"), 1).values()))
    for i, (name, part) in enumerate(recipe.parts.items()):
        state = sum(v.nbytes for v in part.state_dict().values())
        total += state + (state if i == 0 and config.ema else 0)
        muon = recipe.rates(name)[1] > 0
        embeddings = {id(m.weight) for m in part.modules() if isinstance(m, nn.Embedding)}
        for p in part.parameters():
            if p.requires_grad:
                by_muon = muon and p.ndim > 1 and id(p) not in embeddings
                total += p.nbytes + 4 * p.numel() * (1 if by_muon else 2)  # the gradient, and the moments
    if isinstance(config, LDMTraining):
        with torch.device("meta"):
            for used in (VAE(config.model.vae), CLIP3D(config.model.clip, towers=("text",))):
                total += sum(v.nbytes for v in used.state_dict().values())
    return total


def peak_of(run: Callable[[], Any], device: torch.device) -> float:
    """Bytes that `run` has in use at most, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    results = seen.profiler.kineto_results  # type: ignore[union-attr]
    moved = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(results.events()) if e.name() == "[memory]")
    peak = now = 0
    for _, _, size in moved:
        now += size
        peak = max(peak, now)
    return float(peak)


def _probe(recipe: Recipe, device: torch.device, precision: torch.dtype, batch: int, depth: float, width: float) -> Any:
    """(peak bytes of activations, seconds, voxels) of the gradients of one small micro-batch."""
    made = recipe.example(device, batch, depth, width)
    size = next(iter(made.values())).numel() / batch

    def autocast() -> Any:
        low = precision != torch.float32
        return torch.autocast(device.type, precision if low else torch.bfloat16, enabled=low)

    def run() -> None:
        recipe.begin(recipe.config.steps)
        for name in recipe.parts:
            call: Any = partial(recipe.loss)
            recipe.gradients(name, call, [made], lambda loss: loss.backward(), autocast)

    for part in recipe.parts.values():
        part.train()
        for p in part.parameters():  # they are counted apart
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    run()  # the first run pays for first touches and kernel choice
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return peak_of(run, device), seconds, size


def probe_shares(recipe: Recipe, device: torch.device) -> tuple[int, list[tuple[float, float]]]:
    """Numbers in a whole sample, and the shares of (depth, width) to measure at: two sizes, one where no second is."""

    def size(depth: float, width: float) -> int:
        return next(iter(recipe.example(torch.device("cpu"), 1, depth, width).values())).numel()

    whole = next(iter(recipe.example(torch.device("cpu"), 1).values()))
    full, width, depth = whole.numel(), 1.0, min(1.0, max(PROBE, recipe.least / whole.shape[-1]))
    if device.type == "cpu" and not recipe.wide:  # less of a volume, so that the answer takes seconds
        width = min(1.0, max(recipe.least / whole.shape[-2], (CPU_VOXELS / (full * depth)) ** 0.5))
    first = (depth, width)
    longer = [(min(1.0, times * depth), width) for times in (2, 3, 4, 8)]
    wider = [] if recipe.wide else [(depth, min(1.0, times * width)) for times in (2, 4)]
    second = next((shares for shares in (*longer, *wider) if size(*shares) > size(*first)), None)
    return full, [first, second] if second else [first]


def measure(kind: str, config: Training, device: torch.device, blocks: bool) -> Callable[[int], tuple[float, float]]:
    """Probes the recipe; returns micro -> (peak bytes of activations, seconds of a micro-batch)."""
    recipe = probe_recipe(kind, config, device)
    if blocks:
        checkpoint_blocks(recipe.parts)
    precision = find_precision(config.precision, device)
    full, probes = probe_shares(recipe, device)

    @cache
    def at(batch: int) -> tuple[float, float]:
        """(bytes, seconds) of a whole-sized micro-batch: the line through two sizes."""
        found = [_probe(recipe, device, precision, batch, *shares) for shares in probes]
        (low, quick, small), (high, slow, large) = found[0], found[-1]
        if small == large:  # one size alone: what stands still grows with the rest, so it is a bound all the same
            return high * full / large, slow * full / large
        further = (full - large) / (large - small)
        return max(high, high + (high - low) * further), max(slow, slow + (slow - quick) * further)

    def predict(micro: int) -> tuple[float, float]:
        # A batch of one is no line's beginning: convolutions choose other layouts for it.
        if micro <= 2:
            memory, seconds = at(micro)
        else:
            (memory, seconds), (more, longer) = at(2), at(3)
            memory += (micro - 2) * max(more - memory, 0.0)
            seconds += (micro - 2) * max(longer - seconds, 0.0)
        return MARGIN * memory, seconds

    return predict


def make_plan(kind: str, config: Training, device: torch.device, world: int = 1) -> Plan:
    """The largest micro-batch that fits config.memory, with blocks kept if that fits; without a limit, as configured.

    ValueError names the least memory where nothing fits.
    """
    share = max(1, config.batch // world)
    limit = read_size(config.memory) if config.memory else 0.0
    with torch.random.fork_rng(devices=[]):
        recipe = probe_recipe(kind, config, device)
        fixed = fixed_bytes(config, recipe, share)
        del recipe
        smallest = math.inf
        for blocks in (True,) if config.checkpoint_blocks else (False, True):
            predict = measure(kind, config, device, blocks)
            cuts = [m for m in range(share, 0, -1) if share % m == 0]
            for micro in [config.micro] if config.micro else cuts:
                activations, seconds = predict(micro)
                peak = fixed + activations
                smallest = min(smallest, peak)
                if not limit or peak <= limit:
                    times = share // micro * (2 if isinstance(config, CLIPTraining) and micro < share else 1)
                    return Plan(micro, share, blocks, fixed, peak, seconds * times, limit, config.steps)
    raise ValueError(f"memory: wanted at least {write_size(smallest)} for this network, got {config.memory}")
