"""What is done in an evaluation, and in which order: volumes seen once, tables computed from what was seen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from t2ct import __version__
from t2ct.data.phantoms.reports.details import DETAILS
from t2ct.eval import tables as tb
from t2ct.eval.look import Look
from t2ct.eval.make import Maker, kept, see
from t2ct.eval.metrics.utility import crossed_scores
from t2ct.eval.sets import Sets, labels_of
from t2ct.eval.store import Seen, Store
from t2ct.files import write_files
from t2ct.models.judge import Judge
from t2ct.train.data.source import Source, fingerprint

LEFT_OUT = "left_out.txt"
PAIRS = 6  # nearest pairs that are shown


@dataclass(frozen=True)
class Settings:
    """How much is done. count: reports; swept: reports of every point of a sweep; known: training volumes."""

    count: int | None = None
    steps: int = 30
    guidance: float = 5.0
    swept: int = 100
    guidances: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0)
    step_counts: tuple[int, ...] = (2, 5, 10, 20, 30, 50)
    known: int = 2000
    relearnt: int = 0  # updates of each of three classifiers for the utility table; 0: a linear probe


FULL = Settings()
QUICK = Settings(
    count=64, steps=10, swept=10, guidances=(0.0, 1.0, 5.0, 15.0), step_counts=(2, 5, 10, 30), known=64
)  # fmt: skip


@dataclass
class System:
    """What is evaluated: a model that generates (maker), or volumes that some system made (volumes)."""

    name: str
    told: str
    maker: Maker | None = None
    volumes: Source | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def set_name(self, steps: int, guidance: float) -> str:
        return f"{self.name}-s{steps}-g{guidance:g}" if self.maker else self.name


class Bench:
    """Unseen and training volumes, systems, eyes, and the folder where all that is seen is kept."""

    def __init__(
        self, out: str | Path, sets: Sets, systems: Sequence[System], look: Look, settings: Settings,
        tables: Sequence[str], facts: dict[str, Any], reasons: dict[str, str], resume: bool, quiet: bool,
    ):  # fmt: skip
        self.sets, self.systems, self.look, self.quiet = sets, list(systems), look, quiet
        self.out, self.tables = Path(out), list(tables)
        self.count = len(sets.test)
        self.settings = replace(settings, count=self.count, swept=min(settings.swept, self.count))
        self.notes = list(sets.notices)
        self.labels = labels_of(sets.test)
        self.texts = [sets.test.entries[i].texts[0] if sets.test.entries[i].texts else "" for i in range(self.count)]
        self._leave_out(dict(reasons))
        for maker in (s.maker for s in systems if s.maker is not None):
            if (cut := maker.cut()) > 0:
                limit = maker.pipe.config.clip.text.max_length
                self.notes.append(f"{cut} of {self.count} reports are longer than the text tower's {limit} tokens: cut")
        self.facts = facts | {
            "test": fingerprint(sets.test), "count": self.count, "size": list(sets.test.size),
            "known": fingerprint(sets.train) if sets.train is not None else None,
            "systems": {s.name: s.facts for s in systems}, "version": __version__,
        }  # fmt: skip
        self.store = Store(out, self.facts | {"settings": asdict(self.settings)}, resume)
        if sets.left_out:
            write_files({self.out / LEFT_OUT: "".join(f"{line}\n" for line in sets.left_out).encode()})

    def _leave_out(self, reasons: dict[str, str]) -> None:
        """Tables that cannot be computed here, with the reason; ValueError where a table's volumes are too few."""
        if self.labels is None or not tb.measurable(self.labels):
            told = "no volume has labels" if self.labels is None else "no finding is present in some volumes only"
            reasons |= {"factual": told, "utility": told}
        elif (told_of := tb.left_out(self.labels)) is not None:
            self.notes.append(told_of)
        if "factual" in self.tables and "factual" not in reasons:
            if self.look.judge.config.details != DETAILS:
                self.notes.append("side, lobe and size are left out: the judge was not trained for them")
            elif not all(self.texts):
                self.notes.append("side, lobe and size are left out: not every volume has a report")
        train, total = self.sets.train, self.sets.train_total
        if train is None or not len(train):
            reasons["memorisation"] = "no training volumes are known"
        elif "memorisation" in self.tables:
            of = f"{len(train)} of {total}" if total is not None else f"the first {len(train)} phantoms to train on, as"
            told = "training volumes" if total is not None else "they are drawn today,"
            self.notes.append(f"memorisation: {of} {told} were searched")
        if all(s.maker is None for s in self.systems):
            reasons["ablation"] = "volumes of another system cannot be made again with other settings"
        for name in [n for n in self.tables if n in reasons]:
            self.tables.remove(name)
            self.notes.append(f"{name} is left out: {reasons[name]}")
        for name in self.tables:
            least = tb.NEEDS[name]
            have = min(self.count, self.settings.swept) if name == "ablation" else self.count
            if have < least:
                raise ValueError(f"data: wanted at least {least} volumes with reports for {name}, got {have}")

    def runs(self, system: System) -> list[tuple[int, float, int]]:
        """(steps, guidance, count) of every set that a system generates, the main one first."""
        c = self.settings
        main = (c.steps, c.guidance, self.count)
        if system.maker is None:
            return [main]
        swept: list[tuple[int, float]] = []
        if "ablation" in self.tables and system is self.systems[0]:
            swept = [(c.steps, g) for g in c.guidances] + [(s, c.guidance) for s in c.step_counts]
        others = dict.fromkeys(point for point in swept if point != main[:2])
        return [main, *((s, g, c.swept) for s, g in others)]

    def cost(self) -> list[tuple[str, int, float]]:
        """(what, how many volumes are still to be seen, seconds each), measured here on a few."""
        test, shape = self.sets.test, self.sets.test.size
        empty = np.full(shape, -1000, np.int16)
        self.look(empty)
        start = time.perf_counter()
        self.look(empty)
        looking = time.perf_counter() - start
        start = time.perf_counter()
        test.read(0)
        reading = time.perf_counter() - start
        left = self.store.missing
        rows = [("unseen volumes: read, look", len(left("real", self.count)), reading + looking)]
        if self._wants_known():
            assert self.sets.train is not None
            unknown = len(left("known", len(self.sets.train)))
            rows.append(("training volumes: read, look", unknown, reading + looking / 2))
        for system in self.systems:
            each: dict[int, float] = {}
            for steps, guidance, count in self.runs(system):
                missing = len(left(system.set_name(steps, guidance), count))
                if system.maker is None:
                    rows.append((f"volumes of {system.told}: read, look", missing, reading + looking))
                    continue
                if steps not in each:
                    each[steps] = system.maker.pipe.estimate_seconds(shape, steps)
                rows.append((f"{system.told}: {steps} steps, guidance {guidance:g}", missing, each[steps] + looking))
        return rows

    def print_cost(self) -> None:
        """What it will cost, before it starts."""
        rows = self.cost()
        width = max(len(what) for what, _, _ in rows)
        for what, count, seconds in rows:
            print(f"{what:{width}}  {count:5} volumes of {seconds:.2f} s")
        if "utility" in self.tables and self.settings.relearnt:
            rows.append(("three classifiers, updates", 3 * self.settings.relearnt, self._update_seconds()))
            print(f"{rows[-1][0]:{width}}  {rows[-1][1]:5} of {rows[-1][2]:.2f} s")
        total = sum(count * seconds for _, count, seconds in rows)
        print(f"{'and the tables':{width}}; about {1 + total / 60:.0f} min in all", flush=True)

    def _update_seconds(self) -> float:
        """What an update of a classifier takes, from one sample's."""
        from t2ct.eval.judging.relearn import recipe

        judge = Judge(self.look.judge.config).to(self.look.device)
        start = time.perf_counter()
        judge(torch.zeros(1, 1, *judge.config.size, device=self.look.device)).sum().backward()
        return (time.perf_counter() - start) * recipe(judge.config, self.count // 2, 1).batch

    def see(self) -> None:
        """Look at every volume: real ones first, so that what cannot be read shows before anything is generated."""
        with self._bar("unseen volumes", self.count) as bar:
            see(self.store, "real", self.sets.test, self.look, True, bar.update)
        if self._wants_known():
            assert self.sets.train is not None
            with self._bar("training volumes", len(self.sets.train)) as bar:
                see(self.store, "known", self.sets.train, self.look, False, bar.update)
        for system in self.systems:
            if system.maker is None:
                assert system.volumes is not None
                with self._bar(system.told, self.count) as bar:
                    see(self.store, system.name, system.volumes, self.look, True, bar.update)
                continue
            for k, (steps, guidance, count) in enumerate(self.runs(system)):
                name, keep = system.set_name(steps, guidance), None if k else self.kept(system)
                with self._bar(f"{system.told}, {steps} steps, w {guidance:g}", count) as bar:
                    system.maker.see(self.store, name, count, steps, guidance, self.look, keep, bar.update)

    def _bar(self, what: str, count: int) -> tqdm:
        return tqdm(total=count, desc=what, unit="volume", disable=self.quiet)

    def kept(self, system: System) -> Path:
        """Where a system's generated volumes lie."""
        return self.out / "volumes" / system.name

    def main(self, system: System) -> Seen:
        """What was seen of a system's volumes."""
        return self.store.all(system.set_name(self.settings.steps, self.settings.guidance), self.count)

    def compute(self, system: System) -> dict[str, Any]:
        """The tables of a system."""
        real, made = self.store.all("real", self.count), self.main(system)
        known = self.store.all("known", len(self.sets.train)) if self._wants_known() and self.sets.train else None
        found: dict[str, Any] = {}
        for name in tqdm(self.tables, desc="tables", disable=self.quiet):
            if name == "fidelity":
                found[name] = tb.fidelity(real, made, known)
                self._note_few(real)
            elif name == "factual":
                assert self.labels is not None
                found[name] = tb.factual(real, made, self.labels, self.texts if all(self.texts) else None)
            elif name == "alignment":
                assert self.look.clip is not None
                found[name] = tb.alignment(self.look.clip, real, made, self.texts, self.labels)
            elif name == "utility":
                assert self.labels is not None
                found[name] = self._utility(system, real, made, self.labels)
            elif name == "memorisation":
                assert known is not None
                found[name], pairs = tb.memorisation(real, made, known)
                found[name]["pairs"] = pairs[:PAIRS]
            elif system is self.systems[0]:
                found[name] = self._sweeps(system, real)
        return found

    def _note_few(self, real: Seen) -> None:
        few = {"fid_3d": real["features"].shape[-1], "fid_2_5d": real["slices"].shape[-1]}
        told = [f"{name} ({count} features)" for name, count in few.items() if self.count // 2 < count]
        note = f"{self.count} volumes are few for {' and '.join(told)}: rough, even extrapolated; kid is unbiased"
        if told and note not in self.notes:
            self.notes.append(note)

    def _utility(self, system: System, real: Seen, made: Seen, labels: np.ndarray) -> tb.Table:
        steps = self.settings.relearnt
        if not steps:
            return tb.utility(crossed_scores(real["features"], made["features"], labels), labels)
        from t2ct.eval.judging.relearn import Made, learnt_scores

        test = self.sets.test
        volumes = Made(test.entries, lambda i: self.volume(system, i), test.size)
        folder, device = self.out / "utility" / system.name, torch.device(self.look.device)
        scores, tested = learnt_scores(folder, test, volumes, self.look.judge.config, steps, device, self.quiet)
        return tb.utility(scores, labels[tested])

    def _sweeps(self, system: System, real: Seen) -> dict[str, Any]:
        c, n = self.settings, self.settings.swept
        part = {key: value[:n] for key, value in real.items()}
        labels = None if self.labels is None else self.labels[:n]

        def point(steps: int, guidance: float) -> tb.Table:
            seen = self.store.all(system.set_name(steps, guidance), n)
            return tb.setting(part, seen, labels)

        return {
            "guidance": {f"{g:g}": point(c.steps, g) for g in c.guidances},
            "steps": {str(s): point(s, c.guidance) for s in c.step_counts},
        }

    def _wants_known(self) -> bool:
        return self.sets.train is not None and bool({"memorisation", "fidelity"} & set(self.tables))

    def volume(self, system: System, index: int) -> np.ndarray:
        """A volume of a system, HU."""
        if system.maker is not None:
            return kept(self.kept(system), index).hu
        assert system.volumes is not None
        return system.volumes.read(index).hu
