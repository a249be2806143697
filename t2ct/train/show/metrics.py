"""What a run tells: metrics.csv, validation.csv, TensorBoard, the bar's figures, `status`."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from t2ct.files import write_files
from t2ct.train.optim import rate_factor
from t2ct.train.parts.folders import run_facts

if TYPE_CHECKING:
    from t2ct.train.loop import Run

COLUMNS = ("step", "loss", "norm", "rate", "seconds_per_step", "wait_share", "memory_gb", "skipped")


class Metrics:
    """The tables of a run in `folder`; rows after step `start` belong to a life that was lost and are removed."""

    def __init__(self, folder: Path, shown: Sequence[str], start: int, tensorboard: bool = False):
        self.steps, self.valids, self.start = folder / "metrics.csv", folder / "validation.csv", start
        self.columns = [*COLUMNS, *shown]
        self.last = start
        for path in (self.steps, self.valids):
            rows = [row for row in read_table(path) if int(row["step"]) <= start]
            if path.exists():
                write_files({path: _csv(list(rows[0]), [list(r.values()) for r in rows]) if rows else b""})
        self.board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("tensorboard: wanted the package tensorboard, got none installed") from None
            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def step(self, state: Run, told: Any, seconds: float, waited: float, bar: Any) -> None:
        """One row of metrics.csv, and the bar's figures; seconds and waited since the last row."""
        from t2ct.train.parts.machine import memory_used

        count, self.last = max(1, state.step - self.last), state.step
        nothing = Tensor([float("nan")])
        loss, norm, shown = told or (nothing, nothing, dict[str, float]())
        values: dict[str, float] = {
            "step": state.step,
            "loss": float(loss),
            "norm": float(norm),
            "rate": rate_factor(state.step - 1, state.config) * state.config.learning_rate,
            "seconds_per_step": seconds / count,
            "wait_share": waited / max(seconds, 1e-9),
            "memory_gb": memory_used(state.device),
            "skipped": state.skipped,
            **{name: shown.get(name, float("nan")) for name in self.columns[len(COLUMNS) :]},
        }
        self._append(self.steps, self.columns, values)
        bar.set_postfix(
            loss=f"{values['loss']:.4g}", wait=f"{100 * values['wait_share']:.0f}%", mem=f"{values['memory_gb']:.1f}GB",
            **{name: f"{value:.4g}" for name, value in shown.items()},
        )  # fmt: skip

    def valid(self, step: int, figures: dict[str, float]) -> None:
        """One row of validation.csv."""
        self._append(self.valids, ["step", *figures], {"step": step, **figures})

    def _append(self, path: Path, columns: list[str], values: dict[str, float]) -> None:
        new = not path.exists() or path.stat().st_size == 0
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(columns)
            writer.writerow([f"{values[name]:.6g}" if name != "step" else int(values[name]) for name in columns])
        if self.board is not None:
            for name in columns[1:]:
                self.board.add_scalar(f"{path.stem}/{name}", values[name], int(values["step"]))
            self.board.flush()


def read_table(path: Path) -> list[dict[str, str]]:
    """The whole rows of a table; a line that a kill cut short is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row and all(value for value in row.values())]


def _csv(columns: list[str], rows: list[list[str]]) -> bytes:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    writer.writerow(columns)
    writer.writerows(rows)
    return buffer.getvalue().encode()


def status(folder: str | Path) -> dict[str, str]:
    """Where a run stands, for people. FileNotFoundError where `folder` holds none."""
    root = Path(folder)
    if not (root / "run.json").is_file() and (root / "starting.json").is_file():  # in the stages before its own
        facts = run_facts(root / "starting.json")
        stages = [path.parent for path in sorted(root.glob("*/run.json"), key=lambda path: path.stat().st_mtime)]
        return {name: str(value) for name, value in facts.items()} | {s.name: status(s)["step"] for s in stages}
    if not (root / "run.json").is_file():
        raise FileNotFoundError(f"run: wanted the folder of a run, got {str(folder)!r}, which has no run.json")
    facts = run_facts(root / "run.json")
    rows, valids = read_table(root / "metrics.csv"), read_table(root / "validation.csv")
    told = {"kind": facts["kind"], "preset": facts["preset"], "data": facts["data"]}
    step = int(rows[-1]["step"]) if rows else 0
    told["step"] = f"{step} of {facts['steps']}"
    if rows:
        last = rows[-1]
        left = (facts["steps"] - step) * float(last["seconds_per_step"])
        told["loss"] = f"{last['loss']}, norm {last['norm']}, {last['skipped']} updates skipped"
        told["speed"] = f"{float(last['seconds_per_step']):.3g} s a step, about {left / 60:.1f} min to go"
        told["memory"] = f"{last['memory_gb']} GB; {100 * float(last['wait_share']):.0f} % of the time waiting for data"
    if valids:
        told["validation"] = ", ".join(f"{name} {value}" for name, value in valids[-1].items())
    bad = root / "bad.txt"
    if bad.is_file():
        told["left out"] = f"{len(bad.read_text(encoding='utf-8').splitlines())} volumes, listed in {bad}"
    kept = sorted(path.stem for path in (root / "checkpoints").glob("step-*.json"))
    told["checkpoints"] = ", ".join(kept) or "none yet"
    told["final"] = str(root / "final") if (root / "final" / "config.json").exists() else "not there yet"
    return told
