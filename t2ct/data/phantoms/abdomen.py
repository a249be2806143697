"""What lies under the diaphragm: liver, spleen, stomach, kidneys, bowel."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy, ellipsoid, smooth_max, smooth_min
from t2ct.data.phantoms.canvas import Array, Box, Canvas, f32, path, tube
from t2ct.data.phantoms.organs import ORGAN, PART


def paint_abdomen(canvas: Canvas, a: Anatomy, cage: Array, rng: np.random.Generator) -> None:
    """Diaphragm, liver, gallbladder, spleen, stomach with its gas, kidneys, adrenals, bowel, and the fat between."""
    box = canvas.box((-150, -150, -220), (150, 150, max(a.dome) + 25))
    bowel, flesh = canvas.grain(rng, 24.0), canvas.grain(rng, 14.0)
    for part in canvas.slabs(box):
        _paint_part(canvas, a, cage, part, bowel(part), flesh(part))
    soft = SOFT[a.phase]
    if soft:
        for y0, x1 in ((-12.0, 62.0), (-4.0, 34.0), (4.0, 5.0)):  # hepatic veins
            line = f32([[20, -22, a.dome[0] - 18, 5], [(20 + x1) / 2, y0, a.dome[0] - 30, 4],
                        [x1 + 22, y0 + 22, a.dome[0] - 50, 3]])  # fmt: skip
            vein_box, alpha = canvas.splat(*tube([path(line, canvas.step)], canvas.step))
            canvas.paint(vein_box, alpha, 60 + 1.6 * soft)
    adrenals = []
    for side in (1, -1):  # an inverted V beside the spine
        y, z = float(a.spine_y(f32(-128.0))) + 18, -122.0 + 4 * side
        tip = [side * 26, y + 6, z]
        adrenals += [[tip + [3.0], [side * 29, y - 8, z - 5, 2.6], [side * 32, y - 20, z - 12, 2.0]],
                     [tip + [3.0], [side * 34, y - 4, z - 8, 2.4], [side * 40, y - 14, z - 14, 2.0]]]  # fmt: skip
    vein_box, alpha = canvas.splat(*tube([path(f32(line), canvas.step) for line in adrenals], canvas.step))
    canvas.paint(vein_box, alpha, 28.0 + 0.6 * soft, ORGAN["adrenal glands"])


SOFT = {"none": 0.0, "arterial": 25.0, "venous": 55.0}  # HU that contrast medium adds to soft organs


def _paint_part(canvas: Canvas, a: Anatomy, cage: Array, box: Box, bowel: Array, grain: Array) -> None:
    x, y, z = canvas.at(box)
    soft = SOFT[a.phase]
    below = z - a.diaphragm(x, y)
    abdomen = smooth_max(cage[box] + np.float32(2), below * np.float32(0.75), 6)
    canvas.paint(box, canvas.inside(abdomen), 45.0, ORGAN["diaphragm"])
    inner = abdomen + np.float32(3.5)
    inside = canvas.inside(inner)
    canvas.paint(box, inside, -102.0 + np.maximum(5 * grain, -5), ORGAN["fat"])
    low = np.clip((a.dome[1] - 60 - z) / 12, 0, 1)
    gut = np.clip(bowel * 1.6 - 0.2, 0, 1) * low * inside * (y > -30)
    canvas.paint(box, gut, 35.0 + soft * 0.4, ORGAN["bowel"])
    gas = np.clip(bowel * 2.4 - 3.4, 0, 1) * low * inside * (y > 5)
    canvas.paint(box, gas, -900.0)
    # Spleen: behind and to the left. Stomach: under the left dome, gas on top, which is in front.
    left = a.dome[1] + a.volume_loss.get(-1, 0.0)
    spleen = smooth_max(ellipsoid(x + 92, y + 44, z - np.float32(left - 52), (33.0, 44.0, 47.0)), inner, 5)
    canvas.paint(box, canvas.inside(spleen), 48.0 + 1.3 * soft + 2 * grain, ORGAN["spleen"])
    stomach = smooth_max(ellipsoid(x + 60, y - 16, z - np.float32(left - 44), (46.0, 47.0, 42.0)), inner, 5)
    canvas.paint(box, canvas.inside(stomach), 46.0 + soft, ORGAN["stomach"])
    level = np.float32(16 + 44 * (0.5 - a.stomach_gas))
    content = canvas.inside(stomach + np.float32(5))
    gas = np.clip((y - level) / canvas.width + np.float32(0.5), 0, 1)
    canvas.paint(box, content, 22.0 + 5 * bowel - 1010 * gas, ORGAN["stomach"])
    canvas.label(box, content * gas > 0.5, ORGAN["stomach"], PART["stomach gas"])
    # Liver: fills the right side, its left lobe crosses the midline in front.
    edge = np.float32(20) - np.float32(0.62) * (y + 20) - x
    before_spine = np.float32(4) - (y - a.spine_y(z)) - 0.6 * np.abs(x)
    liver = smooth_max(np.maximum(inner, before_spine), edge * np.float32(0.8), 14)
    lower = np.clip((-z - np.float32(125)) / 60, 0, 1) * 60  # the lower edge slopes off the front of the field
    liver = smooth_max(liver, lower - (x + 30) * np.float32(0.35) - 20, 8)
    canvas.paint(box, canvas.inside(liver), 57 + soft + 4 * grain, ORGAN["liver"])
    bladder = ellipsoid(x - 52, y - 44, z - np.float32(a.dome[0] - 78), (15.0, 22.0, 26.0))
    canvas.paint(box, canvas.inside(bladder) * inside, 8.0, ORGAN["gallbladder"])
    for side, name in ((1, "right kidney"), (-1, "left kidney")):
        cz = np.float32(-158 + 8 * (side < 0))
        v = y - (a.spine_y(z) + 2)
        kidney = ellipsoid(x - side * 56, v, z - cz, (25.0, 26.0, 48.0))
        fat = smooth_min(kidney, ellipsoid(x - side * 48, v - 6, z - cz, (28.0, 28.0, 44.0)), 6)
        canvas.paint(box, canvas.inside(np.maximum(fat - 8, inner)), -104.0, ORGAN["fat"])
        shell = canvas.inside(np.maximum(kidney, inner + 3))
        canvas.paint(box, shell, 33.0 + 2.6 * soft, ORGAN[name])
        sinus = ellipsoid(x - side * 40, v - 4, z - cz, (13.0, 9.0, 26.0))
        canvas.paint(box, canvas.inside(sinus) * shell, -85.0, ORGAN["fat"])
