"""`t2ct train` from end to end on networks of seconds: what it writes, what it refuses, and that it generates."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import SMALL

import t2ct
from t2ct.cli import main
from t2ct.train import train
from t2ct.train.config import to_toml
from t2ct.train.presets import TINY, preset
from t2ct.train.show.metrics import read_table

pytestmark = pytest.mark.usefixtures("one_thread")

# Small enough for phantoms, and with a vocabulary that sixteen of them can teach.
MODEL = replace(SMALL, clip=replace(SMALL.clip, text=replace(SMALL.clip.text, vocab_size=280, max_length=192)))
VALUES = ["--data", "phantoms:16", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A VAE, a CLIP3D and a diffusion on them, each a handful of updates."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("vae", "clip", "ldm"):
        values = {"precision": "float32"}  # oneDNN may give NaN for bfloat16 volumes of a few voxels
        values |= {"patches": ((16, 16, 16),)} if kind == "vae" else {}
        config = replace(preset(kind, "tiny"), model=MODEL, batch=4, micro=2, steps=4, log_every=2, **values)
        (folder / f"{kind}.toml").write_text(to_toml(config, comments=True))
        more = ["--vae", str(folder / "vae"), "--clip", str(folder / "clip")] if kind == "ldm" else []
        options = ["--config", str(folder / f"{kind}.toml"), "--out", str(folder / kind), *more]
        assert main(["train", kind, *VALUES, "--preset", "published", *options]) == 0
    return folder


def again(runs, kind, *more):
    parts = ["--vae", str(runs / "vae"), "--clip", str(runs / "clip")] if kind == "ldm" else []
    config = ["--preset", "published", "--config", str(runs / f"{kind}.toml")]
    return main(["train", kind, *VALUES, *config, *parts, *more])


def test_a_run_leaves_what_generates(runs, tmp_path):
    final = runs / "ldm" / "final"
    assert {p.name for p in final.iterdir()} == {
        "config.json", "tokenizer.json", "vae.safetensors", "clip.safetensors", "unet.safetensors"
    }  # fmt: skip
    options = ["--model", str(final), "--seed", "1", "--steps", "2", "--quiet", "--device", "cpu"]
    assert main(["generate", "Normal chest CT.", "-o", str(tmp_path / "ct.nii.gz"), *options]) == 0
    config = json.loads((final / "config.json").read_text())
    assert config["scale_factor"] > 0 and config["size"] == [16, 16, 16]
    # a folder put together from the three runs is the same model
    for part in ("vae", "clip"):
        ours, theirs = (load_file(f / f"{part}.safetensors") for f in (final, runs / part / "final"))
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert list((runs / "vae" / "previews").glob("*.png")) and list((runs / "ldm" / "previews").glob("volume-*.png"))


def test_a_run_tells_what_it_did(runs, capsys):
    assert main(["train", "status", str(runs / "vae")]) == 0
    told = capsys.readouterr().out
    assert "4 of 4" in told and "validation" in told and "step-00000004" in told
    rows = read_table(runs / "vae" / "metrics.csv")
    assert [r["step"] for r in rows] == ["2", "4"] and float(rows[0]["l1_hu"]) > 0
    page = (runs / "vae" / "report.html").read_text()
    assert page.count("<svg") > 5 and "data:image/png;base64" in page and "learning_rate" in page
    assert {"mean_recall", "text_r1"} <= set(read_table(runs / "clip" / "validation.csv")[0])
    assert "psnr_db" in read_table(runs / "vae" / "validation.csv")[0]
    assert main(["train", "status", str(runs)]) == 2
    assert "has no run.json" in capsys.readouterr().err


def test_what_is_refused(runs, tmp_path, capsys):
    def refused(wanted, kind, *options):
        assert again(runs, kind, *options) == 2
        told = capsys.readouterr().err
        assert wanted in told and "Traceback" not in told, told

    vae = str(runs / "vae")
    refused("which holds a run of vae", "vae", "--out", vae)
    refused("was configured otherwise: learning_rate: the run has", "vae", "--out", vae, "--resume", "--set",
            "learning_rate=1.0")  # fmt: skip
    refused("holds a run with kind 'vae', got 'clip'", "clip", "--out", vae, "--resume")
    refused("the nearest is 'learning_rate'", "vae", "--out", str(tmp_path / "a"), "--set", "lerning_rate=1")
    refused("batch: wanted at most the 16 volumes", "clip", "--out", str(tmp_path / "b"), "--set", "batch=32")
    refused("memory: wanted at least", "vae", "--out", str(tmp_path / "c"), "--memory", "1MB")
    refused('wanted a positive size such as "6GB"', "vae", "--out", str(tmp_path / "d"), "--memory", "plenty")
    refused("--out: wanted a folder", "vae")
    refused("no config.json", "ldm", "--out", str(tmp_path / "e"), "--vae", str(tmp_path))
    refused("wanted start=", "ldm", "--out", str(tmp_path / "f"), "--lora", "2")
    assert main(["train", "ldm", *VALUES, "--out", str(tmp_path / "g")]) == 2
    assert "wanted the run or the folder of a trained VAE, got nothing" in capsys.readouterr().err
    assert main(["train", "vae", "--out", str(tmp_path / "h")]) == 2
    assert "data: wanted a folder or phantoms:N for the preset recommended" in capsys.readouterr().err
    with pytest.raises(ValueError, match="kind: wanted one of clip, vae, ldm, judge, got 'gan'"):
        train("gan", "phantoms:4", tmp_path / "i")


def test_what_is_wrong_is_said_before_anything_is_made(tmp_path, capsys):
    """The stages of a preset may take hours; what ends the run after them, or a dry run that would, is said first."""
    for more, wanted in (
        (["--vae", str(tmp_path / "no")], "vae: wanted a finished run or a model's folder"),
        (["--memory", "24XB"], 'memory: wanted a positive size such as "6GB"'),
        (["--lora", "2"], "lora: wanted start="),
        (["--set", "micro=3"], "micro: wanted a divisor of 8 (batch 8), got 3"),
        (["--start", str(tmp_path / "no.safetensors")], "start: wanted a finished run or a model's folder"),
        (["--data", str(tmp_path / "no")], "data: wanted a folder or phantoms:N"),
    ):
        for dry in ([], ["--dry-run"]):
            options = ["--preset", "tiny", "--quiet", "--device", "cpu", "--out", str(tmp_path / "a"), *more, *dry]
            assert main(["train", "ldm", *options]) == 2, more
            assert wanted in capsys.readouterr().err
            assert not (tmp_path / "a").exists()


def test_a_start_that_failed_holds_no_run(runs, tmp_path, capsys):
    """The command, corrected, begins; what a stage has left stays."""
    out = tmp_path / "run"
    assert again(runs, "vae", "--out", str(out), "--start", str(runs / "clip" / "final" / "clip.safetensors")) == 2
    assert again(runs, "clip", "--out", str(out), "--steps", "1") == 0
    capsys.readouterr()
    half = tmp_path / "half"
    (half / "vae" / "checkpoints").mkdir(parents=True)
    (half / "starting.json").write_text('{"kind": "ldm", "preset": "tiny", "data": "phantoms:16"}')
    assert again(runs, "vae", "--out", str(half)) == 2
    assert "which holds a run of ldm (tiny, phantoms:16)" in capsys.readouterr().err
    for content in ("{}", "", "[]"):
        (half / "starting.json").write_text(content)
        assert again(runs, "vae", "--out", str(half), "--resume") == 2
        assert "starting.json: wanted" in capsys.readouterr().err


def test_a_run_goes_on_from_another_folder(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    told = ["train", "ldm", *VALUES, "--preset", "published", "--config", "ldm.toml", "--resume", "--out"]
    assert main([*told, str(tmp_path / "run"), "--vae", "vae", "--clip", "./clip"]) == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ldm.toml").write_bytes((runs / "ldm.toml").read_bytes())
    assert main([*told, "run", "--vae", str(runs / "vae"), "--clip", str(runs / "clip")]) == 0, capsys.readouterr().err
    assert main([*told, "run", "--vae", "embedded", "--clip", str(runs / "clip")]) == 2
    assert "vae" in capsys.readouterr().err


def test_a_dry_run_measures_the_network_it_begins_with(runs, capsys):
    """Not the preset's: --start brings its own sizes."""
    told = ["train", "ldm", "--data", "phantoms:8", "--device", "cpu", "--dry-run"]
    assert main([*told, "--start", str(runs / "ldm")]) == 0
    small = capsys.readouterr().out
    assert main([*told, "--preset", "tiny"]) == 0
    tiny = capsys.readouterr().out
    assert "predicted peak" in small and "predicted peak" in tiny
    assert small.split("predicted peak")[1] != tiny.split("predicted peak")[1]


def test_set_takes_fields_of_the_configuration_alone(tmp_path, capsys):
    """Not what else `train` takes: those have options of their own, and would be given twice, or as they are not."""
    for word in ("cache=/x", "quiet=true", "data=phantoms:3", "device=cpu", "kind=vae"):
        assert main(["train", "vae", *VALUES, "--out", str(tmp_path / "a"), "--set", word]) == 2
        assert f"--set: unknown key {word.split('=')[0]!r}; the nearest is" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_runs_share_what_is_prepared(runs, tmp_path):
    cache, seen = tmp_path / "prepared", []
    for run in ("a", "b"):
        assert again(runs, "vae", "--out", str(tmp_path / run), "--steps", "1", "--cache", str(cache)) == 0
        assert not (tmp_path / run / "cache").exists()
        seen.append({p: p.stat().st_mtime_ns for p in cache.rglob("*.npz")})
    assert seen[0] and seen[1] == seen[0]


def test_init_and_dry_run_write_nothing(runs, tmp_path, capsys):
    assert main(["train", "ldm", "--preset", "tiny", "--init", "--steps", "7"]) == 0
    told = capsys.readouterr().out
    assert "steps = 7  # updates of the weights" in told
    (tmp_path / "run.toml").write_text(told)
    out = tmp_path / "out"
    assert main(["train", "ldm", "--config", str(tmp_path / "run.toml"), "--data", "phantoms:4", "--out", str(out),
                 "--dry-run", "--memory", "2GB", "--device", "cpu"]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "predicted peak" in told and "for 7 updates" in told and not out.exists()


def test_going_on_with_a_finished_run_changes_nothing(runs):
    final = runs / "vae" / "final" / "vae.safetensors"
    before = final.read_bytes()
    assert again(runs, "vae", "--out", str(runs / "vae"), "--resume") == 0
    assert final.read_bytes() == before


def test_the_same_in_python_and_latents_of_their_own(runs, tmp_path, capsys):
    """`t2ct latents`, then diffusion on them, in Python: the weights that the command made from the volumes."""
    latents = tmp_path / "latents"
    options = ["--vae", str(runs / "vae"), "--precision", "float32"]
    assert main(["latents", *VALUES, *options, "--out", str(latents)]) == 0
    told = {"preset": "published", "config": runs / "ldm.toml", "quiet": True, "device": "cpu"}
    final = train("ldm", str(latents), tmp_path / "run", vae=str(runs / "vae"), clip=str(runs / "clip"), **told)
    ours, theirs = load_file(final / "unet.safetensors"), load_file(runs / "ldm" / "final" / "unet.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    with pytest.raises(ValueError, match="latents: wanted those of the VAE .*, got .*, made by"):
        train("ldm", str(latents), tmp_path / "other", vae="embedded", clip=str(runs / "clip"), **told)


def test_adapters_are_a_small_file_that_is_applied(runs, tmp_path):
    base = runs / "ldm" / "final"
    out = tmp_path / "lora"
    assert main(["train", "ldm", *VALUES, "--preset", "published", "--config", str(runs / "ldm.toml"), "--start",
                 str(base), "--lora", "2", "--out", str(out), "--set", "learning_rate=0.05",
                 "--set", "matrix_learning_rate=0.0"]) == 0  # fmt: skip
    file = out / "final" / "lora.safetensors"
    assert file.stat().st_size < 0.5 * (base / "unet.safetensors").stat().st_size
    load = t2ct.T2CTPipeline.from_pretrained
    plain, with_lora, merged = load(base, "cpu"), load(base, "cpu", lora=file), load(out / "final", "cpu")
    options = {"generator": 1, "num_inference_steps": 2, "progress": False, "output_type": "latent"}
    text = "Large right pleural effusion."
    assert torch.allclose(with_lora(text, **options), merged(text, **options), atol=1e-4)
    assert with_lora.weights_hash != plain.weights_hash
    changed = [k for k, v in with_lora.unet.state_dict().items() if not torch.equal(v, plain.unet.state_dict()[k])]
    assert changed and all(".transformer_blocks." in k for k in changed)


def killed_cli(command, folder, seed, kills):
    """The real command, killed at random moments, `kills` times; then let it end."""
    draw = random.Random(seed)
    for _ in range(kills):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(draw.uniform(6, 25))
        ended = child.poll() is not None
        if not ended:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        if ended:
            break
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_tiny_preset_survives_kills_and_generates(tmp_path):
    """Nothing but phantoms, three networks, kills in every stage: the bits of a run that nobody disturbed."""
    command = [sys.executable, "-m", "t2ct", "train", "ldm", "--preset", "tiny", "--quiet", "--device", "cpu"]
    command += ["--resume", "--set", "save_every=5"]
    os.environ["OMP_NUM_THREADS"] = "1"
    assert subprocess.run([*command, "--out", str(tmp_path / "whole")], capture_output=True).returncode == 0
    killed_cli([*command, "--out", str(tmp_path / "killed")], tmp_path / "killed", 1, 8)
    for name in ("vae", "clip", "unet"):
        a, b = (load_file(tmp_path / run / "final" / f"{name}.safetensors") for run in ("whole", "killed"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    final = tmp_path / "killed" / "final"
    volume = t2ct.generate("Normal chest CT.", model=final, seed=1, device="cpu", progress=False)
    assert volume.shape == TINY.size


def test_help_answers_without_torch():
    code = "import sys; from t2ct.cli import main; main(['train', 'ldm', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0 and "--resume" in done.stdout
