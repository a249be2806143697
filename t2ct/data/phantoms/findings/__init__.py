"""The findings a phantom can have: a registry, and how they are drawn at random."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from t2ct.data.phantoms.findings.airways import Bronchiectasis, PeribronchialThickening
from t2ct.data.phantoms.findings.base import LABELS, SIDES, Disease, Finding, Scene
from t2ct.data.phantoms.findings.devices import MedicalMaterial
from t2ct.data.phantoms.findings.heart import ArterialWallCalcification, Cardiomegaly, PericardialEffusion
from t2ct.data.phantoms.findings.interstitium import (
    InterlobularSeptalThickening,
    MosaicAttenuation,
    PulmonaryFibroticSequela,
)
from t2ct.data.phantoms.findings.lung import Atelectasis, Consolidation, Emphysema, LungNodule
from t2ct.data.phantoms.findings.mediastinum import CoronaryCalcification, HiatalHernia, Lymphadenopathy
from t2ct.data.phantoms.findings.opacity import LungOpacity
from t2ct.data.phantoms.findings.pleura import PleuralEffusion
from t2ct.data.phantoms.findings.together import draw_together

FINDINGS: dict[str, Disease] = {
    disease.name: disease
    for disease in (
        PleuralEffusion(), PericardialEffusion(), Cardiomegaly(), Consolidation(), LungNodule(), Emphysema(),
        Atelectasis(), ArterialWallCalcification(), MedicalMaterial(), CoronaryCalcification(), HiatalHernia(),
        Lymphadenopathy(), LungOpacity(), PulmonaryFibroticSequela(), MosaicAttenuation(), PeribronchialThickening(),
        Bronchiectasis(), InterlobularSeptalThickening(),
    )
}  # fmt: skip


def draw_findings(rng: np.random.Generator) -> list[Finding]:
    """About a quarter normal, otherwise one to six findings that come together as in patients: `together`."""
    return [Finding(name) for name in draw_together(rng)]


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
