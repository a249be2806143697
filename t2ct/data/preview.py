"""A volume as one picture: three planes in lung, mediastinal and bone windows, as radiology shows them."""

from __future__ import annotations

import functools
import io
import math
import unicodedata
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from t2ct.data.volume import Volume

WIDTH = 1120  # of the picture, pixels
MARGIN = 28
GAP = 10
MAX_PANEL_HEIGHT = 560

BACKGROUND = (13, 16, 21)
EDGE = (38, 44, 54)
TEXT = (236, 239, 244)
MUTED = (139, 148, 163)
SOFT = (196, 203, 214)  # small print on top of the CT
MARK = (232, 196, 110)  # orientation letters and scale bars: must stand out from every grey of the CT

# What the built-in font lacks and Unicode's decomposition does not resolve.
PLAIN = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "−": "-", "‑": "-", "’": "'", "‘": "'", "“": '"', "”": '"'}
    | {"ß": "ss", "ı": "i", "ø": "o", "≥": ">=", "≤": "<=", "…": "..."}
)

TISSUE = -300  # HU; above it lies body (and table), below it air, lung and bedding


class Window(NamedTuple):
    """HU shown from black to white: `level` ± `width` / 2."""

    name: str
    width: int
    level: int


WINDOWS = (Window("Lung", 1500, -600), Window("Mediastinum", 400, 40), Window("Bone", 1500, 300))


class Plane(NamedTuple):
    """A slice as displayed: volume axis `horizontal` runs along the picture's width, `vertical` along its height."""

    name: str
    axis: int
    horizontal: int
    vertical: int
    flip_horizontal: bool
    letters: tuple[str, str, str, str]  # left, right, top, bottom


# Radiological convention: the viewer faces the patient, or looks from the feet, so the patient's right is on the left
# of the picture. Rows of a picture run downwards, while y and z grow to anterior and superior, which belong on top:
# every plane is flipped vertically.
PLANES = (
    Plane("Axial", axis=2, horizontal=0, vertical=1, flip_horizontal=True, letters=("R", "L", "A", "P")),
    Plane("Coronal", axis=1, horizontal=0, vertical=2, flip_horizontal=True, letters=("R", "L", "H", "F")),
    Plane("Sagittal", axis=0, horizontal=1, vertical=2, flip_horizontal=True, letters=("A", "P", "H", "F")),
)


def render(volume: Volume, *, center: tuple[float, float, float] | None = None) -> Image.Image:
    """Draw `volume` as an RGB picture of 1120 pixels width: one row per window, one column per plane, all at one scale.

    Args:
        volume: what to draw, with its prompt, seed and provenance in the heading.
        center: where the three planes cross, in voxel indices (x, y, z); by default the centre of the body.

    Raises ValueError for a `center` outside the volume.
    """
    index = _slice_indices(volume, center)
    extent = [size * step for size, step in zip(volume.shape, volume.spacing, strict=True)]
    widths_mm = [extent[plane.horizontal] for plane in PLANES]
    height_mm = max(extent[plane.vertical] for plane in PLANES)
    room = WIDTH - 2 * MARGIN - GAP * (len(PLANES) - 1)
    pixels_per_mm = min(room / sum(widths_mm), MAX_PANEL_HEIGHT / height_mm)
    row_height = max(1, round(height_mm * pixels_per_mm))
    # Room that tall volumes leave free goes evenly into the columns.
    spare = (room - sum(widths_mm) * pixels_per_mm) / len(PLANES)

    heading = _heading(volume)
    top = MARGIN + sum(line.height for line in heading) + 40
    picture = Image.new("RGB", (WIDTH, top + len(WINDOWS) * (row_height + GAP) + 36), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    _draw_heading(draw, heading)

    left = float(MARGIN)
    for plane, width_mm in zip(PLANES, widths_mm, strict=True):
        cell_width = round(width_mm * pixels_per_mm + spare)
        position = _position_mm(volume, plane.axis, index)
        draw.text((left, top - 8), plane.name, TEXT, font(16), anchor="ls")
        draw.text(
            (left + cell_width, top - 8), f"{'xyz'[plane.axis]} = {position:.0f} mm", MUTED, font(13), anchor="rs"
        )
        size = (max(1, round(width_mm * pixels_per_mm)), max(1, round(extent[plane.vertical] * pixels_per_mm)))
        slice_hu = _slice(volume, plane, index[plane.axis])
        for row, window in enumerate(WINDOWS):
            cell = (
                round(left),
                top + row * (row_height + GAP),
                round(left) + cell_width,
                top + row * (row_height + GAP) + row_height,
            )
            _draw_panel(picture, cell, _window(slice_hu, window, size), window, plane, pixels_per_mm)
        left += cell_width + GAP

    bottom = picture.height - 18
    notice = "SYNTHETIC, not for diagnosis" if volume.synthetic else "Not for diagnosis"
    draw.text((MARGIN, bottom), notice, MARK, font(13), anchor="ls")
    draw.text(
        (WIDTH - MARGIN, bottom), "Radiological view: the patient's right is on the left", MUTED, font(13), anchor="rs"
    )
    return picture


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def body_center(hu: np.ndarray) -> tuple[float, float, float]:
    """Centre of the body in `hu` (X, Y, Z) in voxel indices: along each axis half way between where 2 % and 98 % of the
    tissue lie.

    The middle of the extent rather than the centre of mass, which a large effusion or the liver would pull aside; the 2
    % keep the table out.
    """
    tissue = hu > TISSUE
    if not tissue.any():
        x, y, z = ((size - 1) / 2 for size in hu.shape)
        return x, y, z
    middle = []
    for axis in range(3):
        profile = tissue.sum(axis=tuple(other for other in range(3) if other != axis))
        share = np.cumsum(profile) / profile.sum()
        middle.append(float(np.searchsorted(share, 0.02) + np.searchsorted(share, 0.98)) / 2)
    return middle[0], middle[1], middle[2]


def scale_bar_mm(width_mm: float) -> float:
    """Length of the scale bar in a panel of `width_mm`: the longest 1, 2 or 5 × 10ⁿ mm within a third of it."""
    power = 10.0 ** math.floor(math.log10(width_mm / 3))
    return max(step * power for step in (1, 2, 5) if step * power <= width_mm / 3)


def _slice_indices(volume: Volume, center: tuple[float, float, float] | None) -> tuple[int, ...]:
    if center is None:
        center = body_center(volume.hu)
    try:
        inside = all(0 <= value <= size - 1 for value, size in zip(center, volume.shape, strict=True))
    except (TypeError, ValueError):  # no numbers, or not three of them
        inside = False
    if not inside:
        raise ValueError(f"center: wanted three voxel indices inside {volume.shape}, got {center}")
    return tuple(round(value) for value in center)


def _position_mm(volume: Volume, axis: int, index: tuple[int, ...]) -> float:
    return float((volume.affine @ [*index, 1.0])[axis])


def _slice(volume: Volume, plane: Plane, index: int) -> np.ndarray:
    """One plane in HU as float32 (rows downwards, columns), oriented for display."""
    values = np.take(volume.hu, index, axis=plane.axis).astype(
        np.float32
    )  # the remaining axes keep their order: horizontal, vertical
    rows = values.T[::-1]
    return rows[:, ::-1] if plane.flip_horizontal else rows


def _window(slice_hu: np.ndarray, window: Window, size: tuple[int, int]) -> Image.Image:
    """`slice_hu` resampled to `size` (width, height) as a grey picture."""
    # Windowed after interpolation, or smooth edges become steps. Clipped before it, but one window's width further out,
    # or cubic interpolation overshoots from lung to soft tissue by a visible part of the narrow mediastinal window and
    # draws a white rim around the lungs.
    black = window.level - window.width / 2
    near = np.clip(slice_hu, black - window.width, black + 2 * window.width)
    smooth = Image.fromarray(np.ascontiguousarray(near)).resize(size, Image.Resampling.BICUBIC)
    grey = np.clip((np.asarray(smooth) - black) / window.width, 0, 1)
    return Image.fromarray(np.rint(grey * 255).astype(np.uint8))


def _draw_panel(
    picture: Image.Image,
    cell: tuple[int, int, int, int],
    grey: Image.Image,
    window: Window,
    plane: Plane,
    pixels_per_mm: float,
) -> None:
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = cell
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=(0, 0, 0))
    picture.paste(grey, (x0 + (x1 - x0 - grey.width) // 2, y0 + (y1 - y0 - grey.height) // 2))
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=EDGE)

    middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
    left, right, upper, lower = plane.letters
    for letter, place, anchor in (
        (left, (x0 + 9, middle_y), "lm"),
        (right, (x1 - 9, middle_y), "rm"),
        (upper, (middle_x, y0 + 7), "mt"),
        (lower, (middle_x, y1 - 8), "mb"),
    ):
        _label(draw, place, letter, 15, anchor, MARK)
    _label(draw, (x0 + 9, y0 + 8), window.name, 14, "lt", TEXT)
    _label(draw, (x1 - 9, y0 + 8), f"W {window.width}  L {window.level}", 12, "rt", SOFT)

    length_mm = scale_bar_mm((x1 - x0) / pixels_per_mm)
    end = x0 + 10 + round(length_mm * pixels_per_mm)
    draw.rectangle((x0 + 10, y1 - 13, end - 1, y1 - 11), fill=MARK)
    _label(draw, (x0 + 10, y1 - 18), f"{length_mm:g} mm", 12, "ls", MARK)


def _label(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    size: int,
    anchor: str,
    color: tuple[int, int, int],
) -> None:
    draw.text(place, text, color, font(size), anchor=anchor, stroke_width=2, stroke_fill=(0, 0, 0))


class _Line(NamedTuple):
    text: str
    size: int
    color: tuple[int, int, int]
    height: int


def _heading(volume: Volume) -> list[_Line]:
    room = WIDTH - 2 * MARGIN
    prompt = volume.prompt or ("Synthetic chest CT" if volume.synthetic else "CT")
    lines = [_Line(text, 21, TEXT, 28) for text in _wrap(printable(prompt), font(21), room, most=4)]
    parts = []
    if volume.seed is not None:
        parts.append(f"seed {volume.seed}")
    parts += [
        f"{name} {volume.provenance[name]}" for name in ("steps", "guidance") if volume.provenance.get(name) is not None
    ]
    parts.append(" x ".join(map(str, volume.shape)) + " voxels")
    parts.append(" x ".join(f"{step:.3g}" for step in volume.spacing) + " mm")
    if volume.provenance.get("version"):
        parts.append(f"t2ct {volume.provenance['version']}")
    detail = _wrap(printable("   ·   ".join(parts), keep_spaces=True), font(14), room, most=1)
    return lines + [_Line(text, 14, MUTED, 24) for text in detail]


def _draw_heading(draw: ImageDraw.ImageDraw, lines: list[_Line]) -> None:
    y = MARGIN
    for line in lines:
        draw.text((MARGIN, y + line.height - 7), line.text, line.color, font(line.size), anchor="ls")
        y += line.height


def _wrap(text: str, font: ImageFont.FreeTypeFont, room: int, most: int) -> list[str]:
    """Break `text` into at most `most` lines of `room` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    while text and len(lines) < most:
        fit = _fitting(text, font, room)
        if fit < len(text):
            if len(lines) == most - 1:
                lines.append(text[: _fitting(text, font, room - math.ceil(font.getlength("...")))].rstrip() + "...")
                break
            space = text.rfind(" ", 0, fit + 1)
            fit = space if space > 0 else fit
        lines.append(text[:fit].rstrip())
        text = text[fit:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, room: int) -> int:
    """How many characters of `text` fit into `room` pixels, at least one."""
    few, many = 1, min(len(text), 4 * WIDTH)
    while few < many:
        half = (few + many + 1) // 2
        few, many = (half, many) if font.getlength(text[:half]) <= room else (few, half - 1)
    return few


def printable(text: str, *, keep_spaces: bool = False) -> str:
    """`text` in characters that the built-in font has: accents are dropped, what it cannot draw becomes "?"."""
    text = text if keep_spaces else " ".join(text.split())
    letters = (c for c in unicodedata.normalize("NFKD", text.translate(PLAIN)) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" or c in "·°" else "?" for c in letters)


@functools.cache  # the font is unpacked from base64 on every load
def font(size: int) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size)
    if not isinstance(found, ImageFont.FreeTypeFont):
        raise RuntimeError("preview: wanted a Pillow with FreeType, got one without; the wheels from PyPI have it")
    return found
