"""The training loop and the three losses, on problems small enough to know the answer."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import SMALL
from torch import nn

from t2ct.models import CLIP3D, VAE, UNet
from t2ct.train import phantom_set
from t2ct.train.clip import clip_loss, embed_texts, info_nce
from t2ct.train.ldm import encode_volumes, freeze_dead, ldm_loss
from t2ct.train.loop import LoopConfig, Optimisers, rate_factor, run
from t2ct.train.vae import draw_patches, edge_loss, kl_divergence, vae_loss

CONFIG = LoopConfig(steps=12, batch_size=4, learning_rate=0.05, warmup=3, ema_decay=0.9)


def linear_problem():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def loss_of(generator):
        x = torch.randn(4, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean(), {}

    return model, loss_of


@pytest.mark.parametrize("matrix_rate", (0.0, 0.02), ids=("adam", "muon"))
def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path, monkeypatch, matrix_rate):
    config = replace(CONFIG, matrix_learning_rate=matrix_rate)
    whole, loss_of = linear_problem()
    run(whole, loss_of, config, tmp_path / "whole.safetensors", "whole")
    monkeypatch.setattr("t2ct.train.loop.SAVE_EVERY_SECONDS", 0.0)  # a checkpoint every step
    model, loss_of = linear_problem()
    seen = 0

    def killed(generator):
        nonlocal seen
        seen += 1
        if seen == 6:
            raise KeyboardInterrupt
        return loss_of(generator)

    with pytest.raises(KeyboardInterrupt):
        run(model, killed, config, tmp_path / "stopped.safetensors", "stopped")
    again, loss_of = linear_problem()
    with torch.no_grad():
        again.weight.zero_()  # what the checkpoint must overwrite
    run(again, loss_of, config, tmp_path / "stopped.safetensors", "resumed")
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)
    finished, loss_of = linear_problem()
    run(finished, lambda g: pytest.fail("nothing is left to do"), config, tmp_path / "whole.safetensors", "finished")
    assert torch.equal(finished.weight, whole.weight)


def test_the_loop_learns_and_averages(tmp_path):
    model, loss_of = linear_problem()
    run(model, loss_of, replace(CONFIG, steps=300, ema_decay=0.5), tmp_path / "c.safetensors", "learn")
    assert torch.allclose(model.weight, torch.ones(1, 3), atol=0.05)
    assert not model.training


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model, _ = linear_problem()
    with pytest.raises(RuntimeError, match="the loss is nan at step 0; the last checkpoint is"):
        run(model, lambda g: (model.weight.sum() * float("nan"), {}), CONFIG, tmp_path / "c.safetensors", "bad")


def test_rates_warm_up_and_fall():
    c = LoopConfig(steps=110, batch_size=1, learning_rate=2.0, warmup=10)
    assert rate_factor(0, c) == pytest.approx(0.1)
    assert rate_factor(9, c) == pytest.approx(1.0)
    assert rate_factor(60, c) == pytest.approx(0.5)  # half the cosine
    assert rate_factor(110, c) == pytest.approx(0.0, abs=1e-12)


def test_matrices_go_to_muon_and_the_rest_to_adam():
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Linear(4, 4), nn.Embedding(3, 4), nn.GroupNorm(2, 4))
    live = dict(model.named_parameters())
    config = LoopConfig(steps=1, batch_size=1, learning_rate=0.0, matrix_learning_rate=0.1)
    optimisers = Optimisers(model, live, config)
    assert set(optimisers.matrices) == {"0.weight", "1.weight"}
    before = {k: p.detach().clone() for k, p in live.items()}
    for p in live.values():
        p.grad = torch.randn_like(p)
    optimisers.step(0.5)
    assert {k for k, p in live.items() if not torch.equal(p, before[k])} == {"0.weight", "1.weight"}
    # An orthogonalised step: every singular value is about the rate (Newton-Schulz leaves them between 0.7 and 1.2).
    moved = (before["0.weight"] - live["0.weight"]).detach().view(4, -1)
    assert torch.linalg.svdvals(moved) == pytest.approx(np.full(4, 0.05), rel=0.4)


def test_losses_are_their_formulas():
    text, volume = (nn.functional.normalize(torch.randn(5, 7).double(), dim=1) for _ in range(2))
    logits = 3 * text @ volume.T
    rows = -(logits.diag() - logits.logsumexp(1)).mean()
    columns = -(logits.diag() - logits.logsumexp(0)).mean()
    assert torch.isclose(info_nce(text, volume, torch.tensor(3.0).double()), (rows + columns) / 2)
    mu, sigma = torch.randn(2, 4, 2, 2, 2).double(), torch.rand(2, 4, 2, 2, 2).double() + 0.1
    normal = torch.distributions.Normal
    truth = torch.distributions.kl_divergence(normal(mu, sigma), normal(0.0, 1.0)).sum((1, 2, 3, 4)).mean()
    assert torch.isclose(kl_divergence(mu, sigma), truth)
    ramp = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(1, 1, 4, 3, 3)
    assert edge_loss(ramp, torch.zeros_like(ramp)).item() == pytest.approx(1 / 3)  # slope 1 along one axis of three
    assert edge_loss(ramp, ramp + 5).item() == 0  # edges, not levels


def test_patches_are_of_the_volumes():
    hu = np.arange(2 * 4 * 4 * 4, dtype=np.int16).reshape(2, 4, 4, 4)
    x = draw_patches(hu, 3, (2, 4, 2), torch.Generator().manual_seed(0))
    assert x.shape == (3, 1, 2, 4, 2)
    first = round(x[0, 0, 0, 0, 0].item() * 2000 - 1000)
    assert first in hu
    assert x[0, 0, 0, 1, 0] * 2000 - 1000 == pytest.approx(first + 4, abs=1e-3)  # the next voxel along Y


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom_set, "SHARD", 2)
        data = phantom_set.phantom_set(folder, 4, (16, 16, 16), first_seed=10, workers=1)
        files = sorted(folder.iterdir())
        files[0].unlink()
        kept = files[1].stat().st_mtime_ns
        again = phantom_set.phantom_set(folder, 4, (16, 16, 16), first_seed=10, workers=1)
        with pytest.raises(ValueError, match="count must be a multiple of 2, got 3"):
            phantom_set.phantom_set(folder, 3, (16, 16, 16))
    assert files[1].stat().st_mtime_ns == kept  # only what was missing is drawn
    assert np.array_equal(data.hu, again.hu)
    assert data.prompts == again.prompts
    return data


def test_a_set_of_phantoms(drawn):
    assert len(drawn) == 4
    assert drawn.hu.shape == (4, 16, 16, 16)
    assert drawn.hu.dtype == np.int16
    assert all(len(texts) == phantom_set.WORDINGS and all(texts) for texts in drawn.prompts)
    assert len({text for texts in drawn.prompts for text in texts}) > 8
    seeds = range(400)
    counts = np.bincount([len(phantom_set.draw_names(s)) for s in seeds], minlength=4) / len(seeds)
    assert 0.06 < counts[0] < 0.2  # about the share of normals that the table says
    assert phantom_set.draw_names(7) == phantom_set.draw_names(7)


def test_every_network_learns_a_little(drawn, tmp_path):
    """A few steps of each recipe lower its loss on the data it saw; weights that must not move do not."""
    torch.manual_seed(0)
    vae, clip, unet = VAE(SMALL.vae), CLIP3D(SMALL.clip), UNet(SMALL.unet)
    freeze_dead(unet)
    ids = torch.randint(0, 279, (4, 2, 6), generator=torch.Generator().manual_seed(0))
    ids[..., -1] = 279
    embeds = embed_texts(clip, ids.flatten(0, 1)).view(4, 2, -1)
    mu, sigma = encode_volumes(vae, drawn.hu, batch=3)
    assert mu.shape == sigma.shape == (4, 4, 4, 4, 4)
    query = unet.state_dict()["middle_block.attention.transformer_blocks.0.attn2.to_q.weight"].clone()
    problems = {
        "vae": (vae, vae_loss(vae, drawn.hu, 2, (16, 16, 8)), 40),
        "clip": (clip, clip_loss(clip, drawn.hu, ids, 4), 40),
        "unet": (unet, ldm_loss(unet, mu, embeds, (20.0, 20.0, 20.0), 1.0, 4, 64), 40),
    }
    for name, (model, loss_of, steps) in problems.items():

        def mean_loss(loss_of=loss_of):
            with torch.no_grad():
                return sum(loss_of(torch.Generator().manual_seed(1000 + i))[0].item() for i in range(8)) / 8

        before = mean_loss()
        # oneDNN's bfloat16 weight gradient of a volume of one voxel, at the bottom of this UNet, may hold NaN.
        config = LoopConfig(steps=steps, batch_size=4, learning_rate=2e-3, warmup=5, autocast=name != "unet")
        run(model, loss_of, config, tmp_path / f"{name}.safetensors", name)
        assert mean_loss() < before, name
    assert torch.equal(unet.state_dict()["middle_block.attention.transformer_blocks.0.attn2.to_q.weight"], query)
    assert 0 <= clip.logit_scale.item() <= math.log(100)
