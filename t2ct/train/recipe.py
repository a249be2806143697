"""What a network's file gives the loop: samples, losses, what to look at, what to write in the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from t2ct.train.config import Training
from t2ct.train.data.order import Samples
from t2ct.train.data.source import BadVolume, Item, Source

Batch = dict[str, Tensor]
Shown = dict[str, float]
Distance = Callable[[Tensor, Tensor], Tensor]  # of two batches of volumes
M = TypeVar("M", bound=nn.Module)
# What gloo and NCCL say, of whichever operation it was that waited, when another process is no longer there.
LOST = ("by peer", "Connection closed", "Broken pipe", "remote process exited")

_by_itself = False


@contextmanager
def by_itself() -> Iterator[None]:
    """Inside, this process trains as if there were no others: what has too small a batch to be shared."""
    global _by_itself
    _by_itself = True
    try:
        yield
    finally:
        _by_itself = False


def ranks() -> tuple[int, int]:
    """(rank, world size); (0, 1) outside torchrun."""
    if _by_itself:
        return 0, 1
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def one_message() -> Iterator[None]:
    """Of several processes those that outlive another say that, in one line, and not what its silence did to them."""
    try:
        yield
    except RuntimeError as error:
        if ranks()[1] > 1 and any(sign in str(error) for sign in LOST):
            raise RuntimeError(
                "another process of this run was lost, so that all end; the same command with --resume goes on"
            ) from error
        raise


class Call(nn.Module):
    """A network and the loss that uses it as one module, for DistributedDataParallel to wrap."""

    def __init__(self, network: nn.Module, loss: Callable[..., Any]):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, *args: Any) -> Any:
        return self.loss(*args)


class Recipe:
    """One network's training. `parts` are the networks with an optimiser each, the first being the one that stays.

    Each sample's random numbers come from its number in the run alone (`order.generator`), so that neither the number
    of devices nor of micro-batches changes what is computed, and a run that goes on sees what it would have seen.
    """

    config: Training
    parts: dict[str, nn.Module]
    shown: tuple[str, ...] = ()  # what `loss` shows besides its value
    least = 1  # voxels (of what `example` makes) along an axis that the networks need
    wide = False  # does a network need the whole width of a volume?
    group = 1  # volumes that stay together, as they follow one another in the data
    better = 1  # is a larger score of `validate` better (1), or a smaller (-1)?

    def samples(self) -> Samples:
        """The training set, with the preparation of one sample."""
        raise NotImplementedError

    def loss(self, part: str, batch: Batch) -> tuple[Tensor, Shown]:
        """Mean loss of a micro-batch, and numbers to show."""
        raise NotImplementedError

    def rates(self, part: str) -> tuple[float, float]:
        """Learning rates of Adam and of Muon."""
        return self.config.learning_rate, self.config.matrix_learning_rate

    def active(self, part: str, step: int) -> bool:
        """Is this part trained at `step`?"""
        return True

    def begin(self, step: int) -> None:
        """Called before every update."""

    def gradients(
        self, part: str, call: nn.Module, micros: Sequence[Batch], backward: Callable[[Tensor], None], autocast: Any
    ) -> tuple[Tensor, Shown]:
        """Accumulate the gradients of an update; returns its loss and what is shown, means over the micro-batches."""
        total, told = torch.zeros(()), dict.fromkeys(self.shown, 0.0)
        for i, batch in enumerate(micros):
            with last_only(call, i, len(micros)):
                with autocast():
                    loss, shown = call(part, batch)
                backward(loss / len(micros))
            total = total + loss.detach().float().cpu() / len(micros)
            for name, value in shown.items():
                told[name] = told.get(name, 0.0) + value / len(micros)
        return total, told

    def after(self, step: int) -> None:
        """Called after every update that was made."""

    def validate(self, weights: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Figures of the validation split with the averaged weights; the first is the score. Pictures go to folder."""
        return {}

    def preview(self, weights: nn.Module, folder: Path, step: int) -> None:
        """Write pictures into folder; called every `preview_every` steps where the recipe has such a field."""

    def export(self, folder: Path, weights: nn.Module) -> None:
        """Write the final weights and their config.json."""
        raise NotImplementedError

    def example(self, device: torch.device, batch: int, depth: float = 1.0, width: float = 1.0) -> Batch:
        """A batch of the shapes that training sees, of a share of their depth and width, for measuring memory."""
        raise NotImplementedError


def placed(module: M, device: torch.device) -> M:
    """The module on `device`; untouched where it is there already, since fake tensors do not bear `to`."""
    return module if next(module.parameters()).device == device else module.to(device)


def readable(source: Source, count: int, skip_bad: bool) -> Iterator[tuple[int, Item]]:
    """The first `count` volumes to look at, with their numbers; those that cannot be read are left out if skip_bad."""
    for i in range(min(len(source), count)):
        try:
            yield i, source.read(i)
        except BadVolume:
            if not skip_bad:
                raise


def last_only(call: nn.Module, i: int, count: int) -> Any:
    """Gradients travel between devices once an update, with its last micro-batch."""
    waits = isinstance(call, DistributedDataParallel) and i < count - 1
    return call.no_sync() if waits else nullcontext()  # type: ignore[operator]


def gather(x: Tensor) -> Tensor:
    """Rows of all ranks, in rank order; no gradient."""
    _, world = ranks()
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def sum_ranks(tensors: Iterable[Tensor]) -> None:
    """Add tensors over all ranks, in place."""
    if ranks()[1] > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
