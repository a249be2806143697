"""Training: one loop, and a small file on it for each network. `train("vae", …)` does what `t2ct train vae` does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

PRESETS = ("published", "recommended", "embedded", "tiny")

if TYPE_CHECKING:
    from t2ct.train.data.latents import make_latents
    from t2ct.train.run import train

__all__ = ["PRESETS", "make_latents", "train"]
_HOMES = {"train": "t2ct.train.run", "make_latents": "t2ct.train.data.latents"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: --help does without torch
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 't2ct.train' has no attribute {name!r}")
