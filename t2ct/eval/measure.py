"""Simple measurements on a chest CT in HU, each with a fixed threshold that turns it into a finding.

No model and no mask: geometry and Hounsfield units. Heights are mm from the centre of a field of view that covers a
whole chest, x and y are mm from the centroid of the body in each slice. Made for grids of about 5.5 x 5.5 x 10 mm,
where structures thinner than two voxels cannot be judged: see `t2ct.eval.listens.visible`.

Consolidation and atelectasis are not among them: on this grid neither could be told from the other, from pleural fluid
and from a large heart with an accuracy of 0.95 by a measurement of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from t2ct.eval.morphology import box_opening, directions, line, opening, outside, over_neighbours, smooth

IN_SLICE = (0, 1)
NODULE_BOX = (27.0, 27.0, 30.0)  # mm: no ball of 30 mm holds such a box, every larger structure does
NODULE_LINE = 38.0  # mm: vessels, plates and septa are longer in some direction, nodules up to 30 mm are not
FLUID = (-30.0, 30.0)  # HU of fluid; unenhanced blood and muscle begin above 35


@dataclass(frozen=True)
class Rule:
    """A finding is present where sign * measurement > sign * threshold."""

    measurement: str
    threshold: float
    unit: str
    sign: int = 1

    def score(self, values: dict[str, float]) -> float:
        """Larger means more of the finding."""
        return self.sign * values[self.measurement]

    def present(self, values: dict[str, float]) -> bool:
        return self.score(values) > self.sign * self.threshold


# Thresholds: best accuracy on 200 phantoms, seeds 200000 to 200199 (the hernia's on 700, to 200699, as its place is);
# checked on others by `t2ct.eval.listens`.
RULES = {
    "pleural effusion": Rule("effusion", 152.0, "ml"),
    "cardiomegaly": Rule("heart width", 0.435, "of chest width"),
    "emphysema": Rule("lung density", -877.0, "HU", -1),
    "lung nodule": Rule("nodule", 459.0, "HU"),
    "pericardial effusion": Rule("pericardial fluid", 119.0, "ml"),
    "arterial wall calcification": Rule("calcification", 303.0, "HU"),
    "hiatal hernia": Rule("gas behind heart", 10.6, "ml"),
}
ANATOMY = ("lung HU", "liver HU", "heart HU", "body HU", "body area")


@dataclass(frozen=True)
class Frame:
    """A volume with the coordinates that all measurements use."""

    hu: np.ndarray  # (X, Y, Z) float32, clipped to +-1000
    spacing: tuple[float, float, float]
    body: np.ndarray  # bool: inside the skin, lungs included
    x: np.ndarray  # mm right of the body's centroid, per slice
    y: np.ndarray  # mm in front of it
    z: np.ndarray  # (Z,) mm above the centre of the field of view

    @property
    def millilitres(self) -> float:
        """Volume of a voxel."""
        return float(np.prod(self.spacing)) / 1000


def frame(hu: np.ndarray, spacing: Sequence[float]) -> Frame:
    """Check a volume and find its body.

    hu: (X, Y, Z) RAS, at least 32 x 32 x 16, any real dtype. spacing: mm, 4 to 8 in the slice and 6 to 14 along z.
    Raises ValueError for anything else and for non-finite numbers.
    """
    hu = np.asarray(hu, np.float32)
    if hu.ndim != 3 or any(n < least for n, least in zip(hu.shape, (32, 32, 16), strict=True)):
        raise ValueError(f"hu: wanted (X, Y, Z) of at least 32 x 32 x 16 voxels, got {hu.shape}")
    if not np.isfinite(hu).all():
        raise ValueError("hu: wanted finite numbers, got some that are not")
    mm = tuple(float(v) for v in spacing)
    limits = ((4, 8), (4, 8), (6, 14))
    if len(mm) != 3 or not all(low <= v <= high for v, (low, high) in zip(mm, limits, strict=True)):
        raise ValueError(f"spacing: wanted 4 to 8 mm in the slice and 6 to 14 mm along z, got {spacing}")
    hu = np.clip(hu, -1000, 1000)
    body = ~outside(hu > -300)  # the couch is less dense than that
    size = body.sum(IN_SLICE)
    centre = [np.zeros(hu.shape[2]), np.zeros(hu.shape[2])]
    index = [np.arange(hu.shape[0])[:, None, None], np.arange(hu.shape[1])[None, :, None]]
    for axis in (0, 1):  # an empty slice has its centre in the middle
        middle = (hu.shape[axis] - 1) / 2
        centre[axis] = np.where(size > 0, (body * index[axis]).sum(IN_SLICE) / np.maximum(size, 1), middle)
    x, y = ((i - c).astype(np.float32) * np.float32(s) for i, c, s in zip(index, centre, mm[:2], strict=True))
    z = (np.arange(hu.shape[2]) - (hu.shape[2] - 1) / 2).astype(np.float32) * np.float32(mm[2])
    full = np.broadcast_to
    return Frame(hu, mm, body, full(x, hu.shape), full(y, hu.shape), z)  # type: ignore[arg-type]


def measure(hu: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """All measurements of a volume (X, Y, Z) in HU, RAS, spacing in mm. Errors as `frame`.

    effusion, effusion right, effusion left   ml of airless tissue in the dependent layer (the larger side; each)
    heart width                               mean width of the heart over the inner width of the chest
    lung density                              HU below which 10 % of the upper lungs lie
    nodule                                    HU by which the most compact blob in the lungs stands out
    pericardial fluid                         ml of fluid density in the front half of the pericardium
    calcification                             HU of the brightest mediastinal voxel above its 95th percentile
    gas behind heart                          ml of gas between heart and spine, where only a hernia brings it
    lung HU, liver HU, heart HU, body HU      mean of aerated lung; median of two organs; mean inside the skin
    body area                                 cm2, mean cross-section
    Always finite: what is not there measures 0.
    """
    f = frame(hu, spacing)
    right, left = (dependent_opacity(f, side) for side in (1, -1))
    return {
        "effusion": max(right, left),
        "effusion right": right,
        "effusion left": left,
        "heart width": heart_width(f),
        "lung density": lung_density(f),
        "nodule": nodule_contrast(f),
        "pericardial fluid": pericardial_fluid(f),
        "calcification": calcification(f),
        "gas behind heart": gas_behind_heart(f),
        **anatomy(f),
    }


def dependent_opacity(f: Frame, side: int) -> float:
    """ml of airless tissue within 30 mm in front of the posterior ribs of one side (1 right, -1 left).

    Fluid sinks to the back of a patient on the couch, where lung lies otherwise. The ribs are the brightest tissue
    along y in the back, over five slices, because a rib crosses a slice only here and there.
    """
    depth = _above_ribs(f)
    lateral = f.x * side
    layer = f.body & (lateral > 35) & (lateral < 110) & (depth > 7) & (depth < 30) & (f.y < 20)
    layer &= (f.z > -85) & (f.z < 35)
    return float((layer & (f.hu > -300)).sum()) * f.millilitres


def _above_ribs(f: Frame) -> np.ndarray:
    """mm in front of the posterior ribs, per column (x, z)."""
    over_slices = over_neighbours(over_neighbours(f.hu, np.maximum, (2,)), np.maximum, (2,))
    ribs = np.where(f.body & (f.y < -25), over_slices, -2000).argmax(1)
    return (np.arange(f.hu.shape[1])[None, :, None] - ribs[:, None, :]) * f.spacing[1]


def heart_width(f: Frame) -> float:
    """Mean width of the heart over the inner width of the chest: like the cardiothoracic ratio, but averaged.

    The width of a row is that of the muscle and blood from the midline to both sides, gaps of two voxels (fat in the
    grooves) bridged. They lie above 24 HU and fluid around the heart below; where the whole heart is darker, as in a
    model whose HU are off, 30 HU below its median is the limit. Rows through the middle of the heart, 40 mm below the
    centre to 20 mm above it.
    """
    limit = min(24.0, _statistic(f.hu[_heart_core(f)], np.median) - 30)
    dense = smooth(f.hu, IN_SLICE)
    slices = np.flatnonzero((f.z > -40) & (f.z < 20))
    widths = []
    for k in slices:
        middle = int(np.abs(f.x[:, 0, k]).argmin())
        for j in np.flatnonzero((f.y[0, :, k] > -5) & (f.y[0, :, k] < 50)):
            row = dense[:, j, k]
            widths.append(f.spacing[0] * (_reach(row[middle + 1 :], limit) + _reach(row[:middle][::-1], limit)))
    chest = _inner_width(f, slices)
    return float(np.mean(widths)) / chest if widths and chest > 0 else 0.0


def _heart_core(f: Frame) -> np.ndarray:
    """Voxels that are heart in every chest."""
    return f.body & (np.abs(f.x + 25) < 35) & (np.abs(f.y - 21) < 25) & (f.z > -30) & (f.z < 10)


def _reach(row: np.ndarray, limit: float, gap: int = 2) -> int:
    """How many voxels from the start the last one above `limit` lies; bridges gaps, but not lung."""
    last = 0
    for k, value in enumerate(row, start=1):
        if value > limit:
            last = k
        elif k - last > gap or value < -400:
            break
    return last


def _inner_width(f: Frame, slices: np.ndarray) -> float:
    """mm between the ribs of both sides, median over slices."""
    over_slices = over_neighbours(over_neighbours(f.hu, np.maximum, (2,)), np.maximum, (2,))
    wall = np.where(f.body & (np.abs(f.y) < 30), over_slices, -2000).max(1)
    x = f.x[:, 0, :]
    ribs = [np.where(x * side > 75, wall, -3000).argmax(0)[slices] for side in (1, -1)]
    thickness = 12.0  # of a rib
    return float(np.median(ribs[0]) - np.median(ribs[1])) * f.spacing[0] - thickness


def lung_density(f: Frame) -> float:
    """HU below which 10 % of the upper lungs lie ("percentile density").

    Taken after a mean over 3 x 3 x 3 voxels, against noise; airways beside the midline and the lungs' border left out.
    """
    calm = smooth(f.hu)
    lung = f.body & (f.hu < -500) & (calm < -720) & (np.abs(f.x) > 35) & (f.z > 0)
    return _statistic(calm[lung], lambda v: np.percentile(v, 10))


def nodule_contrast(f: Frame) -> float:
    """HU by which the most compact small blob in the lungs stands out from all larger or longer structures.

    What a box holds is taken away (organs, wall), then what a line in any direction holds (vessels, plates). The rest
    is averaged over 3 x 3 voxels. Outside counts as wall; midline and hila, full of vessels, are left out.
    """
    size = [2 * int(round(mm / s / 2 - 0.5)) + 1 for mm, s in zip(NODULE_BOX, f.spacing, strict=True)]
    soft = np.where(f.body, np.clip(f.hu, -850, 50), np.float32(50))
    small = soft - box_opening(soft, size)
    long = np.maximum.reduce([opening(small, line(d, NODULE_LINE, f.spacing)) for d in directions()])
    contrast = smooth(small - long, IN_SLICE)
    lateral = np.abs(f.x)
    hilum = (lateral < 50) & (f.z > -35) & (f.z < 45) & (f.y < 15)
    where = f.body & (lateral > 38) & ~hilum & (f.z > -95) & (f.z < 110)
    return float(contrast[where].max(initial=0.0))


def pericardial_fluid(f: Frame) -> float:
    """ml of fluid density in the front half of the pericardium, an ellipse left of the midline; behind it pleural fluid
    could be mistaken. Voxels that touch lung are left out: their HU is that of a mixture."""
    ellipse = ((f.x + 25) / 95) ** 2 + ((f.y - 21) / 60) ** 2 < 1
    solid = over_neighbours(f.hu > -300, np.logical_and, IN_SLICE)
    fluid = (f.hu > FLUID[0]) & (f.hu < FLUID[1])
    here = f.body & ellipse & (f.y > -10) & (f.z > -45) & (f.z < 25)
    return float((here & solid & fluid).sum()) * f.millilitres


def calcification(f: Frame) -> float:
    """HU of the brightest voxel of the mediastinum in front of the spine above the 95th percentile there, which is that
    of contrast medium if there is any."""
    here = f.body & (np.abs(f.x) < 45) & (f.y > -25) & (f.y < 55) & (f.z > -70) & (f.z < 90)
    return _statistic(f.hu[here], lambda v: v.max() - np.percentile(v, 95))


def gas_behind_heart(f: Frame) -> float:
    """ml of gas at the midline between the heart and the spine, above the diaphragm. A stomach there holds gas; lung
    lies at both sides of it, close by, and the trachea has divided higher up."""
    here = f.body & (f.x > -15) & (f.x < 10) & (f.y > -50) & (f.y < -10) & (f.z > -80) & (f.z < -20)
    return float((here & (f.hu < -200)).sum()) * f.millilitres


def anatomy(f: Frame) -> dict[str, float]:
    """HU of lung, liver and heart, mean HU inside the skin, and cm2 of the body's mean cross-section."""
    lung = f.body & (f.hu < -500) & (np.abs(f.x) > 35) & (f.z > -60) & (f.z < 90)
    liver = f.body & (f.x > 40) & (f.x < 85) & (f.y > -20) & (f.y < 45) & (f.z > -145) & (f.z < -100)
    return {
        "lung HU": _statistic(f.hu[lung], np.mean),
        "liver HU": _statistic(f.hu[liver], np.median),
        "heart HU": _statistic(f.hu[_heart_core(f)], np.median),
        "body HU": _statistic(f.hu[f.body], np.mean),
        "body area": float(f.body.sum()) / f.hu.shape[2] * f.spacing[0] * f.spacing[1] / 100,
    }


def _statistic(values: np.ndarray, of) -> float:
    """of(values), or 0 for a handful of voxels that say nothing."""
    return float(of(values)) if values.size >= 20 else 0.0
