"""Evaluation: the paper's tables (`evaluate`, `compare`), what a judge says of one volume (`verdicts`), image
measurements on chest CTs (`measure`), whether a model does what its prompt says (`listens`), pictures (`gallery`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2ct.eval.judging.verdict import Verdict, verdicts
    from t2ct.eval.run import compare, evaluate

__all__ = ["Verdict", "compare", "evaluate", "verdicts"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use: --help and the metrics do without the rest
        from t2ct.eval import run
        from t2ct.eval.judging import verdict

        return getattr(verdict if hasattr(verdict, name) else run, name)
    raise AttributeError(f"module 't2ct.eval' has no attribute {name!r}")
