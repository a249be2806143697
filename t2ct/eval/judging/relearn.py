"""The utility table in full: the judge's own recipe, from nothing, on real volumes, on generated ones, on both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from t2ct.eval.metrics.utility import SETS, halves
from t2ct.eval.sets import Part
from t2ct.models.judge import FILE, Judge, JudgeConfig, load_judge
from t2ct.train.config import JudgeTraining
from t2ct.train.data.source import Entry, Item, Source, cached
from t2ct.train.judge import JudgeRecipe
from t2ct.train.loop import run
from t2ct.train.presets import preset

CACHE_GB = 50.0


class Made:
    """Generated volumes with the reports and labels that they were made from."""

    def __init__(self, entries: Sequence[Entry], read: Callable[[int], np.ndarray], size: tuple[int, int, int]):
        self.entries: Sequence[Entry] = [Entry(f"made: {e.name}", e.texts, e.labels) for e in entries]
        self._read, self.size = read, size

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Item:
        return Item(self._read(index).clip(-1000, 1000), (1.0, 1.0, 1.0))  # the judge does not ask for mm


class Both:
    """The volumes of two sources."""

    def __init__(self, first: Source, second: Source):
        self.parts, self.size = (first, second), first.size
        self.entries: Sequence[Entry] = [*first.entries, *second.entries]

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Item:
        n = len(self.parts[0])
        return self.parts[0].read(index) if index < n else self.parts[1].read(index - n)


def recipe(model: JudgeConfig, count: int, steps: int) -> JudgeTraining:
    """How each of the three classifiers is trained: as `t2ct train judge --preset embedded`, from labels alone."""
    made = preset("judge", "embedded")
    assert isinstance(made, JudgeTraining)
    return replace(
        made, model=model, steps=steps, batch=min(made.batch, count), warmup=min(made.warmup, steps / 10),
        valid_every=0, keep=1, workers=0, threads=0, place_weight=0.0,  # nobody knows where in generated ones they are
    )  # fmt: skip


def learnt_scores(
    folder: Path, real: Source, made: Source, model: JudgeConfig, steps: int, device: torch.device, quiet: bool
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Logits (M, 18) of the tested half of the real volumes by classifiers trained on the other half: on its real
    volumes, its generated ones, both; and which volumes (M,) were tested. All three see as many updates.

    The runs lie in `folder` and go on where they were stopped. Row i of real and made are of one report.
    """
    learn, test = halves(len(real))
    a, b = (cached(Part(source, learn.tolist()), folder / "cache", CACHE_GB) for source in (real, made))
    sources = dict(zip(SETS, (a, b, Both(a, b)), strict=True))
    scores = {}
    for name, source in sources.items():
        config = recipe(model, len(source), steps)
        torch.manual_seed(config.seed)  # all three begin as the same network
        network = Judge(model).to(device)
        if not (folder / name / "final" / FILE).is_file():
            run(JudgeRecipe(config, network, source), config, folder / name, device, config.batch, quiet)
        judge = load_judge(folder / name, device)
        with torch.no_grad():
            rows = [judge(torch.from_numpy(real.read(int(i)).hu)[None, None].float().to(device))[0] for i in test]
        scores[name] = torch.stack(rows).double().cpu().numpy()
    return scores, test
