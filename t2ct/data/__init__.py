"""Data: CT volumes in files, and phantoms whose truth is known exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from t2ct.data.io import load_volume, save_volume

if TYPE_CHECKING:
    from t2ct.data.phantoms import Phantom, contact_sheet, phantom

__all__ = ["Phantom", "contact_sheet", "load_volume", "phantom", "save_volume"]


def __getattr__(name: str) -> Any:
    # Phantoms are imported when first asked for, so that reading a file stays quick.
    if name in __all__:
        from t2ct.data import phantoms

        return getattr(phantoms, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
