"""Interstitium and small airways: interlobular septal thickening, mosaic attenuation, fibrotic sequelae."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.bones import ellipsoid_points
from t2ct.data.phantoms.canvas import ALL, f32, path, tube
from t2ct.data.phantoms.chest import HILUM
from t2ct.data.phantoms.findings.base import SIDES, Disease, Finding, Scene, dry_side
from t2ct.data.phantoms.findings.lobules import lobules
from t2ct.data.phantoms.organs import ORGAN


class InterlobularSeptalThickening(Disease):
    """The septa between lobules as lines: short ones that meet the pleura (Kerley B), polygons, thick fissures."""

    name, label, layer = "interlobular septal thickening", "Interlobular septal thickening", 0
    sides = {"right": 0.1, "left": 0.1, "bilateral": 0.8}
    sizes = {"mild": 0.25, "moderate": 0.4, "severe": 0.35}
    thick = {"mild": (0.8, 1.0), "moderate": (1.1, 1.4), "severe": (1.5, 2.0)}
    depth = {"mild": 22.0, "moderate": 34.0, "severe": 55.0}  # mm from the pleura

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        canvas, size = scene.canvas, f.size or "moderate"
        thick = float(rng.uniform(*self.thick[size]))
        cells = lobules(scene, float(rng.uniform(15, 19)), rng)
        width = max(canvas.width * 0.8, thick)
        line = np.clip((np.float32(thick / 2) - cells.septum()) / np.float32(width) + np.float32(0.5), 0, 1)
        lobes = scene.anatomy.lobe(canvas.x, canvas.y, canvas.z)
        fissure = np.abs(lobes["lower"])
        fissure = np.minimum(fissure, np.where(canvas.x > 0, np.abs(lobes["middle"]), np.float32(99)))
        np.maximum(line, np.clip(np.float32(0.5 + 0.7 * thick / width) - fissure / np.float32(width), 0, 1), out=line)
        line *= np.float32(min(1.0, thick / width + 0.15))
        outer = np.clip(np.float32(1.3) + scene.lungs / np.float32(self.depth[size]), 0, 1)
        low = np.clip((np.float32(45) - canvas.z) / 90, 0.35, 1)  # heavier at the base
        some = np.clip(0.85 + 0.45 * canvas.texture(rng, 40.0), 0, 1)
        line *= outer * low * some
        line *= scene.alpha
        if f.side != "bilateral":
            line *= canvas.x * SIDES[f.side or "right"][0] > 0
        canvas.hu += np.float32(45) * (line > 0) * outer * low * scene.alpha  # oedema makes the lung between hazier
        canvas.paint(ALL, line, -60.0, ORGAN[self.name], least=0.25)


class MosaicAttenuation(Disease):
    """A patchwork of darker and lighter lobules with sharp borders; vessels are thinner in the dark ones."""

    name, label, layer = "mosaic attenuation pattern", "Mosaic attenuation pattern", -1
    sizes = {"mild": 0.3, "moderate": 0.4, "severe": 0.3}
    share = {"mild": 0.65, "moderate": 0.25, "severe": -0.1}  # lobules whose value is above are dark
    contrast = {"mild": 75.0, "moderate": 100.0, "severe": 125.0}  # HU between dark and light

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        canvas, size = scene.canvas, f.size or "moderate"
        cells = lobules(scene, float(rng.uniform(15, 19)), rng, patch=58.0)
        dark = cells.value > self.share[size]
        deep = np.minimum(np.maximum(scene.anatomy.lung_hu - 45, -925), -880)
        room = scene.alpha * dark
        # What shines out of the dark lobules, vessels above all, is dimmed; the rest becomes lighter.
        excess = np.maximum(canvas.hu - np.float32(scene.anatomy.lung_hu), 0)
        canvas.hu -= room * excess * np.float32(0.45)
        canvas.paint(ALL, room * np.float32(0.75), float(deep))
        canvas.label(ALL, room > 0.5, ORGAN[self.name])
        light = scene.alpha * ~dark
        canvas.hu += light * np.float32(self.contrast[size] - 45)


class PulmonaryFibroticSequela(Disease):
    """Scars: irregular bands from the pleura towards the hilum, a cap on the apex, retraction, old granulomas."""

    name, label, layer = "pulmonary fibrotic sequela", "Pulmonary fibrotic sequela", 2
    sides = {"right": 0.3, "left": 0.25, "bilateral": 0.45}
    lobes = {"upper": 0.72, "middle": 0.1, "lower": 0.18}
    sizes = {"mild": 0.3, "moderate": 0.4, "severe": 0.3}
    bands = {"mild": (3, 4), "moderate": (5, 7), "severe": (9, 12)}

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        return dry_side(f, super().fill(f, rng, others), others)

    def prepare(self, anatomy: Anatomy, f: Finding, rng: np.random.Generator) -> None:
        pull = {"mild": 3.0, "moderate": 8.0, "severe": 15.0}[f.size or "moderate"]
        for side in SIDES[f.side or "right"]:
            anatomy.retraction[side] = anatomy.retraction.get(side, 0.0) + (pull if f.lobe == "upper" else -pull / 2)

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas, size = scene.anatomy, scene.canvas, f.size or "moderate"
        dry = canvas.mask != ORGAN["pleural effusion"]
        grain = canvas.texture(rng, 9.0)
        for side in SIDES[f.side or "right"]:
            half = (canvas.x * side > 0) & dry
            points = scene.lobe_points(f, side)
            rim = points[a.lungs(*points.T) > -9]
            if f.lobe == "upper":
                rim = rim[rim[:, 2] > a.apex - 48] if (rim[:, 2] > a.apex - 48).sum() > 8 else rim
                cap = np.float32({"mild": 3.0, "moderate": 6.0, "severe": 10.0}[size])
                depth = scene.lungs + cap * (1 + np.float32(0.6) * grain)
                top = np.clip((canvas.z - np.float32(a.apex - 34)) / 14, 0, 1)
                canvas.paint(ALL, canvas.inside(-depth) * top * scene.alpha * half, 20.0, ORGAN[self.name])
            rim = rim if len(rim) >= 4 else points
            count = int(rng.integers(*self.bands[size], endpoint=True))
            centre = rim[rng.integers(len(rim))]
            close = rim[np.argsort(((rim - centre) ** 2).sum(1))[: max(8, len(rim) // 2)]]
            focus = close.mean(0) + 0.35 * (np.array(HILUM[side]) - close.mean(0))
            lines, lumens = [], []
            for k in range(count):
                start = close[rng.integers(len(close))]
                end = focus + rng.normal(0, 9, 3) if k % 2 else start + 0.75 * (np.array(HILUM[side]) - start)
                t = np.linspace(0, 1, 6)[:, None]
                knots = start + (end - start) * t + rng.normal(0, 2.6, (6, 3)) * np.sin(np.pi * t)
                wide = np.interp(t[:, 0], [0, 0.25, 1], rng.uniform([3.2, 2.0, 0.9], [5.0, 3.2, 1.8]))
                line = path(f32(np.concatenate([knots, wide[:, None]], 1)), canvas.step)
                lines.append(line)
                if k % 3 == 0 and size != "mild":  # a bronchus pulled open beside it
                    lumens.append(line[len(line) // 4 :] * f32([1, 1, 1, 0]) + f32([2.5, 2.5, 0, 2.0]))
            box, alpha = canvas.splat(*tube(lines, canvas.step))
            haze_box = ALL
            near = np.sqrt((canvas.x - focus[0]) ** 2 + (canvas.y - focus[1]) ** 2 + (canvas.z - focus[2]) ** 2)
            haze = np.clip(1.2 - near / 38, 0, 1) * scene.alpha * half
            canvas.hu[haze_box] += haze * (np.float32(90) + 60 * grain) * np.float32(0.5 if size == "mild" else 1)
            canvas.paint(box, alpha * scene.alpha[box] * half[box], 25.0, ORGAN[self.name], least=0.3)
            if lumens:
                box, alpha = canvas.splat(*tube(lumens, canvas.step))
                canvas.paint(box, alpha * scene.alpha[box] * half[box], -960.0)
            for _ in range(int(rng.integers(0, 3)) + (size == "severe")):  # calcified granulomas
                spot = focus + rng.normal(0, 8, 3)
                if a.lungs(*f32(spot)[:, None])[0] < -3:
                    ball, weights = ellipsoid_points(tuple(spot), float(rng.uniform(1.8, 3.0)), canvas.step)
                    box, alpha = canvas.splat(ball, weights)
                    canvas.paint(box, alpha * half[box], 850.0, ORGAN[self.name], least=0.3)
