"""Heart and aorta: cardiomegaly, pericardial effusion, arterial wall calcification."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.canvas import path
from t2ct.data.phantoms.chest import aorta_path
from t2ct.data.phantoms.findings.base import Disease, Finding, Scene
from t2ct.data.phantoms.organs import FINDING_BITS, ORGAN


class Cardiomegaly(Disease):
    """A heart wider than 0.55 of the inner chest."""

    name, label, layer = "cardiomegaly", "Cardiomegaly", -2
    sizes = {"mild": 0.3, "moderate": 0.4, "severe": 0.3}
    ratio = {"mild": (0.56, 0.59), "moderate": (0.59, 0.64), "severe": (0.64, 0.69)}

    def prepare(self, anatomy: Anatomy, f: Finding, rng: np.random.Generator) -> None:
        anatomy.heart_ratio = float(rng.uniform(*self.ratio[f.size or "moderate"]))

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        heart = scene.canvas.mask == ORGAN["heart"]
        scene.canvas.bits |= heart.astype(np.uint32) << np.uint32(FINDING_BITS[self.name])


class PericardialEffusion(Disease):
    """Fluid in the pericardial sac: a band around the heart, thicker behind and below. Drawn with the heart."""

    name, label, layer = "pericardial effusion", "Pericardial effusion", -2
    sizes = {"small": 0.3, "moderate": 0.4, "large": 0.3}
    thickness = {"small": (5, 7), "moderate": (10, 13), "large": (17, 22)}

    def prepare(self, anatomy: Anatomy, f: Finding, rng: np.random.Generator) -> None:
        anatomy.pericardial_fluid = float(rng.uniform(*self.thickness[f.size or "moderate"]))

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        # The sac was painted whole, then the heart into it: what is left of it is the fluid.
        bit = np.uint32(1 << FINDING_BITS[self.name])
        scene.canvas.bits &= ~bit
        scene.canvas.bits |= np.where(scene.canvas.mask == ORGAN[self.name], bit, np.uint32(0))


class ArterialWallCalcification(Disease):
    """Bright plaques in the wall of the aorta."""

    name, label, layer = "arterial wall calcification", "Arterial wall calcification", 0
    sizes = {"mild": 0.3, "moderate": 0.4, "severe": 0.3}
    plaques = {"mild": (4, 6), "moderate": (8, 13), "severe": (17, 26)}

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        line = path(aorta_path(a), 2.0)
        line = line[line[:, 2] > -150]
        arch = int(np.argmax(line[:, 2]))
        count = int(rng.integers(*self.plaques[f.size or "moderate"], endpoint=True))
        for k in range(count):
            # Every aorta that calcifies has a plaque in its arch; the others lie anywhere along it.
            at = arch + int(rng.integers(-8, 9)) if k < 2 else int(rng.integers(4, len(line) - 12))
            long, arc, thick = rng.uniform(12, 20), rng.uniform(13, 21), rng.uniform(3.6, 4.8)
            angle, hu = rng.uniform(0, 2 * np.pi), rng.uniform(950, 1350)
            centre, radius = line[at, :3], line[at, 3]
            tangent = line[min(at + 2, len(line) - 1), :3] - line[max(at - 2, 0), :3]
            tangent /= np.linalg.norm(tangent)
            side = np.cross(tangent, [0.2, 0.95, 0.24])
            side /= np.linalg.norm(side)
            up = np.cross(side, tangent)
            u, v, w = (g.ravel() for g in np.meshgrid(np.linspace(-0.5, 0.5, 24), np.linspace(-0.5, 0.5, 28),
                                                      np.linspace(-0.5, 0.5, 5)))  # fmt: skip
            keep = u * u + v * v < 0.25
            u, v, w = u[keep], v[keep], w[keep]
            phi, r = angle + v * arc / radius, radius + 0.5 + w * thick
            points = centre + (u * long)[:, None] * tangent
            points = points + (r * np.cos(phi))[:, None] * side + (r * np.sin(phi))[:, None] * up
            weights = np.full(len(u), np.pi / 4 * long * arc * thick / len(u))
            box, alpha = canvas.splat(points.astype(np.float32), weights.astype(np.float32))
            canvas.paint(box, alpha, float(hu), ORGAN["arterial wall calcification"], least=0.2)
