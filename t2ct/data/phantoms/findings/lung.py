"""Lung: consolidation, nodule, emphysema, atelectasis."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.bones import ellipsoid_points
from t2ct.data.phantoms.canvas import ALL, f32, path, tube
from t2ct.data.phantoms.chest import HILUM
from t2ct.data.phantoms.findings.base import SIDES, Disease, Finding, Scene, dry_side
from t2ct.data.phantoms.organs import ORGAN

ENHANCED = {"none": 0.0, "arterial": 25.0, "venous": 40.0}


class Consolidation(Disease):
    """Airspace filled with fluid: opaque lung with a ground-glass rim, stopped by fissures, with open bronchi in it."""

    name, label, layer = "consolidation", "Consolidation", 3
    sides = {"right": 0.42, "left": 0.38, "bilateral": 0.2}
    lobes = {"upper": 0.38, "middle": 0.14, "lower": 0.48}
    sizes = {"segmental": 0.6, "lobar": 0.4}

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        return dry_side(f, super().fill(f, rng, others), others)

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        grain = canvas.texture(rng, 13.0)
        for side in SIDES[f.side or "right"]:
            depth = 10.0 if f.size == "segmental" else 0.0
            points = scene.lobe_points(f, side, depth)
            if f.size == "lobar":
                centre, radius = points.mean(0), float(rng.uniform(62, 78))
            else:
                centre, radius = points[rng.integers(len(points))], float(rng.uniform(29, 40))
            reach = radius + 30
            box = canvas.box(tuple(centre - reach), tuple(centre + reach))
            x, y, z = canvas.at(box)
            d = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
            field = np.float32(radius) - d + 8 * grain[box]
            lobe = canvas.inside(a.lobe(x, y, z)[f.lobe or "lower"])
            room = lobe * scene.room(box) * (x * side > 0) * (canvas.mask[box] != ORGAN["pleural effusion"])
            rim = np.clip((field + 15) / 15, 0, 1) * room
            canvas.paint(box, rim * np.float32(0.45), -300.0)
            core = np.clip(field / 9 + np.float32(0.2), 0, 1) * room
            value = 38.0 + ENHANCED[a.phase] * 1.2 + 7 * grain[box]
            canvas.paint(box, core * np.float32(0.95), value, ORGAN["consolidation"])
            # Air bronchograms fan out from the side of the hilum.
            start = np.array(HILUM[side]) * 0.25 + centre * 0.75 if f.size == "lobar" else centre
            toward = np.array(HILUM[side]) - centre
            start = start + toward / np.linalg.norm(toward) * radius * 0.35
            lines = []
            for _ in range(7 if f.size == "lobar" else 4):
                end = centre + rng.normal(0, radius * 0.42, 3) - toward / np.linalg.norm(toward) * radius * 0.35
                bend = 0.5 * (start + end) + rng.normal(0, 5, 3)
                lines.append(path(f32([[*start, 2.3], [*bend, 1.8], [*end, 1.3]]), canvas.step))
            air_box, air = canvas.splat(*tube(lines, canvas.step))
            inside = canvas.mask[air_box] == ORGAN["consolidation"]
            canvas.paint(air_box, air * inside, -900.0, ORGAN["airway"])


def nodule_size(mm: float) -> str:
    """The class of a nodule's diameter."""
    return "small" if mm < 12.5 else "medium" if mm < 20 else "large"


class LungNodule(Disease):
    """A solid round nodule of known diameter, or several of them."""

    name, label, layer = "lung nodule", "Lung nodule", 4
    sides = {"right": 0.52, "left": 0.48}
    lobes = {"upper": 0.45, "middle": 0.12, "lower": 0.43}
    sizes = {"small": 0.12, "medium": 0.44, "large": 0.44}
    diameter = {"small": (7, 12), "medium": (13, 20), "large": (20, 30)}

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        if f.size_mm is not None:
            if not isinstance(f.size_mm, (int, float)) or not 3 <= f.size_mm <= 30:
                raise ValueError(f"size_mm of {self.name}: wanted 3 to 30 mm, got {f.size_mm!r}")
            word = nodule_size(f.size_mm)
            f = replace(f, size=f.size or word)
        filled = dry_side(f, super().fill(f, rng, others), others)
        low, high = self.diameter[filled.size or "medium"]
        diameter = int(rng.integers(low, high, endpoint=True))
        several = rng.random() < 0.25
        number = int(rng.integers(3, 7)) if several else 1
        if f.count is not None and not 1 <= f.count <= 20:
            raise ValueError(f"count of {self.name}: wanted 1 to 20, got {f.count!r}")
        return replace(filled, size_mm=f.size_mm if f.size_mm is not None else diameter, count=f.count or number)

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        main = SIDES[f.side or "right"][0]
        value = float(rng.uniform(30, 55)) + ENHANCED[a.phase]
        spiculated = f.size == "large" and rng.random() < 0.5
        for k in range(f.count or 1):
            # The first is the one that the report measures; the others are smaller and anywhere.
            diameter = float(f.size_mm or 15) * (1.0 if k == 0 else float(rng.uniform(0.45, 0.8)))
            side = main if k == 0 else int(rng.choice([1, -1]))
            where = f if k == 0 else replace(f, lobe=None)
            points = scene.lobe_points(where, side, diameter / 2 + 4)
            clear = _clear_of(scene, points, diameter / 2)
            points = points[clear] if clear.sum() >= 3 else points
            centre = points[rng.integers(len(points))]
            ball, weights = ellipsoid_points((0.0, 0.0, 0.0), diameter / 2, min(canvas.spacing) * 0.45)
            box, alpha = canvas.splat(ball + canvas.frame.to_scanner(centre[None]), weights, scanner=True)
            canvas.paint(box, alpha, value, ORGAN["lung nodule"])
            if spiculated:  # fine lines to the lung around; not part of what is measured
                ways = rng.normal(0, 1, (9, 3))
                ways /= np.linalg.norm(ways, axis=1, keepdims=True)
                reach = diameter * rng.uniform(0.65, 0.95, (9, 1))
                lines = [path(f32([[*(centre + 0.4 * diameter * w), 1.1], [*(centre + far * w), 0.4]]), canvas.step)
                         for w, far in zip(ways, reach, strict=True)]  # fmt: skip
                box, alpha = canvas.splat(*tube(lines, canvas.step))
                canvas.paint(box, alpha * scene.alpha[box], value)


class Emphysema(Disease):
    """Holes without walls in the upper lungs (centrilobular) or under the pleura (paraseptal, with bullae)."""

    name, label, layer = "emphysema", "Emphysema", 0
    sizes = {"mild": 0.3, "moderate": 0.37, "severe": 0.33}
    kinds = {"centrilobular": 0.65, "paraseptal": 0.35}
    threshold = {"mild": 0.95, "moderate": 0.5, "severe": 0.05}

    def prepare(self, anatomy: Anatomy, f: Finding, rng: np.random.Generator) -> None:
        grade = {"mild": 0.2, "moderate": 0.6, "severe": 1.0}[f.size or "moderate"]
        anatomy.dome_fall *= 1 - 0.4 * grade  # flat domes
        anatomy.dome = (anatomy.dome[0] - 12 * grade, anatomy.dome[1] - 12 * grade)
        anatomy.depth *= 1 + 0.07 * grade  # barrel chest
        anatomy.lung_hu = max(anatomy.lung_hu - 12 * grade, -890.0)

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        size = f.size or "moderate"
        holes = canvas.texture(rng, 8.5)
        below = np.clip((np.float32(a.apex - 70) - canvas.z) / 130, 0, 1)  # fewer holes towards the base
        limit = np.float32(self.threshold[size]) + below * np.float32(1.1)
        if f.kind == "paraseptal":
            limit = limit - np.float32(0.5) + np.clip(-(scene.lungs + 6) / 16, 0, 1.5)
        alpha = np.clip((holes - limit) * np.float32(3.2) + np.float32(0.5), 0, 1) * canvas.inside(scene.lungs + 3)
        canvas.paint(ALL, alpha.astype(np.float32), -975.0, ORGAN["emphysema"])
        if f.kind == "paraseptal":
            count = {"mild": 2, "moderate": 5, "severe": 9}[size]
            for k in range(count):
                side = 1 if k % 2 else -1
                points = scene.points[side]
                x, y, z = points.T
                near = points[(z > a.apex - 75) & (a.lungs(x, y, z) > -14)]
                centre = near[rng.integers(len(near))] if len(near) else points[0]
                radius = float(rng.uniform(9, 15) + 6 * (size == "severe") * rng.random())
                box = canvas.box(tuple(centre - radius - 4), tuple(centre + radius + 4))
                bx, by, bz = canvas.at(box)
                d = np.sqrt((bx - centre[0]) ** 2 + (by - centre[1]) ** 2 + (bz - centre[2]) ** 2) - np.float32(radius)
                inside = canvas.inside(d) * scene.alpha[box]
                wall = np.clip(1 - np.abs(d) / canvas.width, 0, 1) * scene.alpha[box]
                canvas.paint(box, inside, -980.0, ORGAN["emphysema"])
                canvas.paint(box, wall * np.float32(min(1.0, 0.9 / canvas.width)), -200.0)


class Atelectasis(Disease):
    """Airless lung: plates at the base, a collapsed lower lobe, or lung compressed by pleural fluid."""

    name, label, layer = "atelectasis", "Atelectasis", 2
    sides = {"right": 0.38, "left": 0.37, "bilateral": 0.25}
    lobes = {"lower": 1.0}
    kinds = {"linear": 0.6, "lobar": 0.4, "compressive": 0.0}

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        filled = super().fill(f, rng, others)
        fluid = [o for o in others if o.name == "pleural effusion" and o.size != "trace"]
        if f.kind in (None, "compressive") and fluid and f.side in (None, fluid[0].side):
            return replace(filled, kind="compressive", side=fluid[0].side)
        if f.kind == "compressive":
            raise ValueError(f"kind of {self.name}: wanted pleural effusion on that side too, got {f.kind!r} alone")
        return filled

    def prepare(self, anatomy: Anatomy, f: Finding, rng: np.random.Generator) -> None:
        for side in SIDES[f.side or "right"]:
            rise = {"lobar": 20.0, "linear": 8.0}.get(f.kind or "linear", 0.0)
            anatomy.volume_loss[side] = anatomy.volume_loss.get(side, 0.0) + rise

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        value = 50.0 + 1.4 * ENHANCED[a.phase]
        grain = canvas.texture(rng, 16.0)
        for side in SIDES[f.side or "right"]:
            room = scene.room() * (canvas.x * side > 0)
            if f.kind == "linear":
                self._plates(scene, side, grain, rng)
                continue
            if f.kind == "compressive" and side in scene.fluid:
                d = scene.fluid[side](canvas.x, canvas.y, canvas.z, scene.lungs)
                inner = np.exp(-((np.abs(canvas.x) - 45) ** 2) / 2500 - (canvas.z + 45) ** 2 / 8000)
                shape = d - 26 * inner - 3 - 3 * grain
                room = room * (d > -0.5 * canvas.width)  # up to the fluid, whose surface is shared with it
            else:
                lobe = a.lobe(canvas.x, canvas.y, canvas.z)["lower"]
                # The collapsed lobe is a wedge beside the spine, below the hilum.
                wedge = np.abs(canvas.x) - np.float32(50) + np.float32(0.4) * (canvas.z + 20)
                shape = np.maximum(lobe + 16, wedge * np.float32(0.92)) + 2 * grain
                room = room * (canvas.mask != ORGAN["pleural effusion"])
            alpha = np.clip(canvas.inside(shape, canvas.width + 3), 0, 1) * room
            haze = np.clip(1 - shape / 14, 0, 1) * room
            canvas.paint(ALL, (haze * np.float32(0.18)).astype(np.float32), -300.0)
            canvas.paint(ALL, alpha.astype(np.float32), value, ORGAN["atelectasis"])

    def _plates(self, scene: Scene, side: int, grain: np.ndarray, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        for _ in range(int(rng.integers(2, 5))):
            x0 = float(side * rng.uniform(55, 95))
            y0 = float(rng.uniform(-60, 10))
            z0 = float(a.diaphragm(f32([x0]), f32([y0]))[0]) + float(rng.uniform(10, 32))
            tilt_x, tilt_y = float(rng.uniform(-0.35, 0.35)), float(rng.uniform(-0.5, 0.3))
            wide, thick = float(rng.uniform(24, 42)), float(rng.uniform(4.0, 6.5))
            reach = f32([wide + 6, wide + 6, wide * 0.7 + 8])
            centre = f32([x0, y0, z0])
            box = canvas.box(tuple(centre - reach), tuple(centre + reach))
            x, y, z = canvas.at(box)
            u, v = x - centre[0], y - centre[1]
            off = np.abs(z - centre[2] - tilt_x * u - tilt_y * v + 2 * grain[box]) * np.float32(0.9)
            edge = np.clip((np.float32(wide) - np.sqrt(u * u + v * v)) / 14 + 0.5 * grain[box], 0, 1)
            # A plate thinner than a voxel shows by its share of it.
            width = max(canvas.width, canvas.spacing[2] * 0.8)
            alpha = np.clip((thick / 2 - off) / width + 0.5, 0, 1) * min(1.0, thick / width + 0.35)
            alpha = alpha * edge * scene.alpha[box] * (x * side > 0)
            canvas.paint(box, alpha.astype(np.float32), 10.0, ORGAN["atelectasis"], least=0.3)


def _clear_of(scene: Scene, points: np.ndarray, radius: float) -> np.ndarray:
    """Which points keep `radius` mm away from the heart and stand free in the lung away from other opacities."""
    canvas = scene.canvas
    voxel = (canvas.frame.to_scanner(points) - canvas.origin) / f32(canvas.spacing)
    index = tuple(np.clip(np.rint(voxel).astype(int), 0, np.array(canvas.size) - 1).T)
    opaque = [ORGAN["consolidation"], ORGAN["atelectasis"], ORGAN["pleural effusion"], ORGAN["lung nodule"]]
    return ~np.isin(canvas.mask[index], opaque)
