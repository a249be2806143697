"""Which sample comes when, as a pure function of the seed: a run that goes on needs no memory of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t2ct.train.data.source import BadVolume, Item, Source

Draw = tuple[int, int, int]  # index of the volume, number of the sample in the run, place in its batch


class Order:
    """Epochs of whole batches in random order: no volume twice in a batch, and what is left over changes by epoch.

    group: so many volumes that follow one another in the data stay together, in their order.
    """

    def __init__(self, count: int, batch: int, seed: int, group: int = 1):
        if count % group or batch % group:
            got = f"{count} volumes and a batch of {batch}"
            raise ValueError(f"group: wanted volumes and batches in whole groups of {group}, got {got}")
        self.count, self.batch, self.seed, self.group = count, batch, seed, group
        self.whole = max(1, count // batch)  # batches in an epoch
        self._epoch, self._places = -1, np.empty(0, int)

    def at(self, step: int) -> list[Draw]:
        """The samples of update `step`. Fewer volumes than a batch: they come again."""
        epoch, k = divmod(step, self.whole)
        if epoch != self._epoch:
            groups = np.random.default_rng([self.seed, epoch, 7]).permutation(self.count // self.group)
            self._epoch = epoch
            self._places = (self.group * groups[:, None] + np.arange(self.group)).reshape(-1)
        return [
            (int(self._places[(k * self.batch + j) % self.count]), step * self.batch + j, j) for j in range(self.batch)
        ]


def generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of one sample, whoever computes it."""
    state = np.random.SeedSequence([seed, number]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


class Samples(Dataset):
    """Prepared samples: `prepare(item, draw)` makes the tensors of one, in a worker or here."""

    def __init__(
        self, source: Source, prepare: Callable[[Item, Draw], dict[str, Tensor]], skip_bad: bool = False,
        bad: Path | None = None,
    ):  # fmt: skip
        self.source, self.prepare, self.skip_bad, self.bad = source, prepare, skip_bad, bad

    def __getitem__(self, draw: Draw) -> dict[str, Tensor] | BadVolume:
        index, number, place = draw
        error: BadVolume | None = None
        for further in range(len(self.source)):
            at = (index + further) % len(self.source)
            try:
                return self.prepare(self.source.read(at), (at, number, place))
            except BadVolume as bad:
                error = error or bad
                if not self.skip_bad:
                    break
                self._note(bad)
        return error or BadVolume("data: no volumes")

    def _note(self, error: BadVolume) -> None:
        if self.bad is not None:
            note_bad(self.bad, str(error))


def note_bad(path: Path, words: str) -> None:
    """Add a line on what was left out to RUN/bad.txt, once: an epoch comes by again. Appended, since readers in other
    processes may do so at the same time."""
    line = " ".join(words.split())
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if line not in known:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def collate(samples: Sequence[dict[str, Tensor] | BadVolume]) -> dict[str, Tensor] | BadVolume:
    """Stack the tensors of a micro-batch; token ids are filled with their last one, the end of the text."""
    good: list[dict[str, Tensor]] = []
    for sample in samples:
        if isinstance(sample, BadVolume):
            return sample
        good.append(sample)
    return {name: _stack([sample[name] for sample in good]) for name in good[0]}


def _stack(rows: list[Tensor]) -> Tensor:
    if rows[0].dim() == 1 and len({len(row) for row in rows}) > 1:
        longest = max(map(len, rows))
        rows = [torch.cat((row, row[-1:].expand(longest - len(row)))) for row in rows]
    return torch.stack(rows)


class Micros:
    """The micro-batches that this rank computes, update after update, from `start` on."""

    def __init__(self, order: Order, micro: int, start: int, stop: int, rank: int = 0, world: int = 1):
        self.order, self.micro, self.start, self.stop, self.rank, self.world = order, micro, start, stop, rank, world

    def __len__(self) -> int:
        return (self.stop - self.start) * (self.order.batch // (self.micro * self.world))

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in range(self.start, self.stop):
            draws = self.order.at(step)
            for i in range(self.rank * self.micro, len(draws), self.micro * self.world):
                yield draws[i : i + self.micro]


@contextmanager
def reading(
    samples: Dataset, batches: Iterable[list[Any]], workers: int, pin: bool, joined: Callable[[Any], Any] = collate
) -> Iterator[Any]:  # fmt: skip
    """Iterates over the samples of `batches`, joined, read ahead by `workers` processes, which end with the block."""
    more: dict[str, Any] = {"prefetch_factor": 4, "worker_init_fn": _deaf} if workers else {}
    ahead: Any = iter(DataLoader(
        samples, batch_sampler=batches, num_workers=workers, collate_fn=joined, pin_memory=pin, **more  # type: ignore[arg-type]
    ))  # fmt: skip
    try:
        yield ahead
    finally:
        if workers:  # who is deaf must be told: at the interpreter's exit, which asks by a signal, it would never end
            ahead._shutdown_workers()


def _deaf(worker: int) -> None:
    """A signal to stop reaches the whole group of processes; the run needs its readers until it has saved."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
