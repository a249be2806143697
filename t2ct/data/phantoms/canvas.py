"""The voxel grid of a phantom: patient coordinates, painting with partial volumes, splatting of thin structures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from t2ct.data.phantoms.organs import BIT_OF_ORGAN

Box = tuple[slice, slice, slice]
Array = np.ndarray
ALL: Box = (slice(None), slice(None), slice(None))


def f32(values: object) -> Array:
    """`values` as a float32 array: single precision is what keeps a phantom under a second."""
    return np.asarray(values, np.float32)


@dataclass(frozen=True)
class Frame:
    """How the patient lies in the scanner: standard-patient mm -> scanner mm, with roll, tilt and a gentle warp."""

    scale: tuple[float, float, float]  # scanner mm per standard-patient mm along x, y, z
    roll: float  # radians, about the long axis
    tilt: tuple[float, float]  # mm of sideways and forward lean per mm of height
    shift: tuple[float, float, float]  # mm, where the centre of the chest lies
    warp: tuple[float, ...]  # (amplitude mm, period mm, phase) three times: x over z, x over y, y over z

    def _bend(self, y: Array, z: Array) -> tuple[Array, Array]:
        a, pa, fa, b, pb, fb, c, pc, fc = (np.float32(v) for v in self.warp)
        turn = np.float32(2 * np.pi)
        return a * np.sin(turn * z / pa + fa) + b * np.sin(turn * y / pb + fb), c * np.sin(turn * z / pc + fc)

    def to_patient(self, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
        """Scanner mm -> standard-patient mm; arguments broadcast."""
        x, y, z = x - np.float32(self.shift[0]), y - np.float32(self.shift[1]), z - np.float32(self.shift[2])
        bend_x, bend_y = self._bend(y, z)
        cos, sin = np.float32(np.cos(self.roll)), np.float32(np.sin(self.roll))
        sx, sy, sz = (np.float32(1 / s) for s in self.scale)
        px = (cos * x - sin * y + (np.float32(self.tilt[0]) * z + bend_x)) * sx
        py = (sin * x + cos * y + (np.float32(self.tilt[1]) * z + bend_y)) * sy
        return px, py, z * sz

    def to_scanner(self, points: Array) -> Array:
        """(N, 3) standard-patient mm -> scanner mm: the inverse of `to_patient` to well below a voxel."""
        p = points.astype(np.float32) * f32(self.scale)
        cos, sin = np.float32(np.cos(self.roll)), np.float32(np.sin(self.roll))
        z, y = p[:, 2], p[:, 1]
        for _ in range(2):
            bend_x, bend_y = self._bend(y, z)
            u = p[:, 0] - self.tilt[0] * z - bend_x
            v = p[:, 1] - self.tilt[1] * z - bend_y
            x, y = cos * u + sin * v, cos * v - sin * u
        return np.stack([x, y, z], axis=1) + f32(self.shift)


SLAB = 1 << 17  # voxels


class Canvas:
    """HU and organ labels on a grid centred on the scanner's origin, axes RAS.

    `x`, `y` are (X, Y, Z) and `z` is (1, 1, Z): standard-patient mm at voxel centres, float32.
    """

    def __init__(self, size: tuple[int, int, int], spacing: tuple[float, float, float], frame: Frame):
        self.size, self.spacing, self.frame = size, spacing, frame
        self.origin = np.array([-(n - 1) / 2 * s for n, s in zip(size, spacing, strict=True)], np.float32)
        gx, gy, gz = (self.origin[k] + np.arange(size[k], dtype=np.float32) * np.float32(spacing[k]) for k in range(3))
        self.axes = (gx, gy, gz)
        self.x, self.y, self.z = frame.to_patient(gx[:, None, None], gy[None, :, None], gz[None, None, :])
        self.hu = np.full(size, -1000, np.float32)
        self.mask = np.zeros(size, np.uint8)  # numbers of ORGANS
        self.parts = np.zeros(size, np.uint8)  # numbers of PARTS
        self.bits = np.zeros(size, np.uint32)  # one bit per finding
        # One blending width for all directions: the root mean square voxel edge, in standard-patient mm.
        edges = np.array(spacing) / np.array(frame.scale)
        self.width = float(np.sqrt(np.mean(edges**2)))

    @property
    def affine(self) -> Array:
        """4x4 voxel -> RAS mm."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(self.size, self.spacing, strict=True)]
        return affine

    def box(self, low: tuple[float, float, float], high: tuple[float, float, float]) -> Box:
        """Slices that hold the standard-patient box [low, high] mm."""
        corners = np.array([[(low, high)[i][0], (low, high)[j][1], (low, high)[k][2]]
                            for i in (0, 1) for j in (0, 1) for k in (0, 1)], np.float32)  # fmt: skip
        corners = self.frame.to_scanner(corners)
        return self._slices(corners.min(0) - 4, corners.max(0) + 4)

    def _slices(self, low: Array, high: Array) -> Box:
        first = np.floor((low - self.origin) / self.spacing).astype(int)
        last = np.ceil((high - self.origin) / self.spacing).astype(int) + 1
        x, y, z = (slice(max(0, a), max(0, min(n, b))) for a, b, n in zip(first, last, self.size, strict=True))
        return x, y, z

    def at(self, box: Box) -> tuple[Array, Array, Array]:
        """Patient coordinates inside `box`, broadcastable."""
        return self.x[box], self.y[box], self.z[:, :, box[2]]

    def slabs(self, box: Box = ALL) -> Iterator[Box]:
        """Boxes that together are `box`, each small enough for its temporaries to stay in a cache."""
        (start, stop, _), *rest = (s.indices(n) for s, n in zip(box, self.size, strict=True))
        rows = max(1, SLAB // max(1, int(np.prod([max(b - a, 0) for a, b, _ in rest]))))
        for first in range(start, stop, rows):
            yield (slice(first, min(first + rows, stop)), box[1], box[2])

    def inside(self, sdf: Array, width: float | None = None) -> Array:
        """Share of a voxel inside a surface from the signed distance (mm, negative inside)."""
        alpha = sdf * np.float32(-1 / (width or self.width))
        alpha += np.float32(0.5)
        return np.clip(alpha, 0, 1, out=alpha)

    def paint(
        self, box: Box, alpha: Array, value: Array | float, label: int | None = None, least: float = 0.5, part: int = 0
    ) -> None:
        """Blend `value` HU over the box with opacity `alpha`; voxels covered by more than `least` take `label`.

        A label of an organ replaces what was there, its part too; that of a finding leaves the anatomy under it.
        """
        hu = self.hu[box]
        hu += alpha * (f32(value) - hu)
        if label is not None:
            self.label(box, alpha > np.float32(least), label, part)

    def thin(self, radius: float) -> float:
        """Share of a voxel from which on it is in the mask of a tube of `radius` mm: a third of what it can have."""
        return 0.33 * min(1.0, float(np.pi * radius**2 / np.prod(sorted(self.spacing)[:2])))

    def label(self, box: Box, where: Array, label: int, part: int = 0) -> None:
        """Mark voxels without changing their HU."""
        np.copyto(self.mask[box], np.uint8(label), where=where)
        if label in BIT_OF_ORGAN:
            self.bits[box] |= where.astype(np.uint32) << np.uint32(BIT_OF_ORGAN[label])
        else:
            np.copyto(self.parts[box], np.uint8(part), where=where)

    def splat(self, points: Array, weights: Array, scanner: bool = False) -> tuple[Box, Array]:
        """Volume fraction of points (N, 3) carrying `weights` mm^3 (standard-patient mm unless `scanner`)."""
        if not len(points):
            return (slice(0, 0),) * 3, np.zeros((0, 0, 0), np.float32)
        if not scanner:
            points = self.frame.to_scanner(points)
            weights = weights * f32(np.prod(self.scale))
        columns = np.ascontiguousarray(points.T)  # reductions along short rows are slow
        box = self._slices(columns.min(1) - self.spacing, columns.max(1) + self.spacing)
        shape = tuple(max(0, s.stop - s.start) for s in box)
        if 0 in shape:
            return box, np.zeros(shape, np.float32)
        # A rim of one voxel takes what falls outside, so no index needs a test per corner.
        padded = tuple(n + 2 for n in shape)
        start = np.array([s.start for s in box], np.float32)
        scale = np.float32(1) / f32(self.spacing)
        f = columns * scale[:, None] - (self.origin * scale + start - 1)[:, None]
        f = np.clip(f, 0, f32(np.array(padded) - 1.001)[:, None])
        i = f.astype(np.int32)
        f -= i
        flat = (i[0] * padded[1] + i[1]) * padded[2] + i[2]
        w = (weights / f32(np.prod(self.spacing))).astype(np.float32)
        g = 1 - f
        xy = np.stack([g[0] * g[1], g[0] * f[1], f[0] * g[1], f[0] * f[1]]) * w
        share = np.stack([xy * g[2], xy * f[2]])
        offset = np.array([0, padded[2], padded[1] * padded[2], (padded[1] + 1) * padded[2]])
        corner = flat + np.stack([offset, offset + 1])[:, :, None]
        total = np.bincount(corner.ravel(), share.ravel(), int(np.prod(padded)))
        occupancy = total.reshape(padded)[1:-1, 1:-1, 1:-1].astype(np.float32)
        return box, np.minimum(occupancy, 1)

    @property
    def scale(self) -> tuple[float, float, float]:
        return self.frame.scale

    @property
    def step(self) -> float:
        """Distance of sample points that fills voxels without gaps, in standard-patient mm."""
        return 0.6 * float(min(np.array(self.spacing) / np.array(self.scale)))

    def texture(self, rng: np.random.Generator, pitch: float, box: Box | None = None) -> Array:
        """Smooth noise of unit variance with features of about `pitch` mm, the same field on every grid."""
        return self.grain(rng, pitch)(ALL if box is None else box)

    def grain(self, rng: np.random.Generator, pitch: float) -> Callable[[Box], Array]:
        """`texture` as a function of a box, for what is painted piece by piece."""
        nodes = [int(np.ceil(extent / pitch)) + 3 for extent in (420.0, 420.0, 420.0)]
        field = rng.standard_normal(nodes, dtype=np.float32)
        weights = []
        for axis in self.axes:
            u = (axis + np.float32(210)) / np.float32(pitch) + 1
            # Cubic B-spline weights; columns normalised to unit energy so that the variance stays one.
            d = np.abs(u[:, None] - np.arange(field.shape[0], dtype=np.float32)[None])
            w = np.where(d < 1, 2 / 3 - d * d * (1 - d / 2), np.where(d < 2, (2 - d) ** 3 / 6, 0))
            weights.append((w / np.sqrt(np.maximum((w * w).sum(1, keepdims=True), 1e-12))).astype(np.float32))

        def at(box: Box) -> Array:
            values = field
            for weight, part in zip(weights, box, strict=True):
                # Moves the axis just done to the end: three times is a cycle.
                values = np.tensordot(values, weight[part], axes=(0, 1))
            return values

        return at


@lru_cache(maxsize=256)
def disc(count: int) -> Array:
    """(count, 2) evenly spread points of the unit disc (sunflower pattern)."""
    k = np.arange(count)
    radius = np.sqrt((k + 0.5) / count)
    angle = k * 2.399963
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).astype(np.float32)


def path(knots: Array, step: float) -> Array:
    """Smooth curve through (M, C) knots; the first three columns are mm, sampled every `step` mm -> (N, C)."""
    knots = np.asarray(knots, np.float32)
    if len(knots) > 2:  # Catmull-Rom
        p = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
        t = np.linspace(0, 1, 9, dtype=np.float32)[:-1, None, None]
        a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
        curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
        knots = np.concatenate([curve.transpose(1, 0, 2).reshape(-1, knots.shape[1]), knots[-1:]])
    chord = knots[1:, :3] - knots[:-1, :3]
    arc = np.concatenate([[0], np.cumsum(np.sqrt((chord * chord).sum(1)))])
    count = max(2, int(np.ceil(arc[-1] / step)) + 1)
    at = np.arange(count) * (arc[-1] / (count - 1))
    return np.stack([np.interp(at, arc, knots[:, c]) for c in range(knots.shape[1])], axis=1).astype(np.float32)


def _cross(a: Array, b: Array) -> Array:
    """Cross product of (N, 3) arrays; numpy's own is several times slower on short ones."""
    x = a[:, 1] * b[:, 2] - a[:, 2] * b[:, 1]
    y = a[:, 2] * b[:, 0] - a[:, 0] * b[:, 2]
    return np.stack([x, y, a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]], axis=1)


def tube(curves: list[Array], step: float, flatten: float = 1.0, core: float = 1.0) -> tuple[Array, Array]:
    """Points and weights (mm^3) that fill tubes along `curves`, each (N, 4): x, y, z, radius in mm.

    `flatten` < 1 thins the tubes sideways (in the horizontal plane), as a rib is thinner than it is high; `core` < 1
    fills only the inner part.
    """
    joined = np.concatenate(curves)
    tangent = np.empty_like(joined[:, :3])
    tangent[1:-1] = (joined[2:, :3] - joined[:-2, :3]) * np.float32(0.5)
    ends = np.cumsum([len(c) for c in curves])
    first, last = ends - [len(c) for c in curves], ends - 1
    tangent[first] = joined[first + 1, :3] - joined[first, :3]
    tangent[last] = joined[last, :3] - joined[last - 1, :3]
    length = np.sqrt((tangent * tangent).sum(1))
    radius = joined[:, 3] * np.float32(core)
    return fill_tube(joined[:, :3], tangent / np.maximum(length, 1e-6)[:, None], length, radius, step, flatten)


def fill_tube(
    centre: Array, tangent: Array, length: Array, radius: Array, step: float, flatten: float = 1.0
) -> tuple[Array, Array]:
    """Points and weights (mm^3) of slices `length` mm long at `centre` (N, 3), as fine as each radius needs."""
    helper = np.where(np.abs(tangent[:, 2:3]) < 0.9, f32([[0, 0, 1]]), f32([[1, 0, 0]]))
    side = _cross(tangent, helper)
    side /= np.sqrt((side * side).sum(1, keepdims=True))
    up = _cross(side, tangent)
    side *= np.float32(flatten)
    need = np.ceil(np.pi * radius**2 * flatten / step**2)
    points, weights = [np.zeros((0, 3), np.float32)], [np.zeros(0, np.float32)]
    low = 0
    for count in (1, 3, 6, 12, 24, 48, 96, 400):
        pick = np.flatnonzero((need > low) & ((need <= count) | (count == 400)))
        low = count
        if not len(pick):
            continue
        count = min(count, int(need[pick].max()))
        pattern = disc(count) if count > 1 else np.zeros((1, 2), np.float32)
        spread = side[pick, None] * pattern[None, :, :1] + up[pick, None] * pattern[None, :, 1:]
        points.append((centre[pick, None] + spread * radius[pick, None, None]).reshape(-1, 3))
        weights.append(np.repeat(np.float32(np.pi * flatten) * radius[pick] ** 2 * length[pick] / count, count))
    return np.concatenate(points).astype(np.float32), np.concatenate(weights).astype(np.float32)
