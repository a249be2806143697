"""Which findings come together: the frequencies that `phantom(seed)` draws from."""

from __future__ import annotations

import numpy as np

NORMAL = 0.22  # share of normal chests
MOST = 6  # findings in one chest

# How often a finding comes of itself, in chests that are not normal; about as common, relative to one another, as
# among the 18 labels of CT-RATE, the rare ones raised so that they can be learnt.
ALONE = {
    "medical material": 0.11, "arterial wall calcification": 0.16, "cardiomegaly": 0.11, "pericardial effusion": 0.08,
    "coronary artery wall calcification": 0.10, "hiatal hernia": 0.10, "lymphadenopathy": 0.13, "emphysema": 0.13,
    "atelectasis": 0.12, "lung nodule": 0.20, "lung opacity": 0.15, "pulmonary fibrotic sequela": 0.14,
    "pleural effusion": 0.13, "mosaic attenuation pattern": 0.09, "peribronchial thickening": 0.06,
    "consolidation": 0.11, "bronchiectasis": 0.09, "interlobular septal thickening": 0.06,
}  # fmt: skip

# first -> {then: how often the first brings the second}. Read in this order: what is brought may bring in turn.
BRINGS = {
    "cardiomegaly": {"pleural effusion": 0.30, "interlobular septal thickening": 0.20, "medical material": 0.15,
                     "pericardial effusion": 0.12},
    "pericardial effusion": {"pleural effusion": 0.25},
    "arterial wall calcification": {"coronary artery wall calcification": 0.40, "hiatal hernia": 0.08},
    "coronary artery wall calcification": {"arterial wall calcification": 0.35, "medical material": 0.10},
    "pleural effusion": {"atelectasis": 0.50, "consolidation": 0.12, "interlobular septal thickening": 0.12},
    "emphysema": {"lung nodule": 0.25, "peribronchial thickening": 0.15, "pulmonary fibrotic sequela": 0.12},
    "bronchiectasis": {"peribronchial thickening": 0.45, "mosaic attenuation pattern": 0.15},
    "mosaic attenuation pattern": {"peribronchial thickening": 0.20},
    "consolidation": {"lung opacity": 0.35, "pleural effusion": 0.12, "lymphadenopathy": 0.12},
    "lung opacity": {"consolidation": 0.15, "interlobular septal thickening": 0.12},
    "pulmonary fibrotic sequela": {"bronchiectasis": 0.12, "lung nodule": 0.10},
    "lung nodule": {"lymphadenopathy": 0.12},
    "interlobular septal thickening": {"pleural effusion": 0.25},
}  # fmt: skip


def draw_together(rng: np.random.Generator) -> list[str]:
    """Names of the findings of one chest: none for a normal one, otherwise one to `MOST`."""
    if rng.random() < NORMAL:
        return []
    names = list(ALONE)
    chosen: list[str] = []
    while not chosen:
        draws = rng.random(len(names))
        waiting = [names[int(k)] for k in rng.permutation(len(names)) if draws[k] < ALONE[names[k]]]
        while waiting and len(chosen) < MOST:
            name = waiting.pop(0)
            if name not in chosen:
                chosen.append(name)
                waiting += [then for then, share in BRINGS.get(name, {}).items() if rng.random() < share]
    return chosen
