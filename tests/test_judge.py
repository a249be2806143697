"""The judge: any grid, exact files, calibration, and that it learns what it is shown."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import mannwhitneyu

from t2ct.cli import main
from t2ct.data.phantoms import LABELS, phantom
from t2ct.data.phantoms.reports.details import DETAILS
from t2ct.data.volume import Volume
from t2ct.eval.metrics.factual import auc
from t2ct.models.judge import Judge, JudgeConfig, fit_volume, load_judge
from t2ct.train.config import JudgeTraining
from t2ct.train.data.phantoms import PhantomSource, draw_names
from t2ct.train.data.source import Entry, Item, cached, fit
from t2ct.train.judge import UNKNOWN, Cases, JudgeRecipe, calibrate, cells_of, class_weights, overlap_loss
from t2ct.train.loop import run
from t2ct.train.presets import PUBLISHED, preset

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = JudgeConfig(size=(16, 16, 16), channels=(8, 16))


def test_a_judge_takes_any_grid():
    torch.manual_seed(0)
    judge = Judge(SMALL).eval()
    hu = 800 * torch.randn(2, 1, 32, 32, 48)
    with torch.no_grad():
        logits, features = judge(hu), judge.features(hu)
        assert logits.shape == (2, 18) and features.shape == (2, judge.num_features) == (2, 48 + 14 * 18)
        assert torch.allclose(judge(hu[:1]), logits[:1], atol=1e-4)
        own = fit_volume(hu.clamp(-1000, 1000), SMALL.size)
        assert torch.allclose(judge(own), logits, atol=1e-4)
        assert judge(torch.randn(1, 1, 17, 5, 90)).shape == (1, 18)
        assert torch.allclose(judge(hu.clamp(-1000, 1000)), logits, atol=1e-4)  # what is beyond the windows is not seen
        judge.scale.fill_(2)
        judge.shift.fill_(1)
        assert torch.allclose(judge(hu), 2 * logits + 1, atol=1e-5)
    for wrong in (torch.zeros(1, 3, 8, 8, 8), torch.zeros(8, 8, 8), torch.zeros(1, 1, 8, 8, 8, dtype=torch.int16)):
        with pytest.raises(ValueError, match=r"judge: hu must be floating \(B, 1, X, Y, Z\), got"):
            judge(wrong)


def test_training_and_use_bring_volumes_to_the_same_grid():
    rng = np.random.default_rng(0)
    for shape in ((40, 36, 50), (20, 30, 9)):
        hu = rng.integers(-1000, 1000, shape).astype(np.int16)
        ours = fit_volume(torch.from_numpy(hu).float()[None, None], (16, 16, 16))[0, 0]
        theirs, _ = fit(hu, (1.0,) * 3, (16, 16, 16))
        assert (ours - torch.from_numpy(theirs)).abs().max() <= 0.5  # rounded


def test_a_judge_of_any_preset_is_small_and_wrong_sizes_are_refused():
    for name in ("embedded", "recommended", "tiny"):
        assert sum(p.numel() for p in Judge(preset("judge", name).model).parameters()) <= 3e6
    for change, wanted in (
        ({"size": (16, 16, 10)}, r"JudgeConfig.size: wanted three positive multiples of 4, got \(16, 16, 10\)"),
        ({"channels": (6, 16)}, "every entry of channels must be a positive multiple of norm_groups=8"),
        ({"size": (16, 16)}, r"JudgeConfig.size: wanted three positive multiples of 4, got \(16, 16\)"),
        ({"windows": ((100.0, 0.0),)}, "windows must be pairs of rising HU"),
        ({"windows": (1,)}, r"JudgeConfig.windows: wanted a list of two finite numbers each, got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=wanted):
            Judge(replace(SMALL, **change))
    with pytest.raises(ValueError, match="preset: wanted one of recommended, embedded, tiny for the judge"):
        preset("judge", "published")
    assert "judge" not in PUBLISHED
    assert JudgeConfig.from_json(SMALL.to_json()) == SMALL


def test_auc_is_scipys():
    rng = np.random.default_rng(1)
    label = rng.integers(0, 2, 200)
    score = np.round(rng.normal(size=200) + label, 1)  # with ties
    truth = mannwhitneyu(score[label == 1], score[label == 0]).statistic / (label.sum() * (1 - label).sum())
    assert auc(score, label) == pytest.approx(truth, abs=1e-12)
    assert auc(label, label) == 1 and auc(-label, label) == 0 and auc(0 * score, label) == 0.5
    assert np.isnan(auc(score, np.ones(200)))


def test_calibration_finds_the_law_that_made_the_labels():
    torch.manual_seed(0)
    raw = 3 * torch.randn(20_000, 3)
    labels = torch.bernoulli((raw * torch.tensor([1.0, 0.5, 2.0]) + torch.tensor([0.0, -1.0, 0.5])).sigmoid())
    scale, shift = calibrate(raw, labels, torch.ones(3))
    assert scale == pytest.approx([1, 0.5, 2], rel=0.1) and shift == pytest.approx([0, -1, 0.5], abs=0.1)
    # without volumes: what the weights of training did is undone, and no more
    weight = class_weights(torch.tensor([0.1, 0.5, 0.0]), 1.0)
    assert weight == pytest.approx([9, 1, 20])
    scale, shift = calibrate(raw[:0], labels[:0], weight)
    assert scale == pytest.approx(np.ones(3)) and shift == pytest.approx(-np.log([9, 1, 20]))


def test_a_sample_is_changed_a_little():
    entries = [Entry("a", (), tuple(int(k == 3) for k in range(18)))]
    hu = np.arange(16**3, dtype=np.int16).reshape(16, 16, 16) % 900
    item = Item(hu, (1.0,) * 3)
    still = JudgeTraining(flip=False, move=0, shift_hu=0.0)

    class Source:
        pass

    source = Source()
    source.entries = entries
    made = Cases(source, still)(item, (0, 5, 0))
    assert torch.equal(made["hu"][0], torch.from_numpy(hu).float()) and made["labels"].nonzero().tolist() == [[3]]
    flips = [Cases(source, replace(still, flip=True))(item, (0, n, 0))["hu"][0] for n in range(20)]
    mirrored = torch.from_numpy(hu).float().flip(0)
    assert 0 < sum(torch.equal(f, mirrored) for f in flips) < 20
    assert all(torch.equal(f, mirrored) or torch.equal(f.flip(0), mirrored) for f in flips)
    brighter = Cases(source, replace(still, shift_hu=20.0))(item, (0, 1, 0))["hu"] - made["hu"]
    assert 0 < brighter.abs().max() <= 20 and brighter.std() < 1e-3
    moved = Cases(source, replace(still, move=2))(item, (0, 1, 0))["hu"][0]
    assert any(torch.equal(moved[4:12, 4:12, 4:12], made["hu"][0, 4 + a : 12 + a, 4 + b : 12 + b, 4 + c : 12 + c])
               for a in range(-2, 3) for b in range(-2, 3) for c in range(-2, 3) if (a, b, c) != (0, 0, 0))  # fmt: skip


class Spots:
    """Volumes of noise in which a bright spot is label 0, a dark half label 1."""

    size = (16, 16, 16)

    def __init__(self, first, count):
        self.seeds = range(first, first + count)
        self.entries = [Entry(str(s), (), (s % 2, s // 2 % 2, *[0] * 16)) for s in self.seeds]

    def __len__(self):
        return len(self.seeds)

    def read(self, index):
        rng = np.random.default_rng(self.seeds[index])
        hu = rng.normal(0, 30, self.size)
        spot, dark, *_ = self.entries[index].labels
        x, y, z = rng.integers(2, 12, 3)
        hu[x : x + 3, y : y + 3, z : z + 3] += 400 * spot
        hu[:, :, :8] -= 300 * dark
        return Item(hu.astype(np.int16), (1.0,) * 3)


def test_it_learns_and_says_how_sure_it_is(tmp_path):
    config = JudgeTraining(
        model=SMALL, steps=240, batch=8, learning_rate=3e-3, matrix_learning_rate=0.02, ema=0.8, valid_count=64,
        precision="float32", export="float16",
    )
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="nothing to learn of 16 findings"):
        recipe = JudgeRecipe(config, Judge(SMALL), Spots(0, 200), Spots(1000, 64))
    run(recipe, config, tmp_path, torch.device("cpu"), 8, quiet=True)
    with (tmp_path / "validation.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["auc_macro"]) > 0.97 and row["auc_lung_nodule"] == "nan"
    judge = load_judge(tmp_path)
    assert (tmp_path / "final" / "judge.safetensors").stat().st_size < 80_000
    assert (judge.shift != 0).any() and not judge.training
    truth = Spots(2000, 64)
    hu = torch.from_numpy(np.stack([truth.read(i).hu for i in range(64)])).float()[:, None]
    labels = np.array([e.labels for e in truth.entries])
    says = judge(hu).sigmoid().numpy()
    for k in (0, 1):
        assert auc(says[:, k], labels[:, k]) > 0.97
        assert np.mean((says[:, k] - labels[:, k]) ** 2) < 0.1  # Brier's score; 0.25 is to know nothing
    assert says[:, 2:].max() < 0.1  # what nobody has is improbable
    # a file alone says all that there is to know
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "final" / "judge.safetensors").read_bytes())
    assert torch.equal(load_judge(tmp_path / "copy.safetensors")(hu[:2]), judge(hu[:2]))


def test_what_is_no_judge_is_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="judge: wanted a file, or a folder with judge.safetensors"):
        load_judge(tmp_path)
    file = tmp_path / "judge.safetensors"
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="judge: wanted the weights of a judge"):
        load_judge(tmp_path)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="wanted a configuration of format 't2ct-judge-2'"):
        load_judge(tmp_path)
    save_file({"a": torch.zeros(1)}, file, {"config": SMALL.to_json()})
    with pytest.raises(ValueError, match="wanted the weights of a judge"):
        load_judge(tmp_path)
    state = Judge(SMALL).state_dict()
    save_file(state | {"shift": state["shift"] * float("nan")}, file, {"config": SMALL.to_json()})
    with pytest.raises(ValueError, match="wanted the weights of a judge, got .*shift is not finite"):
        load_judge(tmp_path)


def prepared(folder, labels):
    """A folder with a manifest of tiny volumes."""
    folder.mkdir()
    rows = ["volume,labels,split"]
    for i, words in enumerate(labels):
        hu = np.full((18, 16, 16), -800, np.int16)
        hu[:, :, : 4 + i] = 40
        Volume(hu, np.diag([2.0, 2.0, 2.0, 1.0])).save(folder / f"{i}.nii.gz")
        rows.append(f"{i}.nii.gz,{words},{'valid' if i % 3 == 2 else 'train'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_folders_with_labels_train_it(tmp_path, capsys):
    one = ";".join(str(int(k == 9)) for k in range(18))
    none = ";".join(["0"] * 18)
    told = {"model": {"size": [16, 16, 16], "channels": [8, 16]}, "workers": 0}
    toml = [f"--set=model.{k}={json.dumps(v)}" for k, v in told["model"].items()] + ["--set=workers=0"]
    options = ["--preset", "tiny", "--quiet", "--device", "cpu", "--steps", "2", "--set", "batch=2", *toml]
    good = prepared(tmp_path / "good", [one, none, one, none, one, none])
    assert main(["train", "judge", "--data", str(good), "--out", str(tmp_path / "run"), *options]) == 0
    assert load_judge(tmp_path / "run")(torch.zeros(1, 1, 20, 20, 20)).shape == (1, len(LABELS))
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert config["size"] == [16, 16, 16] and config["classes"] == 18
    capsys.readouterr()
    lacking = prepared(tmp_path / "lacking", [one, "", none, none])
    assert main(["train", "judge", "--data", str(lacking), "--out", str(tmp_path / "a"), *options]) == 2
    assert "1 of 4 volumes cannot be used: 1.nii.gz: no labels (--skip-bad leaves them out)" in capsys.readouterr().err
    more = ["--skip-bad", "--set", "batch=1"]
    assert main(["train", "judge", "--data", str(lacking), "--out", str(tmp_path / "b"), *options, *more]) == 0
    assert "no labels" in (tmp_path / "b" / "bad.txt").read_text()
    capsys.readouterr()
    short = prepared(tmp_path / "short", [one, "1;0;1"])
    assert main(["train", "judge", "--data", str(short), "--out", str(tmp_path / "c"), *options]) == 2
    assert "wanted 18 labels of 0 or 1, got 3" in capsys.readouterr().err


def test_where_findings_are_is_known_of_phantoms_and_moves_with_them(tmp_path):
    source = PhantomSource(24, "train", (32, 32, 32))
    k = next(k for k in range(24) if "pleural effusion" in draw_names(k))
    item = source.read(k)
    whole = phantom(k, draw_names(k), (32, 32, 32))
    effusion = LABELS.index("Pleural effusion")
    assert item.findings.shape == (16, 16, 16) and set(draw_names(k)) <= {f.name for f in whole.present}
    for bit, name in enumerate(LABELS):
        told = whole.finding_mask(name.lower()).reshape(16, 2, 16, 2, 16, 2).any((1, 3, 5))
        assert np.array_equal(item.findings >> bit & 1, told)
    cells = cells_of(torch.from_numpy(item.findings.astype(np.int32)))
    assert cells.shape == (18, 8, 8, 8) and cells[effusion].any()
    # kept and read again
    kept = cached(source, tmp_path, 1.0)
    kept.read(k)
    assert np.array_equal(kept.read(k).findings, item.findings) and np.array_equal(kept.read(k).small, item.small)
    # mirrored and moved as the volume: a volume that is bright where the effusion is stays so
    bright = np.where(np.kron(item.findings >> effusion & 1, np.ones((2, 2, 2), int)), 500, -900).astype(np.int16)
    shown, config = replace(item, hu=bright), JudgeTraining(move=4, shift_hu=0.0)
    different = set()
    for n in range(12):
        made = Cases(source, config)(shown, (k, n, 0))
        assert torch.equal(F.max_pool3d(made["hu"], 4)[0] > 0, made["found"][effusion] > 0), n
        different.add(made["hu"].numpy().tobytes())
    assert len(different) > 8
    unknown = Cases(source, config)(replace(shown, findings=None), (k, 0, 0))["found"]
    assert (unknown >= UNKNOWN).all()
    assert "found" not in Cases(source, replace(config, place_weight=0.0))(shown, (k, 0, 0))


def test_the_loss_of_places_is_least_where_they_are_found():
    found = torch.zeros(2, 3, 6, 6, 6)
    found[0, 0, :3], found[1, 1, 2, 2, 2] = 1, 1
    exact = overlap_loss(40 * found - 20, found)
    assert exact < 1e-3
    missed = (40 * found - 20).clone()
    missed[1, 1] = -20  # one cell of 432
    assert overlap_loss(missed, found) > exact + 0.3
    assert overlap_loss(20 - 40 * found, found) > 5
    # a batch of which nobody knows: labels alone, and evidence still has a gradient
    judge = Judge(SMALL)
    recipe = JudgeRecipe(JudgeTraining(model=SMALL), judge, None)
    batch = recipe.example(torch.device("cpu"), 2)
    batch["found"] = torch.full_like(batch["found"], UNKNOWN)
    loss, shown = recipe.loss("judge", batch)
    loss.backward()
    assert shown == {"where": 0} and judge.votes[0].conv.weight.grad.abs().sum() > 0
    batch["found"][1] = 1
    evidence = judge.look(batch["hu"])[0]
    wanted = overlap_loss(evidence[1:], batch["found"][1:])
    assert recipe.loss("judge", batch)[1]["where"] == pytest.approx(wanted.item(), rel=1e-5)


def test_evidence_is_where_it_lies():
    """A change in one corner moves the evidence there most; features are what the heads are given."""
    torch.manual_seed(0)
    judge = Judge(SMALL).eval()
    hu = torch.full((1, 1, 16, 16, 16), -800.0)
    other = hu.clone()
    other[..., :4, :4, :4] = 300
    with torch.no_grad():
        change = (judge.evidence(hu) - judge.evidence(other)).abs().sum(1)[0]
        assert judge.evidence(hu).shape == (1, 18, 4, 4, 4)
    assert change.argmax() == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_a_judge_of_another_precision_says_about_the_same(dtype):
    torch.manual_seed(0)
    config = replace(SMALL, size=(32, 32, 16), channels=(8, 16, 16, 16), details=DETAILS)
    judge, hu = Judge(config).eval(), 500 * torch.randn(1, 1, 32, 32, 16) - 300
    with torch.no_grad():
        exact, features = judge(hu), judge.features(hu)
        other = judge.to(dtype)
        assert other(hu.to(dtype)).dtype == other.details(other.features(hu.to(dtype))).dtype == dtype
        assert (other(hu.to(dtype)) - exact).abs().max() < (0.1 if dtype == torch.bfloat16 else 1e-4)
        assert torch.allclose(other.features(hu.to(dtype))[:, : other.num_maps].float(), features[:, :112], atol=0.2)
