"""What the fields of a configuration may hold: one check of kind and range for every dataclass that has sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints

WORDS: dict[type, tuple[str, str]] = {  # of one, and of several
    int: ("an integer", "integers"), float: ("a finite number", "finite numbers"),
    bool: ("true or false", "entries true or false"), str: ("a text", "texts"),
}  # fmt: skip
COUNTS = {2: "two", 3: "three"}
LARGEST = 1e15  # of a number without a limit of its own: whatever is computed from it stays finite


@dataclass(frozen=True)
class Range:
    """Numbers from low to high; without low or high themselves where it is open there."""

    low: float = 0
    high: float = LARGEST
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: Any) -> bool:
        """Is it in here? NaN is in no range."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.low == -LARGEST and self.high == LARGEST:
            return ""
        low, high = (str(v) if isinstance(v, int) else f"{v:g}" for v in (self.low, self.high))
        if self.high == LARGEST:
            return f" above {low}" if self.open_low else f" of at least {low}"
        return f" {'above' if self.open_low else 'from'} {low} {'up to but not' if self.open_high else 'to'} {high}"


SIZE = Range(1, 2**20)  # of an integer without a range: a width, a count of voxels, a vocabulary
DEPTH = Range(1, 128)  # of layers: each is a module of its own, and thousands take minutes to build
SHARE = Range(0, 1)
POSITIVE = Range(0, open_low=True)
ANY = Range(-LARGEST)


def check_fields(config: Any, name: str = "", **ranges: Range) -> None:
    """ValueError unless every field of the dataclass `config` has its annotated kind and every number in it is finite
    and in its range: that in `ranges`, or `SIZE` for integers, at least 0 for others.

    name: what stands before a field's name in the error, such as "UNetConfig.".
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        if get_origin(hints[f.name]) is tuple or hints[f.name] in WORDS:
            check_value(name + f.name, getattr(config, f.name), hints[f.name], ranges.get(f.name))


def check_value(name: str, value: Any, kind: Any, limits: Range | None = None) -> None:
    """ValueError unless `value` is of `kind`, numbers in it within `limits`, as in `check_fields`."""
    if not _fits(value, kind, limits):
        raise ValueError(f"{name}: wanted {_words(kind, limits)}, got {value!r:.200}")


def check_grid(name: str, size: Any, factor: int, within: tuple[int, int, int] | None = None) -> None:
    """ValueError unless `size` is voxels along three axes, each a positive multiple of `factor`, at most `within`."""
    good = _fits(size, tuple[int, int, int], None) and not any(n % factor for n in size)
    if not good or (within and any(n > m for n, m in zip(size, within, strict=True))):
        told = f" within {within}" if within else ""
        raise ValueError(f"{name}: wanted three positive multiples of {factor}{told}, got {size!r:.200}")


def _limits(kind: type, limits: Range | None) -> Range:
    return limits or (SIZE if kind is int else Range())


def _fits(value: Any, kind: Any, limits: Range | None) -> bool:
    if get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(kinds) == len(value) and all(_fits(v, k, limits) for v, k in zip(value, kinds, strict=True))
    if kind not in (int, float):
        return isinstance(value, kind)
    right = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return right and _limits(kind, limits).holds(value) and -math.inf < value < math.inf


def _words(kind: Any, limits: Range | None, several: bool = False) -> str:
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        each = _words(kinds[0], limits, several=True)
        if kinds[-1] is Ellipsis:
            return f"{'lists' if several else 'a list'} of {each}"
        return f"{COUNTS[len(kinds)]} {each}{' each' if several else ''}"
    return WORDS[kind][several] + (str(_limits(kind, limits)) if kind in (int, float) else "")
