"""One training loop: Adam, warm-up and cosine decay, an exponential moving average, checkpoints that survive a kill.

The random numbers of a step come from (seed, step, rank) alone, so a resumed run sees what an uninterrupted one would.
Under torchrun, torch's DistributedDataParallel around the model that the loss calls averages the gradients; every rank
keeps the same weights and the first one writes them.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from t2ct.files import write_files

SAVE_EVERY_SECONDS = 120.0


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs to know; learning rates are of Adam, ema_decay 0 keeps no average."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0


def learning_rate(step: int, config: LoopConfig) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def run(
    model: nn.Module,
    loss_of: Callable[[torch.Generator], tuple[Tensor, dict[str, float]]],
    config: LoopConfig,
    checkpoint: Path,
    name: str,
) -> None:
    """Train `model` in place to `config.steps`; on return it holds the averaged weights where an average is kept.

    loss_of(generator) draws a batch with the generator and returns the loss and numbers to show. `checkpoint` is a
    safetensors file, written every two minutes and at the end; where it exists the run goes on from it.
    A non-finite loss raises RuntimeError with the step: the last checkpoint is then still good.
    """
    live = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(live.values(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()} if config.ema_decay else {}
    start = _resume(model, optimiser, live, average, checkpoint)
    saved = time.monotonic()
    model.train()
    rank, world = ranks()
    bar = tqdm(
        range(start, config.steps), initial=start, total=config.steps, desc=name, mininterval=5, disable=rank != 0
    )
    for step in bar:
        rate = learning_rate(step, config)
        for group in optimiser.param_groups:
            group["lr"] = rate
        seed = (config.seed * 1_000_003 + step) * world + rank
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for modules that draw on their own (dead codes)
        loss, shown = loss_of(generator)
        if not torch.isfinite(loss):
            raise RuntimeError(f"{name}: the loss is {loss.item()} at step {step}; the last checkpoint is {checkpoint}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(live.values(), config.clip_norm)
        optimiser.step()
        if average:
            _update(average, model, min(config.ema_decay, (step + 1) / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}", **{k: f"{v:.4g}" for k, v in shown.items()})
        if rank == 0 and time.monotonic() - saved > SAVE_EVERY_SECONDS:
            _save(model, optimiser, live, average, checkpoint, step + 1, config)
            saved = time.monotonic()
    if start < config.steps and rank == 0:
        _save(model, optimiser, live, average, checkpoint, config.steps, config)
    if average:
        model.load_state_dict(average)
    model.eval()


def ranks() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@torch.no_grad()
def _update(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            average[key].lerp_(value, 1 - decay)
        else:
            average[key].copy_(value)


def _save(model, optimiser, live, average, path, step, config) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"ema.{k}": v for k, v in average.items()}
    for key, parameter in live.items():
        state = optimiser.state.get(parameter, {})
        tensors |= {f"adam.{key}.{moment}": state[moment] for moment in ("exp_avg", "exp_avg_sq") if moment in state}
    metadata = {"step": str(step), "config": json.dumps(asdict(config))}
    write_files({path: save({k: v.detach().contiguous() for k, v in tensors.items()}, metadata)})


def _resume(model, optimiser, live, average, path: Path) -> int:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return 0
    with safe_open(path, "pt") as f:
        step = int(f.metadata()["step"])
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  safe_open has no iteration
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for key in average:
        average[key].copy_(tensors[f"ema.{key}"])
    for key, parameter in live.items():
        if f"adam.{key}.exp_avg" in tensors:
            moments = {m: tensors[f"adam.{key}.{m}"].clone() for m in ("exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return step
