"""Lungs with vessels, airways and fissures; great vessels; oesophagus."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy, aorta_x, ellipsoid
from t2ct.data.phantoms.canvas import Array, Canvas, f32, path, tube
from t2ct.data.phantoms.heart import paint_heart
from t2ct.data.phantoms.organs import ORGAN, PART
from t2ct.data.phantoms.trees import ARTERY, BRONCHI, LOBES, TIPS, VEINS, Tree, bronchi, fill, grow

HILUM = {1: (36.0, -22.0, 2.0), -1: (-40.0, -26.0, 4.0)}
GRADIENT = 0.2  # HU per mm: the lung of a patient on the back is denser behind
AIR, BRONCHUS = -990.0, 25.0  # HU of the air in an airway and of its wall


def grow_trees(a: Anatomy, rng: np.random.Generator) -> dict[tuple[int, str], tuple[Tree, Tree]]:
    """(side, lobe) -> arteries, which bronchi follow, and veins; the same on every grid."""
    trees = {}
    for side in (1, -1):
        points = a.lung_points(side, 9000, rng)
        lobes = a.lobe(*points.T)
        for lobe in (name for s, name in LOBES if s == side):
            inside = points[lobes[lobe] < -1]
            inside = inside if len(inside) >= 16 else points
            size = (len(inside) / len(points) * (5 if side == 1 else 4) / 2) ** (1 / 3)  # small lobes, small vessels
            arteries = grow(inside, BRONCHI[side, lobe], TIPS if lobe != "middle" else TIPS // 2, ARTERY * size, rng)
            veins = grow(inside[::-1], VEINS[side, lobe], TIPS // 2, 0.95 * ARTERY * size, rng)
            trees[side, lobe] = arteries, veins
    return trees


def paint_lungs(
    canvas: Canvas, a: Anatomy, lungs: Array, trees: dict[tuple[int, str], tuple[Tree, Tree]], rng: np.random.Generator
) -> Array:
    """Aerated lung, denser towards the back, with its vessels, bronchi and fissures; returns its opacity."""
    alpha = np.empty(canvas.size, np.float32)
    coarse, fine = canvas.grain(rng, 26.0), canvas.grain(rng, 5.5)
    # A fissure is about a millimetre: it shows by its share of the voxel.
    width, thin = np.float32(canvas.width), np.float32(0.6 / canvas.width)
    for box in canvas.slabs():
        x, y, z = canvas.at(box)
        share = alpha[box] = canvas.inside(lungs[box])
        if not share.any():
            continue
        air = coarse(box)
        air *= np.float32(9)
        air += fine(box) * np.float32(11)
        air += np.float32(a.lung_hu) - np.float32(GRADIENT) * y
        lobes = a.lobe(x, y, z)
        solid = share > 0.5
        for side, name in ((1, "right"), (-1, "left")):
            half = solid & (x * side > 0)
            canvas.label(box, half, ORGAN[f"{name} lung"])
            for s, lobe in LOBES:
                if s == side:
                    part = PART[f"{name} {lobe} lobe"]
                    np.copyto(canvas.parts[box], np.uint8(part), where=half & (lobes[lobe] <= 0))
        line = np.maximum(1 - np.abs(lobes["lower"]) / width, 0)
        right = np.maximum(1 - np.abs(lobes["middle"]) / width, 0) * (x > 0)
        air += np.maximum(line, right) * thin * share * (np.float32(-300) - air)
        canvas.paint(box, share, air)
    # What is far thinner than a voxel is in the parenchyma's own density already.
    least = 0.16 * canvas.width
    vessels = [fill(tree, canvas.step, least) for pair in trees.values() for tree in pair]
    points, weights = (np.concatenate([part[k] for part in vessels]) for k in (0, 1))
    box, share = canvas.splat(points, weights)
    canvas.paint(box, share * alpha[box], a.blood)
    canvas.label(box, share * alpha[box] > np.float32(0.6), ORGAN["pulmonary vessels"], PART["lung vessels"])
    tubes = [bronchi(arteries, canvas.step).tubes(canvas.step) for arteries, _ in trees.values()]
    paint_pipes(canvas, tubes, "segmental bronchi", alpha)
    return alpha


def paint_pipes(canvas: Canvas, tubes: Sequence[tuple[tuple[Array, Array], tuple[Array, Array]]], part: str,
                within: Array | None = None, wall: float = BRONCHUS) -> None:  # fmt: skip
    """Bronchi, each with (points, weights) of the whole and of its air: exact shares of wall and air in a voxel."""
    points, weights = (np.concatenate([outer[i] for outer, _ in tubes]) for i in (0, 1))
    box, alpha = canvas.splat(points, weights)
    if within is not None:
        alpha = alpha * within[box]
    canvas.paint(box, alpha, wall)
    points, weights = (np.concatenate([inner[i] for _, inner in tubes]) for i in (0, 1))
    box, air = canvas.splat(points, weights)
    if within is not None:
        air = air * within[box]
    canvas.hu[box] += air * np.float32(AIR - wall)
    canvas.label(box, air > np.float32(0.5), ORGAN["airway"], PART[part])


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

    def tubes(paths: Sequence[object], value: float, label: str, grow: float = 0.0, part: str = "none") -> None:
        points, weights = tube([path(f32(p) + f32([0, 0, 0, grow]), step) for p in paths], step)
        box, alpha = canvas.splat(points, weights * np.float32(1.1))
        canvas.paint(box, alpha, value, ORGAN[label], part=PART[part])

    gullet = f32([[-3, 0, 165, 7], [-5, 0, 90, 7], [-4, 0, 30, 7.5], [-6, 0, -20, 7], [-10, 0, -60, 7],
                  [-22, -30, -100, 8]])  # fmt: skip
    gullet[:5, 1] = a.spine_y(gullet[:5, 2]) + 22  # runs down in front of the spine
    tubes([gullet], 42.0, "oesophagus")
    paint_heart(canvas, a, wall)
    cx, cy, cz = a.heart_centre
    top = cz + 32
    caval = a.blood if a.phase != "arterial" else a.blood * 1.05
    tubes([[[24, -26, -200, 11], [24, -24, -110, 11], [24, -14, cz - 28, 11]]],
          caval if a.phase != "arterial" else 0.5 * (caval + 45), "vena cava", part="inferior vena cava")  # fmt: skip
    tubes([vena_cava(a)], caval, "vena cava", part="superior vena cava")
    tubes([[[30, 8, 72, 7], [40, 6, 92, 7], [48, 2, 120, 7], [50, -4, 165, 6]],
           [[29, 9, 70, 6], [5, 19, 76, 6], [-22, 16, 86, 6], [-42, 4, 108, 7], [-46, -6, 165, 6]]],
          caval, "vena cava", part="brachiocephalic veins")  # fmt: skip
    azygos = f32([[12, 0, -120, 3.4], [11, 0, -40, 3.6], [11, 0, 30, 3.8], [15, 0, 52, 4.2], [24, -12, 56, 4.2],
                  [28, 4, 50, 4.5]])  # fmt: skip
    azygos[:4, 1] = a.spine_y(azygos[:4, 2]) + 17
    tubes([azygos], caval, "azygos vein")
    trunk = [[-26, 44 + 0.1 * cy, top - 22, 13], [-25, 30, top - 6, 13], [-22, 10, 22, 12], [-30, -10, 24, 11],
             [-44, -24, 16, 9], [-54, -34, 0, 6]]  # fmt: skip
    branch = [[-22, 8, 22, 11], [-4, -5, 17, 10], [16, -9, 13, 9.5], [36, -17, 6, 8.5], [50, -28, -10, 6]]
    tubes([trunk[:3]], a.blood, "pulmonary vessels", part="pulmonary trunk")
    tubes([trunk[2:], [[-44, -22, 16, 6], [-52, -24, 14, 5]]], a.blood, "pulmonary vessels",
          part="left pulmonary artery")  # fmt: skip
    tubes([branch, [[34, -16, 8, 6], [45, -28, 20, 4.6]]], a.blood, "pulmonary vessels", part="right pulmonary artery")
    lx, ly, lz = cx + 22, cy - 30, cz + 18  # left atrium
    veins = [[[s * w, y, lz + dz, 4.0], [s * 24 - 8, y + 4, lz + dz / 3, 5.5], [lx, ly, lz, 7]]
             for s, w, y, dz in ((1, 52, -14, 12), (1, 52, -32, -16), (-1, 58, -14, 12), (-1, 60, -36, -16))]
    tubes(veins, a.aorta_blood, "pulmonary vessels", part="pulmonary veins")
    neck = [[[9, 9, 55, 7], [17, 2, 80, 6.5], [26, -6, 112, 6], [30, -12, 165, 5]],
            [[-4, -2, 60, 5], [-12, -6, 90, 4.5], [-20, -12, 165, 4.5]],
            [[-16, -20, 62, 6], [-28, -26, 90, 5.5], [-38, -28, 118, 5.5], [-70, -28, 128, 5]]]  # fmt: skip
    tubes(neck, a.aorta_blood, "aorta", part="supra-aortic arteries")
    main = aorta_path(a)
    tubes([main], max(a.aorta_blood - 20, wall) if a.phase != "none" else 48.0, "aorta", 1.2)
    points, weights = tube([path(main, step)], step)
    box, alpha = canvas.splat(points, weights * np.float32(1.1))
    canvas.paint(box, alpha, a.aorta_blood, ORGAN["aorta"], part=PART["descending aorta"])
    x, y, z = canvas.at(box)
    inside = alpha > np.float32(0.5)
    canvas.label(box, inside & (z > 54), ORGAN["aorta"], PART["aortic arch"])
    canvas.label(box, inside & (z <= 54) & (y > -18), ORGAN["aorta"], PART["ascending aorta"])
    _paint_small(canvas, a)
    paint_airways(canvas)


# Lymph nodes that everybody has: centre (mm) and short axis, well below the 10 mm that count as enlarged.
NODES = ((18, -12, 62, 6), (16, -14, 78, 5), (19, -8, 46, 6), (-15, -14, 60, 5), (4, -38, 12, 7), (-8, -42, 2, 5),
         (-18, 28, 44, 5), (6, 30, 56, 4), (44, -26, 12, 6), (-46, -30, 8, 5), (122, -6, 84, 7), (-124, -4, 80, 7),
         (126, -18, 66, 6), (-122, -16, 70, 6))  # fmt: skip


def _paint_small(canvas: Canvas, a: Anatomy) -> None:
    """The thyroid, and lymph nodes of normal size."""
    bright = {"none": 0.0, "arterial": 70.0, "venous": 45.0}[a.phase]
    rise = np.float32(a.apex - 115)
    for side in (1, -1):
        box = canvas.box((side * 17 - 14, -26, 110), (side * 17 + 14, 8, 175))
        x, y, z = canvas.at(box)
        lobe = canvas.inside(ellipsoid(x - side * 16, y + 8, z - 143 - rise, (9.0, 11.0, 24.0)))
        canvas.paint(box, lobe, 100.0 + bright, ORGAN["thyroid"])
    for x0, y0, z0, size in NODES:
        reach = size + 2
        box = canvas.box((x0 - reach, y0 - reach, z0 - reach), (x0 + reach, y0 + reach, z0 + reach))
        x, y, z = canvas.at(box)
        node = canvas.inside(ellipsoid(x - x0, y - y0, z - z0, (size / 2, size / 2, size * 0.8)))
        node *= canvas.mask[box] == ORGAN["fat"]
        canvas.paint(box, node, 40.0 + 0.5 * bright, ORGAN["lymph nodes"], least=0.4)


def vena_cava(a: Anatomy) -> list[list[float]]:
    """Knots (x, y, z, radius) of the superior vena cava, from the right atrium up."""
    return [[28, 2, a.heart_centre[2] + 8, 10], [27, 4, 12, 9], [28, 7, 45, 9], [30, 8, 74, 8]]


AIRWAYS: dict[str, list[list[list[float]]]] = {
    "trachea": [[[1, -16, 170, 8.5], [0, -17, 110, 8.5], [1, -22, 65, 8.5], [3, -27, 36, 9.0]]],
    "right main bronchus": [[[3, -27, 38, 7.5], [12, -29, 25, 7.2], [28, -31, 12, 6.6]]],
    "left main bronchus": [[[2, -27, 38, 7.2], [-18, -31, 16, 6.5], [-36, -35, 4, 5.8]]],
    "lobar bronchi": [
        [[26, -31, 13, 6.4], [38, -33, 2, 5.6], [46, -37, -18, 4.4], [*BRONCHI[1, "lower"], 3.6]],
        [[27, -31, 14, 5], [36, -31, 17, 4.6], [*BRONCHI[1, "upper"], 3.6]],
        [[45, -35, -14, 3.8], [*BRONCHI[1, "middle"], 3.0]],
        [[-34, -35, 5, 5.6], [-44, -39, -4, 5], [*BRONCHI[-1, "lower"], 3.6]],
        [[-35, -34, 5, 5], [-43, -29, 9, 4.4], [*BRONCHI[-1, "upper"], 3.6]],
    ],
}  # fmt: skip


def paint_airways(canvas: Canvas, wall: float = 1.6, only: tuple[int, ...] = (1, -1)) -> None:
    """Trachea, main and lobar bronchi with walls of `wall` mm. only: 1 for the right side, -1 for the left."""
    for name, knots in AIRWAYS.items():
        lines = [path(f32(k), canvas.step) for k in knots]
        if len(only) == 1:
            lines = [line for line in lines if line[-1, 0] * only[0] > 5]
        if not lines:
            continue
        thick = f32([0, 0, 0, wall])
        pair = (tube([line + thick for line in lines], canvas.step), tube(lines, canvas.step))
        clear = None
        if name == "lobar bronchi":  # a large heart or fluid around it leaves no room
            clear = ~np.isin(canvas.mask, [ORGAN["heart"], ORGAN["pericardial effusion"]])
        paint_pipes(canvas, [pair], name, clear)
