"""The pieces of training on problems small enough to know the answer: configuration, rates, losses, networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from micro import MicroRecipe
from small import SMALL
from torch import nn

from t2ct.train import PRESETS, train
from t2ct.train.clip import info_nce
from t2ct.train.config import (
    KINDS,
    LARGEST_SEED,
    Training,
    VAETraining,
    differences,
    load_config,
    read_override,
    read_toml,
    to_toml,
    updated,
)
from t2ct.train.data.augment import augment, cut
from t2ct.train.data.order import Micros, Order, collate, generator
from t2ct.train.data.source import Item
from t2ct.train.optim import Average, Optimisers, moment_bytes, rate_factor, shared_out
from t2ct.train.parts.critic import Critic, RandomFeatures
from t2ct.train.presets import before, preset
from t2ct.train.show.figures import recall, reconstruction, ssim
from t2ct.train.vae import Patches, edge_loss, kl_divergence, window_loss

NAN, INF = float("nan"), float("inf")
BAD_VALUES = (
    ("ldm", {"learning_rate": INF}, "config: learning_rate: wanted a finite number of at least 0, got inf"),
    ("ldm", {"learning_rate": NAN}, "learning_rate: wanted a finite number of at least 0, got nan"),
    ("ldm", {"learning_rate": 10**400}, "learning_rate: wanted a number, got 1000"),
    ("ldm", {"seed": 2**63 - 1}, "seed: wanted an integer from 0 to 8796093022207, got 9223372036854775807"),
    ("ldm", {"power": 0}, "power: wanted a finite number above 0, got 0"),
    ("ldm", {"warmup": INF}, "warmup: wanted a finite number"),
    ("ldm", {"memory": "plenty"}, 'memory: wanted a positive size such as "6GB"'),
    ("ldm", {"text_dropped": 5}, "text_dropped: wanted a finite number from 0 to 1, got 5"),
    ("ldm", {"text_noise": -3}, "text_noise: wanted a finite number of at least 0, got -3"),
    ("ldm", {"small_weight": -4}, "small_weight: wanted a finite number of at least 0, got -4"),
    ("ldm", {"preview_steps": 0}, "preview_steps: wanted an integer from 1 to 1000, got 0"),
    ("ldm", {"model": {"unet": {"head_dim": 0}}}, "config.model.unet: UNetConfig.head_dim: wanted an integer from 1"),
    ("ldm", {"model": {"class_label": 7}}, "config.model: class_label: wanted an integer from 0 to 1, got 7"),
    ("vae", {"patches": [64]}, "patches: wanted a list of three integers from 1 to"),
    ("vae", {"patches": []}, "patches: wanted at least one size"),
    ("vae", {"patches": [[64, 64]]}, r"patches: wanted a list of three integers .* each, got \(\(64, 64\),\)"),
    ("vae", {"patch_from": [NAN]}, "patch_from: wanted a list of finite numbers from 0 to 1"),
    ("vae", {"patch_from": [0.5]}, "patch_from: wanted 1 rising shares from 0"),
    ("vae", {"critic_layers": 0}, "critic_layers: wanted an integer from 1 to 8, got 0"),
    ("vae", {"adversarial_weight": 0.1, "critic_layers": 4}, "patches: wanted at least 48 voxels along every axis"),
    ("vae", {"model": {"size": [32, 32]}}, r"model: size: wanted three positive multiples of 4, got \(32, 32\)"),
    ("clip", {"codebook_decay": 3}, "codebook_decay: wanted a finite number from 0 to 1, got 3"),
    ("judge", {"noise_hu": -1}, "noise_hu: wanted a finite number of at least 0, got -1"),
    ("judge", {"model": {"windows": [1]}}, r"windows: wanted a list of two finite numbers each, got \(1,\)"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_toml(kind, name):
    if (kind, name) == ("judge", "published"):
        pytest.skip("the published classifier is another network")
    config = preset(kind, name)
    for comments in (False, True):
        assert updated(type(config)(), read_toml(to_toml(config, comments=comments))) == config
    assert not differences(updated(type(config)(), read_toml(to_toml(config))), config)
    assert all(isinstance(c, KINDS[k]) for _, k, c in before(kind, name))


def test_a_key_that_is_unknown_is_told_its_nearest(tmp_path):
    config = preset("ldm", "tiny")
    for values, wanted in (
        ({"learning_rat": 1e-3}, "config: unknown key 'learning_rat'; the nearest is 'learning_rate'"),
        ({"model": {"unet": {"chanels": [8]}}}, "config.model.unet: unknown key 'chanels'; the nearest is 'channels'"),
        ({"steps": 1.5}, "config.steps: wanted an integer, got 1.5"),
        ({"model": 3}, "config.model: wanted a table, got 3"),
        ({"loss": "l1"}, "loss: wanted one of squared, absolute, got 'l1'"),
        ({"steps": 0}, "steps: wanted an integer from 1 to 1000000000, got 0"),
        ({"ema": 1.0}, "ema: wanted a finite number from 0 up to but not 1, got 1.0"),
    ):
        with pytest.raises(ValueError, match=wanted):
            updated(config, values)
    for kind, values, wanted in BAD_VALUES:
        with pytest.raises(ValueError, match=wanted):
            getattr(updated(preset(kind, "tiny"), values), "check_patches", int)()  # told apart, looked at together
    assert updated(config, {"seed": LARGEST_SEED}).seed * 1_000_003 + 10**12 < 2**63  # what the loop seeds torch with
    with pytest.raises(ValueError, match="wanted TOML"):
        read_toml("steps = = 3")
    assert read_override("model.vae.channels=[8, 16]") == {"model": {"vae": {"channels": [8, 16]}}}
    assert read_override("loss=absolute") == {"loss": "absolute"}
    assert updated(config, {"warmup": 3}).warmup == 3.0
    (tmp_path / "latin.toml").write_bytes('tokenizer = "Häuser"'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.toml: wanted TOML in UTF-8, got"):
        load_config(tmp_path / "latin.toml", config)
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\n")
    assert load_config(tmp_path / "marked.toml", config).steps == 3
    changed = differences(config, replace(config, learning_rate=1.0, workers=5))
    assert changed == ["learning_rate: the run has 0.002, got 1.0"]  # workers are free


def test_rates_warm_up_and_fall():
    c = Training(steps=110, warmup=10.0)
    assert [rate_factor(s, c) for s in (0, 9)] == pytest.approx([0.1, 1.0])
    assert rate_factor(60, c) == pytest.approx(0.5)  # half the cosine
    assert rate_factor(110, c) == pytest.approx(0.0, abs=1e-12)
    assert rate_factor(4, replace(c, warmup=0.1)) == pytest.approx(5 / 11)  # a share of the steps
    assert rate_factor(60, replace(c, schedule="polynomial")) == pytest.approx(0.25)
    assert rate_factor(60, replace(c, schedule="constant")) == 1


def test_matrices_go_to_muon_and_the_rest_to_adam():
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Linear(4, 4), nn.Embedding(3, 4), nn.GroupNorm(2, 4))
    live = dict(model.named_parameters())
    optimisers = Optimisers(model, 0.0, 0.1, 0.0)
    assert set(optimisers.matrices) == {"0.weight", "1.weight"}
    before = {k: p.detach().clone() for k, p in live.items()}
    for p in live.values():
        p.grad = torch.randn_like(p)
    optimisers.step(0.5)
    assert {k for k, p in live.items() if not torch.equal(p, before[k])} == {"0.weight", "1.weight"}
    # An orthogonalised step: every singular value is about the rate (Newton-Schulz leaves them between 0.7 and 1.2).
    moved = (before["0.weight"] - live["0.weight"]).detach().view(4, -1)
    assert torch.linalg.svdvals(moved) == pytest.approx(np.full(4, 0.05), rel=0.4)


def test_the_average_is_its_formula_and_copies_buffers():
    model, average = nn.Linear(2, 1), None
    model.register_buffer("seen", torch.zeros(1))
    average = Average(model, 0.5)
    first = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
        model.seen.fill_(7)
    average.update(model)  # the first of them: a share of 1 - 1/10
    assert torch.allclose(average.weights["weight"], first + 0.9)
    assert average.weights["seen"].item() == 7
    for _ in range(20):
        average.update(model)
    with torch.no_grad():
        model.weight.add_(1)
    kept = average.weights["weight"].clone()
    average.update(model)
    assert torch.allclose(average.weights["weight"], (kept + model.weight) / 2)


@pytest.mark.parametrize("matrix_rate", (0.0, 0.02))
def test_optimisers_and_average_on_the_host_make_the_same_numbers(matrix_rate):
    """And take up a checkpoint where the others left it."""

    def steps(host, count, state=None, weights=None, average_weights=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Flatten(), nn.Linear(4, 4), nn.GroupNorm(2, 4))
        if weights:
            model.load_state_dict(weights)
        optimisers, average = Optimisers(model, 1e-2, matrix_rate, 0.1, host), Average(model, 0.9, host)
        if state:
            optimisers.restore(state)
            average.weights = {k: v.clone() for k, v in average_weights.items()}
            average.updates = 3
        for number in range(count):
            optimisers.zero_grad()
            model(torch.randn(3, 2, 3, 3, 3, generator=torch.Generator().manual_seed(number))).square().sum().backward()
            optimisers.step(0.5)
            average.update(model)
            with torch.no_grad():
                model[2].bias.clamp_(-0.01, 0.01)  # as a recipe may, between updates
        if host:
            assert all(p.grad is None for p in model.parameters())
            shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in optimisers.apart.values()}
            assert not shared
        return optimisers.state(), {k: v.clone() for k, v in model.state_dict().items()}, average.weights

    def equal(one, other):
        assert one.keys() == other.keys() and len(one) > 3
        assert all(torch.equal(v, other[k]) for k, v in one.items())

    there, here = steps(False, 3), steps(True, 3)
    for one, other in zip(there, here, strict=True):
        equal(one, other)
    for one, other in zip(steps(False, 2, *there), steps(True, 2, *here), strict=True):
        equal(one, other)


def test_moments_of_eight_bits(monkeypatch):
    """Steps nearly as with 32, a quarter of the memory, and a checkpoint that is taken up to the bit."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the same operators, without the minute

    def made(bits):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
        return model, Optimisers(model, 3e-3, 0.0, 0.01, bits=bits)

    def steps(model, optimisers, first, count):
        for number in range(first, first + count):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
            optimisers.zero_grad()
            loss = (model(x) - x.flip(1)).square().mean()
            loss.backward()
            optimisers.step(1.0)
        return loss.item()

    (model, few), (other, many) = made(8), made(32)
    one, two = steps(model, few, 0, 60), steps(other, many, 0, 60)
    assert one < 0.6 and one == pytest.approx(two, rel=0.05)
    kept = few.state()
    assert {k.rpartition(":")[2] for k in kept if "0.weight.exp_avg:" in k} == {"codes", "scale", "qmap"}
    assert not any(":" in k for k in many.state()) and "adam.0.bias.exp_avg" in kept  # too few to be cut into blocks
    sizes = [sum(v.nbytes for k, v in s.items() if "weight.exp" in k and "qmap" not in k) for s in (kept, many.state())]
    assert sizes == [sum(moment_bytes(p.numel(), False, b) for p in model.parameters() if p.ndim > 1) for b in (8, 32)]
    again, fresh = made(8)
    again.load_state_dict(model.state_dict())
    fresh.restore({k: v.clone() for k, v in kept.items()})
    steps(model, few, 60, 3)
    steps(again, fresh, 60, 3)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_what_is_not_installed_is_told_first(monkeypatch):
    monkeypatch.setattr("t2ct.train.optim.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="optimiser_bits: wanted torchao for 8 .pip install 't2ct.train.'., got none"):
        train("ldm", out="nowhere", preset="tiny", optimiser_bits=8)
    with pytest.raises(ValueError, match="optimiser_bits: wanted one of 32, 8, got 4"):
        Training(optimiser_bits=4)


def test_shares_of_ranks_are_whole_and_alike():
    sizes = {f"p{n}": n * n for n in range(1, 30)}
    for ranks in (1, 2, 5):
        shares = shared_out(sizes, ranks)
        assert sorted(name for share in shares for name in share) == sorted(sizes)
        loads = [sum(sizes[name] for name in share) for share in shares]
        assert max(loads) - min(loads) <= 30
    assert shared_out({"a": 1, "b": 5, "c": 5}, 2) == [["b", "a"], ["c"]] and shared_out({"a": 1}, 3)[1:] == [[], []]


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
    inside = torch.full((1, 1, 2, 2, 2), 0.5)  # 0 HU; the window is -160 to 240
    assert window_loss(inside, inside + 0.02).item() == pytest.approx(0.1, rel=1e-4)
    assert window_loss(inside + 0.2, inside + 0.4).item() == 0


def test_order_is_a_function_of_the_seed():
    order = Order(11, 4, 3)
    seen = [[draw[0] for draw in order.at(s)] for s in range(6)]
    assert all(len(set(batch)) == 4 for batch in seen)  # no volume twice in a batch
    assert len({i for batch in seen[:2] for i in batch}) == 8  # nor in an epoch
    assert [[d[0] for d in Order(11, 4, 3).at(s)] for s in (5, 0, 3)] == [seen[5], seen[0], seen[3]]
    assert seen != [[draw[0] for draw in Order(11, 4, 4).at(s)] for s in range(6)]
    assert [d[1:] for d in order.at(2)] == [(8, 0), (9, 1), (10, 2), (11, 3)]
    whole = [draw for s in range(2, 6) for draw in order.at(s)]
    parts = [list(Micros(order, 1, 2, 6, rank, 2)) for rank in (0, 1)]
    assert sorted(d for part in parts for micro in part for d in micro) == sorted(whole)
    assert len(Micros(order, 1, 2, 6, 0, 2)) == len(parts[0]) == 8
    small = [draw[0] for draw in Order(3, 4, 0).at(0)]
    assert sorted(small)[:1] == [0] and len(small) == 4  # fewer volumes than a batch: they come again
    a, b = (torch.rand(3, generator=generator(1, n)) for n in (5, 6))
    assert not torch.equal(a, b) and torch.equal(a, torch.rand(3, generator=generator(1, 5)))


def test_token_rows_are_filled_with_their_end():
    rows = [{"ids": torch.tensor([1, 9])}, {"ids": torch.tensor([1, 2, 3, 9])}]
    assert collate(rows)["ids"].tolist() == [[1, 9, 9, 9], [1, 2, 3, 9]]


def test_patches_and_their_augmentation():
    hu = np.arange(6 * 8 * 4, dtype=np.int16).reshape(6, 8, 4)
    assert np.array_equal(cut(hu, (2, 4, 2), None), hu[2:4, 2:6, 1:3])  # the middle
    patch = cut(hu, (2, 4, 2), torch.Generator().manual_seed(1))
    assert np.array_equal(patch - patch[0, 0, 0], hu[:2, :4, :2])  # somewhere else, as it lies
    x = torch.rand(1, 8, 8, 8)
    made = [augment(x, torch.Generator().manual_seed(s)) for s in range(40)]
    assert all(m.shape == x.shape and 0 <= m.min() and m.max() <= 1 for m in made)
    assert torch.equal(made[3], augment(x, torch.Generator().manual_seed(3)))
    moved = [m for m in made if torch.allclose(m.sort().values.sum(), x.sum(), atol=1e-3)]
    assert 5 < len(moved) < 38  # flips and turns alone keep every value; zoom, turning and contrast do not
    config = VAETraining(model=SMALL, steps=10, batch=2, patches=((8, 8, 8), (16, 16, 16)), patch_from=(0.0, 0.5),
                         adversarial_weight=0.0)  # fmt: skip
    patches = Patches(config)
    assert [patches.patch_at(n)[0] for n in (0, 9, 10, 19)] == [8, 8, 16, 16]
    made = patches(Item(np.zeros((16, 16, 16), np.int16), (1.0,) * 3), (0, 3, 1))
    assert made["x"].shape == (1, 8, 8, 8) and made["noise"].shape == (4, 2, 2, 2)
    with pytest.raises(ValueError, match=r"three positive multiples of 4 within \(16, 16, 16\), got \(6, 8, 8\)"):
        replace(config, patches=((6, 8, 8),), patch_from=(0.0,)).check_patches()


def test_figures_of_a_reconstruction():
    x = torch.rand(1, 1, 16, 16, 16)
    assert ssim(x, x).item() == pytest.approx(1)
    assert ssim(x, torch.rand_like(x)).item() < 0.2
    truth = torch.full((1, 1, 8, 8, 8), 0.5)  # soft tissue
    truth[..., :4] = 0.1  # lung
    made = truth + 0.01
    figures = reconstruction([(truth, made)])
    assert figures["l1_hu"] == pytest.approx(20, rel=1e-3) and figures["psnr_db"] == pytest.approx(40, rel=1e-3)
    assert [figures[f"{tissue}_hu"] for tissue in ("air_lung", "soft")] == pytest.approx([20, 20], rel=1e-3)
    assert next(iter(figures)) == "l1_hu"  # the score
    rows = torch.eye(12)
    assert set(recall(rows, rows).values()) == {1.0}
    shifted = recall(rows, rows.roll(1, 0))
    assert shifted["volume_r1"] == 0 and shifted["text_r10"] == 0
    assert recall(torch.ones(12, 4) / 2, torch.ones(12, 4) / 2)["volume_r10"] == 0  # all alike is nothing found


def test_critic_and_random_features():
    critic, features = Critic(8, 3), RandomFeatures()
    x = torch.rand(2, 1, 32, 32, 32)
    assert critic(x).shape[:2] == (2, 1)
    assert torch.equal(RandomFeatures().filters[2], features.filters[2])
    assert not any(p.requires_grad for p in features.parameters())
    noise = 0.1 * torch.rand_like(x)
    blurred = nn.functional.avg_pool3d(x, 3, 1, 1, count_include_pad=False)
    assert features(x, x).item() == 0
    assert features(x, x + 0.05).item() < 0.2 * features(x, blurred).item()  # brightness is not its affair, blur is
    assert 0 < features(x, x + noise).item() < features(x, blurred).item()


def test_the_loop_learns(tmp_path):
    from micro import CONFIG

    from t2ct.train.loop import run
    from t2ct.train.show.metrics import read_table

    config = replace(CONFIG, steps=400, save_every=0)
    recipe = MicroRecipe(config)
    run(recipe, config, tmp_path, torch.device("cpu"), 2, quiet=True)
    losses = [float(row["loss"]) for row in read_table(tmp_path / "metrics.csv")]
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
