"""Evaluation: the paper's tables (`evaluate`, `compare`), image measurements on chest CTs (`measure`) and whether a
model does what its prompt says (`listens`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2ct.eval.run import compare, evaluate

__all__ = ["compare", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use: --help and the metrics do without the rest
        from t2ct.eval import run

        return getattr(run, name)
    raise AttributeError(f"module 't2ct.eval' has no attribute {name!r}")
