"""The evaluation from end to end, on networks of random weights and volumes whose figures are known."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from small import SMALL, randomised

from t2ct.cli import main
from t2ct.data.phantoms import LABELS, phantom
from t2ct.data.phantoms.reports.details import DETAILS
from t2ct.data.volume import Volume
from t2ct.eval import bench, compare, evaluate
from t2ct.eval import run as running
from t2ct.models import CLIP3D, VAE, UNet
from t2ct.models.judge import Judge, JudgeConfig
from t2ct.pipeline import T2CTPipeline

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = replace(
    bench.QUICK, count=12, steps=2, swept=8, guidances=(0.0, 5.0), step_counts=(2, 3), known=10,
)  # fmt: skip
PROMISED = (
    "fidelity.fid_2_5d", "fidelity.fid_3d", "factual.auc_macro_real", "factual.auc_macro_generated",
    "alignment.zero_shot_auc", "alignment.map_at_1", "alignment.report_to_volume_r5", "utility.auc_real",
    "utility.auc_real_and_synthetic",
)  # fmt: skip
PHANTOMS = 12


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(running, "QUICK", QUICK)


@pytest.fixture(scope="module")
def model(published, tmp_path_factory):
    """A model's folder with random weights, both towers of its CLIP3D and a judge."""
    folder = tmp_path_factory.mktemp("model")
    networks = {"vae": VAE(SMALL.vae), "unet": UNet(SMALL.unet), "clip": CLIP3D(SMALL.clip)}
    for seed, (name, network) in enumerate(networks.items()):
        state = {k: v.contiguous() for k, v in randomised(network, seed).state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    for name in ("tokenizer", "config"):
        shutil.copy(published[name], folder)
    config = JudgeConfig(size=(16, 16, 16), channels=(8, 16), norm_groups=4, details=DETAILS)
    save_file(randomised(Judge(config), 4).state_dict(), folder / "judge.safetensors", {"config": config.to_json()})
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A prepared folder: 24 volumes to train on, 12 unseen; the drawn findings are its labels."""
    root = tmp_path_factory.mktemp("scans")
    lines = ["volume,report,labels,split"]
    for i in range(36):
        drawn = phantom(i, size=(16, 16, 16))
        drawn.volume.save(root / f"{i:02}.nii.gz")
        labels = " ".join(map(str, drawn.labels))
        lines.append(f"{i:02}.nii.gz,Report {i}.,{labels},{'train' if i < 24 else 'test'}")
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A whole quick evaluation from the command line."""
    out = tmp_path_factory.mktemp("eval") / "out"
    before, running.QUICK = running.QUICK, QUICK
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(["eval", "--quick", "--model", str(model), "--data", "phantoms:40", "--out", str(out), "--quiet"])
    running.QUICK = before
    assert code == 0
    return out, json.loads((out / "results.json").read_text())


def found(results, name):
    for part in name.split("."):
        results = results[part]
    return results


def test_every_promised_figure_is_there_with_its_interval(done):
    _, results = done
    for name in PROMISED:
        figure = found(results, name)
        assert set(figure) == {"value", "low", "high", "n"} and figure["low"] <= figure["value"] <= figure["high"], name
        assert 2 <= figure["n"] <= PHANTOMS
    assert results["fidelity"]["fid_3d"]["n"] == results["n"] == PHANTOMS
    assert set(results["ablation"]["guidance"]) == {"0", "5"} and set(results["ablation"]["steps"]) == {"2", "3"}
    assert results["ablation"]["guidance"]["5"] == results["ablation"]["steps"]["2"]  # one point, seen once
    assert results["ablation"]["steps"]["3"]["fid_3d_of_n"]["n"] == 8
    assert len(results["memorisation"]["pairs"]) == bench.PAIRS


def test_findings_that_cannot_be_measured_are_named(done):
    _, results = done
    each = results["factual"]["by_finding"]
    gone = next((note for note in results["notes"] if "findings that no volume" in note), "")
    assert all((name in each) != (name in gone) for name in LABELS)
    macro = np.mean([row["auc_real"]["value"] for row in each.values()])
    assert results["factual"]["auc_macro_real"]["value"] == pytest.approx(macro)


def test_details_that_reports_tell_are_looked_for(done):
    _, results = done
    for kind in ("side", "lobe", "size", "size_within_one_class"):
        real, made = (results["factual"][f"{kind}_{side}"] for side in ("real", "generated"))
        assert real["n"] == made["n"] > 0 and 0 <= made["value"] <= 1
    exact, near = (results["factual"][f"{kind}_real"]["value"] for kind in ("size", "size_within_one_class"))
    assert exact <= near


def test_the_page_holds_everything(done):
    out, _ = done
    page = (out / "report.html").read_text()
    assert "http" not in page and page.count("<svg") >= 4 and page.count("data:image/png;base64,") == 2
    for word in ("fid_2_5d", "guidance scale", "too_close_pixel", "Nearest pairs", "AUC of the judge by finding"):
        assert word in page


def test_generated_volumes_are_those_of_t2ct_generate(done, model):
    """The volume of report i is what the seed i gives, up to rounding that a batch changes."""
    out, _ = done
    kept = Volume.load(out / "volumes/made/000003.nii.gz")
    pipe = T2CTPipeline.from_pretrained(model, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = pipe(kept.prompt, num_inference_steps=2, generator=3, progress=False)
    assert kept.seed == 3 and np.abs(kept.hu.astype(int) - alone.hu).max() <= 2
    assert not list(out.rglob("*.part")) and not list(out.rglob("*.p*kl*"))


def test_going_on_does_nothing_twice_and_something_else_is_refused(done, model, capsys, monkeypatch):
    out, results = done
    command = ["eval", "--quick", "--model", str(model), "--data", "phantoms:40", "--out", str(out), "--quiet"]
    assert main(command) == 2 and "--resume goes on with it" in capsys.readouterr().err
    assert main([*command, "--resume", "--guidance", "3"]) == 2
    assert "something else: settings" in capsys.readouterr().err
    monkeypatch.setattr("t2ct.eval.make.Maker.make", lambda *a: pytest.fail("generated again"))
    assert main([*command[:-1], "--resume"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"small: 2 steps, guidance 0 +0 volumes of .* s\n", told) and " min in all" in told
    assert "| auc_macro_real |" in told and "guidance scale, 8 reports each:" in told
    again = json.loads((out / "results.json").read_text())
    assert again | {"date": 0} == results | {"date": 0}


def test_a_killed_run_goes_on_with_the_same_bits(model, scans, tmp_path):
    options = ["--model", str(model), "--data", str(scans), "--tables", "factual", "--steps", "20", "--batch", "2"]
    command = [sys.executable, "-m", "t2ct", "eval", *options, "--out", str(tmp_path / "killed"), "--quiet"]
    child = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    made = tmp_path / "killed/seen/made-s20-g5"
    for _ in range(6000):
        if made.is_dir() and len(list(made.glob("*.safetensors"))) >= 3:
            break
        assert child.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    seen = len(list(made.glob("*.safetensors")))
    assert 3 <= seen < 12 and not (tmp_path / "killed/results.json").exists()
    (made / "000000.safetensors").write_bytes(b"damaged")
    results = {}
    for name in ("killed", "whole"):
        arguments = dict(data=scans, tables=("factual",), steps=20, batch=2, resume=True, quiet=True)
        results[name] = evaluate(tmp_path / name, model, **arguments) | {"date": 0}
    assert results["killed"] == results["whole"]
    ours, theirs = (sorted((tmp_path / name).rglob("*.nii.gz")) for name in results)
    assert len(ours) == 12 and [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]


def test_a_perfect_system(model, scans, tmp_path):
    """Another system's folder that holds the real volumes: no distance, the same AUC, every volume found."""
    made = tmp_path / "made"
    made.mkdir()
    for i in range(24, 36):
        shutil.copy(scans / f"{i}.nii.gz", made)
    tables = ("fidelity", "factual", "utility")
    results = evaluate(tmp_path / "out", made, data=scans, judge=model, quiet=True, tables=tables)
    assert all(abs(results["fidelity"][name]["value"]) < 1e-6 for name in ("fid_3d", "fid_3d_of_n", "fid_2_5d"))
    factual = results["factual"]
    assert factual["auc_macro_real"] == factual["auc_macro_generated"]
    assert factual["auc_macro_generated_minus_real"]["value"] == 0
    assert results["utility"]["auc_real"] == results["utility"]["auc_synthetic"]
    assert results["fidelity"]["fid_3d_of_training_volumes"]["n"] == 12


def test_a_copying_system_is_caught(model, scans, tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    for i in range(24, 35):  # of the last report nothing was made
        shutil.copy(scans / f"{i - 24:02}.nii.gz", made / f"{i}.nii.gz")
    shutil.copy(scans / "00.nii.gz", made / "99.nii.gz")
    tables = ("memorisation", "fidelity", "ablation")
    results = evaluate(tmp_path / "out", made, data=scans, judge=model, quiet=True, tables=tables)
    assert results["n"] == 11
    for space in ("embedding", "pixel"):
        assert results["memorisation"][f"too_close_{space}"]["value"] == 1
        assert results["memorisation"][f"nearest_{space}_generated"]["value"] == 0
    assert all(i == k for i, k in results["memorisation"]["pairs"])
    told = "\n".join(results["notes"])
    assert "1 reports have no generated volume: 35.nii.gz" in told
    assert "1 generated volumes have no report: 99.nii.gz" in told
    assert "ablation is left out: volumes of another system" in told


def test_classifiers_that_learn_from_nothing(model, scans, tmp_path):
    """What the three learn from is what the table says: generated volumes that are the real ones teach the same."""
    made = tmp_path / "made"
    made.mkdir()
    for i in range(24, 36):
        shutil.copy(scans / f"{i}.nii.gz", made)
    options = dict(data=scans, judge=model, tables=("utility",), relearn=3, quiet=True)
    found = evaluate(tmp_path / "out", made, **options)["utility"]
    assert found["auc_real"]["n"] == 6 and found["auc_real"] == found["auc_synthetic"]
    runs = tmp_path / "out/utility/made"
    assert all((runs / name / "final/judge.safetensors").is_file() for name in ("real", "synthetic", "both"))
    before = (runs / "both/final/judge.safetensors").stat().st_mtime_ns
    assert evaluate(tmp_path / "out", made, resume=True, **options)["utility"] == found
    assert (runs / "both/final/judge.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="something else: settings"):
        evaluate(tmp_path / "out", made, resume=True, **options | {"relearn": 2})


def test_compare_a_model_with_itself(model, scans, tmp_path):
    results = compare(model, model, tmp_path / "out", data=scans, steps=2, quiet=True, tables=("fidelity", "factual"))
    assert results["a"] == results["b"]
    for name in ("auc_macro", "fid_3d", "kid_3d"):
        assert results["difference"][name]["value"] == 0 == results["difference"][name]["high"]
    assert (tmp_path / "out/volumes/a/000011.nii.gz").is_file() and (tmp_path / "out/report.html").is_file()


def test_the_ablation_of_contrastive_training(model, scans, tmp_path):
    results = evaluate(
        tmp_path / "out", model, data=scans, without_contrastive=model, steps=1, quiet=True, tables=("factual",)
    )
    assert results["ablation"]["contrastive"]["auc_macro"]["value"] == 0
    assert "contrastive" in (tmp_path / "out/report.html").read_text()


def test_compare_two_folders_of_volumes_alone(model, scans, tmp_path, capsys):
    """No reports, no data: identical folders, and one that was made darker."""
    darker = tmp_path / "darker"
    for name in ("same", "darker"):
        (tmp_path / name).mkdir()
    for i in range(24):
        shutil.copy(scans / f"{i:02}.nii.gz", tmp_path / "same")
        volume = Volume.load(scans / f"{i:02}.nii.gz")
        Volume(np.maximum(volume.hu - 200, -1000), volume.affine).save(darker / f"{i:02}.nii.gz")
    judge = ["--judge", str(model / "judge.safetensors")]
    out = tmp_path / "out"
    assert main(["eval", "compare", str(tmp_path / "same"), str(darker), "--out", str(out), *judge]) == 0
    told = capsys.readouterr()
    assert "| kid_3d |" in told.out and "factual correctness of b is left out: it has no labels" in told.err
    far = json.loads((out / "results.json").read_text())["fidelity"]
    with pytest.warns(UserWarning, match="no labels"):
        near = compare(tmp_path / "same", tmp_path / "same", tmp_path / "near", judge=model, quiet=True)["fidelity"]
    assert abs(near["fid_3d_of_n"]["value"]) < 1e-6 < far["fid_3d_of_n"]["low"] and far["fid_3d"]["n"] == 24
    labelled = compare(scans, scans, tmp_path / "labelled", judge=model, quiet=True)
    assert labelled["a"]["factual"]["auc_macro_generated"]["n"] == 36 and "difference" not in labelled


def test_the_model_in_a_message_where_there_is_no_judge(model, tmp_path, published, capsys, monkeypatch):
    monkeypatch.setattr("t2ct.eval.look.EMBEDDED", tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "judge.safetensors").unlink()
    assert main(["eval", "--quick", "--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "t2ct train judge --preset embedded" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_published_files_hold_no_vision_tower_here(model, scans, tmp_path):
    """A model whose clip is the text tower alone: alignment is left out, and why is said."""
    folder = tmp_path / "model"
    T2CTPipeline.from_pretrained(model, device="cpu").save_pretrained(folder)
    tables = ("alignment", "factual")
    results = evaluate(tmp_path / "out", folder, data=scans, judge=model, steps=1, quiet=True, tables=tables)
    assert "alignment" not in results
    assert any("alignment is left out: the model has no vision" in note for note in results["notes"])


def test_a_clip_of_another_run(model, scans, tmp_path, capsys):
    """--clip names a run whose vision tower a model's folder lacks; one that lacks it too is an error."""
    folder = tmp_path / "model"
    T2CTPipeline.from_pretrained(model, device="cpu").save_pretrained(folder)
    command = ["eval", "--model", str(folder), "--data", str(scans), "--judge", str(model), "--steps", "1", "--quiet"]
    command += ["--tables", "alignment"]
    assert main([*command, "--clip", str(folder), "--out", str(tmp_path / "bad")]) == 2
    assert "lacks" in capsys.readouterr().err and not (tmp_path / "bad").exists()
    (tmp_path / "run").mkdir()
    shutil.copytree(model, tmp_path / "run/final")
    assert main([*command, "--clip", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["alignment"]
    assert found["report_to_volume_r5"]["n"] == 12 and "map_at_50" not in found


def test_help_names_the_command(capsys):
    assert main(["eval", "--help"]) == 0
    assert "t2ct eval compare a b" in capsys.readouterr().out
    assert main(["eval", "--tables", "fidelty", "--out", "x"]) == 2 and "wanted some of" in capsys.readouterr().err
    assert main(["eval"]) == 2 and "--out: wanted a folder" in capsys.readouterr().err
    assert Path("x").exists() is False
