"""`Volume`: what it accepts, what it refuses, what it says."""

import json
import sys

import numpy as np
import pytest

from t2ct.data.volume import Volume

AFFINE = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, -20], [0, 0, 5.0, -30], [0, 0, 0, 1]])


def random_hu(shape=(8, 6, 4), seed=0):
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def test_holds_what_it_was_given():
    hu = random_hu()
    volume = Volume(hu, AFFINE, "a nodule", 7, {"steps": 30})
    assert volume.hu is hu and volume.hu.dtype == np.int16
    assert volume.shape == (8, 6, 4)
    assert volume.spacing == (2.0, 3.0, 5.0)
    assert (volume.prompt, volume.seed, volume.provenance) == ("a nodule", 7, {"steps": 30})
    assert volume.synthetic


def test_affine_is_a_copy():
    affine = AFFINE.copy()
    volume = Volume(random_hu(), affine)
    affine[0, 3] = 99
    assert volume.affine[0, 3] == AFFINE[0, 3]


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "uint16", "int32", "uint32", "int64", "float16", "float32", "float64"]
)
def test_real_dtypes_are_rounded_and_clipped(dtype):
    info = np.finfo(dtype) if np.dtype(dtype).kind == "f" else np.iinfo(dtype)
    values = np.array([info.min, 0, 100, info.max], dtype).reshape(4, 1, 1)
    wanted = [min(max(int(value), -32768), 32767) for value in values.ravel().tolist()]
    assert Volume(values, AFFINE).hu.ravel().tolist() == wanted


def test_floats_are_rounded_to_nearest():
    values = np.array([-0.6, 0.4, 0.6, 1e6, -1e6]).reshape(5, 1, 1)
    assert Volume(values, AFFINE).hu.ravel().tolist() == [-1, 0, 1, 32767, -32768]


@pytest.mark.parametrize(
    ("hu", "error", "message"),
    [
        (np.zeros((4, 4)), ValueError, r"hu: wanted a volume of shape \(X, Y, Z\).*got shape \(4, 4\)"),
        (np.zeros((4, 4, 4, 1)), ValueError, r"hu: .*got shape \(4, 4, 4, 1\)"),
        (np.zeros((4, 0, 4)), ValueError, r"hu: .*at least one voxel, got shape \(4, 0, 4\)"),
        (np.full((2, 2, 2), np.nan), ValueError, "hu: wanted finite values, got 8"),
        (np.full((2, 2, 2), np.inf), ValueError, "hu: wanted finite values, got 8"),
        (np.zeros((2, 2, 2), complex), TypeError, "hu: wanted real numbers, got dtype complex128"),
        (np.zeros((2, 2, 2), bool), TypeError, "hu: wanted real numbers, got dtype bool"),
        ("a chest", TypeError, "hu: wanted real numbers"),
        ([[1, 2], [3]], ValueError, "hu: wanted an array, got list that makes none"),
    ],
)
def test_refuses_what_is_no_volume(hu, error, message):
    with pytest.raises(error, match=message):
        Volume(hu, AFFINE)


@pytest.mark.parametrize(
    ("affine", "error", "message"),
    [
        (np.eye(3), ValueError, r"affine: wanted shape \(4, 4\), got \(3, 3\)"),
        (np.full((4, 4), np.nan), ValueError, "affine: wanted finite values"),
        (np.diag([1.0, 1, 0, 1]), ValueError, "affine: wanted an invertible matrix"),
        (np.diag([1.0, 1, 1, 2]), ValueError, "affine: wanted the last row 0 0 0 1, got 0 0 0 2"),
        (np.diag([-1.0, 1, 1, 1]), ValueError, "affine: wanted axes closest to RAS, got LAS"),
        (np.eye(4, dtype=complex), TypeError, "affine: wanted .* real numbers, got complex ones"),
        (np.diag([1e100, 1e100, 1e100, 1]), ValueError, r"affine: wanted lengths up to 1e\+09 mm, got 1e\+100"),
        (np.diag([1e-60, 1e-60, 1e-60, 1]), ValueError, "affine: wanted an invertible matrix"),
        ("eye", TypeError, r"affine: wanted a \(4, 4\) array of numbers, got str"),
    ],
)
def test_refuses_what_is_no_affine(affine, error, message):
    with pytest.raises(error, match=message):
        Volume(random_hu(), affine)


def test_tiny_voxels_are_not_singular():
    assert Volume(random_hu(), np.diag([1e-4, 1e-4, 1e-4, 1])).spacing == pytest.approx((1e-4,) * 3)


@pytest.mark.parametrize(
    ("field", "value"), [("prompt", 3), ("seed", "7"), ("seed", True), ("seed", 1.5), ("provenance", [1])]
)
def test_refuses_wrong_types(field, value):
    with pytest.raises(TypeError, match=f"{field}: wanted"):
        Volume(random_hu(), AFFINE, **{field: value})


def test_is_an_array():
    volume = Volume(random_hu(), AFFINE)
    assert np.shares_memory(np.asarray(volume), volume.hu)
    assert np.asarray(volume, dtype=np.float32).dtype == np.float32
    copied = np.array(volume)
    assert not np.shares_memory(copied, volume.hu) and np.array_equal(copied, volume.hu)
    assert np.array_equal(np.add(volume, 1), volume.hu + 1)


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="copy=False is numpy 2")
def test_copy_false_never_copies():
    volume = Volume(random_hu(), AFFINE)
    assert np.shares_memory(np.asarray(volume, copy=False), volume.hu)
    with pytest.raises(ValueError, match="copy: wanted True or None"):
        np.asarray(volume, dtype=np.float32, copy=False)


def test_says_what_it_is():
    text = repr(Volume(random_hu(), AFFINE, "x" * 500, 7))
    assert "8×6×4 voxels" in text and "2×3×5 mm" in text and "seed 7" in text and len(text) < 200


def test_shows_itself_in_a_notebook():
    assert Volume(random_hu(), AFFINE)._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["ct.nii.gz", "ct.nii", "CT.NII.GZ"])
def test_save_and_load(tmp_path, name):
    volume = Volume(
        random_hu(), AFFINE, "göğüs 胸部 \n two", 0, {"steps": 30, "guidance": 5.0, "weights": "ab12", "version": "9"}
    )
    volume.save(tmp_path / name)
    loaded = Volume.load(tmp_path / name)
    assert np.array_equal(loaded.hu, volume.hu) and loaded.hu.dtype == np.int16
    assert np.allclose(loaded.affine, volume.affine, atol=1e-5)
    assert (loaded.prompt, loaded.seed, loaded.provenance) == (volume.prompt, volume.seed, volume.provenance)
    assert loaded.synthetic
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, name.split(".")[0] + ".json"])


def test_json_beside_the_volume(tmp_path):
    provenance = {
        "steps": np.int64(30),
        "guidance": np.float32(5),
        "weights": "ab12",
        "version": "9",
        "prompt": "forged",
    }
    Volume(random_hu(), AFFINE, "a nodule", np.int64(7), provenance).save(tmp_path / "ct.nii.gz")
    content = json.loads((tmp_path / "ct.json").read_text())
    assert content["prompt"] == "a nodule" and content["seed"] == 7 and content["synthetic"] is True
    assert (content["steps"], content["guidance"], content["weights"], content["version"]) == (30, 5, "ab12", "9")
    assert content["shape"] == [8, 6, 4] and content["spacing_mm"] == [2, 3, 5] and content["unit"] == "HU"
    assert "not for diagnosis" in content["notice"]


def test_a_lone_surrogate_in_the_prompt_survives(tmp_path):
    volume = Volume(random_hu(), AFFINE, "nodule \udc80")
    volume.save(tmp_path / "ct.nii")
    assert Volume.load(tmp_path / "ct.nii").prompt == volume.prompt


def test_same_volume_same_bytes(tmp_path):
    for name in ("a", "b"):
        Volume(random_hu(), AFFINE, "x", 1).save(tmp_path / f"{name}.nii.gz")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": object()}])
def test_provenance_that_json_cannot_hold_writes_nothing(tmp_path, bad):
    with pytest.raises(ValueError, match="provenance: wanted values that JSON can hold"):
        Volume(random_hu(), AFFINE, provenance=bad).save(tmp_path / "ct.nii.gz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ct", "ct.mha", "ct.gz", ".nii.gz", "ct.nii.gz.txt"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="path: wanted a name that ends in .nii.gz or .nii, got"):
        Volume(random_hu(), AFFINE).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_volume_is_importable_without_torch():
    import subprocess

    heavy = ("torch", "nibabel", "t2ct.data.phantoms")
    code = f"import sys, t2ct.data.volume, t2ct.data; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
