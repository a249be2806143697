"""The body around the chest: couch, skin, fat, breasts, muscles of the wall."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy, curve, ellipse, ellipsoid, oval, smooth_min
from t2ct.data.phantoms.canvas import Array, Canvas, f32
from t2ct.data.phantoms.organs import ORGAN, PART

# Fat between the muscles of the shoulder and in the armpit: centre and half axes (mm) on the right.
POCKETS = (
    ((124.0, -8.0, 78.0), (17.0, 27.0, 42.0)), ((96.0, 14.0, 88.0), (30.0, 7.0, 26.0)),
    ((88.0, -66.0, 96.0), (34.0, 5.0, 30.0)), ((52.0, -18.0, 142.0), (26.0, 14.0, 22.0)),
    ((118.0, -52.0, 40.0), (9.0, 24.0, 34.0)), ((128.0, -40.0, 96.0), (10.0, 18.0, 22.0)),
    ((70.0, -96.0, 70.0), (26.0, 3.5, 40.0)), ((74.0, 0.0, 60.0), (34.0, 3.0, 30.0)),
)  # fmt: skip


def paint_wall(canvas: Canvas, a: Anatomy, cage: Array, rng: np.random.Generator) -> Array:
    """Skin, subcutaneous fat, muscles of the chest wall, fat in the cavity; returns what lies under the skin."""
    z = canvas.z
    half_width, half_depth, centre = a.cage_axes(z)
    girdle = curve(z, [-200, 20, 60, 95, 122, 142, 160, 200], [0, 90, 140, 158, 160, 140, 105, 70])
    wide = np.maximum(half_width + np.float32(12 * a.muscle), girdle * np.float32(0.9 + 0.1 * a.muscle))
    deep = half_depth + np.float32(12 + 6 * a.muscle)
    spine_y, front = a.spine_y(z), half_depth + centre
    strands, lobules = canvas.grain(rng, 6.5), canvas.grain(rng, 11.0)
    size = 0.75 + 0.5 * a.breast
    top = float(sum(a.cage_axes(f32(8))[1:]))
    breast_radii = (52 * size, (27 + 0.55 * a.fat) * size, 50 * size)
    under, flesh = np.empty(canvas.size, np.float32), np.empty(canvas.size, np.float32)
    for box in canvas.slabs():
        x, y, _ = canvas.at(box)
        side = np.abs(x)
        muscle = oval(x, y - (centre - 5), wide, deep)
        muscle = smooth_min(muscle, ellipse(side - np.float32(25), y - (spine_y - 36), 25.0, 19.0 * a.muscle), 12)
        chest = ellipsoid(side - np.float32(72), y - (front - np.float32(4)), z - 58, (58.0, 21.0 * a.muscle, 46.0))
        muscle = smooth_min(muscle, chest, 14)
        skin = muscle - np.float32(a.fat) * (1 + 0.35 * np.clip(y / 100, -1, 1) * np.clip((70 - z) / 60, 0, 1))
        if a.female:
            breast = ellipsoid(side - np.float32(72), y - np.float32(top + 8), z, breast_radii)
            skin = smooth_min(skin, breast, 18)
        canvas.paint(box, canvas.inside(skin), 10.0, ORGAN["skin"])
        fat = under[box] = canvas.inside(skin + np.float32(2.2))
        grain = strands(box)
        canvas.paint(box, fat, np.float32(-104) + np.maximum(grain * 7, -7), ORGAN["fat"])
        if a.female:
            gland = canvas.inside(breast + np.float32(11)) * fat
            gland *= np.clip(lobules(box) * 0.6 + np.float32(0.9 - a.age / 90), 0, 0.9)
            canvas.paint(box, gland, 30.0, ORGAN["breast"])
        alpha = flesh[box] = canvas.inside(muscle)
        # Muscle, marbled with a little fat, more of it with age.
        marbled = np.float32(56) - np.maximum(grain - np.float32(1.2 - a.age / 130), 0) * np.float32(45)
        canvas.paint(box, alpha, marbled, ORGAN["muscle"])
        # A plane of fat between the muscles of the ribs and those of the shoulder girdle and the back.
        plane = np.abs(cage[box] - np.float32(15) - grain) - np.float32(0.5 + 0.05 * a.fat)
        canvas.paint(box, canvas.inside(plane) * (muscle < -5) * np.float32(0.85), -95.0)
        for part, half in (("right pectoral muscle", x > 0), ("left pectoral muscle", x < 0)):
            canvas.label(box, (chest < -4) & (alpha > 0.5) & (cage[box] > 12) & half, ORGAN["muscle"], PART[part])
    for (cx, cy, cz), radii in POCKETS:
        for s in (1, -1):
            box = canvas.box((s * cx - 40, cy - 35, cz - 50), (s * cx + 40, cy + 35, cz + 50))
            x, y, zz = canvas.at(box)
            pocket = canvas.inside(ellipsoid(x - s * cx, y - cy, zz - cz, radii))
            canvas.paint(box, pocket * (cage[box] > 14) * flesh[box], -98.0, ORGAN["fat"])
    for box in canvas.slabs():
        canvas.paint(box, canvas.inside(cage[box] + np.float32(1)) * flesh[box], -100.0, ORGAN["fat"])
    return under


def paint_table(canvas: Canvas) -> None:
    """The couch: a thin curved shell with a foam core, straight in the scanner whatever the patient does."""
    gx, gy = canvas.axes[0][:, None], canvas.axes[1][None, :]
    top = np.float32(-152) + gx * gx * np.float32(1 / 1400)
    depth = top - gy
    edge = np.float32(canvas.spacing[1])

    def layer(low: float, high: float) -> Array:  # share of each voxel between two depths
        overlap = np.minimum(depth + edge / 2, high) - np.maximum(depth - edge / 2, low)
        return np.clip(overlap / edge, 0, 1) * (np.abs(gx) < 205)

    shell, core = layer(0, 2.5) + layer(13.5, 16), layer(2.5, 13.5)
    inside = shell + core
    hu = (-1000 + shell * 650 + core * 60).astype(np.float32)
    canvas.hu[...] = np.maximum(canvas.hu, hu[:, :, None])
    air = (inside > 0.5)[:, :, None] & (canvas.mask == 0)
    canvas.mask[air] = ORGAN["table"]
