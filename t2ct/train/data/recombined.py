"""Short reports put together of sentences from many, so that a text tower learns which side is whose.

A report of five findings and three sides hardly tells a network which word belongs to which: it counts "right" and
"left" and stays at that for thousands of updates. Two or three sentences, and the same with right for left, leave
nothing to count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reader import read_report
from t2ct.data.phantoms.reports.details import ASPECTS, MIRRORED, details_told
from t2ct.train.data.source import Entry

READ = 4000  # reports' patients that sentences are taken from, at most
ONE_SIDED = 0.85  # share of sentences that name one side, of findings that have sides
_SWAPPED = {"right": "left", "Right": "Left", "RUL": "LUL", "RLL": "LLL"}
_SWAPPED |= {left: right for right, left in _SWAPPED.items()}
_SIDES = re.compile(r"\b(" + "|".join(_SWAPPED) + r")\b")
_ONE_LUNG = re.compile(r"middle lobe|\bRML\b|lingula", re.IGNORECASE)  # nothing like it on the other side
_HEADINGS = re.compile(r"\b(Findings|Impression): ")


class Sentences:
    """Sentences that assert one finding, by finding, with what they tell of it."""

    def __init__(self, entries: Sequence[Entry]):
        """ValueError where no sentence is read: the reader knows the words that phantoms' reports use."""
        seen = dict.fromkeys(s for entry in entries[:READ] for text in entry.texts for s in _split(text))
        self.told: dict[str, dict[bool, list[tuple[str, np.ndarray]]]] = defaultdict(lambda: {True: [], False: []})
        for sentence in seen:
            names = {f.name for f in read_report(sentence).findings}
            if len(names) == 1:
                details = details_told(sentence)
                self.told[name := names.pop()][_one_sided(name, details)].append((sentence, details))
        self.names = sorted(self.told)
        if not self.names:
            raise ValueError("recombine: wanted reports with sentences that assert one finding, got none that is read")

    def draw(self, rng: torch.Generator, most: int, mirrored: bool) -> tuple[str, Tensor]:
        """Sentences of 1 to `most` different findings, and the answers (QUESTIONS,) they give; what they do not name
        is absent. mirrored: right for left, unless a sentence is of a lobe that one lung has."""
        count = 1 + _below(rng, min(most, len(self.names)))
        names = [self.names[i] for i in torch.randperm(len(self.names), generator=rng)[:count].tolist()]
        chosen = [self._of(name, rng) for name in names]
        text = " ".join(sentence for sentence, _ in chosen)
        labels = torch.tensor([float(label.lower() in names) for label in LABELS])
        details = np.full(len(MIRRORED), np.nan, np.float32)
        for _, told in chosen:
            details = np.where(np.isfinite(told), told, details)
        if mirrored and not _ONE_LUNG.search(text):
            text, details = _SIDES.sub(lambda m: _SWAPPED[m[0]], text), details[MIRRORED]
        return text, torch.cat((labels, torch.from_numpy(details)))

    def _of(self, name: str, rng: torch.Generator) -> tuple[str, np.ndarray]:
        one_sided = bool(torch.rand((), generator=rng) < ONE_SIDED)
        pool = self.told[name][one_sided] or self.told[name][not one_sided]
        return pool[_below(rng, len(pool))]


def _split(text: str) -> Iterator[str]:
    yield from re.split(r"(?<=\.) ", _HEADINGS.sub("", text))


def _one_sided(name: str, details: np.ndarray) -> bool:
    sides = [details[a.place] for a in ASPECTS if a.finding == name and a.kind == "side"]
    return any(bool(s.sum() == 1) for s in sides)  # NaN is not


def _below(rng: torch.Generator, n: int) -> int:
    return int(torch.randint(n, (1,), generator=rng))
