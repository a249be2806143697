"""One patient shown several times, and findings that count for more than their few voxels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small import SMALL

from t2ct.data.phantoms import LABELS, describe, phantom
from t2ct.models import VAE
from t2ct.train import train
from t2ct.train.config import LDMTraining, VAETraining
from t2ct.train.data import open_data, phantom_counts
from t2ct.train.data.found import coarser, finding_weights, stretched
from t2ct.train.data.latents import Latent, encode_source
from t2ct.train.data.order import Order
from t2ct.train.data.phantoms import draw_names, draw_shown
from t2ct.train.data.source import Item
from t2ct.train.ldm import Flows
from t2ct.train.vae import MOST_WEIGHT, Patches, VAERecipe, edge_loss, window_loss

SIZE = (32, 32, 32)
VAE_TRAINING = VAETraining(model=SMALL, steps=4, batch=2, patches=((8, 8, 8),), patch_from=(0.0,), augment=False,
                           adversarial_weight=0.0, perceptual="none", finding_weight=0.1)  # fmt: skip


def told(source):
    return [(e.name, e.texts, e.labels) for e in source.entries]


def phantom_findings(seed, shown):
    return describe(seed, draw_shown(seed, shown)).present


def test_a_patient_shown_several_times():
    once, source = open_data("phantoms:12", "train", SIZE), open_data("phantoms:12x4", "train", SIZE)
    assert (len(once), len(source)) == (12, 48)
    assert told(source)[::4] == told(once)  # the first time as ever
    assert len({e.name for e in source.entries}) == 48
    for split in ("valid", "test"):  # what is looked at stays comparable
        rows = [told(open_data(spec, split, SIZE)) for spec in ("phantoms:12", "phantoms:12x4")]
        assert rows[0] == rows[1]
    first, turned = source.read(0), source.read(1)
    assert np.array_equal(first.hu, once.read(0).hu) and not np.array_equal(first.hu, turned.hu)
    drawn = phantom(0, draw_shown(0, 1), SIZE)
    assert np.array_equal(turned.hu, np.clip(drawn.hu, -1000, 1000))
    assert source.entries[1].labels == tuple(drawn.labels.tolist())
    with pytest.raises(IndexError):
        source.entries[48]


def test_the_second_of_a_pair_has_right_for_left():
    turned = 0
    for seed in range(60):
        assert draw_shown(seed, 0) == draw_names(seed)
        for shown in (0, 2):
            a, b = (phantom_findings(seed, shown + k) for k in (0, 1))
            assert a != b  # never the same twice
            if [f.name for f in a] == [f.name for f in b]:
                pairs = [(x.side, y.side) for x, y in zip(a, b, strict=True)]
                assert all(x == y == "bilateral" or x is y is None or {x, y} == {"right", "left"} for x, y in pairs)
                assert all(y.lobe != "middle" or y.side == "right" for y in b)
                turned += 1
            else:
                assert b == a[:-1] or (len(a) < 2 and [(f.name, f.side) for f in b] == [("pleural effusion", "right")])
    assert turned > 60
    others = [{f.name for f in phantom_findings(seed, 2)} != set(draw_names(seed)) for seed in range(30)]
    assert sum(others) > 25  # the third time has findings of its own


@pytest.mark.parametrize("spec", ["phantoms:", "phantoms:0", "phantoms:4x0", "phantoms:4x2x2", "phantoms:x2",
                                  "phantoms:50001x2", "phantoms:-4", "phantoms:4.5"])  # fmt: skip
def test_specs_that_are_none(spec):
    with pytest.raises(ValueError, match="wanted phantoms:N, or phantoms:NxK"):
        phantom_counts(spec)
    assert phantom_counts("phantoms:50000x2") == (50_000, 2) and phantom_counts("phantoms:7") == (7, 1)


def test_groups_stay_together():
    order = Order(12, 4, 3, 2)
    for step in range(9):
        places = [draw[0] for draw in order.at(step)]
        assert len(set(places)) == 4 and all(
            a % 2 == 0 and b == a + 1 for a, b in zip(places[::2], places[1::2], strict=True)
        )
    assert sorted(d[0] for step in range(3) for d in order.at(step)) == list(range(12))
    for wrong in ((13, 4), (12, 3)):
        with pytest.raises(ValueError, match="whole groups of 2"):
            Order(*wrong, 0, 2)
    with pytest.raises(ValueError, match="wanted a part of batch=8 that divides it, got 3"):
        LDMTraining(group=3)


def test_a_group_shares_noise_and_time_and_nothing_else():
    config = LDMTraining(model=SMALL, batch=8, steps=2, group=2)
    contexts = [torch.eye(24)[i : i + 1] for i in range(8)]
    latents = [Latent(torch.full((4, 2, 2, 2), float(i)), torch.ones(4, 2, 2, 2), torch.ones(3)) for i in range(8)]
    flows = Flows(config, contexts, SMALL.spacing)
    made = [flows(latents[i], (i, 8 + i, i)) for i in range(8)]
    for a, b in zip(made[::2], made[1::2], strict=True):
        assert torch.equal(a["noise"], b["noise"]) and a["t"] == b["t"]
        assert not torch.equal(a["x0"], b["x0"] - 1) and not torch.equal(a["context"], b["context"])
    times = sorted(float(m["t"]) for m in made[::2])
    assert [int(4 * t) for t in times] == [0, 1, 2, 3]  # a group in each stratum
    assert len({float(m["noise"].sum()) for m in made}) == 4
    again = Flows(replace(config, seed=1), contexts, SMALL.spacing)(latents[0], (0, 8, 0))
    assert not torch.equal(again["noise"], made[0]["noise"])


def test_every_finding_counts_as_a_share_of_the_volume():
    cells = np.zeros((8, 8, 8), np.uint32)
    cells[0, :4] |= 1 << 3  # 32 cells of 512
    cells[1, 0, 0] |= 1 << 5  # a single one: as much as may be
    cells[0, 0, 0] |= 1 << 17
    weights = finding_weights(cells, 0.1, 50.0)
    large = 0.1 * 512 / 32
    assert weights[0, 3, 1] == pytest.approx(1 + large) and weights[1, 0, 0] == 51 and weights[2, 0, 0] == 1
    assert weights[0, 0, 0] == pytest.approx(1 + large + 50)
    assert weights[0, :4].sum() - 50 == pytest.approx(32 + 0.1 * 512, rel=1e-5)
    voxels = stretched(weights, (16, 16, 17))
    assert np.array_equal(voxels[::2, ::2, :16:2], weights) and np.array_equal(voxels[1::2, 1::2, 1:16:2], weights)
    assert (voxels[:, :, 16] == 1).all()  # an odd last plane has no cell
    assert coarser(cells, 2).tolist() == [
        [[(1 << 17 | 1 << 5 | 1 << 3) if (x, y, z) == (0, 0, 0) else (1 << 3) * (x == 0 and y < 2) for z in range(4)]
         for y in range(4)] for x in range(4)
    ]  # fmt: skip
    assert np.array_equal(finding_weights(coarser(cells, 1), 0.1, 50.0), weights) and len(LABELS) == 18


def test_latents_know_their_findings_and_the_flow_weighs_them(tmp_path):
    vae, source = VAE(SMALL.vae), open_data("phantoms:3", "train", SIZE)
    latents = encode_source(source, vae, "vae", tmp_path, torch.device("cpu"), quiet=True)
    for i in range(3):
        latent, item = latents.read(i), source.read(i)
        assert torch.equal(latent.findings, torch.from_numpy(coarser(item.findings, 2)))
        config = LDMTraining(model=SMALL, finding_weight=0.05, small_weight=2.0)
        alone, both = (Flows(c, [torch.eye(24)[:1]] * 3, SMALL.spacing)(latent, (i, 0, 0))["weight"]
                       for c in (replace(config, small_weight=0.0), config))  # fmt: skip
        assert np.array_equal(alone.numpy(), finding_weights(coarser(item.findings, 2), 0.05, 8.0))
        assert torch.allclose(both - alone, 2 * (latent.small.float() / 16).clamp(max=1))


def test_weights_go_with_their_voxels_and_into_every_term():
    rng = np.random.default_rng(0)
    cells = np.zeros((8, 8, 8), np.uint32)
    cells[2:5, 3:5, 1:7] = 1
    hu = rng.integers(-1000, 1000, (16, 16, 16)).astype(np.int16)
    hu[stretched(finding_weights(cells, 0.1, MOST_WEIGHT), hu.shape) > 1] = 777
    made = Patches(VAE_TRAINING)(Item(hu, (1.0,) * 3, None, cells), (0, 3, 1))
    inside = made["weight"] > 1
    assert made["x"].shape == made["weight"].shape == (1, 8, 8, 8)
    assert inside.any() and (made["x"][inside] == (777 + 1000) / 2000).all()
    assert "weight" not in Patches(VAE_TRAINING)(Item(hu, (1.0,) * 3), (0, 3, 1))

    x, y, ones = torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 8, 8, 8), torch.ones(1, 1, 8, 8, 8)
    for term in (edge_loss, window_loss):
        assert term(x, y, ones).item() == pytest.approx(term(x, y).item(), rel=1e-6)
        assert term(x, y, 3 * ones).item() == pytest.approx(3 * term(x, y).item(), rel=1e-6)
    torch.manual_seed(0)
    recipe = VAERecipe(replace(VAE_TRAINING, edge_weight=1.0, square_weight=5.0, window_weight=0.05, kl_weight=0.0,
                               offset_weight=1.0), VAE(SMALL.vae), None)  # fmt: skip
    batch = {"x": made["x"][None], "noise": made["noise"][None]}
    plain, shown = recipe.loss("vae", batch)
    even, _ = recipe.loss("vae", batch | {"weight": ones})
    twice, told = recipe.loss("vae", batch | {"weight": 2 * ones})
    assert even.item() == pytest.approx(plain.item(), rel=1e-5)
    assert twice.item() == pytest.approx(2 * plain.item(), rel=1e-5)
    assert told["l1_hu"] == pytest.approx(shown["l1_hu"])  # what is shown is in HU, whatever counts


def test_where_findings_are_not_known_a_warning_says_so():
    class Source:
        entries, size = (), (16, 16, 16)

        def __len__(self):
            return 1

        def read(self, index):
            return Item(np.zeros((16, 16, 16), np.int16), (1.0, 1.0, 1.0))

    with pytest.warns(UserWarning, match="finding_weight: nothing to weigh"):
        VAERecipe(VAE_TRAINING, VAE(SMALL.vae), Source())
    with pytest.raises(ValueError, match="finding_weight: wanted augment=false"):
        replace(VAE_TRAINING, augment=True)


def test_a_run_on_patients_in_pairs(tmp_path):
    train("vae", "phantoms:4x2", tmp_path / "vae", preset="tiny", steps=2, finding_weight=0.1, quiet=True)
    train("clip", "phantoms:8x2", tmp_path / "clip", preset="tiny", steps=1, quiet=True)
    told = {"vae": str(tmp_path / "vae"), "clip": str(tmp_path / "clip"), "preset": "tiny", "quiet": True}
    train("ldm", "phantoms:4x2", tmp_path / "ldm", steps=2, group=2, batch=4, preview_count=0, **told)
    assert (tmp_path / "ldm" / "final" / "unet.safetensors").is_file()
    with pytest.raises(ValueError, match="whole groups of 4"):
        train("ldm", "phantoms:3x2", tmp_path / "other", steps=2, group=4, batch=4, preview_count=0, **told)
