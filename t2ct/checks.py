"""What a caller may ask for: every argument of `generate` checked before anything long starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2ct.diffusion import as_integer
from t2ct.text import form_prompt

EMBEDDED = Path(__file__).parent / "assets" / "embedded"
FILES = {
    "vae": "vae.safetensors",
    "unet": "unet.safetensors",
    "clip": "clip.safetensors",
    "tokenizer": "tokenizer.json",
}
MIN_MM, MAX_MM = 1e-3, 1e6  # of a voxel: a NIfTI header keeps these, and knows the axes again
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_seed(seed: Any) -> int:
    """The seed as an int, or ValueError."""
    value = as_integer(seed)
    if value is None or not 0 <= value < 2**63:
        raise ValueError(f"seed must be an integer from 0 to 2^63 - 1, got {seed!r}")
    return value


def check_size(size: Any, factor: int) -> tuple[int, int, int]:
    """Three positive multiples of factor, or ValueError."""
    values = [as_integer(n) or 0 for n in _listed(size)]
    if len(values) != 3 or not all(0 < n < 2**31 and n % factor == 0 for n in values):
        raise ValueError(f"size must be three positive multiples of {factor} (voxels), got {size!r}")
    x, y, z = values
    return x, y, z


def check_spacing(spacing: Any) -> tuple[float, float, float]:
    """Three positive finite numbers, or ValueError."""
    values: list[Any] = [v for v in _listed(spacing) if isinstance(v, Real) and not isinstance(v, bool)]
    if len(values) != 3 or not all(MIN_MM <= v <= MAX_MM for v in values):
        raise ValueError(f"spacing must be three positive numbers ({MIN_MM:g} to {MAX_MM:g} mm), got {spacing!r}")
    x, y, z = map(float, values)
    return x, y, z


def _listed(values: Any) -> Sequence[Any]:
    """The entries of a list, a tuple, an array or a tensor; none of anything else."""
    if isinstance(values, (np.ndarray, Tensor)):
        return values.tolist() if values.ndim == 1 else ()
    return values if isinstance(values, Sequence) and not isinstance(values, (str, bytes)) else ()


def find_device(device: str | torch.device | None) -> torch.device:
    """The device, or by default the GPU if there is one; ValueError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device: wanted one that is there, got {str(device)!r} ({str(error).splitlines()[0][:100]})"
        ) from None
    if chosen.type == "meta":
        raise ValueError("device: wanted one that computes, got 'meta'")
    return chosen


def find_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype, or by default float16 on a GPU and float32 on a CPU; ValueError for one the networks do not run in."""
    chosen = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if chosen not in DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {chosen}")
    return chosen


def check_place(pipe: Any, device: Any, dtype: torch.dtype | None) -> None:
    """ValueError where a loaded pipeline is asked to run on another device, or in another dtype, than it is in."""
    if device is not None:
        wanted = find_device(device)
        same = None in (wanted.index, pipe.device.index) or wanted.index == pipe.device.index  # "cuda": any of them
        if wanted.type != pipe.device.type or not same:
            raise ValueError(f"device: wanted that of the loaded pipeline, {pipe.device}, or None, got {str(device)!r}")
    if dtype is not None and dtype != pipe.dtype:
        raise ValueError(f"dtype: wanted that of the loaded pipeline, {pipe.dtype}, or None, got {dtype}")


def model_folder(path: str | Path | None) -> Path:
    """The folder of weights that `path` names: a model's folder, or a run of `t2ct train` (its final/); None and
    "embedded" are the model in the package. Where there is no config.json in it, what was named, as it is."""
    if path is None or str(path) == "embedded":
        return EMBEDDED
    final = Path(path) / "final"
    return final if (final / "config.json").is_file() else Path(path)


def find_files(model: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """Where each part lies; "config" None = the published networks."""
    if isinstance(model, Mapping):
        wanted = (*FILES, "config")
        wrong = [k for k in model if k not in wanted] or [k for k in FILES if k not in model]
        if wrong:
            raise ValueError(
                f"model: wanted files for {', '.join(FILES)} (and optionally config), got {', '.join(model)}"
            )
        found = {**model, "config": model.get("config")}
    else:
        folder = model_folder(model)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"model: wanted a folder with config.json, or a dict of files {', '.join(FILES)}, got {str(folder)!r}"
            )
        found = {name: folder / file for name, file in FILES.items()} | {"config": folder / "config.json"}
    for name, path in found.items():
        if isinstance(path, (str, Path)) and not Path(path).is_file():
            raise FileNotFoundError(f"model: wanted a file for {name}, got {str(path)!r}, which is not there")
    return found


def form_prompts(prompt: Any, several: bool, embeds: Tensor | None) -> list[str] | None:
    """The formed texts, or None where embeddings came instead; ValueError for both, neither or an empty list."""
    if (prompt is None) == (embeds is None):
        raise ValueError(f"wanted either prompt or prompt_embeds, got {'neither' if prompt is None else 'both'}")
    if prompt is None:
        return None
    if several and not isinstance(prompt, Iterable):
        raise TypeError(f"prompt: wanted a text, a report, or a list of them, got {type(prompt).__name__}")
    prompts = list(prompt) if several else [prompt]
    if not prompts:
        raise ValueError("prompt: wanted at least one text, got an empty list")
    return [form_prompt(one) for one in prompts]
