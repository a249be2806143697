"""What a judge says of one volume, in Python and on the command line."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small import SMALL

from t2ct.cli import main
from t2ct.data.phantoms import LABELS, phantom
from t2ct.data.phantoms.reports.details import ASPECTS, DETAILS, details_told
from t2ct.data.volume import Volume
from t2ct.eval import verdicts
from t2ct.eval.judging.judged import judged
from t2ct.eval.metrics.factual import auc
from t2ct.models import VAE
from t2ct.models.judge import Judge, JudgeConfig, load_judge
from t2ct.train.data.phantoms import PhantomSource

CONFIG = JudgeConfig(size=(16, 16, 16), channels=(8, 16), details=DETAILS)
EFFUSION, NODULE = (LABELS.index(name) for name in ("Pleural effusion", "Lung nodule"))


@pytest.fixture
def judge():
    """Says that there is an effusion, on both sides, large, and that a nodule is just improbable."""
    judge = Judge(CONFIG).eval().requires_grad_(False)
    judge.head.weight.zero_()
    judge.head.bias.fill_(-3.0)
    judge.head.bias[EFFUSION], judge.head.bias[NODULE] = 2.0, -0.1
    judge.detail_head.weight.zero_()
    for k, name in enumerate(DETAILS):
        likely = name in ("pleural effusion: side right", "pleural effusion: size large", "lung nodule: lobe lower")
        judge.detail_head.bias[k] = 3.0 if likely else 1.0 if name == "pleural effusion: side left" else -1.0
    return judge


def test_a_verdict_is_what_the_heads_say_in_words(judge):
    ct = phantom(0, [], (32, 32, 32)).volume
    said = verdicts(ct, judge)
    assert [v.finding for v in said[:2]] == ["Pleural effusion", "Lung nodule"] and len(said) == 18
    first, second = said[:2]
    assert first.probability == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-5)
    assert (first.side, first.lobe, first.size) == ("bilateral", None, "large")
    assert second.lobe == "lower" and second.side in ("right", "left") and 0.4 < second.probability < 0.5
    assert verdicts(ct.hu, judge) == said
    assert {v.finding for v in said} == set(LABELS)
    silent = Judge(JudgeConfig(size=(16, 16, 16), channels=(8, 16))).eval()
    assert all(v.side is v.lobe is v.size is None for v in verdicts(ct, silent))


def test_what_is_no_ct_is_refused(judge):
    with pytest.raises(ValueError, match=r"volume: wanted HU, got a volume with no air in it"):
        verdicts(np.full((20, 20, 20), 40, np.int16), judge)
    for wrong in (np.zeros((4, 4)), np.full((8, 8, 8), np.nan), np.zeros((0, 4, 4))):
        with pytest.raises(ValueError, match="hu: wanted"):
            verdicts(wrong, judge)
    with pytest.raises(ValueError, match="judge: wanted 18 findings, got 3"):
        verdicts(phantom(0, [], (32, 32, 32)).hu, Judge(JudgeConfig(size=(16, 16, 16), channels=(8, 16), classes=3)))


def test_the_command(judge, tmp_path, capsys):
    file, ct, bad = tmp_path / "judge.safetensors", tmp_path / "ct.nii.gz", tmp_path / "bad.nii.gz"
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, file, {"config": CONFIG.to_json()})
    phantom(0, [], (32, 32, 32)).volume.save(ct)
    Volume(np.full((20, 20, 20), 40, np.int16), np.eye(4)).save(bad)
    assert main(["judge", str(ct), "--judge", str(file)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [str(ct), f"  0.88  {'Pleural effusion':<34}  bilateral, large"]
    assert main(["judge", str(ct), "--judge", str(file), "--all", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out).values()
    assert len(told) == 18 and told[0]["size"] == "large"
    assert main(["judge", str(ct), str(bad), "--judge", str(file)]) == 2
    printed = capsys.readouterr()
    assert "bad.nii.gz: volume: wanted HU" in printed.err
    assert printed.out.splitlines() == out  # what was judged before it stays said
    assert main(["judge", str(ct), str(tmp_path / "no.nii"), "nor.nii", "--judge", str(file)]) == 2
    printed = capsys.readouterr()
    assert "no.nii: wanted a NIfTI file, got no such file, nor of 1 more" in printed.err and not printed.out
    assert main(["judge", str(ct), "--judge", str(tmp_path / "none")]) == 2
    with torch.no_grad():
        judge.head.bias.fill_(-9)
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, file, {"config": CONFIG.to_json()})
    capsys.readouterr()
    assert main(["judge", str(ct), "--judge", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "  nothing"


def test_how_good_a_judge_is(judge, tmp_path, capsys):
    file = tmp_path / "judge.safetensors"
    with torch.no_grad():  # knows one thing: how much is not air
        judge.head.weight[EFFUSION, 0] = 1e-3
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, file, {"config": CONFIG.to_json()})
    found = judged("phantoms:24", file, quiet=True, device="cpu")
    assert {"auc_macro", "precision_weighted", "calibration_error", "side", "lobe", "size"} <= set(found)
    row = found["by_finding"]["Pleural effusion"]
    source = PhantomSource(24, "test", CONFIG.size)
    labels = np.array([e.labels for e in source.entries])
    assert row["cases"] == labels[:, EFFUSION].sum()
    network = load_judge(file)
    scores = [network(torch.from_numpy(source.read(i).hu)[None, None].float())[0, EFFUSION] for i in range(24)]
    assert row["auc"].value == pytest.approx(auc(np.array(scores), labels[:, EFFUSION]))
    assert found["by_finding"]["Cardiomegaly"]["auc"].value == 0.5  # all alike
    told = np.stack([details_told(e.texts[0]) for e in source.entries])
    sides = [a.start for a in ASPECTS if a.kind == "side"]
    assert found["side"].n == np.isfinite(told[:, sides]).sum() > 20
    words = ["judge", "--data", "phantoms:4", "--judge", str(file), "--device", "cpu"]
    assert main(words) == 0 and "| Interlobular septal thickening | 1 |" in capsys.readouterr().out
    assert main([*words, "--count", "3", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["auc_macro"]) == {"value", "low", "high", "n"}
    for wrong, message in (
        ([], "wanted either VOLUME or --data, got neither"), (["a.nii.gz", "--data", "phantoms:4"], "got both"),
        (["--data", "phantoms:4", "--count", "0"], "count: wanted an integer of at least 1, got 0"),
        (["--data", "phantoms:1"], "data: wanted at least 2 volumes, got 1"), (["--data", "nowhere"], "nowhere"),
    ):  # fmt: skip
        assert main(["judge", "--judge", str(file), *wrong]) == 2 and message in capsys.readouterr().err


def test_what_comes_through_a_vae(judge, tmp_path, capsys):
    torch.manual_seed(0)
    vae = VAE(SMALL.vae).eval().requires_grad_(False)
    file = tmp_path / "judge.safetensors"
    with torch.no_grad():
        judge.head.weight[EFFUSION, 0] = 1e-3
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, file, {"config": CONFIG.to_json()})
    (tmp_path / "vae").mkdir()
    save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, tmp_path / "vae" / "vae.safetensors")
    (tmp_path / "vae" / "config.json").write_text(SMALL.to_json())
    found = judged("phantoms:12", file, vae=tmp_path / "vae", quiet=True, device="cpu")
    source, scores = PhantomSource(12, "test", SMALL.size), []
    for i in range(12):
        x = (torch.from_numpy(source.read(i).hu)[None, None].float() + 1000) / 2000
        hu = (vae.decode(vae.encode(x)[0]) * 2000 - 1000).clamp(-1000, 1000).round()
        scores.append(load_judge(file)(hu)[0, EFFUSION])
    labels = np.array([e.labels for e in source.entries])
    wanted = auc(np.array(scores), labels[:, EFFUSION])
    assert found["by_finding"]["Pleural effusion"]["auc"].value == pytest.approx(wanted)
    assert main(["judge", "a.nii.gz", "--vae", str(tmp_path / "vae")]) == 2
    assert "--vae: wanted --data" in capsys.readouterr().err
