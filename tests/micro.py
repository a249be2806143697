"""A training run of milliseconds: two linear layers, every kind of state that a checkpoint must hold."""

import multiprocessing
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # what the first optimiser imports, and a child would again and again
from torch import nn

from t2ct.files import write_files
from t2ct.train.config import Training
from t2ct.train.data.order import Samples, generator
from t2ct.train.data.source import Entry, Item
from t2ct.train.loop import run
from t2ct.train.recipe import Recipe

CONFIG = Training(
    steps=30, batch=4, micro=2, learning_rate=0.02, matrix_learning_rate=0.01, warmup=3.0, ema=0.9, save_every=1,
    log_every=1, valid_every=7, precision="float32",
)  # fmt: skip


class MicroSource:
    entries = [Entry(f"volume {i}", (f"text {i}",)) for i in range(11)]  # no multiple of the batch: epochs have rests
    size = (2, 2, 1)

    def __len__(self):
        return len(self.entries)

    def read(self, index):
        return Item(np.full(self.size, index, np.int16), (1.0, 1.0, 1.0))


class MicroRecipe(Recipe):
    """Fits a plane through the volumes' numbers; its buffer counts what it saw, its `poison` makes updates bad."""

    shown = ("seen",)
    better = -1

    def __init__(self, config=CONFIG, poison=(), weights=True):
        torch.manual_seed(0)
        self.config, self.poison, self.step = config, poison, 0
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.model.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.parts = {"micro": self.model}

    def samples(self):
        seed = self.config.seed

        def prepare(item, draw):
            noise = torch.randn(4, generator=generator(seed, draw[1]))
            return {"x": torch.from_numpy(item.hu).flatten().float() / 10 + noise, "index": torch.tensor(draw[0])}

        return Samples(MicroSource(), prepare)

    def begin(self, step):
        self.step = step

    def loss(self, part, batch):
        self.model.seen += len(batch["x"])
        loss = (self.model(batch["x"])[:, 0] - batch["x"].sum(1)).square().mean()
        loss = loss + 0.01 * torch.rand(()) * loss  # from torch's own generator
        if self.step in self.poison:
            loss = loss * float("nan")
        return loss, {"seen": float(self.model.seen)}

    def validate(self, weights, folder, step):
        return {"size": sum(p.abs().sum().item() for p in weights.parameters())}

    def export(self, folder, weights):
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        write_files({folder / "micro.safetensors": save(weights.state_dict()), folder / "config.json": b"{}"})


def train(folder: Path, config: Training = CONFIG, **more) -> None:
    """In this process; the warm-up of the imports is all that a child does besides."""
    torch.set_num_threads(1)
    run(MicroRecipe(config, **more), config, Path(folder), torch.device("cpu"), config.micro, quiet=True)


class SlowRecipe(MicroRecipe):
    """The same with time for a kill."""

    def loss(self, part, batch):
        time.sleep(0.004)
        return super().loss(part, batch)


def train_in_child(folder: str) -> None:
    """What a process that may be killed runs: silent."""
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    run(SlowRecipe(), CONFIG, Path(folder), torch.device("cpu"), CONFIG.micro, quiet=True)


def signalled_in_child(folder: str, number: int) -> None:
    """With readers, in a group of its own, whose every process gets the signal while the run waits for them."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of the readers
    torch.set_num_threads(1)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    config = replace(CONFIG, save_every=0, workers=2)

    class Signalled(MicroRecipe):
        def samples(self):
            made = super().samples()
            plain = made.prepare

            def prepare(item, draw):
                time.sleep(0.05)  # longer than an update: whoever trains is waiting
                if draw[1] == 50:
                    os.killpg(0, number)
                return plain(item, draw)

            made.prepare = prepare
            return made

    run(Signalled(config), config, Path(folder), torch.device("cpu"), CONFIG.micro, quiet=True)


def broken_in_child(folder: str) -> None:
    """With readers, and an error in the middle: the process must end, and they with it."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # of the readers
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    config = replace(CONFIG, workers=2)

    class Broken(MicroRecipe):
        def after(self, step):
            if step == 5:
                raise RuntimeError("the middle")

    run(Broken(config), config, Path(folder), torch.device("cpu"), CONFIG.micro, quiet=True)
