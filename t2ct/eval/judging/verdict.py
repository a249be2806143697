"""What a judge says of one volume, in words: findings, how probable they are, side, lobe and size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from t2ct.checks import EMBEDDED
from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reports.details import ASPECTS, DETAILS
from t2ct.data.volume import Volume, as_hu
from t2ct.models.judge import Judge, load_judge
from t2ct.train.data.source import hu_evidence


@dataclass(frozen=True)
class Verdict:
    """finding: of `LABELS`. probability: that the volume shows it. side: "right", "left" or "bilateral"; lobe, size: in
    the words of `t2ct.data.phantoms`; None where the judge has not learnt it, or a finding has none. Those three are
    the likeliest if the finding is there, and mean nothing if it is not."""

    finding: str
    probability: float
    side: str | None = None
    lobe: str | None = None
    size: str | None = None


@torch.no_grad()
def verdicts(volume: Volume | np.ndarray, judge: Judge | None = None) -> list[Verdict]:
    """What `judge` (default: that in the package, trained on phantoms) says of a volume, the most probable first.

    volume: a `Volume`, or (X, Y, Z) HU of a whole chest, axes RAS. Raises TypeError or ValueError for what is no
    volume, not finite or not in HU, FileNotFoundError where there is no judge.
    """
    hu = as_hu(volume.hu if isinstance(volume, Volume) else volume)
    evidence = hu_evidence(hu)
    if evidence:
        raise ValueError(f"volume: wanted HU, got a volume with {evidence}")
    judge = load_judge(EMBEDDED) if judge is None else judge
    if judge.config.classes != len(LABELS):
        raise ValueError(f"judge: wanted {len(LABELS)} findings, got {judge.config.classes}")
    x = torch.from_numpy(np.ascontiguousarray(hu)).to(next(judge.parameters()).device).float()[None, None]
    features = judge.features(x)
    odds = judge.calibrated(judge.head(features))[0].double().sigmoid().tolist()
    told = judge.details(features)[0].cpu().numpy() if judge.config.details == DETAILS else None
    found = [Verdict(name, p, **_details(name, told)) for name, p in zip(LABELS, odds, strict=True)]
    return sorted(found, key=lambda v: -v.probability)


def _details(label: str, told: np.ndarray | None) -> dict[str, str]:
    said: dict[str, str] = {}
    if told is None:
        return said
    for aspect in ASPECTS:
        if aspect.finding == label.lower():
            logits = told[aspect.place]
            both = aspect.kind == "side" and (logits > 0).all()
            said[aspect.kind] = "bilateral" if both else aspect.values[int(logits.argmax())]
    return said
