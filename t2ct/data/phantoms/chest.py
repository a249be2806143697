"""Lungs with vessels, airways and fissures; heart; great vessels; oesophagus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy, aorta_x
from t2ct.data.phantoms.body import ALL
from t2ct.data.phantoms.canvas import Array, Canvas, f32, fill_tube, path, tube
from t2ct.data.phantoms.organs import ORGAN

TIPS = 256  # ends of the vessel tree of one lung; a power of two
HILUM = {1: (36.0, -22.0, 2.0), -1: (-40.0, -26.0, 4.0)}


def paint_lungs(canvas: Canvas, a: Anatomy, lungs: Array, rng: np.random.Generator) -> Array:
    """Aerated lung, denser towards the back, with its vessel tree and fissures; returns its opacity."""
    x, y, z = canvas.x, canvas.y, canvas.z
    alpha = canvas.inside(lungs)
    air = canvas.texture(rng, 26.0)
    air *= np.float32(9)
    air += np.float32(a.lung_hu) - np.float32(0.17) * y
    for side, name in ((1, "right lung"), (-1, "left lung")):
        np.copyto(canvas.mask, np.uint8(ORGAN[name]), where=(alpha > 0.5) & (x * side > 0))
    canvas.hu += alpha * (air - canvas.hu)
    within = alpha * alpha
    lobes = a.lobe(x, y, z)
    thin = np.float32(0.6 / canvas.width)  # a fissure is about a millimetre: it shows by its share of the voxel
    line = np.maximum(1 - np.abs(lobes["lower"]) / np.float32(canvas.width), 0)
    right = np.maximum(1 - np.abs(lobes["middle"]) / np.float32(canvas.width), 0) * (x > 0)
    canvas.paint(ALL, np.maximum(line, right) * thin * within, -300.0)
    for side in (1, -1):
        points, weights = _vessels(a, side, canvas.step, rng)
        box, tree = canvas.splat(points, weights)
        canvas.paint(box, tree * alpha[box], a.blood)
    return alpha


def _vessels(a: Anatomy, side: int, step: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Arteries and veins of one lung: a tree from the hilum to points all over the lung, radii by Murray's law."""
    inside = a.lung_points(side, 1500, rng)
    tips = inside[np.arange(TIPS) % len(inside)] + rng.normal(0, 2, (TIPS, 3)).astype(np.float32)
    node, groups = f32([HILUM[side]]), tips[None]  # one node per group of tips; each level halves the groups
    start, end, radius = [], [], []
    while True:
        members = groups.shape[1]
        centre = groups.mean(1)
        away = groups - centre[:, None]
        if members < TIPS:
            share = {1: 1.0}.get(members, 0.32 if members > 16 else 0.45)
            start.append(node)
            node = node + np.float32(share) * (centre - node)
            end.append(node)
            radius.append(np.full(len(node), min(5.5, 0.98 * members ** (1 / 2.8)), np.float32))
        if members == 1:
            break
        rows = np.arange(len(groups))
        axis = away[rows, np.argmax((away * away).sum(2), 1)]
        order = np.argsort((away * axis[:, None]).sum(2), 1)
        groups = np.take_along_axis(groups, order[:, :, None], 1).reshape(2 * len(groups), members // 2, 3)
        node = np.repeat(node, 2, axis=0)
    s, e, r = np.concatenate(start), np.concatenate(end), np.concatenate(radius)
    length = np.sqrt(((e - s) ** 2).sum(1))
    steps = np.maximum(2, np.ceil(length / step).astype(int))
    which = np.repeat(np.arange(len(s)), steps)
    share = (np.arange(len(which)) - np.repeat(np.cumsum(steps) - steps, steps) + 0.5) / steps[which]
    centre = s[which] + (e - s)[which] * share[:, None].astype(np.float32)
    tangent = ((e - s) / np.maximum(length, 1e-3)[:, None])[which]
    return fill_tube(centre, tangent, (length / steps).astype(np.float32)[which], r[which], step)


def aorta_path(a: Anatomy) -> Array:
    """Knots (x, y, z, radius) of the aorta from its root over the arch to the abdomen."""
    r = a.aorta_radius
    base = a.heart_centre[2] + 28
    down = np.array([48.0, 25, 0, -40, -80, -120, -160, -190])
    descending = np.stack([aorta_x(down), a.aorta_y(down.astype(np.float32)), down, np.linspace(0.95, 0.75, 8) * r], 1)
    rising = [[-2, 10, base, 1.05 * r], [13, 20, base + 18, 1.15 * r], [15, 19, 30, 1.15 * r], [10, 12, 50, 1.1 * r],
              [-2, -2, 61, 1.05 * r], [-15, -20, 64, r], [-25, -38, 59, 0.97 * r]]  # fmt: skip
    return np.concatenate([rising, descending]).astype(np.float32)


def paint_mediastinum(canvas: Canvas, a: Anatomy) -> None:
    """Heart, great vessels, oesophagus and airways, in the order in which they cover one another."""
    step = canvas.step
    wall = {"none": 46.0, "arterial": 75.0, "venous": 95.0}[a.phase]

    def tubes(paths: Sequence[object], value: float, label: str, grow: float = 0.0) -> None:
        points, weights = tube([path(f32(p) + f32([0, 0, 0, grow]), step) for p in paths], step)
        box, alpha = canvas.splat(points, weights * np.float32(1.1))
        canvas.paint(box, alpha, value, ORGAN[label])

    gullet = f32([[-3, 0, 165, 7], [-5, 0, 90, 7], [-4, 0, 30, 7.5], [-6, 0, -20, 7], [-10, 0, -60, 7],
                  [-22, -30, -100, 8]])  # fmt: skip
    gullet[:5, 1] = a.spine_y(gullet[:5, 2]) + 22  # runs down in front of the spine
    tubes([gullet], 42.0, "oesophagus")
    _paint_heart(canvas, a, wall)
    cx, cy, cz = a.heart_centre
    top = cz + 32
    tubes([[[24, -26, -200, 11], [24, -24, -110, 11], [24, -14, cz - 28, 11]],
           [[28, 2, cz + 8, 10], [27, 4, 12, 9], [28, 7, 45, 9], [30, 8, 74, 8]],
           [[30, 8, 72, 7], [40, 6, 92, 7], [48, 2, 120, 7], [50, -4, 165, 6]],
           [[29, 9, 70, 6], [5, 19, 76, 6], [-22, 16, 86, 6], [-42, 4, 108, 7], [-46, -6, 165, 6]]],
          a.blood if a.phase != "arterial" else a.blood * 1.05, "vena cava")  # fmt: skip
    trunk = [[-26, 44 + 0.1 * cy, top - 22, 13], [-25, 30, top - 6, 13], [-22, 10, 22, 12], [-30, -10, 24, 11],
             [-44, -24, 16, 9], [-54, -34, 0, 6]]  # fmt: skip
    branch = [[-22, 8, 22, 11], [-4, -5, 17, 10], [16, -9, 13, 9.5], [36, -17, 6, 8.5], [50, -28, -10, 6]]
    tubes([trunk, branch, [[34, -16, 8, 6], [48, -16, 24, 4.5]], [[-44, -22, 16, 6], [-54, -16, 30, 4.5]]],
          a.blood, "pulmonary vessels")  # fmt: skip
    lx, ly, lz = cx + 22, cy - 30, cz + 18  # left atrium
    veins = [[[s * w, y, lz + dz, 4.0], [s * 24 - 8, y + 4, lz + dz / 3, 5.5], [lx, ly, lz, 7]]
             for s, w, y, dz in ((1, 52, -14, 12), (1, 52, -32, -16), (-1, 58, -14, 12), (-1, 60, -36, -16))]
    tubes(veins, a.aorta_blood, "pulmonary vessels")
    neck = [[[9, 9, 55, 7], [17, 2, 80, 6.5], [26, -6, 112, 6], [30, -12, 165, 5]],
            [[-4, -2, 60, 5], [-12, -6, 90, 4.5], [-20, -12, 165, 4.5]],
            [[-16, -20, 62, 6], [-28, -26, 90, 5.5], [-38, -28, 118, 5.5], [-70, -28, 128, 5]]]  # fmt: skip
    tubes(neck, a.aorta_blood, "aorta")
    main = aorta_path(a)
    tubes([main], max(a.aorta_blood - 20, wall) if a.phase != "none" else 48.0, "aorta", 1.2)
    tubes([main], a.aorta_blood, "aorta")
    airways = [[[1, -16, 170, 8.5], [0, -17, 110, 8.5], [1, -22, 65, 8.5], [3, -27, 32, 9.0]],
               [[4, -27, 34, 8], [20, -30, 18, 7], [38, -33, 4, 6.2], [46, -37, -22, 5], [50, -46, -48, 3.6],
                [58, -58, -72, 2.2]],
               [[2, -27, 34, 8], [-18, -31, 16, 6.5], [-40, -36, 2, 5.8], [-54, -48, -22, 4.4], [-62, -60, -56, 2.4]],
               [[30, -32, 12, 4.8], [48, -30, 22, 3.8], [60, -28, 40, 2.4]],
               [[-40, -35, 3, 4.6], [-54, -22, 12, 3.6], [-66, -8, 22, 2.2]],
               [[46, -36, -18, 3.2], [58, -14, -30, 2.6], [68, 8, -38, 1.8]]]  # fmt: skip
    tubes(airways, -40.0, "muscle", 1.6)
    tubes(airways, -990.0, "airway")


def _paint_heart(canvas: Canvas, a: Anatomy, wall: float) -> None:
    """Muscle and chambers inside the pericardium, with a thin layer of fat under it."""
    reach = float(a.heart_radii.max()) + 3 + 1.8 * a.pericardial_fluid + 4
    c = a.heart_centre
    box = canvas.box(tuple(v - reach for v in c), tuple(v + reach for v in c))  # type: ignore[arg-type]
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
    canvas.paint(box, inside, wall, ORGAN["heart"])
    canvas.paint(box, inside * groove.astype(np.float32) * np.float32(0.8), -90.0)
    if a.phase == "none":
        return
    mean = float(r.mean())
    for (cu, cv, cw), (ru, rv, rw), value in (
        ((0.22, 0.36, 0.0), (0.56, 0.34, 0.46), a.aorta_blood),
        ((0.16, -0.44, -0.04), (0.62, 0.36, 0.58), a.blood),
        ((-0.56, -0.38, -0.05), (0.34, 0.46, 0.56), a.blood),
        ((-0.60, 0.34, 0.12), (0.32, 0.48, 0.50), a.aorta_blood),
    ):
        chamber = np.sqrt(((u - cu) / ru) ** 2 + ((v - cv) / rv) ** 2 + ((w - cw) / rw) ** 2) - 1
        canvas.paint(box, canvas.inside(chamber * np.float32(mean * 0.42)) * inside, value, ORGAN["heart"])
