"""Does a model do what its prompt says? `python -m t2ct.eval.listens` prints a table.

The measurements (`t2ct.eval.measure`), taken on a grid of about 5.5 x 5.5 x 10 mm, are first proven on real phantoms,
then made on volumes that the model generates from the prompts of other phantoms. Neither these phantoms nor their
wordings were ever trained on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from t2ct import __version__
from t2ct.data.phantoms import Finding, Phantom, phantom
from t2ct.eval.grid import coarsen
from t2ct.eval.measure import RULES, frame, measure
from t2ct.eval.metrics.factual import auc
from t2ct.eval.morphology import smooth
from t2ct.files import check_outputs, write_files
from t2ct.train.data.phantoms import draw_names

PROOF_SEED, PROMPT_SEED = 100_000, 300_000  # training takes seeds below 100000, the thresholds come from 200000 on
# What prompts name, and how often 0, 1, 2 or 3 of them: the measurements were proven among these findings.
KNOWN = (
    "pleural effusion", "pericardial effusion", "cardiomegaly", "consolidation", "lung nodule", "emphysema",
    "atelectasis", "arterial wall calcification", "hiatal hernia",
)  # fmt: skip
SHARE_BY_COUNT = (0.12, 0.36, 0.34, 0.18)
VISIBLE = {
    "pleural effusion": ("moderate", "large"),
    "pericardial effusion": ("moderate", "large"),
    "emphysema": ("moderate", "severe"),
    "hiatal hernia": ("moderate", "large"),
}
VISIBLE_NODULE = (20, 30)  # mm
TARGETS = {"accuracy": 0.95, "auc": 0.85, "side": 0.9, "hu": 40.0, "outline": 0.9}

TITLE = """# Does it listen?

Printed by `python -m t2ct.eval.listens`. First the measurements alone, on phantoms that no threshold came from: does a
fixed threshold find what is there? Then the same measurements on volumes generated from the prompts of other phantoms:
AUC, the area under the ROC curve, says how often a volume whose prompt names the finding measures more than one whose
prompt does not (0.5: chance). Effusions, emphysema and hernias are at least moderate and nodules 20 to 30 mm here: what
the grid can show."""


@dataclass(frozen=True)
class Row:
    """One line of the table: `value` meets `target`, or misses it."""

    what: str
    value: float
    target: str
    met: bool
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """What `listens` found. phantoms: the measurements on real phantoms; model: on generated volumes."""

    phantoms: tuple[Row, ...]
    model: tuple[Row, ...]
    name: str
    weights: str
    version: str
    date: str
    settings: dict[str, Any]
    seconds: float

    def markdown(self) -> str:
        """The table as Markdown."""
        told = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        head = TITLE + f"\n\nModel {self.name}, weights {self.weights}, t2ct {self.version}, {self.date}; {told}"
        parts = [f"{head}; {self.seconds:.0f} s."]
        for title, rows in (("real phantoms", self.phantoms), ("generated volumes", self.model)):
            lines = [f"| Measured on {title} | value | target | met? | of what |", "|---|---|---|---|---|"]
            for r in rows:
                met = "met" if r.met else "missed"
                lines.append(f"| {r.what} | {_short(r)} | {r.target} | {met} | {r.detail} |")
            parts.append("\n".join(lines))
        return "\n\n".join(parts) + "\n"

    def json(self) -> str:
        """The same as JSON; what could not be computed is null."""
        plain = asdict(self)
        for row in (*plain["phantoms"], *plain["model"]):
            row["value"] = row["value"] if np.isfinite(row["value"]) else None
        return json.dumps(plain, indent=2) + "\n"


def visible(seed: int) -> list[Finding]:
    """The findings of evaluation phantom `seed`: drawn as for training, in sizes that a 5.5 x 5.5 x 10 mm grid shows.

    What is to be seen must be two voxels thick: effusions and hernias are moderate or large, emphysema moderate or
    severe, nodules 20 to 30 mm. Everything else, and the findings that are not measured, come in all sizes. Nothing is
    dropped.
    """
    rng = np.random.default_rng([seed, 300])
    findings = []
    for name in draw_names(seed, KNOWN, SHARE_BY_COUNT):
        if name == "lung nodule":
            low, high = VISIBLE_NODULE
            findings.append(Finding(name, size_mm=int(rng.integers(low, high, endpoint=True))))
        elif name in VISIBLE:
            findings.append(Finding(name, size=str(rng.choice(VISIBLE[name]))))
        else:
            findings.append(Finding(name))
    return findings


def listens(
    pipe: Any,
    prompts: int = 200,
    steps: int = 30,
    guidance: float = 5.0,
    batch: int = 8,
    phantoms: int = 200,
    progress: bool = True,
) -> Report:
    """Prove the measurements on `phantoms` phantoms, then measure what `pipe` makes of `prompts` prompts.

    pipe: a `T2CTPipeline`, or anything called like one that has name, weights_hash, size and spacing. Generated in
    batches, the seed of each being the index of its first prompt. Returns a `Report`. Raises ValueError for counts
    below 1 and for a grid that the measurements are not made for, and whatever `pipe` raises.
    """
    for name, value in (("prompts", prompts), ("steps", steps), ("batch", batch), ("phantoms", phantoms)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: wanted an integer >= 1, got {value!r}")
    frame(*coarsen(np.zeros(pipe.size), pipe.spacing))  # refuses unfit grids now, not after an hour
    start = time.perf_counter()
    proof = _prove(pipe, tqdm(range(phantoms), desc="real phantoms", disable=not progress))
    truth: list[Phantom] = []
    real, made = _Seen(), _Seen()
    with tqdm(total=prompts, desc="generated", disable=not progress) as bar:
        for first in range(0, prompts, batch):
            some = [_draw(pipe, PROMPT_SEED + k) for k in range(first, min(first + batch, prompts))]
            volumes = pipe(
                [p.prompt for p in some], num_inference_steps=steps, guidance_scale=guidance, generator=first,
                output_type="np", progress=False,
            )  # fmt: skip
            for p, hu in zip(some, volumes, strict=True):
                real.add(p.hu, pipe.spacing)
                made.add(hu, pipe.spacing)
            truth += some
            bar.update(len(some))
    settings = {"phantoms": phantoms, "prompts": prompts, "steps": steps, "guidance": guidance}
    rows = (*_finding_rows(truth, made), *_side_row(truth, made), *_anatomy_rows(real, made))
    seconds = time.perf_counter() - start
    return Report(proof, rows, pipe.name, pipe.weights_hash, __version__, date.today().isoformat(), settings, seconds)


class _Seen:
    """Measurements of volumes, and how many of them have body at each voxel."""

    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []
        self.cover: np.ndarray | float = 0.0

    def add(self, hu: np.ndarray, spacing: Sequence[float]) -> None:
        hu, spacing = coarsen(hu, spacing)
        self.values.append(measure(hu, spacing))
        self.cover = self.cover + frame(hu, spacing).body

    def outline(self) -> np.ndarray:
        """Voxels that are body in at least half of the volumes."""
        return np.asarray(self.cover) >= len(self.values) / 2

    def mean(self, name: str) -> float:
        return float(np.mean([v[name] for v in self.values]))


def _draw(pipe: Any, seed: int) -> Phantom:
    return phantom(seed, visible(seed), pipe.size, pipe.spacing)


def _has(phantoms: Iterable[Phantom], name: str) -> np.ndarray:
    return np.array([any(f.name == name for f in p.present) for p in phantoms])


def _prove(pipe: Any, indices: Iterable[int]) -> tuple[Row, ...]:
    """Accuracy of every rule at its fixed threshold on real phantoms, and its AUC on the same ones blurred."""
    drawn, sharp, blurred = [], [], []
    for k in indices:
        p = _draw(pipe, PROOF_SEED + k)
        drawn.append(p)
        hu, spacing = coarsen(p.hu, pipe.spacing)
        sharp.append(measure(hu, spacing))
        blurred.append(measure(smooth(hu), spacing))
    rows = []
    for name, rule in RULES.items():
        present = _has(drawn, name)
        right = float(np.mean([rule.present(v) == y for v, y in zip(sharp, present, strict=True)]))
        area, soft = (auc([rule.score(v) for v in values], present) for values in (sharp, blurred))
        detail = f"{int(present.sum())} of {len(drawn)}; AUC {area:.3f}, blurred over 3x3x3 voxels {soft:.3f}"
        rows.append(_row(f"{name}: accuracy", right, "accuracy", detail))
    return tuple(rows)


def _finding_rows(truth: list[Phantom], made: _Seen) -> list[Row]:
    rows = []
    for name, rule in RULES.items():
        present = _has(truth, name)
        area = auc([rule.score(v) for v in made.values], present)
        rows.append(_row(f"{name}: AUC", area, "auc", f"{int(present.sum())} of {len(truth)}; {rule.measurement}"))
    return rows


def _side_row(truth: list[Phantom], made: _Seen) -> list[Row]:
    right = []
    for p, values in zip(truth, made.values, strict=True):
        for f in p.present:
            if f.name == "pleural effusion" and f.side in ("right", "left"):
                other = "left" if f.side == "right" else "right"
                right.append(values[f"effusion {f.side}"] > values[f"effusion {other}"])
    share = float(np.mean(right)) if right else float("nan")
    return [_row("pleural effusion: right side", share, "side", f"{sum(right)} of {len(right)} one-sided")]


def _anatomy_rows(real: _Seen, made: _Seen) -> list[Row]:
    rows = []
    for what in ("lung HU", "liver HU", "heart HU", "body HU"):
        ours, theirs = made.mean(what), real.mean(what)
        rows.append(_row(f"{what}: difference of means", ours - theirs, "hu", f"{ours:.0f}, phantoms {theirs:.0f}"))
    a, b = made.outline(), real.outline()
    dice = 2 * float((a & b).sum()) / max(float(a.sum() + b.sum()), 1.0)
    areas = f"{made.mean('body area'):.0f} cm², phantoms {real.mean('body area'):.0f}"
    rows.append(_row("body outline: Dice of the mean outlines", dice, "outline", areas))
    return rows


def _row(what: str, value: float, kind: str, detail: str) -> Row:
    limit = TARGETS[kind]
    if kind == "hu":
        return Row(what, value, f"within {limit:g}", abs(value) <= limit, detail)
    return Row(what, value, f">= {limit:g}", value >= limit, detail)


def _short(row: Row) -> str:
    if not np.isfinite(row.value):
        return "not measurable"
    return f"{row.value:+.0f} HU" if row.target.startswith("within") else f"{row.value:.3f}"


def main(argv: Sequence[str] | None = None, load: Callable[[Any], Any] | None = None) -> int:
    """The command. Exit code 0 whether targets are met or missed: the table says which. 2: bad input."""
    parser = argparse.ArgumentParser(prog="python -m t2ct.eval.listens", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a model (default: the one in the package)")
    parser.add_argument("--prompts", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=5.0, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="volumes generated at once (default: %(default)s)")
    parser.add_argument("--phantoms", type=int, default=200, help="to prove the measurements on (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the table: .json, or Markdown under any other name")
    args = parser.parse_args(argv)
    if load is None:
        from t2ct.pipeline import T2CTPipeline

        load = T2CTPipeline.from_pretrained
    try:
        if args.output:
            check_outputs([args.output])
        pipe = load(args.model)
        seconds = args.prompts * (pipe.estimate_seconds(num_inference_steps=args.steps) + 0.3) + args.phantoms * 0.4
        print(f"model {pipe.name}, weights {pipe.weights_hash}, on {pipe.device}")
        work = f"{args.phantoms} phantoms to prove the measurements, {args.prompts} prompts of {args.steps} steps"
        print(f"{work}: about {seconds / 60:.0f} min", flush=True)
        report = listens(pipe, args.prompts, args.steps, args.guidance, args.batch, args.phantoms)
        if args.output:
            table = report.json() if args.output.suffix == ".json" else report.markdown()
            write_files({args.output: table.encode()})
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))
    print(report.markdown(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
