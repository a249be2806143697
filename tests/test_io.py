"""NIfTI files in and out: orientation, Hounsfield units, mm, refusals, and files that appear whole or not at all."""

import itertools
import os
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest

from t2ct import files
from t2ct.data import load_volume, save_volume
from t2ct.data.volume import Volume

SHAPE = (5, 4, 3)
AFFINE = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, -20], [0, 0, 5.0, -30], [0, 0, 0, 1]])
ORIENTATIONS = [
    tuple(zip(order, flips, strict=True))
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]


def random_hu(shape=SHAPE):
    return np.random.default_rng(0).integers(-1000, 1500, shape).astype(np.int16)


def rotation(degrees, axis):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    a, b = (k for k in range(3) if k != axis)
    matrix = np.eye(4)
    matrix[[a, a, b, b], [a, b, a, b]] = c, -s, s, c
    return matrix


def write(path, data, affine=AFFINE, **header):
    image = nib.Nifti1Image(data, affine, dtype=data.dtype)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_gives_the_same_ras_volume(tmp_path, orientation):
    hu = random_hu()
    # nibabel's own reordering makes the file; the truth is the array it started from.
    stored = nib.orientations.apply_orientation(hu, orientation)
    affine = AFFINE @ nib.orientations.inv_ornt_aff(orientation, SHAPE)
    volume = load_volume(write(tmp_path / "ct.nii", stored, affine))
    assert np.array_equal(volume.hu, hu)
    assert np.allclose(volume.affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("degrees", [10, 30, 44.9, 45, 45.1, 80, 135, 170, 225])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_oblique_voxels_keep_their_place(tmp_path, degrees, axis):
    hu, affine = random_hu(), rotation(degrees, axis) @ AFFINE
    volume = load_volume(write(tmp_path / "ct.nii", hu, affine))
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    # Every value lies at the same place in the patient as before: compare (position, value) pairs in one order.
    for stored, place in ((hu, affine), (volume.hu, volume.affine)):
        index = np.indices(stored.shape).reshape(3, -1)
        points = (place @ np.vstack([index, np.ones(index.shape[1])]))[:3].T.round(2) + 0.0
        pairs = sorted((*point, value) for point, value in zip(points.tolist(), stored.ravel().tolist(), strict=True))
        if stored is hu:
            wanted = pairs
    assert np.allclose(pairs, wanted, atol=0.02)


def test_sheared_affine_survives_through_the_sform(tmp_path):
    affine = AFFINE.copy()
    affine[0, 2] = 1.0  # a gantry tilt
    save_volume(Volume(random_hu(), affine), tmp_path / "ct.nii.gz")
    assert np.allclose(load_volume(tmp_path / "ct.nii.gz").affine, affine, atol=1e-4)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
def test_header_of_a_saved_volume(tmp_path, name):
    save_volume(Volume(random_hu(), AFFINE, provenance={"version": "1.2"}), tmp_path / name)
    image = nib.load(tmp_path / name)
    assert image.get_data_dtype() == np.int16
    (sform, sform_code), (qform, qform_code) = image.get_sform(coded=True), image.get_qform(coded=True)
    assert sform_code == qform_code == 1
    assert np.allclose(sform, AFFINE) and np.allclose(qform, AFFINE, atol=1e-4)
    assert image.header["descrip"].item() == b"SYNTHETIC t2ct 1.2"
    assert image.header.get_xyzt_units()[0] == "mm"
    assert np.array_equal(np.asarray(image.dataobj), random_hu())


def test_slope_and_intercept_are_applied(tmp_path):
    stored = np.arange(60, dtype=np.uint16).reshape(SHAPE) * 50
    image = nib.Nifti1Image(stored, AFFINE, dtype=stored.dtype)
    image.header.set_slope_inter(2, -1024)
    nib.save(image, tmp_path / "ct.nii")
    raw = nib.load(tmp_path / "ct.nii").dataobj
    assert (raw.slope, raw.inter) == (2, -1024) and np.array_equal(raw.get_unscaled(), stored)
    assert np.array_equal(load_volume(tmp_path / "ct.nii").hu, stored * 2.0 - 1024)


def test_values_beyond_int16_are_clipped_and_floats_rounded(tmp_path):
    data = np.array([-1e5, -1000.4, 0.6, 1e5], np.float32).reshape(4, 1, 1)
    assert load_volume(write(tmp_path / "ct.nii", data)).hu.ravel().tolist() == [-32768, -1000, 1, 32767]


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_lengths_become_mm(tmp_path, unit, factor):
    image = nib.Nifti1Image(random_hu(), np.diag([*(AFFINE.diagonal()[:3] / factor), 1]))
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "ct.nii")
    assert load_volume(tmp_path / "ct.nii").spacing == pytest.approx((2, 3, 5), rel=1e-5)


def test_nifti2_is_read(tmp_path):
    nib.save(nib.Nifti2Image(random_hu(), AFFINE), tmp_path / "ct.nii")
    assert np.array_equal(load_volume(tmp_path / "ct.nii").hu, random_hu())


def test_no_stored_orientation_warns(tmp_path):
    image = nib.Nifti1Image(random_hu(), AFFINE)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "ct.nii")
    with pytest.warns(UserWarning, match="stores no orientation"):
        assert load_volume(tmp_path / "ct.nii").shape == SHAPE


def test_a_scan_is_never_called_synthetic(tmp_path):
    scan = load_volume(write(tmp_path / "scan.nii", random_hu()))
    assert not scan.synthetic and scan.prompt is None
    scan.save(tmp_path / "copy.nii")
    assert b"SYNTHETIC" not in (tmp_path / "copy.nii").read_bytes()
    assert not load_volume(tmp_path / "copy.nii").synthetic


def test_foreign_json_beside_a_scan_is_left_alone(tmp_path):
    (tmp_path / "scan.json").write_text("not json")
    assert load_volume(write(tmp_path / "scan.nii", random_hu())).prompt is None


def test_broken_json_beside_our_volume_is_named(tmp_path):
    save_volume(Volume(random_hu(), AFFINE), tmp_path / "ct.nii")
    (tmp_path / "ct.json").write_text("[]")
    with pytest.raises(ValueError, match=r"ct.json: wanted the JSON object written beside ct.nii, got a list"):
        load_volume(tmp_path / "ct.nii")


BAD_DATA = {
    "2-D": (np.zeros((4, 4), np.int16), r"wanted a 3-D volume .*got shape \(4, 4\)"),
    "4-D": (np.zeros((4, 4, 4, 2), np.int16), r"wanted a 3-D volume .*got shape \(4, 4, 4, 2\)"),
    "4-D of one": (np.zeros((4, 4, 4, 1), np.int16), r"wanted a 3-D volume .*got shape \(4, 4, 4, 1\)"),
    "empty": (np.zeros((4, 0, 4), np.int16), r"wanted a 3-D volume with at least one voxel"),
    "colour": (np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "wanted one real number per voxel"),
    "complex": (np.zeros((4, 4, 4), np.complex64), "wanted one real number per voxel"),
    "NaN": (np.full((4, 4, 4), np.nan, np.float32), "wanted finite values, got 64"),
    "infinite": (np.full((4, 4, 4), np.inf, np.float64), "wanted finite values, got 64"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_refuses_what_is_no_volume(tmp_path, case):
    data, message = BAD_DATA[case]
    path = write(tmp_path / "ct.nii.gz", data)
    with pytest.raises(ValueError, match=message) as caught:
        load_volume(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_refuses_a_broken_affine(tmp_path, bad):
    path = write(tmp_path / "ct.nii", random_hu(), sform_code=1)
    header = nib.load(path).header
    header["srow_z"] = bad
    path.write_bytes(header.binaryblock + path.read_bytes()[348:])
    with pytest.raises(ValueError, match="wanted a finite, invertible affine, got"):
        load_volume(path)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz"])
@pytest.mark.parametrize("keep", [0, 10, 200, 347, 349, 500, 5000])
def test_refuses_truncated_files(tmp_path, name, keep):
    hu = np.random.default_rng(0).integers(-1000, 1500, (32, 32, 32)).astype(np.int16)
    path = write(tmp_path / name, hu)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="wanted a") as caught:
        load_volume(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (nib.Nifti1Image, "vox_offset", np.inf),
        (nib.Nifti1Image, "vox_offset", 1e30),
        (nib.Nifti1Image, "dim", [3, 30000, 30000, 30000, 1, 1, 1, 1]),
        (nib.Nifti2Image, "dim", [3, 2**40, 2**40, 2**40, 1, 1, 1, 1]),
        (nib.Nifti2Image, "dim", [3, -5, -4, 3, 1, 1, 1, 1]),
        (nib.Nifti2Image, "vox_offset", 2**62),
    ],
)
def test_refuses_headers_that_claim_what_is_not_there(tmp_path, kind, field, value):
    """Before room is taken for it: terabytes, if one asks the reader."""
    image = kind(random_hu(), AFFINE)
    image.header[field] = value
    content = kind(random_hu(), AFFINE).to_bytes()
    path = tmp_path / "ct.nii"
    path.write_bytes(image.header.binaryblock + content[len(image.header.binaryblock) :])
    with pytest.raises(ValueError, match="ct.nii: wanted a") as caught:
        load_volume(path)
    assert "\n" not in str(caught.value)


def test_refuses_to_write_more_voxels_than_a_header_counts(tmp_path):
    with pytest.raises(ValueError, match=r"ct.nii: wanted at most 32767 voxels along an axis .*, got \(40000, 1, 1\)"):
        save_volume(Volume(np.zeros((40000, 1, 1), np.int16), AFFINE), tmp_path / "ct.nii")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.png", "ct", "ct.txt"])
def test_refuses_what_is_no_image(tmp_path, name):
    (tmp_path / name).write_bytes(b"the quick brown fox\n" * 100)
    with pytest.raises(ValueError, match="wanted a NIfTI file .*got one without") as caught:
        load_volume(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_refuses_other_formats_missing_files_and_folders(tmp_path):
    nib.save(nib.MGHImage(random_hu().astype(np.float32), AFFINE), tmp_path / "ct.mgz")
    with pytest.raises(ValueError, match="wanted a NIfTI file .*without the signature"):
        load_volume(tmp_path / "ct.mgz")
    with pytest.raises(ValueError, match="wanted a NIfTI file, got a folder"):
        load_volume(tmp_path)
    with pytest.raises(FileNotFoundError, match="wanted a NIfTI file, got no such file"):
        load_volume(tmp_path / "none.nii")


def test_refuses_damaged_gzip(tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 1500, (32, 32, 32)).astype(np.int16)
    path = tmp_path / "ct.nii.gz"
    save_volume(Volume(hu, AFFINE), path)
    content = bytearray(path.read_bytes())
    content[2000:2600] = bytes(600)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="wanted a"):
        load_volume(path)


def test_files_are_ordinary_files(tmp_path):
    files.write_files({tmp_path / "a": b"1"})
    (tmp_path / "b").write_bytes(b"2")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_all_files_or_none(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        files.write_files({tmp_path / "a": b"new", tmp_path / "none" / "b": b"new"})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        files.write_files({tmp_path / "a": b"new"})
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_checks_before_long_work(tmp_path):
    files.check_outputs([tmp_path / "new"])
    (tmp_path / "old").touch()
    files.check_outputs([tmp_path / "old"])
    with pytest.raises(FileExistsError, match="wanted a new file"):
        files.check_outputs([tmp_path / "old"], overwrite=False)
    with pytest.raises(IsADirectoryError, match="wanted a file, got a folder"):
        files.check_outputs([tmp_path])
    with pytest.raises(FileNotFoundError, match="wanted an existing folder"):
        files.check_outputs([tmp_path / "none" / "a"])
    files.check_output_folder(tmp_path / "new" / "newer")
    for folder in (tmp_path / "old", tmp_path / "old" / "new"):
        with pytest.raises(NotADirectoryError, match="wanted a folder"):
            files.check_output_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    for check in (lambda: files.check_outputs([tmp_path / "a"]), lambda: files.check_output_folder(tmp_path / "b")):
        with pytest.raises(PermissionError, match="wanted one that can be written to, got Permission denied"):
            check()


def test_interrupt_while_writing_leaves_nothing(tmp_path):
    code = (
        "import os, sys, time\nfrom t2ct.files import write_files\n"
        "sync = os.fsync\n"
        "def slow(handle):\n    sync(handle); print('writing', flush=True); time.sleep(30)\n"
        "os.fsync = slow\n"
        f"write_files({{{str(tmp_path / 'a')!r}: b'new'}})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline().strip() == b"writing"
    assert len(list(tmp_path.iterdir())) == 1
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) != 0
    assert not list(tmp_path.iterdir())


def test_refuses_units_that_nobody_knows(tmp_path):
    path = tmp_path / "ct.nii"
    write(path, random_hu())
    content = bytearray(path.read_bytes())
    content[123] = 7
    path.write_bytes(content)
    with pytest.raises(ValueError, match="ct.nii: wanted xyzt_units of the NIfTI standard, got 7"):
        load_volume(path)
