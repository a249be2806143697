"""Pleural effusion."""

from __future__ import annotations

from functools import partial

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.canvas import ALL, Array
from t2ct.data.phantoms.findings.base import POINTS, SIDES, Disease, Finding, Scene
from t2ct.data.phantoms.organs import ORGAN


def _surface(
    x: Array, y: Array, z: Array, lung: Array, slope: np.float32, climb: np.float32, level: np.float32 | float = 0.0
) -> Array:
    """Distance (mm) above fluid that lies behind and below, and climbs every wall over about 13 mm."""
    return (y + slope * z - climb * np.exp(np.minimum(lung, 0) / 13)) * np.float32(0.93) - np.float32(level)


class PleuralEffusion(Disease):
    """Fluid that layers behind the lung, deepest at its base, and climbs the chest wall as a meniscus."""

    name, label, layer = "pleural effusion", "Pleural effusion", 1
    sides = {"right": 0.37, "left": 0.33, "bilateral": 0.3}
    sizes = {"trace": 0.06, "small": 0.27, "moderate": 0.33, "large": 0.34}
    millilitres = {"trace": (70, 130), "small": (230, 420), "moderate": (600, 950), "large": (1250, 1900)}

    def prepare(self, anatomy: Anatomy, f: Finding, rng: np.random.Generator) -> None:
        if f.size == "large" and f.side != "bilateral":  # pushes the diaphragm down
            for side in SIDES[f.side or "right"]:
                anatomy.volume_loss[side] = anatomy.volume_loss.get(side, 0.0) - 8.0

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas = scene.anatomy, scene.canvas
        low, high = self.millilitres[f.size or "small"]
        for side in SIDES[f.side or "right"]:
            slope, climb = np.float32(rng.uniform(0.22, 0.42)), np.float32(rng.uniform(16, 26))
            share = rng.uniform(0, 1)

            points = scene.points[side]
            x, y, z = points.T
            depth = _surface(x, y, z, a.lungs(x, y, z), slope, climb)
            # Millilitres as a share of this pleural space: at most three quarters, so that some lung stays open.
            space = len(depth) / POINTS * a.LUNG_BOX_VOLUME * float(np.prod(canvas.scale)) / 1000
            part = min((low + share * (high - low)) * min(1.0, space / 2600), 0.75 * space) / space
            level = np.float32(np.quantile(depth, part))

            scene.fluid[side] = partial(_surface, slope=slope, climb=climb, level=level)
            field = scene.fluid[side](canvas.x, canvas.y, canvas.z, scene.lungs)
            alpha = canvas.inside(field) * scene.room() * (canvas.x * side > 0)
            # The lung next to much fluid is less aerated.
            if f.size in ("moderate", "large"):
                squeezed = np.exp(-np.maximum(field, 0) / 30) * scene.alpha * (canvas.x * side > 0)
                canvas.hu += squeezed * np.float32(70)
            fluid = alpha > 0.5  # where fluid is, no lung is left for other findings
            canvas.bits[fluid] = 0
            canvas.parts[fluid] = 0
            canvas.paint(ALL, alpha, float(rng.uniform(4, 16)), ORGAN["pleural effusion"])
