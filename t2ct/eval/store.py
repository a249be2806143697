"""The folder of an evaluation: what was seen of every volume, kept so that a run that was killed goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from t2ct.files import check_output_folder, write_files

CONFIG, RESULTS, REPORT = "eval.json", "results.json", "report.html"
Seen = dict[str, np.ndarray]


class Store:
    """What was seen of volume `index` of set `name`, in FOLDER/seen/NAME/000000.safetensors."""

    def __init__(self, folder: str | Path, config: Mapping[str, Any], resume: bool):
        """Begin, or go on with, the evaluation that `config` (JSON) describes.

        Raises FileExistsError for a folder that holds one already, unless resume; ValueError where that one was of
        something else, saying what.
        """
        self.folder = Path(folder)
        check_output_folder(self.folder)
        wanted = json.loads(json.dumps(config))
        path = self.folder / CONFIG
        if path.is_file():
            if not resume:
                raise FileExistsError(
                    f"out: wanted a new folder, got {folder}, which holds an evaluation; --resume goes on with it"
                )
            found = _read(path)
            other = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
            if other:
                told = "; ".join(f"{k}: it has {found.get(k)!r}, got {wanted.get(k)!r}" for k in other)
                raise ValueError(f"out: {folder} holds an evaluation of something else: {told}")
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise FileExistsError(f"out: wanted a new or empty folder, got {folder}, which holds other files")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_files({path: (json.dumps(wanted, indent=2) + "\n").encode()})

    def get(self, name: str, index: int) -> Seen | None:
        """What was kept, or None where there is nothing, or nothing whole."""
        try:
            return load(self._path(name, index).read_bytes())
        except (OSError, SafetensorError, ValueError):
            return None

    def put(self, name: str, index: int, seen: Seen) -> None:
        """Keep it, whole or not at all."""
        path = self._path(name, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files({path: save({k: np.ascontiguousarray(v) for k, v in seen.items()})})

    def missing(self, name: str, count: int) -> list[int]:
        """Which of the first `count` volumes have not been seen yet."""
        return [i for i in range(count) if self.get(name, i) is None]

    def all(self, name: str, count: int) -> Seen:
        """What was seen of the first `count` volumes, stacked: (count, …) each."""
        rows = [self.get(name, i) for i in range(count)]
        good = [row for row in rows if row is not None]
        if len(good) < count or not good:
            raise RuntimeError(f"{self.folder}: wanted what was seen of {count} volumes of {name}, got {len(good)}")
        return {key: np.stack([row[key] for row in good]) for key in good[0]}

    def _path(self, name: str, index: int) -> Path:
        return self.folder / "seen" / name / f"{index:06d}.safetensors"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"out: wanted an evaluation, got {path}, which cannot be read ({error})") from None
