"""Medical material: pacemakers, catheters, tubes, wires and valves, all brighter than bone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from t2ct.data.phantoms.anatomy import Anatomy
from t2ct.data.phantoms.canvas import Array, f32, path, tube
from t2ct.data.phantoms.chest import vena_cava
from t2ct.data.phantoms.findings.base import SIDES, Disease, Finding, Scene
from t2ct.data.phantoms.organs import ORGAN

METAL, PLASTIC = 3000.0, 1400.0  # HU


class MedicalMaterial(Disease):
    """What was put into the patient; `kind` says what."""

    name, label, layer = "medical material", "Medical material", 8
    kinds = {
        "pacemaker": 0.2, "defibrillator": 0.08, "port catheter": 0.17, "central venous catheter": 0.13,
        "sternal wires": 0.17, "endotracheal tube": 0.07, "nasogastric tube": 0.06, "chest tube": 0.06,
        "aortic valve prosthesis": 0.06,
    }  # fmt: skip
    sides = {"right": 0.5, "left": 0.5}
    usual = {"pacemaker": "left", "defibrillator": "left", "port catheter": "right", "central venous catheter": "right"}
    sided = (*usual, "chest tube")

    def fill(self, f: Finding, rng: np.random.Generator, others: list[Finding]) -> Finding:
        if f.side is not None and f.kind is not None and f.kind not in self.sided:
            raise ValueError(f"side of {self.name}: wanted nothing for {f.kind}, got {f.side!r}")
        filled = super().fill(f, rng, others)
        if f.kind is None and f.side is not None and filled.kind not in self.sided:
            filled = replace(filled, kind="port catheter")
        side = filled.side if filled.kind in self.sided else None
        if f.side is None and filled.kind in self.usual and rng.random() < 0.85:
            side = self.usual[filled.kind]
        fluid = [o for o in others if o.name == "pleural effusion" and o.side in ("right", "left")]
        if filled.kind == "chest tube" and f.side is None and fluid:
            side = fluid[0].side  # drains are put where fluid is
        return replace(filled, side=side)

    def paint(self, scene: Scene, f: Finding, rng: np.random.Generator) -> None:
        side = SIDES[f.side or "right"][0]
        draw = {
            "pacemaker": _pacemaker, "defibrillator": _pacemaker, "port catheter": _port,
            "central venous catheter": _line, "sternal wires": _wires, "endotracheal tube": _endotracheal,
            "nasogastric tube": _nasogastric, "chest tube": _drain, "aortic valve prosthesis": _valve,
        }[f.kind or "pacemaker"]  # fmt: skip
        draw(scene, side, f, rng)


def _wire(scene: Scene, knots: Sequence[Sequence[float]] | Array, radius: float, hu: float) -> None:
    canvas = scene.canvas
    knots = f32(knots)
    line = np.concatenate([knots[:, :3], np.full((len(knots), 1), radius, np.float32)], 1)
    box, alpha = canvas.splat(*tube([path(line, canvas.step)], canvas.step))
    canvas.paint(box, alpha, hu, ORGAN["medical material"], least=canvas.thin(radius))


def _block(scene: Scene, centre: Array, axes: Array, half: Sequence[float], hu: float) -> None:
    """A solid with rounded outline: half thickness, width and height along the rows of `axes` (3, 3)."""
    canvas = scene.canvas
    step = min(canvas.step, 1.2)
    u, v, w = (np.arange(-h, h + 1e-3, min(step, h)) for h in half)
    grid = np.stack(np.meshgrid(u, v, w, indexing="ij"), -1).reshape(-1, 3)
    inside = (np.abs(grid[:, 1] / half[1]) ** 3 + np.abs(grid[:, 2] / half[2]) ** 3) < 1
    grid = grid[inside]
    points = f32(centre) + f32(grid) @ f32(axes)
    volume = 8 * half[0] * half[1] * half[2] * 0.88
    box, alpha = canvas.splat(points, np.full(len(points), volume / len(points), np.float32))
    canvas.paint(box, alpha, hu, ORGAN["medical material"], least=0.3)


def _streaks(scene: Scene, centre: Array, reach: float, strength: float, rng: np.random.Generator) -> None:
    """Bright and dark rays in the slices through metal (beam hardening, photon starvation)."""
    canvas = scene.canvas
    box = canvas.box((centre[0] - reach, centre[1] - reach, centre[2] - 18), tuple(c + r for c, r in
                     zip(centre, (reach, reach, 18), strict=True)))  # fmt: skip
    x, y, z = canvas.at(box)
    u, v = x - np.float32(centre[0]), y - np.float32(centre[1])
    r = np.sqrt(u * u + v * v) + np.float32(1)
    angle = np.arctan2(v, u)
    rays = sum(np.cos(n * angle + np.float32(rng.uniform(0, 6.28))) for n in (2, 5, 9, 14, 21)) / np.float32(2)
    fade = np.clip(1 - r / np.float32(reach), 0, 1) * np.clip(1.2 - np.abs(z - np.float32(centre[2])) / 16, 0, 1)
    canvas.hu[box] += np.float32(strength) * rays * fade


def _upper_chest(a: Anatomy, side: int, scene: Scene) -> tuple[Array, Array]:
    """A place under the skin below the clavicle, and axes (normal, sideways, up) there."""
    z = a.apex - 50.0
    x = 74.0 * side
    wide, deep, centre = a.cage_axes(f32(z))
    front = float(centre) + float(deep) * (1 - min(0.98, abs(x) / float(wide)) ** 2.5) ** 0.4
    y = front + 19 + 5 * a.muscle + 0.3 * a.fat
    normal = np.array([0.45 * side, 0.88, 0.1])
    normal /= np.linalg.norm(normal)
    across = np.cross([0.0, 0.0, 1.0], normal)
    across /= np.linalg.norm(across)
    return f32([x, y, z]), f32(np.stack([normal, across, np.cross(normal, across)]))


def _to_cava(a: Anatomy, side: int, start: Array) -> list[list[float]]:
    """From under the clavicle through the subclavian and brachiocephalic veins into the superior vena cava."""
    top = a.apex - 115
    way = [start.tolist(), [side * 78, 26, 104 + top], [side * 52, 10, 112 + top]]
    if side > 0:
        way += [[40, 7, 94], [31, 8, 74]]
    else:
        way += [[-40, 6, 104], [-18, 16, 86], [6, 18, 77], [27, 9, 68]]
    return way + [[28, 7, 45], [27, 4, 12]]


def _pacemaker(scene: Scene, side: int, f: Finding, rng: np.random.Generator) -> None:
    a = scene.anatomy
    centre, axes = _upper_chest(a, side, scene)
    large = f.kind == "defibrillator"
    _streaks(scene, centre, 75.0, 130.0, rng)
    _block(scene, centre, axes, (5.5, 25, 21) if not large else (7.5, 31, 29), METAL)
    hx, hy, hz = a.heart_centre
    r, e = a.heart_radii, a.heart_axes
    ventricle = f32([hx, hy, hz]) + (f32([0.62, -0.5, -0.45]) * r) @ e
    middle = f32([hx, hy, hz]) + (f32([-0.25, -0.5, -0.3]) * r) @ e
    atrium = f32([hx, hy, hz]) + (f32([-0.6, -0.5, 0.3]) * r) @ e
    start = _to_cava(a, side, centre + axes[2] * 20)
    right = [[27, 3, hz + 10], middle.tolist(), ventricle.tolist()]
    _wire(scene, start + right, 1.1, METAL)
    _wire(scene, [[p[0] + 3, p[1] + 2, p[2]] for p in start] + [[29, 6, hz + 14], atrium.tolist()], 1.1, METAL)
    if large:  # the coil of a defibrillator
        _wire(scene, [middle.tolist(), ventricle.tolist()], 2.2, METAL)
    for tip in (ventricle, atrium):
        _wire(scene, [tip.tolist(), (tip + f32([-2, 2, -3])).tolist()], 1.8, METAL)


def _port(scene: Scene, side: int, f: Finding, rng: np.random.Generator) -> None:
    a = scene.anatomy
    centre, axes = _upper_chest(a, side, scene)
    _streaks(scene, centre, 35.0, 60.0, rng)
    _block(scene, centre, axes, (5.5, 13.5, 13.5), 2200.0)
    _wire(scene, _to_cava(a, side, centre + axes[2] * 12), 1.3, PLASTIC)


def _line(scene: Scene, side: int, f: Finding, rng: np.random.Generator) -> None:
    neck = [[50, -2, 165], [48, 2, 120], [40, 6, 94]] if side > 0 else [[-46, -6, 165], [-42, 5, 106], [-30, 12, 92],
                                                                       [-4, 18, 80]]  # fmt: skip
    down = vena_cava(scene.anatomy)
    _wire(scene, [*neck, [31, 8, 72], [28, 7, 45], [27, 4, float(rng.uniform(8, 20))], down[0][:3]], 1.5, PLASTIC)


def _wires(scene: Scene, side: int, f: Finding, rng: np.random.Generator) -> None:
    """Loops around the sternum after an operation on the heart."""
    a = scene.anatomy
    for z in np.linspace(-38, a.apex - 30, int(rng.integers(5, 8))):
        _, b, centre = a.cage_axes(f32(z))
        front = float(b + centre) + 7
        angle = np.linspace(0, 2 * np.pi, 15)
        half = 12.0 if z < 60 else 15.0
        tilt = float(rng.uniform(-4, 4))
        loop = np.stack([half * np.cos(angle), front + 7 * np.sin(angle), z + tilt * np.cos(angle)], 1)
        _wire(scene, loop, 0.9, METAL)
        twist = [[0, front + 7, z], [2, front + 11, z + 1], [-2, front + 13, z + 3]]
        _wire(scene, twist, 1.2, METAL)
        _streaks(scene, f32([0, front + 8, z]), 28.0, 60.0, rng)


def _endotracheal(scene: Scene, side: int, f: Finding, rng: np.random.Generator) -> None:
    end = float(rng.uniform(58, 72))
    canvas = scene.canvas
    knots = f32([[1, -15, 170, 5.6], [0, -16, 110, 5.6], [1, -21, end, 5.6]])
    line = path(knots, canvas.step)
    outer, air = tube([line], canvas.step), tube([line * f32([1, 1, 1, 0.68])], canvas.step)
    box, alpha = canvas.splat(*outer)
    canvas.paint(box, alpha, 350.0, ORGAN["medical material"], least=0.3)
    box, alpha = canvas.splat(*air)
    canvas.hu[box] += alpha * np.float32(-990 - 350)
    _wire(scene, knots[:, :3] + f32([4.4, 0, 0]), 0.9, METAL)  # the radiopaque line in its wall


def _nasogastric(scene: Scene, side: int, f: Finding, rng: np.random.Generator) -> None:
    a = scene.anatomy
    z = f32([165, 90, 30, -20, -60])
    x = f32([-3, -5, -4, -6, -10])
    knots = np.stack([x, a.spine_y(z) + 22, z], 1)
    left = a.dome[1]
    _wire(scene, np.concatenate([knots, f32([[-24, -22, -96], [-44, 0, left - 38], [-62, 20, left - 52]])]), 2.3,
          1700.0)  # fmt: skip


def _drain(scene: Scene, side: int, f: Finding, rng: np.random.Generator) -> None:
    """A chest tube from between the ribs up the back of the pleural space; air in it."""
    a, canvas = scene.anatomy, scene.canvas
    wide, _, _ = a.cage_axes(f32(-10.0))
    knots = f32([[side * (float(wide) + 34 + a.fat), 4, -36], [side * (float(wide) + 8), -6, -22],
                 [side * (float(wide) - 18), -40, -2], [side * 82, -62, 26], [side * 62, -58, 66]])  # fmt: skip
    line = path(np.concatenate([knots, np.full((5, 1), 4.6, np.float32)], 1), canvas.step)
    box, alpha = canvas.splat(*tube([line], canvas.step))
    canvas.paint(box, alpha, 900.0, ORGAN["medical material"], least=0.3)
    box, air = canvas.splat(*tube([line * f32([1, 1, 1, 0.6])], canvas.step))
    canvas.hu[box] += air * np.float32(-950 - 900)
    _wire(scene, knots + f32([0, 0, 4.2]), 0.9, METAL)


def _valve(scene: Scene, side: int, f: Finding, rng: np.random.Generator) -> None:
    """A ring with struts at the root of the aorta."""
    a = scene.anatomy
    centre = f32([-1, 11, a.heart_centre[2] + 28])
    normal = f32([0.45, 0.25, 0.86])
    normal /= np.linalg.norm(normal)
    u = np.cross(normal, [0.0, 1.0, 0.0])
    u /= np.linalg.norm(u)
    v = np.cross(normal, u)
    angle = np.linspace(0, 2 * np.pi, 25)[:, None]
    ring = centre + a.aorta_radius * (np.cos(angle) * u + np.sin(angle) * v)
    _streaks(scene, centre, 45.0, 80.0, rng)
    _wire(scene, ring, 1.7, METAL)
    for k in (0, 8, 16):
        _wire(scene, [ring[k], ring[k] + normal * 14], 1.5, METAL)
