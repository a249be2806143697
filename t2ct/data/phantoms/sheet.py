"""A sheet of phantoms to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from t2ct.data.phantoms.phantom import Phantom

WINDOWS = {"lung": (-600, 1500), "soft": (40, 400), "bone": (400, 1800), "wide": (-250, 1500)}


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
    rows = -(-len(tiles) // columns)
    wide = max(t.width for t in tiles)
    sheet = Image.new("L", (columns * (wide + 4), rows * (height + 16)))
    for k, tile in enumerate(tiles):
        sheet.paste(tile, ((k % columns) * (wide + 4), (k // columns) * (height + 16)))
    sheet.save(path)
    return made
