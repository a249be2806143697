"""Lung opacity: ground glass."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.findings.base import SIDES, Disease, Finding, Scene, dry_side
from t2ct.data.phantoms.organs import ORGAN


class LungOpacity(Disease):
    """Ground glass: hazy lung through which vessels and bronchi still show, in patches with soft edges."""

    name, label, layer = "lung opacity", "Lung opacity", 0
    sides = {"right": 0.27, "left": 0.23, "bilateral": 0.5}
    lobes = {"upper": 0.35, "middle": 0.1, "lower": 0.55}
    sizes = {"focal": 0.25, "patchy": 0.4, "extensive": 0.35}
    patches = {"focal": (1, 1), "patchy": (3, 4), "extensive": (6, 9)}
    radius = {"focal": (16, 24), "patchy": (15, 24), "extensive": (22, 34)}

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        return dry_side(f, super().fill(f, rng, others), others)

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        a, canvas, size = scene.anatomy, scene.canvas, f.size or "patchy"
        grain, fine = canvas.texture(rng, 14.0), canvas.texture(rng, 5.0)
        for side in SIDES[f.side or "right"]:
            points = scene.lobe_points(f, side, 6.0)
            rim = points[a.lungs(*points.T) > -22]  # mostly under the pleura
            lobe = canvas.inside(a.lobe(canvas.x, canvas.y, canvas.z)[f.lobe or "lower"] - 3)
            for _ in range(int(rng.integers(*self.patches[size], endpoint=True))):
                pool = rim if len(rim) and size == "patchy" else points
                centre, radius = pool[rng.integers(len(pool))], float(rng.uniform(*self.radius[size]))
                reach = radius * 1.7
                box = canvas.box(tuple(centre - reach), tuple(centre + reach))
                x, y, z = canvas.at(box)
                squash = rng.uniform(0.75, 1.3, 3)
                d = np.sqrt(sum(((v - c) * np.float32(s)) ** 2 for v, c, s in
                                zip((x, y, z), centre, squash, strict=True))) / np.float32(radius)  # fmt: skip
                cover = np.clip((np.float32(1) - d + np.float32(0.22) * grain[box]) * np.float32(2.6), 0, 1)
                cover *= lobe[box] * scene.alpha[box] * (x * side > 0)
                haze = cover * (1 + np.float32(0.12) * fine[box])
                # Haze in the air of the lung: what is dense already stays as it is.
                level = np.float32(rng.uniform(-590, -500))
                canvas.hu[box] += haze * np.maximum(level - canvas.hu[box], 0) * np.float32(0.92)
                canvas.label(box, cover > 0.4, ORGAN[self.name])
