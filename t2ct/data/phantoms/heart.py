"""The heart in its sac: muscle, four chambers, coronary arteries in their fat."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.canvas import Array, Box, Canvas, f32, path, tube
from t2ct.data.phantoms.organs import ORGAN, PART

# Centre and half axes of the chambers, as shares of the heart's half axes along `Anatomy.heart_axes`.
CHAMBERS = {
    "left ventricle": ((0.22, 0.36, 0.0), (0.56, 0.34, 0.46)),
    "right ventricle": ((0.16, -0.44, -0.04), (0.62, 0.36, 0.58)),
    "right atrium": ((-0.56, -0.38, -0.05), (0.34, 0.46, 0.56)),
    "left atrium": ((-0.60, 0.34, 0.12), (0.32, 0.48, 0.50)),
}
# Courses of the coronary arteries over the heart's surface, in the same axes (apex, left wall, up); radius in mm.
CORONARIES = {
    "left anterior descending": ((-0.42, 0.08, 0.95, 2.2), (-0.2, 0.1, 1.0, 2.1), (0.1, 0.03, 1.0, 1.9),
                                 (0.42, -0.02, 0.9, 1.7), (0.75, 0.0, 0.62, 1.4), (0.94, 0.0, 0.3, 1.1)),
    "circumflex": ((-0.24, 0.12, 0.98, 2.0), (-0.2, 0.5, 0.85, 1.8), (-0.2, 0.86, 0.45, 1.6),
                   (-0.2, 1.0, 0.0, 1.4), (-0.2, 0.86, -0.45, 1.1)),
    "right": ((-0.42, -0.2, 0.9, 2.1), (-0.22, -0.55, 0.8, 2.0), (-0.18, -0.9, 0.4, 1.9), (-0.18, -1.0, -0.1, 1.8),
              (-0.18, -0.75, -0.65, 1.6), (-0.12, -0.2, -1.0, 1.3)),
}  # fmt: skip


def coronary(a: Anatomy, name: str, step: float) -> Array:
    """(N, 4) points (mm) along a coronary artery, and its radius."""
    knots = f32(CORONARIES[name])
    local = knots[:, :3] / np.linalg.norm(knots[:, :3], axis=1, keepdims=True)
    local = local * (a.heart_radii + np.float32(0.9))
    points = f32(a.heart_centre) + local @ a.heart_axes
    return path(np.concatenate([points, knots[:, 3:]], 1), step)


def paint_heart(canvas: Canvas, a: Anatomy, wall: float) -> None:
    """Muscle and chambers inside the pericardium, and a thin layer of fat under it that holds the coronary arteries."""
    reach = float(a.heart_radii.max()) + 3 + 1.8 * a.pericardial_fluid + 4
    c = a.heart_centre
    box = canvas.box(tuple(v - reach for v in c), tuple(v + reach for v in c))  # type: ignore[arg-type]
    for part in canvas.slabs(box):
        _paint_chambers(canvas, a, wall, part)
    lines = [coronary(a, name, canvas.step) for name in CORONARIES]
    box, alpha = canvas.splat(*tube(lines, canvas.step))
    # With fluid around them these arteries still lie in their fat, on the muscle.
    canvas.paint(box, alpha, a.aorta_blood * 0.95, ORGAN["coronary arteries"])


def _paint_chambers(canvas: Canvas, a: Anatomy, wall: float, box: Box) -> None:
    x, y, z = canvas.at(box)
    u, v, w = a.heart_local(x, y, z)
    r = a.heart_radii
    u, v, w = u / r[0], v / r[1], w / r[2]
    k = np.sqrt(u * u + v * v + w * w)
    g = np.sqrt((u / r[0]) ** 2 + (v / r[1]) ** 2 + (w / r[2]) ** 2) + np.float32(1e-6)
    surface = k * (k - 1) / g
    sac = a.pericardium(surface, y, z)
    above = np.clip((a.diaphragm(x, y) - 6 - z) / canvas.width, 0, 1)  # the sac rests on the diaphragm
    keep = 1 - above
    if a.pericardial_fluid > 0:
        canvas.paint(box, canvas.inside(sac) * keep, 12.0, ORGAN["pericardial effusion"])
        canvas.paint(box, canvas.inside(surface - np.float32(2.2)) * keep, -70.0)
    else:
        canvas.paint(box, canvas.inside(sac) * keep, -95.0, ORGAN["fat"])
    groove = np.exp(-(((u + 0.16) / 0.07) ** 2)) * np.clip((k - 0.72) / 0.15, 0, 1)
    inside = canvas.inside(surface) * keep
    canvas.paint(box, inside, wall, ORGAN["heart"], part=PART["myocardium"])
    canvas.paint(box, inside * groove.astype(np.float32) * np.float32(0.8), -90.0)
    mean = np.float32(r.mean() * 0.42)
    for name, ((cu, cv, cw), (ru, rv, rw)) in CHAMBERS.items():
        value = a.aorta_blood if name.startswith("left") else a.blood
        chamber = np.sqrt(((u - cu) / ru) ** 2 + ((v - cv) / rv) ** 2 + ((w - cw) / rw) ** 2) - 1
        canvas.paint(box, canvas.inside(chamber * mean) * inside, value, ORGAN["heart"], part=PART[name])
