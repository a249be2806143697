"""The picture of a volume: sides, scale, windows, and that it survives anything."""

import numpy as np
import pytest
from PIL import Image

from t2ct.data import preview
from t2ct.data.volume import Volume


def box(shape=(32, 32, 16), spacing=(8.0, 8.0, 16.0)):
    """Air around a box of water."""
    hu = np.full(shape, -1000, np.int16)
    hu[4:-4, 4:-4, :] = 0
    return hu, np.diag([*spacing, 1.0])


def blob_in_panel(patient_axis, side, plane):
    """Where (horizontal, vertical; 0…1) a bright blob towards one end of a patient axis lies in the bone window."""
    hu, affine = box()
    plain = np.asarray(preview.render(Volume(hu, affine), center=(15, 15, 8)).convert("L"), int)
    middle = [15, 15, 8]
    reach = [hu.shape[axis] // 4 for axis in range(3)]
    middle[patient_axis] += side * reach[patient_axis]
    window = tuple(slice(m - 1, m + 2) for m in middle)
    hu[window] = 3000
    bright = np.asarray(preview.render(Volume(hu, affine), center=(15, 15, 8)).convert("L"), int)
    rows, columns = np.nonzero(bright - plain > 100)
    room = preview.WIDTH - 2 * preview.MARGIN
    first, last = preview.MARGIN + plane * room / 3, preview.MARGIN + (plane + 1) * room / 3
    top, bottom = 100, bright.shape[0] - 30
    row_height = (bottom - top) / 3
    inside = (columns >= first) & (columns < last) & (rows >= top + 2 * row_height)
    if not inside.any():
        return None
    return (columns[inside].mean() - first) / (last - first), (rows[inside].mean() - top) / row_height - 2


AXIAL, CORONAL, SAGITTAL = range(3)


@pytest.mark.parametrize("plane", [AXIAL, CORONAL])
def test_the_patients_right_is_on_the_left(plane):
    assert blob_in_panel(0, +1, plane)[0] < 0.4
    assert blob_in_panel(0, -1, plane)[0] > 0.6


def test_anterior_is_on_top_of_the_axial_and_left_of_the_sagittal_plane():
    assert blob_in_panel(1, +1, AXIAL)[1] < 0.4 and blob_in_panel(1, -1, AXIAL)[1] > 0.6
    assert blob_in_panel(1, +1, SAGITTAL)[0] < 0.4 and blob_in_panel(1, -1, SAGITTAL)[0] > 0.6


@pytest.mark.parametrize("plane", [CORONAL, SAGITTAL])
def test_the_head_is_on_top(plane):
    assert blob_in_panel(2, +1, plane)[1] < 0.4 and blob_in_panel(2, -1, plane)[1] > 0.6


def scale_bars(picture):
    """Lengths in pixels of the horizontal runs of exactly the bar's colour that are two rows thick or more."""
    marked = (np.asarray(picture) == preview.MARK).all(axis=2)
    bars = []
    for y in range(1, marked.shape[0]):
        padded = np.concatenate([[0], (marked[y] & marked[y - 1]).astype(int), [0]])
        starts, ends = np.nonzero(np.diff(padded) == 1)[0], np.nonzero(np.diff(padded) == -1)[0]
        bars += [end - start for start, end in zip(starts, ends, strict=True) if end - start > 30]
    return bars


@pytest.mark.parametrize("spacing", [(8.0, 8.0, 16.0), (5.5, 5.5, 10.0), (2.0, 4.0, 12.0)])
def test_scale_bar_has_the_length_it_says(spacing):
    hu, affine = box(spacing=spacing)
    picture = preview.render(Volume(hu, affine))
    extent = np.array(hu.shape) * spacing
    room = preview.WIDTH - 2 * preview.MARGIN - 2 * preview.GAP
    pixels_per_mm = min(room / (2 * extent[0] + extent[1]), preview.MAX_PANEL_HEIGHT / max(extent[1:]))
    spare = (room - (2 * extent[0] + extent[1]) * pixels_per_mm) / 3
    widths = [extent[0] * pixels_per_mm + spare, extent[0] * pixels_per_mm + spare, extent[1] * pixels_per_mm + spare]
    wanted = {round(preview.scale_bar_mm(width / pixels_per_mm) * pixels_per_mm) for width in widths}
    measured = set(scale_bars(picture))
    assert measured and all(min(abs(length - one) for one in wanted) <= 1 for length in measured)


@pytest.mark.parametrize(
    ("width", "bar"), [(352, 100), (149, 20), (150, 50), (3, 1), (29, 5), (0.9, 0.2), (6000, 2000)]
)
def test_scale_bar_is_round(width, bar):
    assert preview.scale_bar_mm(width) == pytest.approx(bar)


def test_voxels_are_drawn_isotropic():
    """A cube of 64 mm in voxels of 4 x 4 x 16 mm is as high as it is wide in the coronal plane."""
    hu = np.full((64, 64, 16), -1000, np.int16)
    hu[24:40, 24:40, 6:10] = 1500
    image = np.asarray(preview.render(Volume(hu, np.diag([4.0, 4, 16, 1]))).convert("L"), int)
    room = preview.WIDTH - 2 * preview.MARGIN
    coronal = image[-420:-60, round(preview.MARGIN + room / 3) + 40 : round(preview.MARGIN + 2 * room / 3) - 40]
    rows, columns = np.nonzero(coronal > 127)
    centre = (np.abs(rows - np.median(rows)) < 60) & (np.abs(columns - np.median(columns)) < 60)
    height, width = np.ptp(rows[centre]) + 1, np.ptp(columns[centre]) + 1
    assert height == pytest.approx(width, rel=0.06)


def test_windows_map_level_to_grey():
    for window in preview.WINDOWS:
        for hu, grey in (
            (window.level - window.width / 2, 0),
            (window.level, 127.5),
            (window.level + window.width / 2, 255),
        ):
            panel = np.asarray(preview._window(np.full((4, 4), hu, np.float32), window, (8, 8)))
            assert np.abs(panel.astype(float) - grey).max() <= 1


def test_centre_of_the_body():
    hu = np.full((40, 40, 20), -1000, np.int16)
    hu[10:21, 4:31, :] = 40
    assert preview.body_center(hu) == pytest.approx((15, 17, 9.5), abs=1)
    assert preview.body_center(np.full((8, 6, 4), -1000, np.int16)) == (3.5, 2.5, 1.5)


def test_center_chooses_the_slices():
    hu, affine = box()
    hu[15, 15, 3] = 3000
    shown = preview.render(Volume(hu, affine), center=(15, 15, 3))
    hidden = preview.render(Volume(hu, affine), center=(5, 5, 10))
    assert np.abs(np.asarray(shown, int) - np.asarray(hidden, int)).max() > 100


@pytest.mark.parametrize("center", [(-1, 0, 0), (0, 0, 16), (0, 0), (np.nan, 0, 0), 5, "abc"])
def test_center_outside_is_refused(center):
    with pytest.raises(ValueError, match=r"center: wanted three voxel indices inside \(32, 32, 16\), got"):
        preview.render(Volume(*box()), center=center)


PROMPTS = [
    None,
    "",
    "Large right pleural effusion with adjacent atelectasis.",
    "göğüs 胸部 الصدر 🫁 ≥3 mm “quoted” – dash",
    "\ud800 lone \x00 control \x1b[31m \u202e",
    "x" * 5000,
    "word " * 3000,
    "line\n\n\nline\tline",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_any_prompt_is_drawn(tmp_path, prompt):
    volume = Volume(*box(), prompt=prompt, seed=7, provenance={"steps": 30, "guidance": 5.0})
    volume.preview(tmp_path / "ct.png")
    with Image.open(tmp_path / "ct.png") as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width == preview.WIDTH and picture.height < 2500


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 400), (512, 4, 4), (4, 512, 4), (256, 256, 8)])
def test_any_shape_is_drawn(shape):
    hu = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    picture = preview.render(Volume(hu, np.diag([0.7, 0.7, 5.0, 1])))
    assert picture.width == preview.WIDTH and picture.height < 2500


def test_lines_fit_and_lose_nothing():
    font = preview.font(21)
    text = "Findings: a moderate pleural effusion on the right, layering posteriorly. " * 3
    lines = preview._wrap(text.strip(), font, 400, most=50)
    assert " ".join(lines) == text.strip()
    assert all(font.getlength(line) <= 400 for line in lines)
    cut = preview._wrap(text.strip(), font, 400, most=2)
    assert len(cut) == 2 and cut[-1].endswith("...") and font.getlength(cut[-1]) <= 400


def test_only_synthetic_volumes_are_called_synthetic():
    pictures = [np.asarray(preview.render(Volume(*box(), provenance={"synthetic": flag}))) for flag in (True, False)]
    assert (pictures[0] != pictures[1]).any()


def test_other_suffixes_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="path: wanted a name that ends in .png"):
        Volume(*box()).preview(tmp_path / "ct.jpg")
    with pytest.raises(FileNotFoundError, match="wanted an existing folder"):
        Volume(*box()).preview(tmp_path / "none" / "ct.png")
    assert not list(tmp_path.iterdir())
