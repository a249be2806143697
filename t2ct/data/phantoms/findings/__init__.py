"""The findings a phantom can have: a registry, and how they are drawn at random."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from t2ct.data.phantoms.findings.base import LABELS, SIDES, Disease, Finding, Scene
from t2ct.data.phantoms.findings.heart import ArterialWallCalcification, Cardiomegaly, PericardialEffusion
from t2ct.data.phantoms.findings.lung import Atelectasis, Consolidation, Emphysema, LungNodule
from t2ct.data.phantoms.findings.pleura import PleuralEffusion

FINDINGS: dict[str, Disease] = {
    disease.name: disease
    for disease in (
        PleuralEffusion(), PericardialEffusion(), Cardiomegaly(), Consolidation(), LungNodule(), Emphysema(),
        Atelectasis(), ArterialWallCalcification(),
    )
}  # fmt: skip


def draw_findings(rng: np.random.Generator) -> list[Finding]:
    """A quarter normal, otherwise one to four findings; some effusions bring atelectasis beside them."""
    if rng.random() < 0.25:
        return []
    names = list(FINDINGS)
    weights = np.array([FINDINGS[n].weight for n in names])
    count = int(rng.choice([1, 2, 3, 4], p=[0.3, 0.33, 0.22, 0.15]))
    chosen = [str(n) for n in rng.choice(names, size=count, replace=False, p=weights / weights.sum())]
    if "pleural effusion" in chosen and "atelectasis" not in chosen and rng.random() < 0.4:
        chosen.append("atelectasis")
    return [Finding(n) for n in chosen]


def complete(wanted: list[Finding], stream: Callable[[str], np.random.Generator]) -> tuple[Finding, ...]:
    """Check the findings and draw what they leave open, each from its own stream. Raises ValueError."""
    for f in wanted:
        if f.name not in FINDINGS:
            raise ValueError(f"findings: wanted names from {list(FINDINGS)}, got {f.name!r}")
    done: list[Finding] = []
    # Effusions first: they decide where other lesions can still be seen.
    for k, f in sorted(enumerate(wanted), key=lambda kf: kf[1].name != "pleural effusion"):
        nth = sum(o.name == f.name for o in wanted[:k])
        done.append(FINDINGS[f.name].fill(f, stream(f.name + (f" {nth}" if nth else "")), done))
    return tuple(done)


__all__ = ["FINDINGS", "LABELS", "SIDES", "Disease", "Finding", "Scene", "complete", "draw_findings"]
