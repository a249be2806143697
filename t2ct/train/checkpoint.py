"""Checkpoints that are whole or not there: safetensors with a checksum in a JSON beside, written last.

step-00001200.safetensors holds every tensor, step-00001200.json the rest and the sha256 of the first. Both are written
beside, synced and renamed, the JSON second: without it the tensors do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from t2ct.files import write_files


class Checkpoints:
    """The checkpoints of one run, in `folder`; the newest `keep` stay, and the best."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """The steps of what is there, oldest first."""
        return sorted(int(path.stem.removeprefix("step-")) for path in self.folder.glob("step-*.json"))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], best: int | None = None) -> Path:
        """Write a checkpoint, then remove those that are neither new nor `best` (a step).

        OSError (disk full, …) names the last good one; nothing half-written stays.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        part = path.with_suffix(".part")
        try:
            save_file({k: v.detach().contiguous() for k, v in tensors.items()}, part)
            digest = _sha256(part)  # of what lies on the disk
            os.replace(part, path)
            content = json.dumps({**facts, "step": step, "sha256": digest}, indent=1)
            write_files({path.with_suffix(".json"): content.encode()})
            _sync(self.folder)
        except Exception as error:  # safetensors has an error of its own for a full disk
            part.unlink(missing_ok=True)
            known = [s for s in self.steps() if s != step]
            good = f"the last good checkpoint is {self.path(known[-1])}" if known else "there is no earlier one"
            reason = getattr(error, "strerror", None) or error
            raise OSError(f"checkpoint {path}: not written ({reason}); {good}") from error
        steps = self.steps()
        # Later ones are of a life that was given up, damaged: the run went on from before them.
        lost = [s for s in steps if s > step]
        for old in [*lost, *(s for s in [s for s in steps if s <= step][: -self.keep] if s != best)]:
            self.path(old).with_suffix(".json").unlink(missing_ok=True)
            self.path(old).unlink(missing_ok=True)
        for left in self.folder.iterdir():  # a kill fell between two steps of this
            alone = left.suffix == ".safetensors" and not left.with_suffix(".json").exists()
            if alone or left.suffix == ".part":
                left.unlink(missing_ok=True)
        return path

    def facts(self, step: int) -> dict[str, Any]:
        """What stands beside the tensors."""
        return json.loads(self.path(step).with_suffix(".json").read_text(encoding="utf-8"))

    def load(self, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts of the newest whole checkpoint, or None where there is none.

        A damaged one is passed over with a warning that says so; ValueError where every one is damaged.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                facts = self.facts(step)
                got = _sha256(self.path(step), sync=False)
                if got != facts["sha256"]:
                    raise ValueError(f"sha256 {got[:12]}, wanted {facts['sha256'][:12]}")
                return load_file(self.path(step), device), facts
            except (OSError, ValueError, KeyError) as error:
                warnings.warn(
                    f"checkpoint {self.path(step)} is damaged ({error}): going on from an older one", stacklevel=2
                )
        if steps:
            raise ValueError(f"checkpoints in {self.folder}: wanted a whole one, got {len(steps)} damaged")
        return None


def _sha256(path: Path, sync: bool = True) -> str:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Make the renames last, where the system has a way."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
