"""Everything around the lungs and the heart: table, skin, fat, muscle, bones, upper abdomen."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy, curve, ellipse, ellipsoid, oval, smooth_max, smooth_min
from t2ct.data.phantoms.canvas import Array, Box, Canvas, disc, f32, path, tube
from t2ct.data.phantoms.organs import ORGAN

ALL: Box = (slice(None), slice(None), slice(None))


def paint_wall(canvas: Canvas, a: Anatomy, cage: Array) -> Array:
    """Skin, subcutaneous fat, muscles of the chest wall, fat in the cavity; returns what lies under the skin."""
    x, y, z = canvas.x, canvas.y, canvas.z
    side = np.abs(x)
    half_width, half_depth, centre = a.cage_axes(z)
    girdle = curve(z, [-200, 20, 60, 95, 122, 142, 160, 200], [0, 90, 140, 158, 160, 140, 105, 70])
    wide = np.maximum(half_width + np.float32(12 * a.muscle), girdle * np.float32(0.9 + 0.1 * a.muscle))
    deep = half_depth + np.float32(12 + 6 * a.muscle)
    muscle = oval(x, y - (centre - 5), wide, deep)
    spine_y = a.spine_y(z)
    muscle = smooth_min(muscle, ellipse(side - np.float32(25), y - (spine_y - 36), 25.0, 19.0 * a.muscle), 12)
    front = half_depth + centre
    pectoral = ellipsoid(side - np.float32(72), y - (front - np.float32(4)), z - 58, (58.0, 21.0 * a.muscle, 46.0))
    muscle = smooth_min(muscle, pectoral, 14)

    skin = muscle - np.float32(a.fat) * (1 + 0.35 * np.clip(y / 100, -1, 1) * np.clip((70 - z) / 60, 0, 1))
    if a.female:
        size = 0.75 + 0.5 * a.breast
        top = float(sum(a.cage_axes(f32(8))[1:]))
        by, bz, bx = np.float32(top + 8), np.float32(0), np.float32(72)
        breast = ellipsoid(side - bx, y - by, z - bz, (52 * size, (27 + 0.55 * a.fat) * size, 50 * size))
        skin = smooth_min(skin, breast, 18)
    canvas.paint(ALL, canvas.inside(skin), 10.0)
    fat = canvas.inside(skin + np.float32(2.2))
    canvas.paint(ALL, fat, -103.0, ORGAN["fat"])
    if a.female:
        gland = canvas.inside(breast + np.float32(11)) * fat
        grain = canvas.texture(np.random.default_rng(int(a.age * 1e6)), 11.0)
        lobules = np.clip(grain * 0.6 + 0.9 - a.age / 90, 0, 0.9)
        canvas.paint(ALL, gland * lobules.astype(np.float32), 30.0, ORGAN["breast"])
    alpha = canvas.inside(muscle)
    canvas.paint(ALL, alpha, 52.0, ORGAN["muscle"])
    # Fat of the armpits and planes between the shoulder muscles.
    for cx, cy, cz, radii in ((124.0, -8.0, 78.0, (17.0, 27.0, 42.0)), (96.0, 14.0, 88.0, (30.0, 7.0, 26.0)),
                              (88.0, -66.0, 96.0, (34.0, 5.0, 30.0)), (52.0, -18.0, 142.0, (26.0, 14.0, 22.0)),
                              (118.0, -52.0, 40.0, (9.0, 24.0, 34.0))):  # fmt: skip
        for s in (1, -1):
            box = canvas.box((s * cx - 40, cy - 35, cz - 50), (s * cx + 40, cy + 35, cz + 50))
            bx_, by_, bz_ = canvas.at(box)
            pocket = canvas.inside(ellipsoid(bx_ - s * cx, by_ - cy, bz_ - cz, radii))
            canvas.paint(box, pocket * (cage[box] > 14) * alpha[box], -95.0, ORGAN["fat"])
    canvas.paint(ALL, canvas.inside(cage + np.float32(1)) * alpha, -98.0, ORGAN["fat"])
    return fat


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


def paint_bones(canvas: Canvas, a: Anatomy, body: Array) -> None:
    """Ribs with cartilage, sternum, clavicles, scapulae, humeral heads, spine, all within `body`."""
    cortex = 540 - 2.0 * (a.age - 50)
    marrow = 190 - 1.6 * (a.age - 50)
    _paint_spine(canvas, a, marrow)
    step = canvas.step
    mirror = f32([-1, 1, 1, 1])
    ribs = [_rib(a, rib) for rib in range(12)]
    cuts = [len(knots) - (6 if rib < 10 else 0) for rib, knots in enumerate(ribs)]
    lines = [path(knots[: cut + 1], step) for knots, cut in zip(ribs, cuts, strict=True)]
    ends = [path(knots[cut:], step) for knots, cut in zip(ribs[:10], cuts, strict=False)]
    lines += [line * mirror for line in lines]
    bone, core = [tube(lines, step, 0.72)], [tube(lines, step, 0.6, core=0.5)]
    cartilage = [tube(ends + [line * mirror for line in ends], step, 0.6)]
    for side in (1, -1):
        z = np.float32(a.apex)
        front = float(sum(a.cage_axes(f32(z - 18))[1:]))
        collar = f32([[16, front + 14, z - 16, 7], [45, front + 10, z - 4, 5.5], [85, front - 18, z + 10, 5],
                             [125, front - 42, z + 22, 6]]) * f32([side, 1, 1, 1])  # fmt: skip
        bone.append(tube([path(collar, step)], step))
        bone.append(_scapula(a, side, step))
        head = ellipsoid_points((side * 158.0, -32.0, float(z) + 14.0), 23.0, step)
        bone.append(head)
        core.append(ellipsoid_points((side * 158.0, -32.0, float(z) + 14.0), 18.0, step))
    for parts, value in ((cartilage, 95.0), (bone, cortex), (core, marrow)):
        points, weights = (np.concatenate([p[k] for p in parts]) for k in (0, 1))
        box, alpha = canvas.splat(points, weights)
        canvas.paint(box, alpha * body[box], value, ORGAN["bone"])
    # Sternum: a plate that follows the front of the cage, wider at the manubrium.
    height = np.arange(-52, a.apex - 14, step, dtype=np.float32)
    _, b, centre = a.cage_axes(height)
    half = curve(height, [-60.0, -45, -20, 50, 62, 85, 105], [5, 11, 17, 14, 17, 27, 24])
    u = np.linspace(-1, 1, int(50 / step) + 1, dtype=np.float32)
    for thick, share, value in ((10.0, 1.0, cortex), (5.5, 0.75, marrow)):
        v = np.linspace(-0.5, 0.5, int(thick / step) + 2, dtype=np.float32) * np.float32(thick)
        grid = [g.ravel() for g in np.meshgrid(np.arange(len(height)), u, v, indexing="ij")]
        k = grid[0].astype(int)
        points = np.stack([grid[1] * half[k] * share, (centre + b)[k] + 7 + grid[2], height[k]], 1)
        weights = step * 2 * half[k] * share * thick / (len(u) * len(v))
        box, alpha = canvas.splat(points.astype(np.float32), weights.astype(np.float32))
        canvas.paint(box, alpha * body[box], value, ORGAN["bone"])


def _rib(a: Anatomy, rib: int) -> Array:
    """Knots (x, y, z, radius) of one right rib and its cartilage; the last 6 are cartilage down to rib 10."""
    start = a.apex - 4 - 22.0 * rib
    reach = [150, 148, 148, 146, 142, 138, 132, 124, 116, 108, 92, 66][rib]
    drop = [30, 46, 58, 66, 72, 76, 76, 74, 70, 64, 40, 24][rib]
    angle = np.radians(np.linspace(20, reach, 12))
    z = (start - drop * (np.degrees(angle) / 150) ** 1.25).astype(np.float32)
    wide, deep, centre = a.cage_axes(z)
    f = (np.abs(np.sin(angle) / wide) ** 2.5 + np.abs(np.cos(angle) / deep) ** 2.5) ** -0.4 + 5.5
    x, y = f * np.sin(angle), centre - f * np.cos(angle)
    radius = np.full(12, 4.7)
    head = [[15, float(a.spine_y(f32(start))) - 8, start + 3, 5.0]]
    knots = np.concatenate([head, np.stack([x, y, z, radius], 1)])
    if rib < 10:  # cartilage rises to the sternum
        target_z = f32(max(-48, start - drop + 8 - 2 * rib) if rib < 7 else -50)
        _, b, c = a.cage_axes(target_z)
        target = np.array([17.0, float(b + c) + 7, float(target_z), 5.5])
        t = np.linspace(0, 1, 7)[1:, None]
        middle = 0.5 * (knots[-1] + target) + np.array([8, 5.0, -6, 0])
        tail = (1 - t) ** 2 * knots[-1] + 2 * t * (1 - t) * middle + t**2 * target
        knots = np.concatenate([knots, tail])
    return knots.astype(np.float32)


def _scapula(a: Anatomy, side: int, step: float) -> tuple[Array, Array]:
    """The blade as a thin curved triangle behind the ribs, its spine and the socket as tubes."""
    u, v = np.meshgrid(np.arange(0, 1, step / 100), np.arange(0, 1, step / 75), indexing="ij")
    z = (18 + 92 * u + a.apex - 115).astype(np.float32).ravel()
    angle = np.radians(38 + (14 + 44 * u) * v).ravel()
    wide, deep, centre = a.cage_axes(np.minimum(z, 70))
    r = (np.abs(np.sin(angle) / wide) ** 2.5 + np.abs(np.cos(angle) / deep) ** 2.5) ** -0.4 + 17
    blade = np.stack([side * r * np.sin(angle), centre - r * np.cos(angle), z], 1).astype(np.float32)
    width = np.radians(14 + 44 * u.ravel()) * r
    weights = (step * width / u.shape[1] * 3.6).astype(np.float32)
    top = np.float32(a.apex - 115)
    ridge = f32([[62, -108, 88, 4], [100, -100, 104, 5], [140, -72, 122, 6], [150, -48, 120, 8]])
    ridge = ridge * f32([side, 1, 1, 1]) + f32([0, 0, top, 0])
    neck = f32([[112, -78, 98, 7], [134, -52, 106, 11]]) * f32([side, 1, 1, 1])
    parts = [(blade, weights), tube([path(ridge, step), path(neck + f32([0, 0, top, 0]), step)], step)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def ellipsoid_points(centre: tuple[float, float, float], radius: float, step: float) -> tuple[Array, Array]:
    """Points and weights (mm^3) that fill a ball."""
    layers = max(3, int(np.ceil(2 * radius / step)))
    h = (np.arange(layers) + 0.5) / layers * 2 - 1
    points, weights = [], []
    for k in h:
        r = np.sqrt(1 - k * k) * radius
        count = max(1, int(np.ceil(np.pi * r * r / step**2)))
        points.append(np.concatenate([disc(count) * r, np.full((count, 1), k * radius)], 1))
        weights.append(np.full(count, np.pi * r * r * 2 * radius / layers / count))
    return (np.concatenate(points) + np.array(centre)).astype(np.float32), np.concatenate(weights).astype(np.float32)


def _paint_spine(canvas: Canvas, a: Anatomy, marrow: float) -> None:
    """Vertebral bodies with cortex and end plates, discs, arch, transverse and spinous processes, canal."""
    box = canvas.box((-46, -175, -200), (46, -20, 200))
    x, y, z = canvas.at(box)
    spine_y = a.spine_y(z)
    grow = (1.0 - z / 700).astype(np.float32)
    v = y - spine_y
    level = (z + 300) / np.float32(22.5)
    phase = level - np.floor(level)  # 0…1 along one vertebra and its disc
    # The share of bone in a slice, averaged over the slice's thickness.
    soft = np.float32(max(0.08, canvas.spacing[2] / 2 / 22.5))
    is_bone = np.clip((np.float32(0.39) - np.abs(phase - np.float32(0.5))) / soft + np.float32(0.5), 0, 1)
    plate = np.clip(1 - np.abs(np.abs(phase - np.float32(0.5)) - np.float32(0.35)) / (soft + 0.04), 0, 1)
    body = ellipse(x, v, 17.5 * grow, 14.0 * grow) + 1.5 * (1 - is_bone)
    value = 85 + (marrow - 85) * is_bone + 170 * plate * is_bone
    inside = canvas.inside(body)
    shell = np.clip(1 - np.abs(body + np.float32(1.2)) / np.float32(max(2.0, canvas.width * 0.7)), 0, 1) * is_bone
    process = smooth_max(np.abs(x) - np.float32(4.2), np.abs(v + np.float32(40)) - np.float32(17), 2)
    slant = level + (v + np.float32(20)) / np.float32(70)
    off = np.abs(slant - np.floor(slant) - np.float32(0.45))
    spinous = np.clip((np.float32(0.36) - off) / soft + np.float32(0.5), 0, 1)
    wings = smooth_max(np.abs(x) - np.float32(36), np.abs(v + 22 + 0.15 * np.abs(x)) - np.float32(5.5), 3)
    arch = ellipse(x, v + np.float32(21), 16.5, 13.5)
    canal = canvas.inside(ellipse(x, v + np.float32(21), 10.5, 8.5))
    rear = np.maximum(canvas.inside(process) * spinous, canvas.inside(wings) * np.clip(is_bone * 1.2 - 0.35, 0, 1))
    rear = np.maximum(rear, canvas.inside(arch) * (0.25 + 0.75 * is_bone))
    canvas.paint(box, rear, marrow + 190, ORGAN["bone"])
    canvas.paint(box, inside, value + (430 - value) * shell * np.float32(0.75), ORGAN["bone"])
    canvas.paint(box, canal, 20.0, ORGAN["muscle"])


def paint_abdomen(canvas: Canvas, a: Anatomy, cage: Array, rng: np.random.Generator) -> None:
    """Diaphragm, liver, spleen, stomach with its gas, gut and fat below the domes."""
    box = canvas.box((-150, -150, -220), (150, 150, max(a.dome) + 25))
    x, y, z = canvas.at(box)
    below = z - a.diaphragm(x, y)
    abdomen = smooth_max(cage[box] + np.float32(2), below * np.float32(0.75), 6)
    canvas.paint(box, canvas.inside(abdomen), 45.0, ORGAN["muscle"])
    inner = abdomen + np.float32(3.5)
    inside = canvas.inside(inner)
    canvas.paint(box, inside, -100.0, ORGAN["fat"])
    soft = {"none": 0.0, "arterial": 25.0, "venous": 55.0}[a.phase]
    gut = np.clip(canvas.texture(rng, 24.0, box) * 1.6 - 0.2, 0, 1) * np.clip((a.dome[1] - 60 - z) / 12, 0, 1)
    canvas.paint(box, inside * gut * (y > -40), 38.0 + soft * 0.4)
    # Spleen: behind and to the left. Stomach: under the left dome, gas on top, which is in front.
    left = a.dome[1] + a.volume_loss.get(-1, 0.0)
    spleen = smooth_max(ellipsoid(x + 92, y + 44, z - np.float32(left - 52), (33.0, 44.0, 47.0)), inner, 5)
    canvas.paint(box, canvas.inside(spleen), 48.0 + 1.3 * soft, ORGAN["spleen"])
    stomach = smooth_max(ellipsoid(x + 60, y - 16, z - np.float32(left - 44), (46.0, 47.0, 42.0)), inner, 5)
    canvas.paint(box, canvas.inside(stomach), 48.0 + soft, ORGAN["stomach"])
    level = np.float32(16 + 44 * (0.5 - a.stomach_gas))
    content = canvas.inside(stomach + np.float32(5))
    gas = np.clip((y - level) / canvas.width + np.float32(0.5), 0, 1)
    canvas.paint(box, content, 22.0 - 1000 * gas, ORGAN["stomach"])
    # Liver: fills the right side, its left lobe crosses the midline in front.
    edge = np.float32(20) - np.float32(0.62) * (y + 20) - x
    before_spine = np.float32(4) - (y - a.spine_y(z)) - 0.6 * np.abs(x)
    liver = smooth_max(np.maximum(inner, before_spine), edge * np.float32(0.8), 14)
    lower = np.clip((-z - np.float32(125)) / 60, 0, 1) * 60  # the lower edge slopes off the front of the field
    liver = smooth_max(liver, lower - (x + 30) * np.float32(0.35) - 20, 8)
    flesh = 57 + soft + 4 * canvas.texture(rng, 14.0, box)
    canvas.paint(box, canvas.inside(liver), flesh.astype(np.float32), ORGAN["liver"])
    if soft:
        for y0, x1 in ((-12.0, 62.0), (-4.0, 34.0), (4.0, 5.0)):  # hepatic veins
            line = f32([[20, -22, a.dome[0] - 18, 5], [(20 + x1) / 2, y0, a.dome[0] - 30, 4],
                               [x1 + 22, y0 + 22, a.dome[0] - 50, 3]])  # fmt: skip
            vein_box, alpha = canvas.splat(*tube([path(line, canvas.step)], canvas.step))
            canvas.paint(vein_box, alpha, 60 + 1.6 * soft)
