"""A gallery: reports, what a model makes of them, what they were written about, and the training volume nearest to it.

`python -m t2ct.eval.gallery gallery.png` draws one of the model in the package.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from t2ct.data.phantoms.sheet import view
from t2ct.data.preview import BACKGROUND, GAP, MARGIN, MUTED, TEXT, font
from t2ct.eval.look import PIXELS
from t2ct.eval.make import Maker
from t2ct.eval.metrics.memorisation import nearest
from t2ct.eval.sets import open_sets
from t2ct.files import check_outputs, write_files
from t2ct.pipeline import T2CTPipeline
from t2ct.train.data.source import Source

VIEWS = (("coronal", 0.52, "wide"), ("axial", 0.5, "lung"), ("axial", 0.4, "soft"))  # plane, where, window
HEIGHT = 150  # of a view, pixels
LINE = 19
GREYS = 64  # of the file: nobody sees more, and it is half as large
LETTERS = 190  # of the report, a line
LINES = 9
COLUMNS = ("generated", "what the report is of", "nearest training volume")


@dataclass(frozen=True)
class Shown:
    """A row: report, three volumes (X, Y, Z) int16 HU, name of the nearest, and its distance: root mean square of the
    difference in HU on a coarse grid, that of the nearest to a real volume for comparison."""

    report: str
    volumes: tuple[np.ndarray, np.ndarray, np.ndarray]
    nearest: str
    distance: float
    unseen_distance: float


def gallery(
    path: str | Path, model: str | Path | None = None, *, data: str | Path = "phantoms:100",
    picks: Sequence[int] = range(6), known: int = 400, steps: int = 30, guidance: float = 5.0,
    device: str | None = None, overwrite: bool = False, quiet: bool = False,
) -> list[Shown]:  # fmt: skip
    """Draw a PNG with a row for each report that `picks` names, and return the rows.

    model: a folder as `save_pretrained` leaves it; default the model in the package. data: as of `t2ct.eval.evaluate`,
    of which the first `known` training volumes are searched for the nearest; the model in the package learnt from
    phantoms of these seeds as an earlier revision drew them. All volumes are shown on the model's grid. Report i is
    generated from the seed i.
    Raises FileNotFoundError, FileExistsError, IndexError or ValueError before anything is generated.
    """
    if known < 1:
        raise ValueError(f"known: wanted at least 1 training volume, got {known}")
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: wanted a file named .png, got {str(path)!r}")
    check_outputs([path], overwrite=overwrite)
    pipe = T2CTPipeline.from_pretrained(model, device=device)
    sets = open_sets(data, pipe.size, train_count=known)
    wrong = [i for i in picks if not 0 <= i < len(sets.test)]
    if wrong or not len(picks):
        raise IndexError(f"picks: wanted reports from 0 to {len(sets.test) - 1}, got {list(picks)}")
    if sets.train is None:
        raise ValueError(f"data: wanted training volumes beside those to evaluate, got none in {data}")
    maker = Maker(pipe, [sets.test.entries[i].texts[0] for i in range(len(sets.test))])
    real = [sets.test.read(i).hu for i in picks]
    kept = np.stack([coarse(sets.train.read(i).hu) for i in tqdm(range(len(sets.train)), "reading", disable=quiet)])
    made = [maker.make(i, i + 1, steps, guidance)[0].hu for i in tqdm(picks, "generating", disable=quiet)]
    index, distance = nearest(np.stack([coarse(hu) for hu in made]), kept)
    unseen = nearest(np.stack([coarse(hu) for hu in real]), kept)[1]
    rows = [_row(sets.train, maker.prompts[i], made[n], real[n], int(index[n]), float(distance[n]), float(unseen[n]))
            for n, i in enumerate(picks)]  # fmt: skip
    buffer = io.BytesIO()
    picture = draw(rows, pipe.spacing, f"{sets.train.entries[0].name} and {len(sets.train) - 1} more")
    picture.quantize(GREYS).save(buffer, "PNG", optimize=True)
    write_files({path: buffer.getvalue()})
    return rows


def coarse(hu: np.ndarray) -> np.ndarray:
    """hu (X, Y, Z) -> the means of `PIXELS` parts, flat."""
    x = torch.from_numpy(np.ascontiguousarray(hu)).float()[None, None]
    return F.adaptive_avg_pool3d(x, PIXELS).flatten().numpy()


def _row(
    train: Source, report: str, made: np.ndarray, real: np.ndarray, index: int, distance: float, unseen: float
) -> Shown:
    entry = train.entries[index]
    return Shown(report, (made, real, train.read(index).hu), entry.name, distance, unseen)


def draw(rows: Sequence[Shown], spacing: Sequence[float], searched: str) -> Image.Image:
    """The rows as a picture: above each its report, below each how near the nearest is."""
    tiles = [[_tile(hu, spacing) for hu in row.volumes] for row in rows]
    wide, high = tiles[0][0].size
    texts = [_wrapped(row.report) for row in rows]
    heights = [LINE * (len(text) + 3) + high + GAP for text in texts]
    picture = Image.new("RGB", (2 * MARGIN + 3 * wide + 2 * GAP, 2 * MARGIN + sum(heights)), BACKGROUND)
    pen, top = ImageDraw.Draw(picture), MARGIN
    for row, tile, text, height in zip(rows, tiles, texts, heights, strict=True):
        for k, line in enumerate(text):
            pen.text((MARGIN, top + LINE * k), line, TEXT, font(15))
        y = top + LINE * len(text)
        for k, (name, one) in enumerate(zip(COLUMNS, tile, strict=True)):
            x = MARGIN + k * (wide + GAP)
            pen.text((x, y + 3), name if k < 2 else f"{name}: {row.nearest}", MUTED, font(13))
            picture.paste(one, (x, y + LINE + 3))
        told = (
            f"nearest of {searched}: {row.distance:.0f} HU away (root mean square on {'x'.join(map(str, PIXELS))} "
            f"parts); the volume the report is of is {row.unseen_distance:.0f} HU from its own nearest"
        )
        pen.text((MARGIN, y + LINE + high + 5), told, MUTED, font(13))
        top += height
    return picture


def _tile(hu: np.ndarray, spacing: Sequence[float]) -> Image.Image:
    views = [view(hu, spacing, plane, at, window, HEIGHT) for plane, at, window in VIEWS]
    tile = Image.new("RGB", (sum(v.width for v in views), HEIGHT))
    left = 0
    for v in views:
        tile.paste(v, (left, 0))
        left += v.width
    return tile


def _wrapped(report: str) -> list[str]:
    lines = textwrap.wrap(report, LETTERS)
    return lines if len(lines) <= LINES else [*lines[: LINES - 1], lines[LINES - 1] + " …"]


def main(arguments: Sequence[str] | None = None) -> Any:
    """The command line."""
    parser = argparse.ArgumentParser("python -m t2ct.eval.gallery", description=__doc__)
    parser.add_argument("path", type=Path, help="the PNG to write")
    parser.add_argument("--model", type=Path, help="a model's folder; default: the model in the package")
    parser.add_argument("--data", default="phantoms:100", help="phantoms:N, or a folder with volumes and reports")
    parser.add_argument("--picks", type=int, nargs="+", default=range(6), help="which reports (default: 0 to 5)")
    parser.add_argument("--known", type=int, default=400, help="training volumes that are searched (default: 400)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--device")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    return gallery(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
