"""Sheets of phantoms to look at: a few patients; or every finding, present, absent and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from t2ct.data.phantoms.findings import FINDINGS, Finding

if TYPE_CHECKING:
    from PIL import Image

    from t2ct.data.phantoms.phantom import Phantom

WINDOWS = {"lung": (-600, 1500), "soft": (40, 400), "bone": (400, 1800), "wide": (-250, 1500),
           "metal": (900, 2400), "calcium": (350, 1100),
           "emphysema": (-820, 420), "mosaic": (-760, 520)}  # fmt: skip
SHEET_SIZE = (256, 256, 96)


def view(hu: np.ndarray, spacing: Sequence[float], plane: str, at: float, window: str, height: int) -> Image.Image:
    """One slice as a grey picture, patient's right on the left. `at` is 0…1 along the axis across the plane."""
    from PIL import Image

    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    index = int(np.clip(round(at * (hu.shape[axis] - 1)), 0, hu.shape[axis] - 1))
    cut = np.take(hu, index, axis)
    u, v = [k for k in range(3) if k != axis]
    centre, width = WINDOWS[window]
    grey = np.clip((cut - (centre - width / 2)) / width * 255, 0, 255).astype(np.uint8)
    # Both axes point the other way on a picture: rows go down, and the viewer faces the patient.
    picture = Image.fromarray(np.ascontiguousarray(grey.T[::-1, ::-1]))
    mm_wide, mm_high = cut.shape[0] * spacing[u], cut.shape[1] * spacing[v]
    return picture.resize((max(1, round(height * mm_wide / mm_high)), height), Image.Resampling.BICUBIC)


def contact_sheet(seeds: Sequence[int], path: str | Path, height: int = 170, **options: object) -> list[Phantom]:
    """Write a PNG with a coronal and two axial views (lung and soft-tissue windows) per seed; returns the phantoms.

    `options` go to `phantom` (findings, size, spacing).
    """
    from PIL import Image, ImageDraw

    from t2ct.data.phantoms.phantom import phantom

    made = [phantom(int(seed), **options) for seed in seeds]  # type: ignore[arg-type]
    tiles = []
    for p in made:
        spacing = [float(v) for v in np.diag(p.affine)[:3]]
        views = [("coronal", 0.52, "wide"), ("axial", 0.56, "lung"), ("axial", 0.42, "lung"), ("axial", 0.42, "soft")]
        pictures = [view(p.hu, spacing, plane, at, window, height) for plane, at, window in views]
        tile = Image.new("L", (sum(q.width for q in pictures), height + 14))
        left = 0
        for q in pictures:
            tile.paste(q, (left, 0))
            left += q.width
        words = "; ".join(" ".join(str(v) for v in f.as_dict().values()) for f in p.present) or "normal"
        ImageDraw.Draw(tile).text((2, height + 1), f"{p.seed}: {words}"[: tile.width // 6], fill=255)
        tiles.append(tile)
    columns = 2 if len(tiles) > 1 else 1
    _grid(tiles, columns).save(path)
    return made


@dataclass(frozen=True)
class Shot:
    """How a finding is shown: what is asked for, through which plane, in which window, how many mm of the patient."""

    plane: str
    window: str
    wide: float  # mm across the picture; 0 shows all
    ask: dict[str, object]
    patient: int = 0  # added to the seed
    through: bool = False  # the brightest along each ray instead of one slice, as wires need
    middle: bool = False  # the plane through the middle of the finding instead of that with most of it


SHOTS = {
    "medical material": Shot("coronal", "metal", 0, {"kind": "pacemaker", "side": "left"}, 2, through=True),
    "arterial wall calcification": Shot("axial", "calcium", 200, {"size": "severe"}, 9),
    "cardiomegaly": Shot("coronal", "wide", 0, {"size": "severe"}),
    "pericardial effusion": Shot("axial", "soft", 240, {"size": "large"}, 3, middle=True),
    "coronary artery wall calcification": Shot("axial", "calcium", 170, {"size": "severe", "kind": "multivessel"}, 5),
    "hiatal hernia": Shot("axial", "soft", 240, {"size": "large"}, 4),
    "lymphadenopathy": Shot("axial", "soft", 200, {"kind": "paratracheal", "size": "severe"}, 3),
    "emphysema": Shot("coronal", "emphysema", 0, {"size": "severe", "kind": "centrilobular"}),
    "atelectasis": Shot("axial", "lung", 0, {"kind": "lobar", "side": "left"}, 1),
    "lung nodule": Shot("axial", "lung", 0, {"size_mm": 22, "side": "right", "lobe": "upper", "count": 1}),
    "lung opacity": Shot("axial", "lung", 0, {"size": "extensive", "side": "bilateral", "lobe": "lower"}, 1),
    "pulmonary fibrotic sequela": Shot("coronal", "lung", 240, {"size": "severe", "side": "right", "lobe": "upper"}, 2),
    "pleural effusion": Shot("axial", "soft", 0, {"size": "moderate", "side": "right"}),
    "mosaic attenuation pattern": Shot("axial", "mosaic", 0, {"size": "severe"}),
    "peribronchial thickening": Shot("axial", "lung", 200, {"size": "severe"}, 1),
    "consolidation": Shot("axial", "lung", 0, {"size": "lobar", "side": "right", "lobe": "lower"}, 2),
    "bronchiectasis": Shot("axial", "lung", 200, {"size": "severe", "side": "right", "lobe": "lower",
                                                  "kind": "cylindrical"}, 1),
    "interlobular septal thickening": Shot("axial", "lung", 0, {"size": "severe"}, 1),
}  # fmt: skip


def finding_sheet(
    path: str | Path,
    names: Sequence[str] | None = None,
    seed: int = 0,
    tile: int = 176,
    size: tuple[int, int, int] = SHEET_SIZE,
    columns: int = 3,
    levels: int = 256,
    asked: Sequence[Finding] | None = None,
) -> list[Phantom]:
    """Write a PNG that shows findings present, absent in the same patient, and what the finding changed.

    names: findings of `FINDINGS`, all 18 by default. tile: pixels of a picture. size: voxels. columns: findings side by
    side. levels: shades of grey; fewer make a smaller file. asked: findings to draw instead of the clear cases of
    `SHOTS`, where they say more than the name. Returns the phantoms that have the findings. About two
    seconds for a phantom of 256 x 256 x 80. Raises ValueError for an unknown name.
    """
    from PIL import Image, ImageDraw
    from tqdm import tqdm

    from t2ct.data.phantoms.phantom import phantom

    names = list(SHOTS) if names is None else list(names)
    unknown = [name for name in names if name not in FINDINGS]
    if unknown:
        raise ValueError(f"names: wanted some of {list(FINDINGS)}, got {unknown[0]!r}")
    strips, made = [], []
    for name in tqdm(names, desc="findings", leave=False):
        shot = SHOTS[name]
        wanted = [f for f in asked or () if f.name == name and len(f.as_dict()) > 1]
        ill = phantom(seed + shot.patient, wanted or [{"name": name, **shot.ask}], size)
        well = phantom(seed + shot.patient, [], size)
        strip = Image.new("L", (3 * tile + 4, tile + 13))
        for k, picture in enumerate(_three(ill, well, name, shot, tile)):
            strip.paste(picture, (k * (tile + 2), 0))
        ImageDraw.Draw(strip).text((2, tile + 1), f"{name}: present, absent, difference", fill=255)
        strips.append(strip)
        made.append(ill)
    sheet = _grid(strips, min(columns, len(strips)))
    if levels < 256:
        sheet = sheet.quantize(levels, dither=Image.Dither.NONE)
    sheet.save(path, optimize=True)
    return made


def _three(ill: Phantom, well: Phantom, name: str, shot: Shot, tile: int) -> list[Image.Image]:
    """Present, absent, difference through the middle of the finding."""
    axis = {"sagittal": 0, "coronal": 1, "axial": 2}[shot.plane]
    where = ill.finding_mask(name)
    change = np.abs(ill.hu.astype(np.float32) - well.hu) * (where if where.any() else 1)
    across = tuple(k for k in range(3) if k != axis)
    amount = change.sum(across)
    index = int((amount * np.arange(len(amount))).sum() / amount.sum()) if shot.middle else int(amount.argmax())
    spacing = np.diag(ill.affine)[:3]
    cuts = [v.max(axis) if shot.through else np.take(v, index, axis) for v in (ill.hu, well.hu)]
    cuts = [cut.astype(np.float32) for cut in cuts]
    weight = np.take(change, index, axis)
    middle = [float((weight.sum(1 - k) * np.arange(weight.shape[k])).sum() / max(weight.sum(), 1e-6)) for k in (0, 1)]
    mm = spacing[list(across)]
    body = np.argwhere(np.take(well.mask, index, axis) > 0)
    if not shot.wide:
        middle = [float(v) for v in 0.5 * (body.min(0) + body.max(0))] if len(body) else middle
    wide = shot.wide or 352.0
    centre, width = WINDOWS[shot.window]
    greys = [(cut - (centre - width / 2)) / width * 255 for cut in cuts]
    greys.append(128 + (cuts[0] - cuts[1]) * np.float32(255 / min(width, 1400)))
    air = int(np.clip((-1000 - (centre - width / 2)) / width * 255, 0, 255))
    return [_crop(grey, middle, mm, wide, tile, 128 if k == 2 else air) for k, grey in enumerate(greys)]


def _crop(
    grey: np.ndarray, middle: Sequence[float], mm: np.ndarray, wide: float, tile: int, outside: int
) -> Image.Image:
    """A square of `wide` mm around `middle` (voxels), as a picture of `tile` pixels."""
    from PIL import Image

    half = [wide / 2 / s for s in mm]
    pad = [int(np.ceil(h)) + 1 for h in half]
    padded = np.pad(np.clip(grey, 0, 255), [(p, p) for p in pad], constant_values=outside).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(padded.T[::-1, ::-1]))
    # In the picture both axes are turned round.
    x, y = (padded.shape[k] - (middle[k] + pad[k] + 0.5) for k in (0, 1))
    box = (x - half[0], y - half[1], x + half[0], y + half[1])
    return picture.resize((tile, tile), Image.Resampling.BICUBIC, box=box)


def _grid(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    from PIL import Image

    rows = -(-len(tiles) // columns)
    wide, high = max(t.width for t in tiles), max(t.height for t in tiles)
    sheet = Image.new("L", (columns * (wide + 4), rows * (high + 2)))
    for k, tile in enumerate(tiles):
        sheet.paste(tile, ((k % columns) * (wide + 4), (k // columns) * (high + 2)))
    return sheet
