"""t2ct: a chest CT volume, in Hounsfield units, from the text of a radiology report.

import t2ct
volume = t2ct.generate("Large right pleural effusion with adjacent atelectasis.", seed=1)
volume.save("ct.nii.gz"); volume.preview("ct.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Imported on first use: `import t2ct` and the command line's --help do without torch.
_HOMES = {
    "generate": "t2ct.pipeline",
    "T2CTPipeline": "t2ct.pipeline",
    "Volume": "t2ct.data.volume",
    "explain": "t2ct.ops",
}
_MODULES = ("data", "diffusion", "models", "ops", "eval", "train")

if TYPE_CHECKING:
    from t2ct.data.volume import Volume
    from t2ct.ops import explain
    from t2ct.pipeline import T2CTPipeline, generate

__all__ = ["T2CTPipeline", "Volume", "__version__", "explain", "generate"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"t2ct.{name}")
    raise AttributeError(f"module 't2ct' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
