"""What a report tells of a finding besides that it is there: side, lobe and size, as questions of yes or no."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from t2ct.data.phantoms.findings import FINDINGS, Finding
from t2ct.data.phantoms.findings.lung import nodule_size
from t2ct.data.phantoms.reader import read_report

KINDS = ("side", "lobe", "size")
ONE_CLASS = 3  # sizes at least, for "within one class" to say anything


@dataclass(frozen=True)
class Aspect:
    """Side, lobe or size of a finding, with its values in rising order, and where they begin among `DETAILS`."""

    finding: str
    kind: str
    values: tuple[str, ...]
    start: int

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + len(self.values))


def _aspects() -> Iterator[Aspect]:
    start = 0
    for name, disease in FINDINGS.items():
        sides = ("right", "left") if disease.sides else ()
        for kind, values in zip(KINDS, (sides, tuple(disease.lobes), tuple(disease.sizes)), strict=True):
            if len(values) > 1:
                yield Aspect(name, kind, values, start)
                start += len(values)


ASPECTS = tuple(_aspects())
DETAILS = tuple(f"{a.finding}: {a.kind} {value}" for a in ASPECTS for value in a.values)
# Details of a chest in a mirror, as an index into those of the chest.
MIRRORED = np.concatenate([np.arange(a.start, a.place.stop)[:: -1 if a.kind == "side" else 1] for a in ASPECTS])


def details_of(findings: Sequence[Finding]) -> np.ndarray:
    """(len(DETAILS),) float32: 1 where it is so, 0 where it is not, NaN where the finding is absent or nothing is said.

    Both sides are "right" and "left"; two findings of one name and of different lobes or sizes say nothing of these."""
    told = np.full(len(DETAILS), np.nan, np.float32)
    for a in ASPECTS:
        said = {getattr(f, a.kind) for f in findings if f.name == a.finding} - {None}
        if a.kind == "side" and "bilateral" in said:
            said = {"right", "left"}
        if said and (a.kind == "side" or len(said) == 1):
            told[a.place] = [value in said for value in a.values]
    return told


def details_told(text: str) -> np.ndarray:
    """`details_of` the findings that a report asserts, as far as its words are clear."""
    reading = read_report(text)
    clear = []
    for f, may_be in zip(reading.findings, reading.sizes, strict=True):
        size = next(iter(may_be)) if len(may_be) == 1 else None
        if f.name == "lung nodule" and f.size_mm is not None:
            size = nodule_size(f.size_mm)
        clear.append(replace(f, size=size))
    return details_of(clear)


def right_by_kind(said: np.ndarray, truth: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Which of the told details a judge finds: "side", "lobe", "size" -> (how many right, of how many), (N,) each.

    said: (N, len(DETAILS)) logits; truth: likewise, as `details_of`. A side is right if the likelier one is; of both
    sides, if both are likely. A lobe is right if it is the likeliest, a size ("size_within_one_class") if the likeliest
    is its neighbour or itself; "size" counts the class itself.
    """
    found = {kind: (np.zeros(len(said)), np.zeros(len(said))) for kind in (*KINDS, "size_within_one_class")}
    for a in ASPECTS:
        known = np.isfinite(truth[:, a.start])
        logits, wanted = said[:, a.place], np.nan_to_num(truth[:, a.place])
        best, true = logits.argmax(1), wanted.argmax(1)
        right = best == true
        if a.kind == "side":
            right = np.where(wanted.sum(1) == 2, (logits > 0).all(1), right)
        kinds = {a.kind: right}
        if a.kind == "size" and len(a.values) >= ONE_CLASS:
            kinds["size_within_one_class"] = abs(best - true) <= 1
        for kind, hit in kinds.items():
            found[kind][0][:] += known & hit
            found[kind][1][:] += known
    return found
