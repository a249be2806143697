"""What is known of a volume as questions of yes or no, and the sentences that ask them."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reports.details import ASPECTS, DETAILS, details_told
from t2ct.eval.metrics.alignment import ABSENT, PRESENT
from t2ct.train.data.source import Entry

QUESTIONS = len(LABELS) + len(DETAILS)
# Of the details the share that counts as told, of every text the same, so that micro-batches add up to their batch:
# whole reports tell 0.13, recombined texts of at most 3 sentences 0.10 and of 6 0.17 (means over 1000 of phantoms).
TOLD = 1 / 6
_PHRASES = {"side": "{value} {finding}", "size": "{value} {finding}", "lobe": "{finding} of the {value} lobe"}


def labels_of(entry: Entry) -> Tensor:
    """(18,) float32."""
    return torch.tensor(entry.labels, dtype=torch.float32)


def known_details(entry: Entry) -> Tensor:
    """(len(DETAILS),) float32, NaN where nothing is known: what is recorded, else what the report tells."""
    if entry.details is None and not entry.texts:
        return torch.full((len(DETAILS),), float("nan"))
    return torch.tensor(entry.details or details_told(entry.texts[0]).tolist())


def answers_of(entry: Entry) -> Tensor:
    """(QUESTIONS,) float32: the labels, then the details, which are NaN where nothing is known."""
    return torch.cat((labels_of(entry), known_details(entry)))


def question_weights() -> Tensor:
    """(QUESTIONS,) float32, of the loss of answers: the labels, the sides twice, and the other details weigh alike,
    though a report tells few of the details."""
    sides = torch.tensor([a.kind == "side" for a in ASPECTS for _ in a.values])
    details = torch.where(sides, 2 / sides.sum(), 1 / (~sides).sum()) / TOLD
    weights = torch.cat((torch.full((len(LABELS),), 1 / len(LABELS)), details))
    return weights * QUESTIONS / 4


@cache
def sentences() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Each question as a sentence that says yes, and as one that says no: ("Lung nodule is present.", "Lung nodule is
    not present."), and of a detail ("Right lung nodule is present.", …)."""
    details = [
        _PHRASES[a.kind].format(value=value, finding=a.finding).capitalize() for a in ASPECTS for value in a.values
    ]
    asked = (*LABELS, *details)
    return tuple(map(PRESENT.format, asked)), tuple(map(ABSENT.format, asked))
