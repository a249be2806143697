"""The training loop: every recipe goes through `run`.

An update draws its samples, computes each part's gradient, clips it and steps, unless it is not finite; then the
average follows. What happens at an update depends on the seed and its number alone, and a checkpoint holds everything
that the updates before have left, so that a run that goes on ends with the bits of one that was never stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from t2ct.train.checkpoint import Checkpoints
from t2ct.train.config import Training
from t2ct.train.data.order import Micros, Order, reading
from t2ct.train.data.source import BadVolume
from t2ct.train.optim import Average, Optimisers, rate_factor
from t2ct.train.parts import shard
from t2ct.train.parts.machine import find_precision, kept_memory
from t2ct.train.recipe import Batch, Call, Recipe, Shown, ranks, sum_ranks
from t2ct.train.show.metrics import Metrics

EXIT_PREEMPTED = 75  # "try again": what the command ends with after SIGTERM or SIGUSR1


class Preempted(SystemExit):
    """A signal asked the run to end; everything up to here is saved."""

    def __init__(self, step: int):
        super().__init__(EXIT_PREEMPTED)
        self.step = step


class Run:
    """The state of a run between two updates: networks, optimisers, averages, scaler, counters."""

    def __init__(self, recipe: Recipe, config: Training, device: torch.device):
        self.recipe, self.config, self.device = recipe, config, device
        self.precision = find_precision(config.precision, device)
        self.step = self.skipped = self.bad_row = 0
        self.best: dict[str, float] = {}
        self.first = next(iter(recipe.parts))
        self.shared = config.shard == "all" and ranks()[1] > 1
        self.calls = {name: self._call(name) for name in recipe.parts}
        kept = {
            "host": config.offload == "optimiser", "bits": config.optimiser_bits,
            "shard": ranks() if config.shard != "none" else (0, 1),
        }  # fmt: skip
        self.optimisers = {
            n: Optimisers(part, *recipe.rates(n), config.weight_decay, **kept)  # type: ignore[arg-type]
            for n, part in recipe.parts.items()
        }
        self.average = Average(recipe.parts[self.first], config.ema, config.offload != "none")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        # What the scaler divides gradients by the scale of: it wants an optimiser, whichever of them will step.
        self.handles = {
            n: [torch.optim.SGD(some, lr=0.0) for some in shard.alike(o.live.values())]
            for n, o in self.optimisers.items()
        }

    def _call(self, name: str) -> nn.Module:
        """What computes a part's loss. Only the first is worth sharing out: a critic is small."""
        part = self.recipe.parts[name]
        call = Call(part, self.recipe.loss)
        if self.shared and name == self.first:
            self.hollow = shard.hollow(part)
            shard.fully_shard(call, part, self.device)
            return call
        return DistributedDataParallel(call, broadcast_buffers=False) if ranks()[1] > 1 else call

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds; of several ranks all must call, the first has it."""
        states = {name: part.state_dict() for name, part in self.recipe.parts.items()}
        kept = {f"part.{n}.{k}": v for n, s in states.items() for k, v in shard.gathered(s, s).items()}
        kept |= {f"optim.{n}.{k}": v for n, o in self.optimisers.items() for k, v in o.state().items()}
        average = shard.gathered(self.average.weights, states[self.first])
        return kept | {f"ema.{k}": v for k, v in average.items()}

    def facts(self) -> dict[str, Any]:
        """The numbers beside the tensors."""
        return {
            "skipped": self.skipped,
            "bad_row": self.bad_row,
            "best": self.best,
            "average_updates": self.average.updates,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over a checkpoint."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        for name, part in self.recipe.parts.items():
            part.load_state_dict(shard.as_shared(under(f"part.{name}."), part.state_dict()))
            self.optimisers[name].restore(under(f"optim.{name}."))
        average = shard.as_shared(under("ema."), self.recipe.parts[self.first].state_dict())
        for key, value in average.items():
            self.average.weights[key].copy_(shard.local(value))
        self.step, self.skipped, self.bad_row = facts["step"], facts["skipped"], facts["bad_row"]
        self.best, self.average.updates = facts["best"], facts["average_updates"]
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])

    def autocast(self) -> Any:
        """The context in which losses are computed."""
        dtype = self.precision if self.precision != torch.float32 else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != torch.float32)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The network with its averaged weights, in evaluation mode; afterwards as it was. Of a shared one a copy that
        is whole: all ranks must call."""
        model = self.recipe.parts[self.first]
        if self.shared:
            state = model.state_dict()
            with torch.no_grad():
                yield shard.filled(self.hollow, self.average.weights or state, state).eval()
            return
        kept = model.state_dict().items() if self.average.decay else ()
        live = {k: v.detach().to("cpu" if self.average.host else v.device, copy=True) for k, v in kept}
        if live:
            model.load_state_dict(self.average.weights)
        model.eval()
        try:
            with torch.no_grad():
                yield model
        finally:
            if live:
                model.load_state_dict(live)
            model.train()

    @contextmanager
    def shown(self) -> Iterator[nn.Module | None]:
        """`averaged` for the first rank; the others, which must call where the network is shared, have None."""
        if not self.shared and ranks()[0]:
            yield None
            return
        with self.averaged() as weights:
            yield None if ranks()[0] else weights

    def update(self, micros: Sequence[Batch]) -> tuple[Tensor, Tensor, Shown] | None:
        """One update of every part: (loss, norm, shown) of the first, or None where a gradient of any was not finite:
        then no part has moved."""
        found: dict[str, tuple[Tensor, Tensor, Shown]] = {}
        self.recipe.begin(self.step)
        bad = torch.zeros(())
        for name, call in self.calls.items():
            if bad.item() or not self.recipe.active(name, self.step):
                continue
            optimiser = self.optimisers[name]
            optimiser.zero_grad()
            loss, shown = self.recipe.gradients(name, call, micros, self._backward, self.autocast)
            if optimiser.split:
                shard.mean_whole(optimiser.live.values())
            for handle in self.handles[name] if self.scaler.is_enabled() else ():
                self.scaler.unscale_(handle)
            norm = shard.total_norm(p.grad for p in optimiser.live.values() if p.grad is not None)
            finite = torch.isfinite(norm).cpu() & torch.isfinite(loss)
            bad = (~finite).float()
            sum_ranks([bad])  # a loss may be infinite on one rank alone; all of them must agree
            found[name] = loss, norm, shown
        for name, (_, norm, _) in found.items():
            optimiser = self.optimisers[name]
            if bad.item():
                optimiser.zero_grad()
                continue
            if self.config.clip_norm and norm > self.config.clip_norm:  # else a multiplication by 1 of every gradient
                shard.clip(optimiser.live.values(), self.config.clip_norm, norm)
            optimiser.step(rate_factor(self.step, self.config))
        if self.scaler.is_enabled():
            self.scaler.update()
        if bad.item():
            return None
        self.average.update(self.recipe.parts[self.first])
        self.recipe.after(self.step)
        return next(iter(found.values()), None)

    def _backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()


def run(
    recipe: Recipe, config: Training, folder: Path, device: torch.device, micro: int, quiet: bool = False
) -> None:
    """Train to `config.steps`, going on from the newest checkpoint in `folder`, and export to folder/final.

    micro: samples held at once on each device; ranks * micro must divide config.batch.
    Raises RuntimeError after too many updates without a finite gradient, BadVolume, Preempted.
    """
    rank, world = ranks()
    if config.batch % (micro * world):
        raise ValueError(f"batch: wanted a multiple of micro x devices = {micro} x {world}, got {config.batch}")
    folder.mkdir(parents=True, exist_ok=True)
    state = Run(recipe, config, device)
    checkpoints = Checkpoints(folder / "checkpoints", config.keep)
    found = checkpoints.load()
    if found:
        state.restore(*found)
    samples = recipe.samples()
    order = Order(len(samples.source), config.batch, config.seed, recipe.group)
    micros = Micros(order, micro, state.step, config.steps, rank, world)
    ahead = reading(samples, micros, config.workers, device.type == "cuda")
    metrics = Metrics(folder, recipe.shown, state.step, config.tensorboard) if rank == 0 else None
    for part in recipe.parts.values():
        part.train()
    name = type(recipe).__name__
    bar = tqdm(total=config.steps, initial=state.step, desc=name, mininterval=2, disable=quiet or rank != 0)
    saved, waited, began = time.monotonic(), 0.0, time.monotonic()
    with _signals() as asked, ahead as batches, bar, kept_memory(device):
        while state.step < config.steps:
            started = time.monotonic()
            held = Held([_good(next(batches)) for _ in range(config.batch // (micro * world))], device)
            waited += time.monotonic() - started
            torch.manual_seed(config.seed * 1_000_003 + state.step)  # for modules that draw on their own
            told = state.update(held)
            if told is None:
                state.skipped += 1
                state.bad_row += 1
                if state.bad_row >= config.max_bad_steps:
                    _give_up(state, held, checkpoints)
            else:
                state.bad_row = 0
            state.step += 1
            bar.update()
            last = state.step == config.steps
            if metrics and (state.step % config.log_every == 0 or last):
                seconds, began = time.monotonic() - began, time.monotonic()
                metrics.step(state, told, seconds, waited, bar)
                waited = 0.0
            seen = last or (config.valid_every and state.step % config.valid_every == 0)
            if seen:
                _look(state, metrics, folder)
            every = getattr(config, "preview_every", 0)
            if hasattr(config, "preview_every") and (last or (every and state.step % every == 0)):
                with state.shown() as weights:
                    if weights is not None:
                        recipe.preview(weights, folder / "previews", state.step)
            late = rank == 0 and time.monotonic() - saved > 60 * config.save_minutes
            stop, late = _agree(bool(asked), late)
            due = late or (config.save_every and state.step % config.save_every == 0)
            if due or last or seen or stop:
                tensors = state.tensors()
                if rank == 0:
                    best = int(state.best["step"]) if state.best else None
                    checkpoints.save(state.step, tensors, state.facts(), best)
                del tensors
                saved = time.monotonic()
            if stop and not last:
                raise Preempted(state.step)
    with state.shown() as weights:
        if weights is not None:
            recipe.export(folder / "final", weights)
    if world > 1:
        dist.barrier()


def _look(state: Run, metrics: Metrics | None, folder: Path) -> None:
    with state.averaged() as weights:
        figures = state.recipe.validate(weights, folder / "previews", state.step)
    if not figures:
        return
    score = next(iter(figures.values())) * state.recipe.better
    if not state.best or score > state.best["score"]:
        state.best = {"score": score, "step": state.step}
    if metrics:
        metrics.valid(state.step, figures)


class Held(Sequence):
    """An update's micro-batches, in the host's memory until their turn: a large batch of volumes fits no device. One
    alone is moved at once."""

    def __init__(self, batches: list[Batch], device: torch.device):
        self.device = device
        self.batches = [self._moved(batches[0])] if len(batches) == 1 else batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        return self._moved(self.batches[index])

    def _moved(self, batch: Batch) -> Batch:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def _good(batch: Batch | BadVolume) -> Batch:
    if isinstance(batch, BadVolume):
        raise BadVolume(f"{batch} (--skip-bad puts the next volume in its place)")
    return batch


def _give_up(state: Run, micros: Sequence[Batch], checkpoints: Checkpoints) -> None:
    known = checkpoints.steps()
    good = f"the last good checkpoint is {checkpoints.path(known[-1])}" if known else "there is no checkpoint yet"
    raise RuntimeError(
        f"no finite gradient in {state.bad_row} updates in a row, the last at step {state.step}; "
        f"the first tensor that is not finite is {first_bad(state, micros)}; {good}"
    )


def first_bad(state: Run, micros: Sequence[Batch]) -> str:
    """The name of the first tensor with NaN or infinity: of the batch, weights, modules' outputs, gradients."""
    for i, batch in enumerate(micros):
        for name, value in batch.items():
            if not _finite(value):
                return f"{name} of the batch (micro-batch {i})"
    for part, network in state.recipe.parts.items():
        for name, value in network.state_dict().items():
            if not _finite(value):
                return f"weight {part}.{name}"
    for part, call in state.calls.items():
        if not state.recipe.active(part, state.step):
            continue
        found: list[str] = []
        leaves = [(name, m) for name, m in state.recipe.parts[part].named_modules() if not list(m.children())]
        handles = [m.register_forward_hook(partial(_note_output, name, found)) for name, m in leaves]
        state.optimisers[part].zero_grad()
        loss, _ = state.recipe.gradients(part, call, micros, state._backward, state.autocast)
        for handle in handles:
            handle.remove()
        if found:
            return f"the output of {part}.{found[0]}"
        if not _finite(loss):
            return f"the loss of {part}"
        for name, parameter in state.optimisers[part].live.items():
            if parameter.grad is not None and not _finite(parameter.grad):
                return f"the gradient of {part}.{name}"
    return "none that could be found again"


def _note_output(name: str, found: list[str], module: nn.Module, inputs: Any, output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    if not all(_finite(o) for o in outputs if isinstance(o, Tensor)):
        found.append(name)


def _finite(x: Tensor) -> bool:
    """Of a shared tensor: is all of it? All ranks must ask."""
    if not x.is_floating_point():
        return True
    bad = (~torch.isfinite(shard.local(x)).all()).float()
    if shard.is_shared(x):
        sum_ranks([bad])
    return not bad.item()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGUSR1 append themselves to; outside the main thread nobody can listen."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    known = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, lambda n, _: got.append(n)) for number in known]
    try:
        yield got
    finally:
        for number, handler in zip(known, before, strict=True):
            signal.signal(number, handler)


def _agree(*asked: bool) -> list[bool]:
    """Does any rank want it? All of them stop, and save, at the same step."""
    flags = torch.tensor(asked, dtype=torch.float32)
    sum_ranks([flags])
    return [bool(flag) for flag in flags]
