"""What an update takes, by small ones that are run: on a GPU, whose kernels have workspaces that nobody can count.

Batches of one to three, two depths. Peaks grow linearly with samples and with voxels, so few of them give the peak of
any step; what stands still (weights, optimiser, average, input) is counted.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from t2ct.models import CLIP3D, VAE
from t2ct.train.config import LDMTraining, Training
from t2ct.train.memory.recipes import checkpoint_blocks, probe_recipe
from t2ct.train.optim import MESSAGE, moment_bytes, shared_out
from t2ct.train.parts.machine import find_precision
from t2ct.train.parts.shard import units_of
from t2ct.train.recipe import Recipe

MARGIN = 1.1  # over the line through what is measured: small steps choose other kernels, allocators round up
PROBE = 1 / 8  # of a volume's depth, at least
CPU_VOXELS = 2**14  # of a probe on a CPU, about


def rows_of(tensor: Tensor, world: int) -> int:
    """Numbers of a tensor on each of so many devices that share it out by rows, filled up to the same for all."""
    return -(-len(tensor) // world) * tensor[:1].numel() if tensor.ndim else 1


def is_shared(config: Training, recipe: Recipe, name: str, world: int) -> bool:
    """Do so many devices share out the weights of this part?"""
    return config.shard == "all" and world > 1 and name == next(iter(recipe.parts))


def moments_of(config: Training, recipe: Recipe, world: int = 1) -> float:
    """Bytes that the optimisers keep on a device, of `world` the one with the most."""
    if config.offload == "optimiser":
        return 0.0
    total = 0.0
    for name, part in recipe.parts.items():
        muon = recipe.rates(name)[1] > 0
        embeddings = {id(m.weight) for m in part.modules() if isinstance(m, nn.Embedding)}
        live = {k: p for k, p in part.named_parameters() if p.requires_grad}
        muons = {k for k, p in live.items() if muon and p.ndim > 1 and id(p) not in embeddings}
        taken = {k: moment_bytes(p.numel(), k in muons, config.optimiser_bits) for k, p in live.items()}
        handed = live
        if is_shared(config, recipe, name, world):  # Muon's matrices stay whole, each on one of the devices
            handed = {k: live[k] for k in muons}
            total += sum(moment_bytes(rows_of(live[k], world), False, 32) for k in live.keys() - muons)
        shares = shared_out({k: p.numel() for k, p in handed.items()}, world if config.shard != "none" else 1)
        total += max(sum(taken[k] for k in share) for share in shares)
    return total


def fixed_bytes(config: Training, recipe: Recipe, share: int, world: int = 1) -> float:
    """Weights, gradients, optimiser and average of a recipe, as far as they are not offloaded; networks that are only
    used; `share` samples of input."""
    total = float(share * sum(v.nbytes for v in recipe.example(torch.device("cpu"), 1).values()))
    total += moments_of(config, recipe, world)
    for i, (name, part) in enumerate(recipe.parts.items()):
        state = sum(v.nbytes for v in part.state_dict().values())
        gradients = sum(p.nbytes for p in part.parameters() if p.requires_grad)
        if is_shared(config, recipe, name, world):
            less = {k: p.nbytes - 4 * rows_of(p, world) for k, p in part.named_parameters()}
            state -= sum(less.values())
            gradients -= sum(less[k] for k, p in part.named_parameters() if p.requires_grad)
        total += state + gradients + (state if i == 0 and config.ema and config.offload == "none" else 0)
    if isinstance(config, LDMTraining):
        with torch.device("meta"):
            for used in (VAE(config.model.vae), CLIP3D(config.model.clip, towers=("text",))):
                total += sum(v.nbytes for v in used.state_dict().values())
    return total


def whole_bytes(config: Training, recipe: Recipe, world: int) -> tuple[float, float]:
    """Bytes of what is whole for a while where so many devices share out what they keep: beside the activations, the
    weights and gradients of two blocks, the one at work and the next, and of what lies outside blocks; and without
    them, when the optimisers step or the network is looked at."""
    name, network = next(iter(recipe.parts.items()))
    if world == 1 or config.shard == "none":
        return 0.0, 0.0
    live = {k: p for k, p in network.named_parameters() if p.requires_grad}
    message = 4.0 * max(MESSAGE, *(p.numel() for p in live.values()))
    message = min(message, 4.0 * sum(p.numel() for p in live.values()))
    if not is_shared(config, recipe, name, world):
        return 0.0, message
    blocks = sorted(sum(p.nbytes for p in unit.parameters()) for unit in units_of(network))
    every = sum(p.nbytes for p in network.parameters())
    shown = float(sum(v.nbytes for v in network.state_dict().values()))
    shown += max(p.nbytes for p in live.values()) - 4 * sum(rows_of(p, world) for p in live.values())  # no gradients
    matrices = 0.0
    if recipe.rates(name)[1]:  # Muon's, a rank's share of them, with their gradients
        handed = {k: p.numel() for k, p in live.items() if p.ndim > 1}
        matrices = 8.0 * max(sum(handed[k] for k in share) for share in shared_out(handed, world))
    return 2.0 * (every - sum(blocks[:-2])), max(shown, matrices + message)


def peak_of(run: Callable[[], Any], device: torch.device) -> float:
    """Bytes that `run` has in use at most, beyond what was there before."""
    gc.collect()  # else what others left in cycles is freed meanwhile, and counted as freed by `run`
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
