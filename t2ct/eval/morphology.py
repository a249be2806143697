"""Grey-scale morphology on small volumes with numpy alone: neighbourhood means, erosion, dilation, openings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Offset = tuple[int, int, int]


def over_neighbours(volume: np.ndarray, combine: Callable[..., np.ndarray], axes: Sequence[int]) -> np.ndarray:
    """Combine every voxel with its two neighbours along each of `axes` in turn; edges are repeated."""
    for axis in axes:
        middle = np.moveaxis(volume, axis, 0)
        before, after = np.concatenate([middle[:1], middle[:-1]]), np.concatenate([middle[1:], middle[-1:]])
        volume = np.moveaxis(combine(combine(before, middle), after), 0, axis)
    return volume


def smooth(volume: np.ndarray, axes: Sequence[int] = (0, 1, 2)) -> np.ndarray:
    """Mean over 3 voxels along each of `axes`."""
    return over_neighbours(volume, np.add, axes) / np.float32(3 ** len(axes))


def shifted(volume: np.ndarray, offset: Offset, fill: float) -> np.ndarray:
    """out[i + offset] = volume[i]; `fill` where nothing comes from."""
    out = np.full_like(volume, fill)
    to = tuple(slice(max(k, 0), n + min(k, 0)) for n, k in zip(volume.shape, offset, strict=True))
    come = tuple(slice(max(-k, 0), n + min(-k, 0)) for n, k in zip(volume.shape, offset, strict=True))
    out[to] = volume[come]
    return out


def opening(volume: np.ndarray, element: Iterable[Offset]) -> np.ndarray:
    """The brightest that fits: minimum over `element`, then maximum over its mirror. Beyond the edge lies nothing."""
    offsets = list(element)
    eroded = np.minimum.reduce([shifted(volume, (-i, -j, -k), np.inf) for i, j, k in offsets])
    return np.maximum.reduce([shifted(eroded, offset, -np.inf) for offset in offsets])


def box_opening(volume: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """`opening` by a box of odd `size`, axis by axis."""
    for combine, fill in ((np.minimum, np.inf), (np.maximum, -np.inf)):
        for axis, n in enumerate(size):
            steps = [tuple(k if a == axis else 0 for a in range(3)) for k in range(-(n // 2), n // 2 + 1)]
            volume = combine.reduce([shifted(volume, step, fill) for step in steps])  # type: ignore[arg-type]
    return volume


def line(direction: Sequence[float], length: float, spacing: Sequence[float]) -> list[Offset]:
    """Offsets of the voxels of a line of `length` mm through the origin."""
    unit = np.asarray(direction, float) / np.linalg.norm(direction)
    points = np.linspace(-length / 2, length / 2, int(2 * length / min(spacing)) + 1)[:, None] * unit / spacing
    return sorted({(int(i), int(j), int(k)) for i, j, k in np.rint(points)})


def directions() -> list[tuple[float, float, float]]:
    """25 directions over the half sphere: a line has no front or back."""
    out = [(0.0, 0.0, 1.0)]
    for elevation, count in ((0, 4), (25, 8), (60, 4)):
        full = np.pi if elevation == 0 else 2 * np.pi
        up = np.radians(elevation)
        for turn in np.arange(count) / count * full:
            out.append((float(np.cos(up) * np.cos(turn)), float(np.cos(up) * np.sin(turn)), float(np.sin(up))))
    return out


def outside(tissue: np.ndarray) -> np.ndarray:
    """Per slice (last axis): the voxels that are not `tissue` and connected to the slice's edge, diagonals included."""
    free = ~tissue
    reached = np.zeros_like(free)
    reached[[0, -1]] = reached[:, [0, -1]] = True
    reached &= free
    while True:
        grown = over_neighbours(reached, np.logical_or, (0, 1)) & free
        if np.array_equal(grown, reached):
            return reached
        reached = grown
