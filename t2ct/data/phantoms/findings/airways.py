"""Bronchi: bronchiectasis, peribronchial thickening."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.bones import ellipsoid_points
from t2ct.data.phantoms.canvas import Array
from t2ct.data.phantoms.chest import AIR, BRONCHUS, paint_airways, paint_pipes
from t2ct.data.phantoms.findings.base import SIDES, Disease, Finding, Scene, dry_side
from t2ct.data.phantoms.organs import ORGAN
from t2ct.data.phantoms.trees import LUMEN, bronchi


class PeribronchialThickening(Disease):
    """Bronchi with thick walls, from the hilum half way to the pleura, in a haze of thickened interstitium."""

    name, label, layer = "peribronchial thickening", "Peribronchial thickening", 0
    sides = {"right": 0.1, "left": 0.1, "bilateral": 0.8}
    sizes = {"mild": 0.3, "moderate": 0.4, "severe": 0.3}
    thick = {"mild": (1.0, 1.4), "moderate": (1.7, 2.3), "severe": (2.6, 3.4)}

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        canvas = scene.canvas
        more = np.float32(rng.uniform(*self.thick[f.size or "moderate"]))

        def thicken(centre: Array, level: Array) -> Array:
            return more * np.clip(1.25 - level / 6, 0.3, 1).astype(np.float32)

        sides = SIDES[f.side or "bilateral"]
        parts = [bronchi(arteries, canvas.step, thicken=thicken, levels=6)
                 for (side, _), (arteries, _) in scene.trees.items() if side in sides]  # fmt: skip
        tubes = [part.tubes(canvas.step) for part in parts]
        before = canvas.hu.copy()
        paint_pipes(canvas, tubes, "segmental bronchi", scene.room())
        canvas.hu[...] = np.where(canvas.mask == ORGAN["pulmonary vessels"], np.maximum(before, canvas.hu), canvas.hu)
        paint_airways(canvas, 1.6 + float(more), only=sides)
        points, weights = (np.concatenate([t[0][k] for t in tubes]) for k in (0, 1))
        box, alpha = canvas.splat(points, weights)
        canvas.label(box, (alpha > 0.3) & (scene.alpha[box] > 0.5), ORGAN[self.name])


class Bronchiectasis(Disease):
    """Bronchi wider than their arteries that do not taper: rings beside a dot across, tram tracks along; cysts."""

    name, label, layer = "bronchiectasis", "Bronchiectasis", 2
    sides = {"right": 0.3, "left": 0.3, "bilateral": 0.4}
    lobes = {"upper": 0.25, "middle": 0.15, "lower": 0.6}
    sizes = {"mild": 0.25, "moderate": 0.4, "severe": 0.35}
    kinds = {"cylindrical": 0.55, "varicose": 0.2, "cystic": 0.25}
    wide = {"mild": 3.0, "moderate": 4.0, "severe": 5.2}  # mm, radius of the widened bronchi

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        return dry_side(f, super().fill(f, rng, others), others)

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        canvas, a = scene.canvas, scene.anatomy
        radius = self.wide[f.size or "moderate"] * float(rng.uniform(0.9, 1.1))
        wall = float(rng.uniform(1.3, 1.9))
        wall += 0.6 * any(o.name == "peribronchial thickening" for o in scene.present)
        for side in SIDES[f.side or "right"]:
            arteries, _ = scene.trees[side, f.lobe or "lower"]

            def widen(centre: Array, level: Array) -> Array:
                # Up to `radius` whatever the level: no taper. Some branches more than others.
                beads = 1 + 0.3 * np.sin(centre.sum(1) / 3) if f.kind == "varicose" else 1.0
                some = 0.85 + 0.3 * np.sin(centre[:, 0] / 17 + centre[:, 2] / 13)
                return np.where(level >= 1, radius * (1.05 - 0.05 * level) * beads * some, 0).astype(np.float32)

            part = arteries.take(arteries.level < (6 if f.size != "mild" else 5))
            tree = bronchi(part, canvas.step, widen=lambda c, k: widen(c, k) * (k > 0), levels=6)
            shrink = tree.artery * np.float32(LUMEN) * (tree.level > 0)  # the wide radius replaces the healthy one
            tree.lumen, tree.wall = tree.lumen - shrink, tree.wall * 0 + np.float32(wall)
            deep = a.lungs(*tree.centre.T) < -tree.lumen - wall - 1
            tree.lumen *= deep
            tree.wall *= deep
            tubes = tree.tubes(canvas.step)
            dry = canvas.mask != ORGAN["pleural effusion"]
            paint_pipes(canvas, [tubes], "segmental bronchi", scene.room() * dry)
            box, alpha = canvas.splat(*tubes[0])
            canvas.label(box, (alpha > 0.35) & (scene.alpha[box] > 0.5) & dry[box], ORGAN[self.name])
            if f.kind == "cystic":
                self._cysts(scene, tree.centre[(tree.level >= 4) & deep], f, rng)

    def _cysts(self, scene: Scene, places: Array, f: Finding, rng: np.random.Generator) -> None:
        canvas = scene.canvas
        count = {"mild": 6, "moderate": 12, "severe": 20}[f.size or "moderate"]
        if not len(places):
            return
        step = 0.5 * min(canvas.spacing)
        for k in range(count):
            centre = places[rng.integers(len(places))]
            size, wall = float(rng.uniform(5.5, 9.5)), 1.3
            shift = canvas.frame.to_scanner(centre[None])
            outer, inner = (ellipsoid_points((0.0, 0.0, 0.0), r, step) for r in (size + wall, size))
            box, alpha = canvas.splat(outer[0] + shift, outer[1], scanner=True)
            open_lung = scene.alpha[box] * (canvas.mask[box] != ORGAN["pleural effusion"])
            canvas.paint(box, alpha * open_lung, BRONCHUS)
            canvas.label(box, alpha * open_lung > 0.35, ORGAN[self.name])
            box, air = canvas.splat(inner[0] + shift, inner[1], scanner=True)
            canvas.hu[box] += air * scene.alpha[box] * np.float32(AIR - BRONCHUS)
            if k % 3 == 0:  # some hold fluid
                _, y, _ = canvas.at(box)
                low = np.clip((np.float32(centre[1] - 0.2 * size) - y) / canvas.width + np.float32(0.5), 0, 1)
                canvas.paint(box, air * low * scene.alpha[box], 15.0)

