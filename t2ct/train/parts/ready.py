"""What can be known to be wrong with a run before anything is made: the stages before its own may take hours."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2ct.checks import FILES
from t2ct.train.config import CLIPTraining, JudgeTraining, LDMTraining, Training, VAETraining
from t2ct.train.data import open_data
from t2ct.train.parts.folders import find_folder

PLACES = ("start", "vae", "clip", "tokenizer")  # fields that hold paths


def absolute(config: Training) -> Training:
    """The configuration with its paths from the root on: a run may go on from another folder."""
    said: dict[str, Any] = {name: getattr(config, name, "") for name in PLACES}
    return replace(config, **{k: os.path.abspath(v) for k, v in said.items() if v and v != "embedded"})


def check_numbers(config: Training, world: int = 1) -> None:
    """ValueError unless patches fit, and `world` processes can share out a batch."""
    if isinstance(config, VAETraining):
        config.check_patches()
    if config.batch % world:
        raise ValueError(f"batch: wanted a multiple of the {world} processes, got {config.batch}")
    share = config.batch // world
    if not config.memory and share % (config.micro or share):  # with a limit the plan picks a divisor below it
        of = f"batch {config.batch}" + (f" over {world} processes" if world > 1 else "")
        raise ValueError(f"micro: wanted a divisor of {share} ({of}), got {config.micro}")


def check_weights(kind: str, config: Training, alone: bool) -> None:
    """FileNotFoundError, ValueError where the weights that a run is told to stand on are not there. alone: no stage
    before its own will make any."""
    if isinstance(config, LDMTraining):
        for part in ("vae", "clip"):
            if path := getattr(config, part):
                _holds(path, part, part)
        if config.lora and not config.start:
            raise ValueError("lora: wanted start=, the model that the adapters are for, got none")
    if isinstance(config, CLIPTraining):
        if config.tokenizer and not Path(config.tokenizer).is_file():
            raise FileNotFoundError(f"tokenizer: wanted a tokenizer.json, got {config.tokenizer!r}, which is not there")
        if alone and config.freeze_text and not config.start:
            raise ValueError("freeze_text: wanted start=, the run whose reports the volumes are to meet, got none")
        if config.freeze_text and Path(config.start).is_file() and not config.tokenizer:
            raise ValueError("tokenizer: wanted that of the frozen text tower, got none beside a file of weights")
    if config.start and not Path(config.start).is_file():
        _holds(config.start, "start", "unet" if kind == "ldm" else kind)


def _holds(path: str, said: str, part: str) -> None:
    folder, name = find_folder(path, said), FILES.get(part, f"{part}.safetensors")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{said}: wanted a folder with {name}, got {path!r}, which has none")


def check_data(config: Training, data: str) -> None:
    """ValueError, FileNotFoundError where the tables of the data do not serve the run; no volume is read."""
    if isinstance(config, LDMTraining) and (Path(data) / "train" / "index.json").is_file():
        return
    labels = isinstance(config, JudgeTraining) or bool(getattr(config, "label_weight", 0))
    texts = isinstance(config, (CLIPTraining, LDMTraining))
    open_data(data, "train", config.model.size, texts=texts, labels=labels, skip_bad=config.skip_bad)
