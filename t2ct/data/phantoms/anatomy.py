"""The geometry of one chest: parameters drawn from a seed, and signed distances (mm, negative inside).

Coordinates are standard-patient mm: x to the patient's right, y anterior, z superior, origin at the centre of the
chest; `Frame` maps them into the scanner. Every function takes broadcastable arrays, so the same geometry is
evaluated on any grid and at single points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, wraps

import numpy as np

from t2ct.data.phantoms.canvas import Array, Frame, f32

BLOCK = 1 << 17  # voxels evaluated at once: temporaries that stay in a cache are several times faster


def blocked(function: Callable) -> Callable:
    """A method of (x, y, z, …) evaluated a few planes of large grids at a time."""

    @wraps(function)
    def run(self: Anatomy, *arrays: Array) -> Array | dict[str, Array]:
        shape = np.broadcast_shapes(*(a.shape for a in arrays))
        if len(shape) != 3 or np.prod(shape) <= BLOCK:
            return function(self, *arrays)
        rows = max(1, BLOCK // (shape[1] * shape[2]))
        whole: dict[str, Array] = {}
        for first in range(0, shape[0], rows):
            part = slice(first, first + rows)
            value = function(self, *(a[part] if a.shape[0] == shape[0] else a for a in arrays))
            for name, piece in (value if isinstance(value, dict) else {"": value}).items():
                if not first:
                    whole[name] = np.empty(shape, piece.dtype)
                whole[name][part] = piece
        return whole.get("", whole)

    return run


_TABLE = np.arange(-260, 261, 2, dtype=np.float32)


@lru_cache(maxsize=64)
def _rounded(knots: tuple[float, ...], values: tuple[float, ...]) -> Array:
    window = np.hanning(15)[1:-1]
    padded = np.pad(np.interp(_TABLE, knots, values), 6, mode="edge")
    return np.convolve(padded, window / window.sum(), "valid")


def curve(z: Array, knots: list[float], values: list[float]) -> Array:
    """Smooth piecewise curve of height: linear between knots, rounded over about 24 mm."""
    return np.interp(z, _TABLE, _rounded(tuple(knots), tuple(values))).astype(np.float32)


def oval(x: Array, y: Array, a: Array | float, b: Array | float) -> Array:
    """Signed radial distance to |x/a|^2.5 + |y/b|^2.5 = 1: rounder than a box, squarer than an ellipse."""
    u, v = np.abs(x / np.float32(a)), np.abs(y / np.float32(b))
    f = u * u * np.sqrt(u) + v * v * np.sqrt(v)
    ratio = np.power(np.maximum(f, np.float32(1e-6)), np.float32(-0.4))
    return np.sqrt(x * x + y * y) * (1 - ratio)


def ellipse(x: Array, y: Array, a: Array | float, b: Array | float) -> Array:
    """Signed distance (first order) to an ellipse."""
    u, v = x / np.float32(a), y / np.float32(b)
    k = np.sqrt(u * u + v * v)
    g = np.sqrt((u / np.float32(a)) ** 2 + (v / np.float32(b)) ** 2) + np.float32(1e-6)
    return k * (k - 1) / g


def ellipsoid(x: Array, y: Array, z: Array, radii: Sequence[float]) -> Array:
    """Signed distance (first order) to an ellipsoid at the origin."""
    a, b, c = (np.float32(1 / r) for r in radii)
    u, v, w = x * a, y * b, z * c
    k = np.sqrt(u * u + v * v + w * w)
    g = np.sqrt((u * a) ** 2 + (v * b) ** 2 + (w * c) ** 2) + np.float32(1e-6)
    return k * (k - 1) / g


def smooth_max(a: Array, b: Array, k: float) -> Array:
    """Maximum with edges rounded over `k` mm (intersection of two shapes)."""
    h = np.maximum(np.float32(k) - np.abs(a - b), 0)
    return np.maximum(a, b) + h * h * np.float32(0.25 / k)


def smooth_min(a: Array, b: Array, k: float) -> Array:
    """Minimum with edges rounded over `k` mm (union of two shapes)."""
    h = np.maximum(np.float32(k) - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * np.float32(0.25 / k)


@dataclass
class Anatomy:
    """Drawn parameters of one patient. Lengths in standard-patient mm."""

    female: bool
    fat: float  # subcutaneous thickness
    muscle: float  # 0.8 slight … 1.25 strong
    age: float  # years
    dome: tuple[float, float]  # height of the right and left diaphragm
    dome_fall: float  # how far the diaphragm falls to its rim: small means flat
    apex: float  # height of the lung tops
    depth: float  # factor on the front-to-back size of the cage
    heart_ratio: float  # widest heart over widest inner chest
    lung_hu: float
    phase: str  # "none", "arterial", "venous"
    blood: float  # HU in the right heart and pulmonary arteries
    aorta_blood: float
    breast: float  # size 0…1
    fissure: float  # height offset of the fissures
    aorta_radius: float
    stomach_gas: float
    kyphosis: float
    frame: Frame
    pericardial_fluid: float = 0.0  # mm, mean thickness
    volume_loss: dict[int, float] = field(default_factory=dict)  # side -> mm the diaphragm is drawn up
    retraction: dict[int, float] = field(default_factory=dict)  # side -> mm the fissures are drawn up

    # --- chest cage ---------------------------------------------------------------------------------------------
    def cage_axes(self, z: Array) -> tuple[Array, Array, Array]:
        """Half width, half depth and centre (y) of the inner chest wall at height z."""
        top = self.apex - 115
        knots = [-200, -120, -60, 0, 40 + top / 2, 75 + top, 100 + top, 120 + top, 145 + top, 200]
        a = curve(z, knots, [124, 131, 134, 128, 118, 101, 82, 66, 56, 50])
        b = curve(z, knots, [86, 94, 96, 91, 83, 71, 58, 47, 40, 38]) * np.float32(self.depth)
        back = curve(z, knots, [-84, -94, -97, -94, -89, -82, -76, -70, -64, -58])
        back = back - np.float32(self.kyphosis) * (1 - (z / 110) ** 2).clip(-1, 1)
        return a, b, back + b

    @blocked
    def cage(self, x: Array, y: Array, z: Array) -> Array:
        """Inner chest wall (parietal pleura) and, below the ribs, inner abdominal wall."""
        a, b, centre = self.cage_axes(z)
        return oval(x, y - centre, a, b)

    def spine_y(self, z: Array) -> Array:
        """Front-to-back position of the centre of the vertebral bodies."""
        _, b, centre = self.cage_axes(z)
        return centre - b + np.float32(21)

    # --- heart --------------------------------------------------------------------------------------------------
    @property
    def heart_axes(self) -> Array:
        """Rows: towards the apex (left, front, down), towards the left ventricle's wall, and their cross product."""
        e1 = np.array([-0.76, 0.52, -0.39])
        e1 /= np.linalg.norm(e1)
        e2 = np.array([-0.5, -0.82, 0.05])
        e2 -= e1 * (e1 @ e2)
        e2 /= np.linalg.norm(e2)
        return np.stack([e1, e2, np.cross(e1, e2)]).astype(np.float32)

    @property
    def heart_radii(self) -> Array:
        """Half axes of the heart (mm along `heart_axes`), so that its width is `heart_ratio` of the inner chest."""
        shape = np.array([66.0, 47.0, 49.0])
        half = np.sqrt(((shape[:, None] * self.heart_axes)[:, 0] ** 2).sum())
        return (shape * self.heart_ratio * 134.0 / half).astype(np.float32)

    @property
    def heart_centre(self) -> tuple[float, float, float]:
        half = self.heart_ratio * 134.0
        floor = 0.5 * (self.dome[0] + self.dome[1]) + 8 * (self.dome_fall / 55)
        return -0.36 * half, 21.0 + 0.06 * (half - 60), floor + 39 + 0.45 * (half - 60)

    def heart_local(self, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
        """Coordinates (mm) along the heart's own axes."""
        cx, cy, cz = (np.float32(c) for c in self.heart_centre)
        x, y, z = x - cx, y - cy, z - cz
        e = self.heart_axes
        along, across, up = (e[k, 0] * x + e[k, 1] * y + e[k, 2] * z for k in range(3))
        return along, across, up

    def heart(self, x: Array, y: Array, z: Array) -> Array:
        """Outer surface of the heart muscle."""
        return ellipsoid(*self.heart_local(x, y, z), [float(r) for r in self.heart_radii])

    def pericardium(self, heart: Array, y: Array, z: Array) -> Array:
        """Pericardium from the heart's distance: fluid gathers behind and below in the supine patient."""
        _, cy, cz = self.heart_centre
        lower = 1 + 0.35 * np.clip((cy - y) / 50, -1, 1) + 0.25 * np.clip((cz - z) / 50, -1, 1)
        return heart - np.float32(3.0) - np.float32(self.pericardial_fluid) * lower

    # --- lungs --------------------------------------------------------------------------------------------------
    @blocked
    def diaphragm(self, x: Array, y: Array) -> Array:
        """Height of the two domes over (x, y)."""
        right = np.float32(self.dome[0] + self.volume_loss.get(1, 0.0))
        left = np.float32(self.dome[1] + self.volume_loss.get(-1, 0.0))
        top = left + (right - left) * np.clip(x / 50 + np.float32(0.5), 0, 1)
        q = ((np.abs(x) - 58) / 76) ** 2 + ((y - 12) / 92) ** 2
        return top - np.float32(self.dome_fall) * q * (np.float32(1.25) - np.float32(0.25) * np.minimum(q, 2))

    def mediastinum(self, x: Array, y: Array, z: Array, heart: Array | None = None) -> Array:
        """Everything between the lungs: spine, great vessels, heart with its fat, anterior septum."""
        _, b, centre = self.cage_axes(z)
        spine_y = centre - b + np.float32(21)
        column = ellipse(x, y - (spine_y - 14), 21.0, 34.0)
        aorta = np.sqrt((x - aorta_x(z)) ** 2 + (y - self.aorta_y(z)) ** 2) - np.float32(self.aorta_radius + 3)
        aorta = np.where(z > 66, aorta + 3 * (z - 66), aorta)
        knots = [-200.0, -70, -35, 0, 25, 55, 80, 110, 150]
        wide = curve(z, knots, [16, 17, 24, 36, 37, 34, 33, 31, 34])
        middle = curve(z, knots, [-40, -38, -28, -6, 0, 0, -6, -16, -22])
        deep = curve(z, knots, [28, 28, 34, 46, 52, 50, 42, 32, 30])
        vessels = ellipse(x - np.float32(2), y - middle, wide, deep)
        front = np.abs(x + np.float32(6)) - (np.float32(5) + np.float32(0.06 * self.fat))
        septum = np.maximum(front, np.float32(10) - y)
        if heart is None:
            heart = self.heart(x, y, z)
        sac = self.pericardium(heart, y, z) - np.float32(2 + 0.08 * self.fat)
        out = smooth_min(column, aorta, 8)
        out = smooth_min(out, vessels, 14)
        out = smooth_min(out, septum, 14)
        return smooth_min(out, sac, 12)

    @blocked
    def lungs(self, x: Array, y: Array, z: Array) -> Array:
        """Both pleural spaces in one field (right where x > 0): what lung, or fluid, can fill."""
        cage = self.cage(x, y, z)
        # The tops: one rounded dome per side.
        rise = ((np.abs(x) - 44) / 46) ** 2 + ((y + 34) / 48) ** 2
        top = z - (np.float32(self.apex) - 30 * rise)
        out = smooth_max(cage, top * np.float32(0.7), 16)
        out = smooth_max(out, (self.diaphragm(x, y) - z) * np.float32(0.75), 6)
        return smooth_max(out, -self.mediastinum(x, y, z), 7)

    @blocked
    def lobe(self, x: Array, y: Array, z: Array) -> dict[str, Array]:
        """Signed distances (mm, negative in the lobe's side of the fissures) of "upper", "middle" and "lower"."""
        right = x > 0
        rise = np.where(right, np.float32(self.retraction.get(1, 0.0)), np.float32(self.retraction.get(-1, 0.0)))
        oblique = (z - rise + np.float32(12 - self.fissure) + np.float32(0.85) * (y + 8)) * np.float32(0.76)
        horizontal = z - rise + np.float32(6 - self.fissure)
        return {
            "lower": oblique,
            "middle": np.where(right, np.maximum(-oblique, horizontal), np.float32(999)),
            "upper": np.maximum(-oblique, np.where(right, -horizontal, np.float32(-999))),
        }

    def lung_points(self, side: int, count: int, rng: np.random.Generator) -> Array:
        """Evenly distributed points (N, 3) inside one lung: independent of any grid."""
        low, high = f32([4, -112, -150]), f32([140, 110, 130])
        points = rng.random((count, 3), dtype=np.float32) * (high - low) + low
        points[:, 0] *= side
        return points[self.lungs(points[:, 0], points[:, 1], points[:, 2]) < 0]

    LUNG_BOX_VOLUME = 136.0 * 222.0 * 280.0  # mm^3 of the box sampled by `lung_points`

    def aorta_y(self, z: Array) -> Array:
        return self.spine_y(z) + np.float32(13) + np.float32(0.35) * np.float32(self.aorta_radius)


def aorta_x(z: Array) -> Array:
    """Sideways position of the descending aorta: left of the spine, towards the midline below."""
    return curve(z, [-200.0, -130, -60, 0, 70, 120], [-8, -15, -24, -27, -26, -24])


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """One healthy patient from the stream `rng`."""
    female = bool(rng.random() < 0.45)
    build = float(np.clip(rng.normal(0.93 if female else 1.02, 0.045), 0.82, 1.12))
    fat = float(np.clip(rng.gamma(4.0, 3.8) + (3 if female else 0), 4, 38))
    phase = str(rng.choice(["none", "arterial", "venous"], p=[0.5, 0.3, 0.2]))
    blood = {"none": rng.normal(41, 4), "arterial": rng.uniform(190, 320), "venous": rng.uniform(120, 165)}[phase]
    left = {"none": blood, "arterial": blood * rng.uniform(0.75, 1.0), "venous": blood * rng.uniform(0.95, 1.05)}[phase]
    breath = float(rng.normal(0, 1))  # inspiration: lower domes, darker lungs
    right_dome = -58 - 8 * breath + float(rng.normal(0, 4))
    frame = Frame(
        scale=(build * float(rng.uniform(0.97, 1.03)), build * float(rng.uniform(0.96, 1.04)),
               build * float(rng.uniform(0.97, 1.04))),
        roll=float(rng.normal(0, 0.035)),
        tilt=(float(rng.normal(0, 0.02)), float(rng.normal(0, 0.02))),
        shift=(float(rng.normal(0, 4)), float(rng.normal(6, 4)), float(rng.normal(2, 5))),
        warp=tuple(float(rng.uniform(*limits)) for _ in range(3) for limits in ((-3, 3), (150, 260), (0, 6.28))),
    )  # fmt: skip
    return Anatomy(
        female=female, fat=fat, muscle=float(rng.uniform(0.8, 1.0) if female else rng.uniform(0.9, 1.2)),
        age=float(rng.uniform(25, 88)), dome=(right_dome, right_dome - float(rng.uniform(6, 18))),
        dome_fall=float(rng.uniform(48, 60)), apex=float(rng.normal(114, 4)), depth=float(rng.uniform(0.94, 1.06)),
        heart_ratio=float(rng.uniform(0.40, 0.465)),
        lung_hu=float(np.clip(-852 - 14 * breath + rng.normal(0, 8), -885, -820)),
        phase=phase, blood=float(blood), aorta_blood=float(left),
        breast=float(rng.uniform(0.25, 1.0)) if female else 0.0,
        fissure=float(rng.normal(0, 6)), aorta_radius=float(rng.uniform(11.5, 15.0)),
        stomach_gas=float(rng.uniform(0.1, 0.8)), kyphosis=float(rng.uniform(0, 8)), frame=frame,
    )  # fmt: skip
