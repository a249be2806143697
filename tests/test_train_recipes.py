"""The three recipes on networks of milliseconds: losses are their formulas, exact caching, codes, adapters."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from small import SMALL, randomised

from t2ct.models import CLIP3D, VAE, UNet
from t2ct.models.quantizer import CosineQuantizer
from t2ct.train.clip import CLIPRecipe, info_nce
from t2ct.train.config import CLIPTraining, LDMTraining, VAETraining
from t2ct.train.data.latents import Latent
from t2ct.train.data.order import Order, collate
from t2ct.train.data.source import Entry, Item
from t2ct.train.ldm import Flows, LDMRecipe, freeze_dead, measure_scale
from t2ct.train.optim import Optimisers
from t2ct.train.parts.codebook import SteadyQuantizer
from t2ct.train.parts.lora import LoRALinear, add_lora, apply_lora, lora_state, merged
from t2ct.train.vae import VAERecipe


class Volumes:
    """A few volumes of the small model's size."""

    size = (16, 16, 16)
    entries = [Entry(str(i), (f"large effusion {i}", f"small nodule {i}")) for i in range(8)]

    def __len__(self):
        return len(self.entries)

    def read(self, index):
        hu = np.random.default_rng(index).integers(-1000, 1000, self.size).astype(np.int16)
        hu[: 2 * index] = -1000
        return Item(hu, (20.0, 20.0, 20.0))


class Latents:
    """Latents whose scale is known."""

    size = (16, 16, 16)
    entries = Volumes.entries

    def __init__(self, small=True):
        self.small = small

    def __len__(self):
        return len(self.entries)

    def read(self, index):
        g = torch.Generator().manual_seed(index)
        mu = 2 * torch.randn(4, 4, 4, 4, generator=g)
        small = torch.zeros(4, 4, 4, dtype=torch.uint8)
        small[0, 0, 0] = 8
        spacing = torch.full((3,), 5.0)
        return Latent(mu.half(), torch.full_like(mu, 0.5).half(), spacing, small if self.small else None)


class Words:
    """A tokenizer of numbers."""

    def encode(self, texts, length):
        rows = [[1, *(ord(c) % 200 + 2 for c in text), 279] for text in texts]
        longest = max(map(len, rows))
        return torch.tensor([row + [279] * (longest - len(row)) for row in rows])


def steps_of(recipe, samples, part, number=0):
    """A batch of the recipe, on the CPU."""
    draws = Order(len(samples.source), recipe.config.batch, 0).at(number)
    return [collate([samples[d] for d in draws])]


def learned(recipe, part, steps=25, rate=3e-3):
    """Loss of one batch before and after a few updates on it."""
    batch = steps_of(recipe, recipe.samples(), part)
    optimiser, losses = Optimisers(recipe.parts[part], rate, 0.0, 0.0), []
    no = partial(torch.autocast, "cpu", enabled=False)
    for step in range(steps):
        recipe.begin(step)
        optimiser.zero_grad()
        if part == "critic":  # it judges what the VAE has just made
            with torch.no_grad():
                recipe.loss("vae", batch[0])
        loss, shown = recipe.gradients(part, recipe.loss, batch, lambda x: x.backward(), no)
        assert math.isfinite(loss) and set(shown) <= set(recipe.shown)
        optimiser.step(1.0)
        recipe.after(step)
        losses.append(loss.item())
    return losses


def test_vae_terms_and_critic_learn():
    torch.manual_seed(0)
    config = VAETraining(
        model=SMALL, steps=50, batch=2, patches=((16, 16, 16),), patch_from=(0.0,), critic_channels=4, critic_layers=2,
        edge_weight=1.0, square_weight=5.0, window_weight=0.05, offset_weight=0.2, critic_from=0.0,
    )  # fmt: skip
    recipe = VAERecipe(config, VAE(SMALL.vae), Volumes())
    losses = learned(recipe, "vae")
    assert losses[-1] < 0.8 * losses[0]
    critic = learned(recipe, "critic", rate=1e-3)
    assert critic[-1] < critic[0]
    assert all(p.requires_grad for p in recipe.critic.parameters())
    grads = [p.grad for p in recipe.parts["vae"].parameters()]
    assert all(g is not None for g in grads)
    recipe.begin(0)
    _, shown = recipe.loss("vae", steps_of(recipe, recipe.samples(), "vae")[0])
    assert "fooled" in shown and "perceptual" in shown
    late = VAERecipe(replace(config, critic_from=0.5), VAE(SMALL.vae), Volumes())
    late.begin(10)  # the critic warms up first
    assert "fooled" not in late.loss("vae", steps_of(late, late.samples(), "vae")[0])[1]


def clip_recipe(micro_count=1, **values):
    torch.manual_seed(0)
    config = CLIPTraining(model=SMALL, steps=20, batch=8, **values)
    model = CLIP3D(SMALL.clip).train()
    recipe = CLIPRecipe(config, model, Words(), Volumes())
    batch = steps_of(recipe, recipe.samples(), "clip")[0]
    size = 8 // micro_count
    return recipe, [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(micro_count)]


def clip_gradients(micro_count):
    recipe, micros = clip_recipe(micro_count)
    no = partial(torch.autocast, "cpu", enabled=False)
    recipe.begin(0)
    loss, _ = recipe.gradients("clip", recipe.loss, micros, lambda x: x.backward(), no)
    recipe.after(0)
    grads = {k: p.grad for k, p in recipe.model.named_parameters() if p.grad is not None}
    book = recipe.model.state_dict()["model.vision_model.vq._codebook.embed"]
    return loss, grads, book


def test_gradients_through_a_cache_are_those_of_the_whole_batch():
    loss, whole, book = clip_gradients(1)
    recipe, micros = clip_recipe(1)  # and those of autograd on the loss as it is written
    recipe.begin(0)
    recipe._first_codes("clip", recipe.loss, micros, partial(torch.autocast, "cpu", enabled=False))
    text, volume, _ = recipe.loss("clip", micros[0])
    info_nce(text, volume, recipe.model.logit_scale.exp()).backward()
    plain = {k: p.grad for k, p in recipe.model.named_parameters() if p.grad is not None}
    assert plain.keys() == whole.keys() and len(plain) > 30
    for key in plain:
        assert torch.allclose(plain[key], whole[key], atol=1e-7), key
    for count in (2, 4, 8):
        other, cached, moved = clip_gradients(count)
        assert torch.allclose(other, loss, atol=1e-6)
        assert cached.keys() == plain.keys()
        largest = max(g.abs().max() for g in plain.values())
        for key in plain:
            assert (cached[key] - plain[key]).abs().max() <= 1e-5 * largest, (count, key)
        assert torch.allclose(moved, book, atol=1e-5)


def test_both_passes_of_a_cache_draw_the_same_random_numbers():
    recipe, micros = clip_recipe(4)
    recipe.model.train()
    dropout = torch.nn.Dropout(0.5)
    recipe.model.model.visual_projection.register_forward_pre_hook(lambda _, tokens: (dropout(tokens[0]),))
    seen = {True: [], False: []}
    recipe.model.register_forward_hook(lambda m, i, out: seen[torch.is_grad_enabled()].append(out[1].detach()))
    recipe.begin(0)
    recipe._first_codes("clip", recipe.loss, micros, partial(torch.autocast, "cpu", enabled=False))
    seen[False].clear()
    torch.manual_seed(5)
    no = partial(torch.autocast, "cpu", enabled=False)
    recipe.gradients("clip", recipe.loss, micros, lambda loss: loss.backward(), no)
    assert len(seen[True]) == len(seen[False]) == 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(seen[False], seen[True], strict=True))
    assert not torch.allclose(*seen[True][:2], atol=1e-2)


def test_clip_learns_and_its_scale_stays_in_bounds():
    recipe, _ = clip_recipe(micro=4)
    losses = learned(recipe, "clip", steps=30)
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        recipe.model.logit_scale.fill_(9)
    recipe.begin(0)
    assert recipe.model.logit_scale.item() == pytest.approx(math.log(100))
    looking = CLIPRecipe(recipe.config, recipe.model, Words(), Volumes(), Volumes())
    figures = looking.validate(recipe.model.eval(), None, 0)
    assert next(iter(figures)) == "mean_recall" and figures["volume_r10"] == 1
    with pytest.raises(ValueError, match="batch: wanted at most the 8 volumes of the data, got 9"):
        CLIPRecipe(replace(recipe.config, batch=9), recipe.model, Words(), Volumes())


def test_codes_move_as_the_original_quantiser_moves_them():
    torch.manual_seed(0)
    old = CosineQuantizer(6, 5).train()
    old(torch.randn(4, 8, 5))  # the first batch: codes come from it
    new = SteadyQuantizer(CosineQuantizer(6, 5), 0.8, 0.03, 4).train()
    new._codebook.load_state_dict(old._codebook.state_dict())
    assert list(new.state_dict()) == list(old.state_dict())
    x = torch.randn(4, 8, 5, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    codes, ids = old(x)
    new.counting = True
    halves = [new(y[:2]), new(y[2:])]
    assert torch.equal(torch.cat([h[1] for h in halves]), ids)
    made = torch.cat([h[0] for h in halves])
    assert torch.allclose(made, codes, atol=1e-6)
    weight = torch.randn_like(codes)
    (codes * weight).sum().backward()
    (made * weight).sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)
    new.move(1)
    for name in ("embed", "cluster_size"):
        assert torch.allclose(getattr(old._codebook, name), getattr(new._codebook, name), atol=1e-5), name
    new.counting = True
    new(torch.randn(4, 8, 5))
    new._codebook.cluster_size.zero_()
    new._codebook.embed[0, 0] = -new._codebook.embed[0].mean(0)
    new.usage = torch.zeros(6)
    new.move(2)  # nobody chose any code: all are dead, and become tokens
    assert torch.allclose(new._codebook.embed.norm(dim=-1), torch.ones(1, 6), atol=1e-5)


def ldm_recipe(source=None, unet=SMALL.unet, **values):
    torch.manual_seed(0)
    config = LDMTraining(model=SMALL, steps=20, batch=4, **values)
    clip = CLIP3D(SMALL.clip).eval()
    return LDMRecipe(config, UNet(unet), VAE(SMALL.vae), clip, Words(), source or Latents())


def test_ldm_loss_is_its_formula_and_learns():
    recipe = ldm_recipe(latents="means")
    assert 1 / recipe.scale == pytest.approx(2, rel=0.03)
    assert 1 / measure_scale(Latents(), True) == pytest.approx((4 + 0.25) ** 0.5, rel=0.03)
    batch = steps_of(recipe, recipe.samples(), "unet")[0]
    # the network's last layer begins as zero: the loss is that of predicting nothing
    target = recipe.scale * batch["x0"] - batch["noise"]
    assert recipe.loss("unet", batch)[0].item() == pytest.approx(target.square().mean().item(), rel=1e-5)
    absolute = ldm_recipe(latents="means", loss="absolute")
    assert absolute.loss("unet", batch)[0].item() == pytest.approx(target.abs().mean().item(), rel=1e-5)
    weighted = ldm_recipe(latents="means", small_weight=12.0)
    batch = steps_of(weighted, weighted.samples(), "unet")[0]
    extra = torch.ones(4, 1, 4, 4, 4)
    extra[:, :, 0, 0, 0] = 1 + 12 * 8 / 16
    assert weighted.loss("unet", batch)[0].item() == pytest.approx((extra * target.square()).mean().item(), rel=1e-5)
    dead = "middle_block.attention.transformer_blocks.0.attn2.to_q.weight"
    query = recipe.model.state_dict()[dead].clone()
    losses = learned(recipe, "unet", steps=40, rate=5e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(recipe.model.state_dict()[dead], query)
    with pytest.warns(UserWarning, match="small_weight: nothing to weigh, since these data do not know"):
        unknown = ldm_recipe(Latents(small=False), small_weight=1.0)
    assert "weight" not in steps_of(unknown, unknown.samples(), "unet")[0]


def test_what_a_flow_draws():
    config = LDMTraining(model=SMALL, steps=100, batch=8, text_dropped=0.25)
    contexts = [torch.ones(2, 24)] * 8
    flows, source = Flows(config, contexts, SMALL.spacing), Latents()
    draws = [flows(source.read(n % 8), (n % 8, n, n % 8)) for n in range(800)]
    dropped = np.mean([not d["context"].any() for d in draws])
    assert 0.2 < dropped < 0.3
    t = torch.stack([d["t"] for d in draws]).view(100, 8)
    assert torch.equal((8 * t).long().sort(1).values, torch.arange(8).expand(100, 8))  # one in each stratum
    assert torch.histc(t, 10, 0, 1).min() > 50  # uniform
    spread = torch.stack([d["x0"] for d in draws[::8]]).var(0).mean()  # the same latent: fresh noise every time
    assert spread.item() == pytest.approx(0.25, rel=0.1)
    assert torch.equal(draws[0]["spacing"], torch.full((3,), 2000.0))
    actual = Flows(replace(config, actual_spacing=True), contexts, SMALL.spacing)(source.read(0), (0, 0, 0))
    assert torch.equal(actual["spacing"], torch.full((3,), 500.0))
    normal = Flows(replace(config, time="logit-normal"), contexts, SMALL.spacing)
    t = torch.stack([normal(source.read(0), (0, n, n % 8))["t"] for n in range(800)])
    assert t.logit().std().item() == pytest.approx(1, rel=0.1)
    noisy = Flows(replace(config, text_noise=0.5, text_dropped=0.0), [torch.eye(24)[:1]] * 8, SMALL.spacing)
    context = torch.stack([noisy(source.read(0), (0, n, 0))["context"][0] for n in range(50)])
    assert torch.allclose(context.norm(dim=1), torch.ones(50), atol=1e-5)
    assert (context[:, 0].mean() - 1 / 1.25**0.5).abs() < 0.03


def test_adapters_begin_as_nothing_and_merge_to_the_same(tmp_path):
    torch.manual_seed(0)
    unet = randomised(UNet(SMALL.unet), 3)
    freeze_dead(unet)
    args = (torch.randn(2, 4, 4, 4, 4), torch.tensor([3.0, 500.0]), torch.randn(2, 1, 24), torch.ones(2).long(),
            torch.ones(2, 3))  # fmt: skip
    before_, keys = unet(*args), set(unet.state_dict())
    add_lora(unet, 2)
    assert torch.equal(unet(*args), before_)
    trained = {k for k, p in unet.named_parameters() if p.requires_grad}
    assert trained and all(k.endswith((".up", ".down")) for k in trained)
    with torch.no_grad():
        for m in unet.modules():
            if isinstance(m, LoRALinear):
                m.up.normal_(std=0.1)
    adapted = unet(*args)
    assert (adapted - before_).abs().max() > 1e-3
    (tmp_path / "lora.safetensors").write_bytes(lora_state(unet))
    with merged(unet) as one:
        assert set(one.state_dict()) == keys
        assert torch.allclose(one(*args), adapted, atol=1e-4)
    assert torch.equal(unet(*args), adapted)  # as it was
    other = randomised(UNet(SMALL.unet), 3)
    torch.manual_seed(0)
    plain = UNet(SMALL.unet)
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if k in keys})
    apply_lora(plain, tmp_path / "lora.safetensors")
    assert torch.allclose(plain(*args), adapted, atol=1e-4)
    with pytest.raises(ValueError, match="lora: wanted a rank of at most"):
        add_lora(other, 99)
    with pytest.raises(ValueError, match="lora: .* wanted None, got"):
        apply_lora(VAE(SMALL.vae), tmp_path / "lora.safetensors")
