"""What an evaluation is given: folders good and bad, networks of one's own, too few volumes; told before long work."""

import csv
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small import SMALL, randomised

from t2ct.cli import main
from t2ct.data.phantoms import LABELS, phantom
from t2ct.data.volume import Volume
from t2ct.eval import evaluate
from t2ct.eval.look import SLICES, Backbone, Look
from t2ct.eval.sets import labels_of, open_sets, open_volumes
from t2ct.eval.store import Store
from t2ct.models.judge import Judge, JudgeConfig
from t2ct.train.data.phantoms import TEST_SEED
from t2ct.train.data.source import BadVolume

SIZE = (16, 16, 16)
REPORTS = ("VolumeName", "Findings_EN", "Impressions_EN")
CT = phantom(5, size=SIZE).volume


@pytest.fixture
def scans(tmp_path):
    """CT-RATE's shape: six volumes with reports and labels."""
    root = tmp_path / "scans"
    (root / "valid").mkdir(parents=True)
    names = [f"valid_{i}_a_1.nii.gz" for i in range(6)]
    for name in names:
        CT.save(root / "valid" / name)
    table(root / "valid_reports.csv", REPORTS, *((name, "Normal.", "") for name in names))
    rows = [(n, *(int(k == i) for k in range(18))) for i, n in enumerate(names)]
    table(root / "valid_labels.csv", ("VolumeName", *LABELS), *rows)
    return root


def table(path, *rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_ct_rate_as_it_comes(scans):
    sets = open_sets(scans, SIZE)
    assert len(sets.test) == 6 and sets.train is None and not sets.notices
    assert labels_of(sets.test).argmax(1).tolist() == list(range(6))
    assert sets.test.entries[0].texts == ("Findings: Normal.",)
    assert np.array_equal(sets.test.read(2).hu, CT.hu.clip(-1000, 1000))
    assert len(open_sets(scans, SIZE, count=4).test) == 4


def test_labels_of_another_order_are_read_by_their_names(scans):
    other = LABELS[::-1]
    rows = [(f"valid_{i}_a_1.nii.gz", *(int(name == LABELS[i]) for name in other)) for i in range(6)]
    table(scans / "valid_labels.csv", ("VolumeName", *other), *rows)
    assert labels_of(open_sets(scans, SIZE).test).argmax(1).tolist() == list(range(6))


def test_labels_that_are_missing_or_no_labels(scans):
    table(scans / "valid_labels.csv", ("VolumeName", *LABELS[1:]), ("valid_0_a_1.nii.gz", *[0] * 17))
    with pytest.raises(ValueError, match="wanted a column 'Medical material'"):
        open_sets(scans, SIZE)
    table(scans / "valid_labels.csv", ("VolumeName", *LABELS), ("valid_0_a_1.nii.gz", *[2] * 18))
    with pytest.raises(ValueError, match="wanted 18 labels of 0 or 1"):
        open_sets(scans, SIZE)
    table(scans / "valid_labels.csv", ("VolumeName", *LABELS), ("valid_0_a_1.nii.gz", *[1] * 18))
    with pytest.raises(ValueError, match="labels of all volumes or of none, got 5 of 6 without: valid_1_a_1"):
        labels_of(open_sets(scans, SIZE).test)
    (scans / "valid_labels.csv").unlink()
    assert labels_of(open_sets(scans, SIZE).test) is None


def test_reports_without_volumes_and_the_reverse_are_listed(scans):
    (scans / "valid/valid_5_a_1.nii.gz").unlink()
    CT.save(scans / "valid/valid_9_a_1.nii.gz")
    with pytest.warns(UserWarning) as told:
        sets = open_sets(scans, SIZE)
    assert len(sets.test) == 5 and len(told) == len(sets.notices) == 2
    assert "1 reports without a volume are left out: valid_5_a_1.nii.gz" in sets.notices[0]
    assert "1 volumes without a report are left out: valid/valid_9_a_1.nii.gz" in sets.notices[1]


def test_mixed_grids_are_stretched_with_a_notice(scans):
    phantom(6, size=(20, 18, 16)).volume.save(scans / "valid/valid_5_a_1.nii.gz")
    with pytest.warns(UserWarning, match="2 sizes .most often 16x16x16., 2 spacings .* are stretched to 16x16x16"):
        sets = open_sets(scans, SIZE)
    assert sets.test.read(5).hu.shape == SIZE
    with pytest.warns(UserWarning, match="stretched to 16x16x16"):
        assert open_volumes(scans).size == SIZE  # that of most


def test_spacings_alone_are_told_of(scans):
    other = Volume(CT.hu, np.diag([1.0, 1.0, 1.0, 1.0]) @ CT.affine @ np.diag([0.5, 0.5, 0.5, 1.0]))
    other.save(scans / "valid/valid_5_a_1.nii.gz")
    with pytest.warns(UserWarning, match="2 spacings .*: as many voxels for all, which cover more or less"):
        open_sets(scans, SIZE)


def test_volumes_are_matched_by_path_then_by_name(tmp_path):
    from t2ct.eval.sets import matched

    for name in ("a/p0/ct", "a/p1/ct", "b/p1/ct", "b/p0/ct", "c/ct", "d/x/p0-ct", "d/p1-ct"):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        CT.save(path)
    a, b, c, d = (open_volumes(tmp_path / name) for name in "abcd")
    assert [e.name for e in a.entries] == ["p0/ct.nii.gz", "p1/ct.nii.gz"]
    assert matched(a, b) == ([0, 1], [0, 1], None)
    for ours, theirs in ((a, c), (c, a)):  # one file for two reports, two files for one
        with pytest.raises(ValueError, match="one volume for each report, by path or by file name, got .*ct.nii.gz"):
            matched(ours, theirs)
    for name in ("p0-ct", "p1-ct"):
        (tmp_path / "e").mkdir(exist_ok=True)
        CT.save(tmp_path / "e" / f"{name}.nii.gz")
    assert matched(open_volumes(tmp_path / "e"), d) == ([0, 1], [1, 0], None)  # by file name
    assert [e.name for e in d.entries] == ["p1-ct.nii.gz", "x/p0-ct.nii.gz"]


def test_labels_without_reports_and_labels_in_columns(scans, tmp_path):
    (scans / "valid_reports.csv").unlink()
    assert labels_of(open_volumes(scans)).argmax(1).tolist() == list(range(6))
    other = LABELS[::-1]
    rows = [(f"valid/valid_{i}_a_1.nii.gz", "Normal.", *(int(name == LABELS[i]) for name in other)) for i in range(6)]
    table(scans / "manifest.csv", ("volume", "report", *other), *rows)
    assert labels_of(open_sets(scans, SIZE).test).argmax(1).tolist() == list(range(6))
    table(scans / "manifest.csv", ("volume", "report", *other[1:]), *(row[:2] + row[3:] for row in rows))
    with pytest.raises(ValueError, match="a column for each of 18 labels, got none for 'Interlobular septal thick"):
        open_sets(scans, SIZE)


def test_what_phantoms_write_beside_their_volumes_is_no_volume(tmp_path):
    for seed in (5, 6):
        phantom(seed, size=SIZE).save(tmp_path / str(seed))
    assert [e.name for e in open_volumes(tmp_path).entries] == ["5/ct.nii.gz", "6/ct.nii.gz"]


def test_bad_volumes_are_left_out_when_asked(scans, capsys):
    Volume(CT.hu + 1024, CT.affine).save(scans / "valid/valid_2_a_1.nii.gz")  # not among those that are looked at
    assert len(open_sets(scans, SIZE).test) == 6
    with pytest.warns(UserWarning, match="1 volumes that cannot be used are left out: .*valid_2_a_1.nii.gz: wanted HU"):
        sets = open_sets(scans, SIZE, skip_bad=True)
    assert len(sets.test) == 5 and len(sets.left_out) == 1 and sets.left_out[0].startswith("valid_2_a_1.nii.gz: ")


@pytest.mark.parametrize(
    "hu, told",
    [
        (CT.hu + 1024, "no air in it: 1st, 50th and 99th percentile are"),
        (CT.hu / 4 - 900, "nothing denser than lung"),
        (CT.hu.astype(int) * 200, "denser than any tissue"),
    ],
)
def test_volumes_that_are_not_in_hu_are_refused_with_the_evidence(scans, hu, told):
    Volume(hu, CT.affine).save(scans / "valid/valid_0_a_1.nii.gz")
    with pytest.raises(BadVolume, match=f"valid_0_a_1.nii.gz: wanted HU, got a volume with {told}"):
        open_sets(scans, SIZE)


def test_nan_and_files_that_are_no_volumes(scans):
    import nibabel as nib

    hu = CT.hu.astype(np.float32)
    hu[3, 3, 3] = np.nan
    nib.save(nib.Nifti1Image(hu, CT.affine), scans / "valid/valid_0_a_1.nii.gz")
    with pytest.raises(BadVolume, match="valid_0_a_1.nii.gz.*NaN"):
        open_sets(scans, SIZE)
    for i in (0, 1):
        (scans / f"valid/valid_{i}_a_1.nii.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="2 of 6 volumes cannot be opened: valid_0_a_1.nii.gz"):
        open_sets(scans, SIZE)


def test_no_folder_an_empty_one_and_one_without_reports(tmp_path, scans):
    with pytest.raises(FileNotFoundError, match="wanted a folder or phantoms:N"):
        open_sets(tmp_path / "nowhere", SIZE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="wanted manifest.csv or CT-RATE"):
        open_sets(tmp_path / "empty", SIZE)
    with pytest.raises(ValueError, match="wanted NIfTI files, got none"):
        open_volumes(tmp_path / "empty")
    with pytest.raises(ValueError, match="wanted phantoms:N"):
        open_sets("phantoms:many", SIZE)
    table(scans / "valid_reports.csv", REPORTS, ("valid_0_a_1.nii.gz", "nan", ""))
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="wanted volumes with reports, got none of 1"):
        open_sets(scans, SIZE)


def test_splits(tmp_path):
    rows = [("volume", "report", "split")]
    for i, split in enumerate(("train", "valid", "train", "test")):
        CT.save(tmp_path / f"{i}.nii.gz")
        rows.append((f"{i}.nii.gz", "Normal.", split))
    table(tmp_path / "manifest.csv", *rows)
    sets = open_sets(tmp_path, SIZE, train_count=9)
    assert [e.name for e in sets.test.entries] == ["3.nii.gz"]
    assert [e.name for e in sets.train.entries] == ["0.nii.gz", "2.nii.gz"]
    table(tmp_path / "manifest.csv", *(row[:2] for row in rows))
    assert len(open_sets(tmp_path, SIZE, train_count=9).test) == 4


def test_phantoms_are_none_that_anything_was_trained_on():
    sets = open_sets("phantoms:500", SIZE, 3, 5)
    assert list(sets.test.seeds) == [TEST_SEED, TEST_SEED + 1, TEST_SEED + 2]
    assert list(sets.train.seeds) == list(range(5))


# Looking


@pytest.fixture(scope="module")
def judge():
    return randomised(Judge(JudgeConfig(size=(32, 32, 16), channels=(8, 16), norm_groups=4)), 4).eval()


def test_what_is_taken_from_a_volume(judge):
    look = Look(judge)
    seen = look(CT.hu)
    x = torch.from_numpy(CT.hu)[None, None].float()
    with torch.no_grad():
        assert torch.allclose(judge(x)[0], torch.from_numpy(seen["logits"]), atol=1e-5)
        assert torch.allclose(judge.features(x)[0, : judge.num_maps], torch.from_numpy(seen["features"]))
    assert seen["slices"].shape == (3, SLICES, judge.num_maps) and seen["pixels"].shape == (24, 24, 16)
    assert "slices" not in look(CT.hu, whole=False)
    assert judge.config.size == (32, 32, 16)  # untouched by the slices


def test_a_slices_features_are_of_that_slice_alone(judge):
    """Another slice changes nothing; a volume whose slices are all alike gives the same features for each."""
    look, places = Look(judge), np.linspace(1.5, 13.5, SLICES).round().astype(int)
    hu = CT.hu.copy()
    other = next(k for k in range(16) if k not in places)
    hu[:, :, other] = -500
    before, after = look(CT.hu)["slices"], look(hu)["slices"]
    assert np.array_equal(before[0], after[0]) and not np.array_equal(before[1], after[1])
    same = look(np.repeat(CT.hu[:, :, 8:9], 16, 2))["slices"][0]
    assert np.abs(same - same[0]).max() < 1e-5


def test_a_volume_that_gives_nan_is_refused(judge):
    bad = randomised(Judge(JudgeConfig(size=SIZE, channels=(8, 16), norm_groups=4)), 4).eval()
    with torch.no_grad():
        bad.head.bias[3] = float("nan")
    with pytest.raises(ValueError, match="logits: wanted finite numbers"):
        Look(bad)(CT.hu)


NETS = """
import torch
class Slices(torch.nn.Module):
    dims = 2
    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), x.std((1, 2, 3))], 1)
def slices(): return Slices()
def maps(): return torch.nn.Conv3d(1, 5, 3, stride=2)
def nothing(): return 3
def nan(): return torch.nn.Sequential(torch.nn.Conv3d(1, 2, 1), torch.nn.Threshold(1e9, float("nan")))
def twins(): return torch.nn.LSTM(16, 4)
def four():
    net = torch.nn.Identity(); net.dims = 4; return net
def broken(): raise RuntimeError("no weights")
"""


def test_backbones_of_ones_own(judge, tmp_path):
    file = tmp_path / "nets.py"
    file.write_text(NETS)
    flat, solid = (Backbone(f"{file}:{name}", SIZE) for name in ("slices", "maps"))
    seen = Look(judge, None, [flat, solid])(CT.hu)
    assert seen["slices"].shape == (3, SLICES, 2) and seen["features"].shape == (5,)
    places = np.linspace(1.5, 13.5, SLICES).round().astype(int)
    for axis, plane in zip((2, 1, 0), seen["slices"], strict=True):
        assert plane[:, 0] == pytest.approx(CT.hu.take(places, axis).mean(tuple({0, 1, 2} - {axis})), rel=1e-5)
    assert seen["logits"].shape == (18,)  # still the judge's


@pytest.mark.parametrize(
    "name, told",
    [
        ("absent", "has no attribute 'absent'"), ("nothing", "wanted a torch module"), ("nan", "finite features"),
        ("twins", "fails on"), ("four", "dims of 2 or 3"), ("broken", "does not load: no weights"),
        ("no name", "wanted PATH:factory"),
    ],
)  # fmt: skip
def test_backbones_that_do_not_load(tmp_path, name, told):
    (tmp_path / "nets.py").write_text(NETS)
    with pytest.raises(ValueError, match=told):
        Backbone(f"{tmp_path / 'nets.py'}:{name}", SIZE)
    with pytest.raises(FileNotFoundError, match="wanted a Python file"):
        Backbone(f"{tmp_path / 'none.py'}:net", SIZE)
    (tmp_path / "wrong.py").write_text("def net(:\n")
    with pytest.raises(ValueError, match="does not load"):
        Backbone(f"{tmp_path / 'wrong.py'}:net", SIZE)


# The whole


def test_too_few_volumes_are_told_before_anything_starts(scans, published, tmp_path, judge):
    config = JudgeConfig(size=SIZE, channels=(8, 16), norm_groups=4)
    save_file(randomised(Judge(config), 4).state_dict(), tmp_path / "judge.safetensors", {"config": config.to_json()})
    options = dict(data=scans, judge=tmp_path / "judge.safetensors", quiet=True, device="cpu")
    with pytest.raises(ValueError, match="wanted at least 8 volumes with reports for fidelity, got 6"):
        evaluate(tmp_path / "out", published, **options)
    with pytest.raises(ValueError, match="wanted at least 10 volumes with reports for utility, got 6"):
        evaluate(tmp_path / "out", published, tables=("utility",), **options)
    with pytest.raises(ValueError, match="wanted some of fidelity"):
        evaluate(tmp_path / "out", published, tables=("fid",), **options)
    made = tmp_path / "made"
    made.mkdir()
    CT.save(made / "another.nii.gz")
    with pytest.raises(ValueError, match="wanted volumes named as those of the data, such as 'valid_0_a_1.nii.gz'"):
        evaluate(tmp_path / "out", made, tables=("factual",), **options)
    assert not (tmp_path / "out").exists()


def test_the_folder_of_an_evaluation(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="which holds other files"):
        Store(tmp_path / "used", {"a": 1}, resume=True)
    store = Store(tmp_path / "new", {"a": (1, 2)}, resume=False)
    store.put("set", 3, {"x": np.arange(3)})
    assert store.missing("set", 5) == [0, 1, 2, 4] and store.get("set", 3)["x"].tolist() == [0, 1, 2]
    again = Store(tmp_path / "new", {"a": [1, 2]}, resume=True)
    assert again.missing("set", 4) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="of 4 volumes of set, got 1"):
        again.all("set", 4)
    with pytest.raises(ValueError, match=r"something else: a: it has \[1, 2\], got \[3\]"):
        Store(tmp_path / "new", {"a": [3]}, resume=True)
    (tmp_path / "new/eval.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Store(tmp_path / "new", {"a": 1}, resume=True)


def test_sizes_of_models_and_of_the_published_files(published, tmp_path):
    """Two models of different grids cannot share real volumes."""
    from t2ct.eval import compare
    from t2ct.pipeline import T2CTPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = T2CTPipeline.from_pretrained(published, device="cpu")
    pipe.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    config = (tmp_path / "b/config.json").read_text().replace("16,\n    16,\n    16", "32,\n    16,\n    16", 1)
    (tmp_path / "b/config.json").write_text(config)
    small = JudgeConfig(size=SIZE, channels=(8, 16), norm_groups=4)
    save_file(randomised(Judge(small), 4).state_dict(), tmp_path / "a/judge.safetensors", {"config": small.to_json()})
    assert SMALL.size == SIZE
    with pytest.raises(ValueError, match="wanted volumes of one size"):
        compare(tmp_path / "a", tmp_path / "b", tmp_path / "out", data="phantoms:8", quiet=True)


def test_what_is_said_before_compare_counts(tmp_path, capsys):
    """argparse would let what `compare` was not told undo what `eval` was; and two bare folders have no reports."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    pair, out = ["compare", str(tmp_path / "a"), str(tmp_path / "b")], ["--out", str(tmp_path / "out")]
    for words, wanted in (
        (["--count", "0", *out, *pair], "--count: wanted an integer of at least 1, got 0"),
        (pair, "--out: wanted a folder for the results"),
        (["--model", "x", *out, *pair], "--model: has no say in a comparison of A and B, got x"),
        ([*out, "--known", "5", *pair], "since known=5 has no say without"),
        ([*out, "--quick", *pair], "since quick=True has no say without"),
        ([*pair, *out, "--tables", "factual"], "has no say without"),
        ([*out, *pair], "wanted NIfTI files, got none"),
    ):
        assert main(["eval", *words]) == 2
        assert wanted in capsys.readouterr().err, words
