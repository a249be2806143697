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
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from t2ct.files import write_files

SAVE_EVERY_SECONDS = 120.0
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@dataclass(frozen=True)
class LoopConfig:
    """What the loop needs to know.

    learning_rate        of AdamW, for every parameter or, with matrix_learning_rate, for vectors and embeddings
    matrix_learning_rate of Muon (Jordan et al. 2024), for matrices and convolutions; 0: AdamW for all. With one volume
                         a step a gradient is nearly of rank one (brightness, contrast) and Adam swings along it; an
                         orthogonalised update learns every direction at once.
    ema_decay            0 keeps no average
    """

    steps: int
    batch_size: int
    learning_rate: float
    matrix_learning_rate: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    autocast: bool = True  # bfloat16 convolutions and matrix products where the processor multiplies them natively


def rate_factor(step: int, config: LoopConfig) -> float:
    """Linear warm-up to 1, then a cosine down to 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


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
    optimiser = Optimisers(model, live, config)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()} if config.ema_decay else {}
    start = _resume(model, optimiser, average, checkpoint)
    saved = time.monotonic()
    model.train()
    rank, world = ranks()
    bar = tqdm(
        range(start, config.steps), initial=start, total=config.steps, desc=name, mininterval=5, disable=rank != 0
    )
    for step in bar:
        seed = (config.seed * 1_000_003 + step) * world + rank
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # for modules that draw on their own (dead codes)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast and has_bfloat16()):
            loss, shown = loss_of(generator)
        if not torch.isfinite(loss):
            raise RuntimeError(f"{name}: the loss is {loss.item()} at step {step}; the last checkpoint is {checkpoint}")
        model.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(live.values(), config.clip_norm)
        optimiser.step(rate_factor(step, config))
        if average:
            _update(average, model, min(config.ema_decay, (step + 1) / (step + 10)))
        bar.set_postfix(loss=f"{loss.item():.4f}", norm=f"{norm:.2f}", **{k: f"{v:.4g}" for k, v in shown.items()})
        if rank == 0 and time.monotonic() - saved > SAVE_EVERY_SECONDS:
            _save(model, optimiser, average, checkpoint, step + 1, config)
            saved = time.monotonic()
    if start < config.steps and rank == 0:
        _save(model, optimiser, average, checkpoint, config.steps, config)
    if average:
        model.load_state_dict(average)
    model.eval()


@cache
def has_bfloat16() -> bool:
    """Does this processor have bfloat16 products? Emulated ones would be slower than float32."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has no such function
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


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


class Optimisers:
    """AdamW, and Muon for the matrices where the configuration asks for it, with one state to save and restore."""

    def __init__(self, model: nn.Module, live: dict[str, nn.Parameter], config: LoopConfig):
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        by_muon = {
            k: p for k, p in live.items() if config.matrix_learning_rate and p.ndim > 1 and id(p) not in embeddings
        }
        rest = {k: p for k, p in live.items() if k not in by_muon}
        self.live = live
        # Muon takes matrices: a convolution's weight (out, in, 3, 3, 3) is shown to it as (out, in * 27), a view.
        self.matrices = {k: nn.Parameter(p.detach().view(len(p), -1)) for k, p in by_muon.items()}
        decay = config.weight_decay
        self.rates = {"adam": config.learning_rate, "muon": config.matrix_learning_rate}
        self.optimisers: dict[str, torch.optim.Optimizer] = {
            "adam": torch.optim.AdamW(rest.values(), lr=config.learning_rate, weight_decay=decay, fused=True)
        }
        if self.matrices:
            self.optimisers["muon"] = torch.optim.Muon(
                self.matrices.values(), lr=config.matrix_learning_rate, weight_decay=decay
            )
        self.owners = {k: ("adam", p) for k, p in rest.items()} | {k: ("muon", p) for k, p in self.matrices.items()}

    def step(self, factor: float) -> None:
        """One step at `factor` times the learning rates."""
        for key, matrix in self.matrices.items():
            gradient = self.live[key].grad
            matrix.grad = None if gradient is None else gradient.reshape(matrix.shape)
        for name, optimiser in self.optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = factor * self.rates[name]
            optimiser.step()

    def state(self) -> dict[str, Tensor]:
        """The moments of every parameter, as "muon.key.momentum_buffer"."""
        return {
            f"{name}.{key}.{moment}": value
            for key, (name, parameter) in self.owners.items()
            for moment, value in self.optimisers[name].state.get(parameter, {}).items()
            if moment in MOMENTS
        }

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        for key, (name, parameter) in self.owners.items():
            moments = {m: state[f"{name}.{key}.{m}"].clone() for m in MOMENTS if f"{name}.{key}.{m}" in state}
            if moments:
                self.optimisers[name].state[parameter] = {"step": torch.tensor(float(step)), **moments}


def _save(model, optimiser, average, path, step, config) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()} | {f"ema.{k}": v for k, v in average.items()}
    tensors |= optimiser.state()
    metadata = {"step": str(step), "config": json.dumps(asdict(config))}
    write_files({path: save({k: v.detach().contiguous() for k, v in tensors.items()}, metadata)})


def _resume(model, optimiser, average, path: Path) -> int:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return 0
    with safe_open(path, "pt") as f:
        step = int(f.metadata()["step"])
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118  safe_open has no iteration
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for key in average:
        average[key].copy_(tensors[f"ema.{key}"])
    optimiser.restore(tensors, step)
    return step
