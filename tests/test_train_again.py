"""A run that goes on with other memory or processes, what its stages are told, and updates that are refused whole."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small import SMALL
from test_train_recipes import Volumes, ldm_recipe, steps_of

from t2ct.cli import main
from t2ct.models import VAE
from t2ct.train import train
from t2ct.train.config import VAETraining
from t2ct.train.data.latents import Latent, LatentSource
from t2ct.train.ldm import measure_scale
from t2ct.train.loop import Held, Run
from t2ct.train.presets import preset
from t2ct.train.run import _dividing, _told
from t2ct.train.vae import VAERecipe

CPU = torch.device("cpu")


def facts_of(run):
    return json.loads((Path(run) / "run.json").read_text())


def test_a_run_goes_on_with_another_micro_batch_or_limit(tmp_path):
    run, told = tmp_path / "vae", dict(preset="tiny", steps=1, batch=4, quiet=True)
    train("vae", "phantoms:4", run, **told)
    before = (run / "final" / "vae.safetensors").read_bytes()
    assert facts_of(run)["micro"] == 4
    train("vae", "phantoms:4", run, resume=True, micro=2, **told)
    assert facts_of(run)["micro"] == 2 and "micro = 2\n" in (run / "config.toml").read_text()
    train("vae", "phantoms:4", run, resume=True, memory="10GB", **told)  # made anew, since nobody named a limit before
    assert facts_of(run)["micro"] == 4 and facts_of(run)["memory"] == "10GB"
    with pytest.raises(ValueError, match="memory: wanted at least"):
        train("vae", "phantoms:4", run, resume=True, memory="1MB", **told)
    assert (run / "final" / "vae.safetensors").read_bytes() == before


CRITIC = dict(adversarial_weight=0.1, critic_channels=4, critic_layers=2, critic_from=0.3, augment=False)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("vae", CRITIC), ("clip", dict(micro=8, batch=16)), ("ldm", dict(batch=4, preview_count=0)),
        ("judge", dict(batch=4)),
    ],
)
def test_every_network_stopped_in_the_middle_ends_with_the_same_bits(stood_on, tmp_path, monkeypatch, kind, values):
    told = dict(preset="tiny", steps=5, save_every=2, quiet=True, precision="float32", **values)
    told |= {k: str(stood_on / k) for k in ("vae", "clip")} if kind == "ldm" else {}
    train(kind, "phantoms:16", tmp_path / "whole", **told)
    update, calls = Run.update, []

    def stopping(run, micros):
        calls.append(run.step)
        if len(calls) == 4:  # after the checkpoint of two updates, and one that is lost
            raise KeyboardInterrupt
        return update(run, micros)

    monkeypatch.setattr(Run, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(kind, "phantoms:16", tmp_path / "stopped", **told)
    train(kind, "phantoms:16", tmp_path / "stopped", resume=True, **told)
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    ends = [load_file(tmp_path / run / "checkpoints/step-00000005.safetensors") for run in ("whole", "stopped")]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 20
    assert not [name for name, value in ends[0].items() if not torch.equal(value, ends[1][name])]


@pytest.fixture(scope="module")
def stood_on(tmp_path_factory):
    """What diffusion stands on."""
    folder = tmp_path_factory.mktemp("stood_on")
    for kind in ("vae", "clip"):
        train(kind, "phantoms:16", folder / kind, preset="tiny", steps=1, quiet=True)
    return folder


def test_more_processes_take_smaller_micro_batches():
    assert [_dividing(share, most) for share, most in ((8, 8), (4, 8), (6, 4), (5, 4), (7, 1))] == [8, 4, 3, 1, 1]


def test_stages_are_told_what_changes_no_number():
    config = replace(preset("ldm", "tiny"), memory="8GB", save_every=7, seed=3, workers=2, micro=4, learning_rate=1.0)
    stage = preset("vae", "tiny")
    told = _told("ldm", "tiny", config, stage, "phantoms:64")
    assert told == replace(stage, memory="8GB", save_every=7, seed=3, workers=2)
    assert _told("ldm", "tiny", preset("ldm", "tiny"), stage, "phantoms:64") == stage


def test_a_dry_run_costs_every_stage(capsys):
    assert main(["train", "ldm", "--preset", "tiny", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.index("first its vae:") < out.index("first its clip:") and out.count("predicted speed") == 3
    assert "for 100 updates" in out and "for 40 updates" in out and "for 150 updates" in out


def test_a_finished_stage_of_another_seed_is_not_taken(tmp_path):
    small = dict(preset="tiny", steps=1, preview_count=0, quiet=True, vae="", clip="")
    stage = tmp_path / "run" / "vae"
    train("vae", "phantoms:16", stage, preset="tiny", steps=1, quiet=True, batch=1)
    with pytest.raises(ValueError, match="vae holds a run that was configured otherwise: .*batch: the run has 1"):
        train("ldm", "phantoms:16", tmp_path / "run", resume=True, **small)


def test_a_critic_without_a_finite_gradient_moves_nothing(monkeypatch):
    torch.manual_seed(0)
    config = VAETraining(
        model=SMALL, steps=5, batch=2, patches=((16, 16, 16),), patch_from=(0.0,), critic_channels=4, critic_layers=2,
        ema=0.5, augment=False,
    )  # fmt: skip
    recipe = VAERecipe(config, VAE(SMALL.vae), Volumes())
    run = Run(recipe, config, CPU)
    micros = Held(steps_of(recipe, recipe.samples(), "vae"), CPU)
    assert run.update(micros) is not None
    before = {k: v.clone() for k, v in run.tensors().items()}
    whole = recipe._critic_loss
    monkeypatch.setattr(recipe, "_critic_loss", lambda: (whole()[0] * float("nan"), {}))
    assert run.update(micros) is None
    assert all(torch.equal(v, before[k]) for k, v in run.tensors().items())
    assert all(p.grad is None or not p.grad.any() for part in recipe.parts.values() for p in part.parameters())
    monkeypatch.setattr(recipe, "_critic_loss", whole)
    assert run.update(micros) is not None
    assert not torch.equal(run.tensors()["part.critic." + next(iter(recipe.parts["critic"].state_dict()))],
                           before["part.critic." + next(iter(recipe.parts["critic"].state_dict()))])  # fmt: skip


def test_micro_batches_wait_in_the_host_memory():
    meta = torch.device("meta")
    batches = [{"x": torch.ones(2)}, {"x": torch.zeros(2)}]
    held = Held(batches, meta)
    assert len(held) == 2 and all(b["x"].is_meta for b in held) and not any(b["x"].is_meta for b in held.batches)
    assert Held(batches[:1], meta).batches[0]["x"].is_meta  # one alone is there already


def test_a_perceptual_distance_of_ones_own(tmp_path):
    seen = []

    def distance(x, y):
        seen.append((tuple(x.shape), tuple(y.shape)))
        return (x - y).abs().mean()

    options = dict(preset="tiny", steps=1, quiet=True, perceptual_weight=1.0)
    train("vae", "phantoms:4", tmp_path / "vae", perceptual_distance=distance, **options)
    assert seen == [((2, 1, 32, 32, 32), (2, 1, 32, 32, 32))]
    with pytest.raises(ValueError, match="perceptual_distance: wanted none for clip"):
        train("clip", "phantoms:16", tmp_path / "clip", perceptual_distance=distance, preset="tiny", quiet=True)


def test_few_latents_give_a_scale_with_a_warning():
    class Few:
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def read(self, index):
            return Latent(torch.full((4, 2, 2, 2), float(index)), torch.ones(4, 2, 2, 2), torch.ones(3))

    with pytest.warns(UserWarning, match="latents: wanted 64 or more to measure a scale factor on, got 63"):
        measure_scale(Few(63), False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measure_scale(Few(64), False) == pytest.approx(1 / np.arange(64).std())


def test_weights_of_the_signal_to_noise_ratio():
    recipe = ldm_recipe(latents="means", min_snr=5.0, shift=False)
    batch = steps_of(recipe, recipe.samples(), "unet")[0]
    t = batch["t"]
    weight = t**2 * torch.minimum(((1 - t) / t) ** 2, torch.tensor(5.0))
    target = (recipe.scale * batch["x0"] - batch["noise"]).square().mean((1, 2, 3, 4))
    assert recipe.loss("unet", batch)[0].item() == pytest.approx((weight * target).mean().item(), rel=1e-5)


def test_what_latents_leave_out_is_listed(stood_on, tmp_path):
    import nibabel as nib

    from t2ct.data.phantoms import phantom

    root = tmp_path / "scans"
    rows = ["volume,report,split"]
    for seed in range(4):
        made = phantom(seed, size=(32, 32, 32))
        made.save(root / str(seed))
        rows.append(f"{seed}/ct.nii.gz,Report {seed}.,train")
    (root / "manifest.csv").write_text("\n".join([*rows, "4/ct.nii.gz,Gone.,train"]) + "\n")
    bad = np.full((32, 32, 32), np.nan, np.float32)
    nib.save(nib.Nifti1Image(bad, np.eye(4)), root / "1" / "ct.nii.gz")
    told = dict(vae=str(stood_on / "vae"), clip=str(stood_on / "clip"), preset="tiny", steps=1, batch=2, quiet=True,
                preview_count=0, skip_bad=True)  # fmt: skip
    with pytest.warns(UserWarning, match="1 of 5 volumes cannot be used"):
        train("ldm", str(root), tmp_path / "ldm", **told)
    lines = (tmp_path / "ldm" / "bad.txt").read_text().splitlines()
    assert lines[0] == "4/ct.nii.gz,no such file" and "1/ct.nii.gz" in lines[1] and len(lines) == 2
    entries = LatentSource(tmp_path / "ldm" / "latents" / "train").entries
    assert [e.texts[0] for e in entries] == ["Report 0.", "Report 2.", "Report 2.", "Report 3."]
    assert load_file(tmp_path / "ldm" / "final" / "unet.safetensors")
