"""HU of the organs of phantoms beside published ranges: `python -m t2ct.data.phantoms.hounsfield` prints the table.

Without contrast medium, as the references are; only voxels whose six neighbours are of the same organ count, as in a
region of interest drawn by hand; for vertebrae, whose shell is dense, the neighbours' neighbours too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t2ct.data.phantoms.anatomy import draw_anatomy
from t2ct.data.phantoms.phantom import Phantom, phantom, stream

SOURCES = (
    "radclass.mudr.org, Hounsfield units, after Buzug, Computed Tomography (2008), and Prokop and Galanski, Spiral and "
    "Multislice CT of the Body (2003)",
    "radgray.com, Hounsfield scale",
    "Wikipedia, Hounsfield scale, values of body tissues",
    "Jang et al., Radiology 2019; 291: 360: vertebral trabecular bone, 226 HU below 30 years to 89 HU from 90 years on",
    "Abramowitz et al., AJR 2009; 192: 618: pleural fluid, 10.1 (SD 6.9) and 7.2 (SD 9.4) HU",
    "Gevenois et al., Am J Respir Crit Care Med 1995; 152: 653: emphysema lies below -950 HU",
    "J Comput Assist Tomogr 1979; 3: 740 (PubMed 512106): healthy lungs, -860 to -700 HU over all phases of breathing",
)


@dataclass(frozen=True)
class Organ:
    """An organ or part, the range (HU) in which its mean should lie, and which of `SOURCES` (from 1) say so."""

    name: str
    low: float
    high: float
    sources: tuple[int, ...]
    finding: str | None = None  # drawn for it
    depth: int = 1  # voxels from its surface that count: 0 for what is too thin, 2 for what has a shell


REFERENCE = (
    Organ("trachea", -1000, -950, (1,)),
    Organ("right lung", -910, -700, (1, 7)), Organ("left lung", -910, -700, (1, 7)),
    Organ("fat", -120, -90, (3,)), Organ("muscle", 35, 55, (3,)), Organ("aorta", 30, 50, (2, 3)),
    Organ("left ventricle", 30, 50, (2, 3)), Organ("liver", 45, 70, (1, 2)), Organ("spleen", 35, 55, (1,)),
    Organ("right kidney", 20, 40, (1, 2)), Organ("gallbladder", -5, 15, (3,)),
    Organ("vertebrae", 89, 226, (4,), depth=2), Organ("right ribs", 250, 1000, (2,), depth=0),
    Organ("pleural effusion", -2, 17, (5,), "pleural effusion"),
    Organ("emphysema", -1000, -950, (6,), "emphysema"),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """mean: of the means of the phantoms. low, high: 5th and 95th percentile of all voxels. count: phantoms."""

    organ: Organ
    mean: float
    low: float
    high: float
    count: int

    @property
    def inside(self) -> bool:
        return self.organ.low <= self.mean <= self.organ.high


def inner(mask: np.ndarray) -> np.ndarray:
    """Voxels of `mask` (X, Y, Z) bool whose six neighbours are in it too."""
    kept = mask.copy()
    for axis in range(3):
        part = np.moveaxis(mask, axis, 0)
        keep = np.moveaxis(kept, axis, 0)
        keep[1:] &= part[:-1]
        keep[:-1] &= part[1:]
        keep[[0, -1]] = False
    return kept


def measure(count: int = 8, size: tuple[int, int, int] = (128, 128, 64), first: int = 0) -> list[Measured]:
    """HU of the organs of `count` patients without contrast medium, seeds from `first` on."""
    seeds: list[int] = []
    seed = first
    while len(seeds) < count:
        if draw_anatomy(stream(seed, "anatomy")).phase == "none":
            seeds.append(seed)
        seed += 1
    healthy = [phantom(s, [], size) for s in seeds]
    ill: dict[str, list[Phantom]] = {}
    rows = []
    for organ in REFERENCE:
        some = healthy
        if organ.finding:
            ask = {"name": organ.finding, "size": "large" if organ.finding == "pleural effusion" else "severe"}
            some = ill.setdefault(organ.finding, [phantom(s, [ask], size) for s in seeds[: max(1, count // 2)]])
        values = [p.hu[where] for p in some if (where := _where(p, organ)).sum() >= 8]
        voxels = np.concatenate(values)
        mean = float(np.mean([v.mean() for v in values]))
        low, high = np.percentile(voxels, [5, 95])
        rows.append(Measured(organ, mean, float(low), float(high), len(values)))
    return rows


def _where(p: Phantom, organ: Organ) -> np.ndarray:
    mask = p.finding_mask(organ.name) if organ.finding else p.organ_mask(organ.name)
    for _ in range(organ.depth):
        mask = inner(mask)
    return mask


def markdown(rows: Sequence[Measured]) -> str:
    """The table, and what its numbers refer to."""
    lines = ["| organ | mean HU | 5 to 95 % of voxels | published | inside | source |", "|---|---|---|---|---|---|"]
    for r in rows:
        o = r.organ
        source = ", ".join(str(k) for k in o.sources)
        inside = "yes" if r.inside else "**no**"
        lines.append(f"| {o.name} | {r.mean:.0f} | {r.low:.0f} to {r.high:.0f} | {o.low:g} to {o.high:g} | {inside} | "
                     f"{source} |")  # fmt: skip
    lines += ["", *(f"{k}. {text}." for k, text in enumerate(SOURCES, 1))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(measure()), end="")
