"""Short reports put together of sentences from many, so that a text tower learns which side is whose.

A report of five findings and three sides hardly tells a network which word belongs to which: it counts "right" and
"left" and stays at that for thousands of updates. Two or three sentences, and the same with right for left, leave
nothing to count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reader import read_report
from t2ct.data.phantoms.reports.details import ASPECTS, MIRRORED, details_told
from t2ct.train.data.source import Entry

READ = 4000  # patients whose reports sentences are taken from, at most
ONE_SIDED = 0.85  # share of sentences that name one side, of findings that have sides
SIDED = {a.finding: a.place for a in ASPECTS if a.kind == "side"}
_SWAPPED = {"right": "left", "Right": "Left", "RUL": "LUL", "RLL": "LLL", "R": "L"}
_SWAPPED |= {left: right for right, left in _SWAPPED.items()}
_SIDES = re.compile(r"\b(right|Right|left|Left|RUL|LUL|RLL|LLL|[RL](?=[ -]))\b")
_ONE_LUNG = re.compile(r"middle lobe|\bRML\b|lingula", re.IGNORECASE)  # nothing like it on the other side
_HEADINGS = re.compile(r"\b(Findings|Impression): ")


@dataclass(frozen=True)
class Told:
    """A sentence with the details (len(DETAILS),) that it tells."""

    text: str
    details: np.ndarray


class Sentences:
    """Sentences that assert one finding and deny none, each with its mirror image; by finding, of one side or not."""

    def __init__(self, entries: Sequence[Entry]):
        """ValueError where no sentence is read: the reader knows the words that phantoms' reports use."""
        seen = dict.fromkeys(s for entry in entries[:READ] for text in entry.texts for s in _split(text))
        self.told: dict[tuple[str, bool], list[tuple[Told, Told]]] = {}
        for sentence in seen:
            reading = read_report(sentence)
            names = {f.name for f in reading.findings}
            if len(names) == 1 and not reading.denied:
                name, told = names.pop(), Told(sentence, details_told(sentence))
                one_sided = name in SIDED and bool(told.details[SIDED[name]].sum() == 1)  # NaN is not
                self.told.setdefault((name, one_sided), []).append((told, _mirrored(name, told)))
        self.names = sorted({name for name, _ in self.told})
        if not self.names:
            raise ValueError("recombine: wanted reports with sentences that assert one finding, got none that is read")

    def draw(self, rng: torch.Generator, most: int, mirrored: bool) -> tuple[str, Tensor]:
        """Sentences of 1 to `most` different findings, and the answers (QUESTIONS,) they give; what they do not name
        is absent. mirrored: right for left, but in a sentence of what one lung alone has."""
        count = 1 + _below(rng, min(most, len(self.names)))
        names = [self.names[i] for i in torch.randperm(len(self.names), generator=rng)[:count].tolist()]
        chosen = [self._of(name, rng)[mirrored] for name in names]
        labels = torch.tensor([float(label.lower() in names) for label in LABELS])
        details = np.full(len(MIRRORED), np.nan, np.float32)
        for told in chosen:
            details = np.where(np.isfinite(told.details), told.details, details)
        return " ".join(told.text for told in chosen), torch.cat((labels, torch.from_numpy(details)))

    def _of(self, name: str, rng: torch.Generator) -> tuple[Told, Told]:
        one_sided = bool(torch.rand((), generator=rng) < ONE_SIDED)
        pool = self.told.get((name, one_sided)) or self.told[name, not one_sided]
        return pool[_below(rng, len(pool))]


def _split(text: str) -> Iterator[str]:
    """Its sentences, each with a full stop."""
    for sentence in re.split(r"(?<=\.) ", _HEADINGS.sub("", text)):
        if sentence.strip():
            yield sentence if sentence.endswith(".") else sentence + "."


def _mirrored(name: str, told: Told) -> Told:
    """The sentence with right for left, if it then tells the mirrored details; else itself."""
    turned = Told(_SIDES.sub(lambda m: _SWAPPED[m[0]], told.text), told.details[MIRRORED])
    one_finding = [f.name for f in read_report(turned.text).findings]
    fits = name in SIDED and set(one_finding) == {name}
    same = fits and np.array_equal(details_told(turned.text), turned.details, equal_nan=True)
    return turned if same and not _ONE_LUNG.search(told.text) else told


def _below(rng: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (1,), generator=rng))
