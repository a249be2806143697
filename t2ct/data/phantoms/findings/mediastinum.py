"""Mediastinum: hiatal hernia, lymphadenopathy, coronary artery wall calcification."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy, ellipsoid
from t2ct.data.phantoms.canvas import f32, path, tube
from t2ct.data.phantoms.chest import HILUM
from t2ct.data.phantoms.findings.base import SIDES, Disease, Finding, Scene
from t2ct.data.phantoms.heart import CORONARIES, coronary
from t2ct.data.phantoms.organs import ORGAN, PART

ENHANCED = {"none": 0.0, "arterial": 25.0, "venous": 40.0}


class HiatalHernia(Disease):
    """Stomach above the diaphragm: a thick-walled sac behind the heart, in fat, gas in front of fluid."""

    name, label, layer = "hiatal hernia", "Hiatal hernia", 5
    sizes = {"small": 0.3, "moderate": 0.4, "large": 0.3}
    radii = {"small": (19, 15, 19), "moderate": (30, 20, 30), "large": (46, 27, 43)}

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        radii = np.array(self.radii[f.size or "moderate"]) * rng.uniform(0.92, 1.08, 3)
        floor = 0.5 * (a.dome[0] + a.dome[1]) - 8
        cz = floor + 0.75 * radii[2]
        cy = float(a.spine_y(f32(cz))) + 17 + radii[1]
        cx = -11.0 + float(rng.uniform(-5, 5))
        fat = radii + 7
        low, high = (tuple(c + s * r for c, r in zip((cx, cy, cz), fat, strict=True)) for s in (-1, 1))
        box = canvas.box(low, high)
        x, y, z = canvas.at(box)
        # Nothing of the aorta, the spine or the heart's chambers gives way.
        firm = np.isin(canvas.mask[box], [ORGAN["aorta"], ORGAN["bone"], ORGAN["spinal canal"], ORGAN["airway"]])
        free = ~firm
        centred = (x - np.float32(cx), y - np.float32(cy), z - np.float32(cz))
        coat = ellipsoid(*centred, fat.tolist())
        canvas.paint(box, canvas.inside(coat) * free, -95.0, ORGAN["fat"])
        sac = ellipsoid(*centred, radii.tolist())
        whole = canvas.inside(sac) * free
        canvas.paint(box, whole, 42.0 + 0.7 * ENHANCED[a.phase], ORGAN[self.name])
        inner = canvas.inside(sac + np.float32(4.0)) * free
        folds = canvas.texture(rng, 10.0, box)
        canvas.paint(box, inner, (18 + 16 * folds).astype(np.float32))
        level = np.float32(cy + radii[1] * rng.uniform(-0.25, 0.25))
        gas = np.clip((y - level) / canvas.width + np.float32(0.5), 0, 1)
        canvas.paint(box, inner * gas, -985.0)


class Lymphadenopathy(Disease):
    """Enlarged nodes: ovals of soft tissue in clusters, in the fat of their stations."""

    name, label, layer = "lymphadenopathy", "Lymphadenopathy", 4
    kinds = {"paratracheal": 0.25, "subcarinal": 0.2, "prevascular": 0.15, "hilar": 0.25, "axillary": 0.15}
    sizes = {"mild": 0.25, "moderate": 0.4, "severe": 0.35}
    sides = {"right": 0.35, "left": 0.25, "bilateral": 0.4}
    short = {"mild": (12, 15), "moderate": (16, 22), "severe": (23, 32)}  # mm, short axis of the largest
    sided = ("hilar", "axillary")

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        if f.size_mm is not None:
            if not isinstance(f.size_mm, (int, float)) or not 10 <= f.size_mm <= 40:
                raise ValueError(f"size_mm of {self.name}: wanted 10 to 40 mm, got {f.size_mm!r}")
            word = "mild" if f.size_mm < 15.5 else "moderate" if f.size_mm < 22.5 else "severe"
            f = replace(f, size=f.size or word)
        if f.side is not None and f.kind is None:
            f = replace(f, kind="hilar" if rng.random() < 0.6 else "axillary")
        if f.side is not None and f.kind in self.kinds and f.kind not in self.sided:
            raise ValueError(f"side of {self.name}: wanted nothing for {f.kind} nodes, got {f.side!r}")
        filled = super().fill(replace(f, size_mm=None), rng, others)
        millimetres = int(rng.integers(*self.short[filled.size or "moderate"], endpoint=True))
        side = filled.side if filled.kind in self.sided else None
        return replace(filled, size_mm=f.size_mm if f.size_mm is not None else millimetres, side=side)

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        diameter = float(f.size_mm or 18)
        number = {"mild": 3, "moderate": 5, "severe": 7}[f.size or "moderate"]
        value = 38.0 + 1.3 * ENHANCED[a.phase] + float(rng.uniform(-4, 6))
        for side in SIDES[f.side or "right"]:
            for k in range(number):
                size = diameter if k == 0 else diameter * float(rng.uniform(0.55, 0.95))
                centre = self._place(f.kind or "paratracheal", side, k, size, a, rng)
                long = size * float(rng.uniform(1.2, 1.6))
                radii = [size / 2, size / 2, long / 2] if f.kind != "subcarinal" else [long / 2, size / 2, size / 2]
                box = canvas.box(tuple(centre - long / 2 - 3), tuple(centre + long / 2 + 3))
                x, y, z = canvas.at(box)
                node = ellipsoid(x - np.float32(centre[0]), y - np.float32(centre[1]), z - np.float32(centre[2]), radii)
                firm = np.isin(canvas.mask[box], [ORGAN["bone"], ORGAN["airway"], ORGAN["heart"], ORGAN["aorta"],
                                                  ORGAN["vena cava"], ORGAN["azygos vein"], ORGAN["skin"],
                                                  ORGAN["background"], ORGAN["spinal canal"]])  # fmt: skip
                # The vessels of the hila are pushed aside, those of the mediastinum are not.
                large = np.isin(canvas.parts[box], [PART["pulmonary trunk"], PART["right pulmonary artery"],
                                                    PART["left pulmonary artery"]])  # fmt: skip
                alpha = canvas.inside(node)
                rim = canvas.inside(node - np.float32(2))  # a little fat around each
                other = canvas.mask[box] == ORGAN[self.name]  # nodes that touch grow together
                canvas.paint(box, rim * ~(firm | other) * (f.kind != "hilar") * np.float32(0.7), -95.0)
                canvas.paint(box, alpha * ~(firm | large), value, ORGAN[self.name])

    def _place(self, kind: str, side: int, k: int, size: float, a: Anatomy, rng: np.random.Generator) -> np.ndarray:
        """Centre (mm) of the k-th node of a station."""
        spots: dict[str, list[tuple[float, float, float]]] = {
            "paratracheal": [(19, -14, 60), (18, -12, 80), (20, -8, 44), (-15, -16, 66), (17, 6, 64)],
            "subcarinal": [(3, -37, 14), (12, -40, 3), (-10, -42, 2), (2, -42, -10), (4, -34, 20)],
            "prevascular": [(2, 30, 58), (-20, 26, 46), (-30, 14, 36), (14, 34, 48), (-8, 32, 74)],
            "hilar": [(HILUM[side][0] + 10 * side, -24, 8), (HILUM[side][0] + 12 * side, -14, -10),
                      (HILUM[side][0] + 10 * side, -32, 24), (HILUM[side][0] + 14 * side, -38, -8),
                      (HILUM[side][0] + 6 * side, -8, 20)],
            "axillary": [(side * 126, -6, 86), (side * 130, -16, 66), (side * 122, 10, 78), (side * 128, -2, 104),
                         (side * 132, -20, 84)],
        }  # fmt: skip
        more = k // len(spots[kind])  # the next round lies beside the first
        centre = f32(spots[kind][k % len(spots[kind])]) + f32(rng.uniform(-3, 3, 3)) + more * f32([6, 10, -14])
        if kind == "hilar":
            centre[0] += side * size * 0.2
        return centre


class CoronaryCalcification(Disease):
    """Bright plaques along the coronary arteries, from points to tram lines."""

    name, label, layer = "coronary artery wall calcification", "Coronary artery wall calcification", 5
    sizes = {"mild": 0.3, "moderate": 0.4, "severe": 0.3}
    kinds = {"left anterior descending": 0.35, "right": 0.15, "circumflex": 0.1, "multivessel": 0.4}
    share = {"mild": 0.16, "moderate": 0.34, "severe": 0.68}  # of the first two thirds of the artery

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas, size = scene.anatomy, scene.canvas, f.size or "moderate"
        names = list(CORONARIES) if f.kind == "multivessel" else [f.kind or "left anterior descending"]
        for name in names:
            line = coronary(a, name, 1.0)
            line = line[: int(len(line) * 0.75)]
            wanted = max(12.0, self.share[size] * len(line))
            done = 0.0
            while done < wanted:
                long = float(rng.uniform(5, 9) if size == "mild" else rng.uniform(7, 16))
                at = int(rng.integers(2, max(4, len(line) - int(long) - 1)))
                part = line[at : at + int(long) + 2]
                thick = float(rng.uniform(1.5, 2.1) if size == "mild" else rng.uniform(1.8, 2.7))
                knots = np.concatenate([part[::2, :3], np.full((len(part[::2]), 1), thick)], 1)
                if len(knots) >= 2:
                    box, alpha = canvas.splat(*tube([path(knots, canvas.step)], canvas.step))
                    canvas.paint(box, alpha, float(rng.uniform(750, 1250)), ORGAN[self.name],
                                 least=canvas.thin(thick))  # fmt: skip
                done += long
