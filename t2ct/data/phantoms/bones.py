"""Ribs with cartilage, sternum, clavicles, scapulae, humeral heads, spine."""

from __future__ import annotations

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy, curve, ellipse, smooth_max
from t2ct.data.phantoms.canvas import Array, Box, Canvas, disc, f32, path, tube
from t2ct.data.phantoms.organs import ORGAN, PART


def paint_bones(canvas: Canvas, a: Anatomy, body: Array) -> None:
    """Ribs with cartilage, sternum, clavicles, scapulae, humeral heads, spine, all within `body`."""
    cortex = 540 - 2.0 * (a.age - 50)
    marrow = 160 - 2.1 * (a.age - 50)  # of vertebrae: Jang et al., Radiology 2019; 291: 360
    _paint_spine(canvas, a, marrow)
    step, z = canvas.step, np.float32(a.apex)

    def fill(parts: list[tuple[Array, Array]], value: float, part: str) -> None:
        points, weights = (np.concatenate([p[k] for p in parts]) for k in (0, 1))
        box, alpha = canvas.splat(points, weights)
        canvas.paint(box, alpha * body[box], value, ORGAN["bone"], part=PART[part])

    ribs = [_rib(a, rib) for rib in range(12)]
    cuts = [len(knots) - (6 if rib < 10 else 0) for rib, knots in enumerate(ribs)]
    lines = [path(knots[: cut + 1], step) for knots, cut in zip(ribs, cuts, strict=True)]
    ends = [path(knots[cut:], step) for knots, cut in zip(ribs[:10], cuts, strict=False)]
    mirror = f32([-1, 1, 1, 1])
    fill([tube(ends + [line * mirror for line in ends], step, 0.6)], 95.0, "costal cartilages")
    front = float(sum(a.cage_axes(f32(z - 18))[1:]))
    collar = f32([[16, front + 14, z - 16, 7], [45, front + 10, z - 4, 5.5], [85, front - 18, z + 10, 5],
                  [125, front - 42, z + 22, 6]])  # fmt: skip
    for side, name in ((1, "right"), (-1, "left")):
        sided = lines if side > 0 else [line * mirror for line in lines]
        fill([tube(sided, step, 0.72)], cortex, f"{name} ribs")
        fill([tube(sided, step, 0.6, core=0.5)], marrow, f"{name} ribs")
        clavicle = path(collar * f32([side, 1, 1, 1]), step)
        fill([tube([clavicle], step)], cortex, f"{name} clavicle")
        fill([tube([clavicle], step, core=0.5)], marrow, f"{name} clavicle")
        fill([_scapula(a, side, step)], cortex, f"{name} scapula")
        for radius, value in ((23.0, cortex), (19.5, marrow)):
            fill([ellipsoid_points((side * 158.0, -32.0, float(z) + 14.0), radius, step)], value, f"{name} humerus")
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
        fill([(points.astype(np.float32), weights.astype(np.float32))], value, "sternum")


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
    cancellous = canvas.grain(np.random.default_rng(int(a.age * 1e6)), 4.0)
    for part in canvas.slabs(box):
        _paint_vertebrae(canvas, a, marrow, part, cancellous(part))


def _paint_vertebrae(canvas: Canvas, a: Anatomy, marrow: float, box: Box, grain: Array) -> None:
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
    value = 85 + (marrow - 85 + 22 * grain) * is_bone + 170 * plate * is_bone
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
    canvas.paint(box, rear, marrow + 190, ORGAN["bone"], part=PART["vertebrae"])
    value = value + (430 - value) * shell * np.float32(0.75)
    canvas.paint(box, inside, value, ORGAN["bone"], part=PART["vertebrae"])
    canvas.label(box, (inside > 0.5) & (is_bone < 0.5), ORGAN["bone"], PART["intervertebral discs"])
    # Fat, sac and cord of the canal.
    canvas.paint(box, canal, -20.0, ORGAN["spinal canal"])
    canvas.paint(box, canvas.inside(ellipse(x, v + np.float32(21), 8.5, 6.8)), 12.0, ORGAN["spinal canal"])
    canvas.paint(box, canvas.inside(ellipse(x, v + np.float32(21), 5.5, 4.2)), 38.0, ORGAN["spinal canal"])
