"""The plan: an upper bound, within 20 % of what a step is seen to take; blocks computed again change no gradient."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from t2ct.models import CLIP3D, VAE, UNetConfig, VAEConfig
from t2ct.train.config import CLIPTraining, LDMTraining, VAETraining
from t2ct.train.loop import Run
from t2ct.train.memory import checkpoint_blocks, make_plan, peak_of, probe_recipe, probe_shares, read_size, write_size
from t2ct.train.presets import TINY

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
MODEL = replace(
    TINY,
    size=(32, 32, 64),
    vae=VAEConfig(channels=(8, 16, 16), norm_groups=4, num_res_blocks=1),
    unet=UNetConfig(channels=(16, 32), attention_levels=(False, True), head_dim=16, cross_attention_dim=64,
                    norm_groups=8, num_res_blocks=1, num_class_embeds=2),
)  # fmt: skip
CONFIGS = {
    "vae": VAETraining(model=MODEL, batch=2, patches=((32, 32, 64),), patch_from=(0.0,), critic_from=0.0,
                       critic_channels=8, critic_layers=2, ema=0.9, precision="float32"),
    "clip": CLIPTraining(model=replace(MODEL, clip=replace(TINY.clip, vision=replace(TINY.clip.vision, depth=64))),
                         batch=4, micro=2, precision="float32"),
    "ldm": LDMTraining(model=MODEL, batch=4, precision="float32", ema=0.9, matrix_learning_rate=0.01),
}  # fmt: skip


def measured(kind, config, blocks, micro):
    """Bytes that a run holds, and at most in a whole update, by torch's own record."""
    recipe = probe_recipe(kind, config, CPU)
    if blocks:
        checkpoint_blocks(recipe.parts)
    for part in recipe.parts.values():
        part.train()
    state = Run(recipe, config, CPU)
    micros = [recipe.example(CPU, micro) for _ in range(config.batch // micro)]
    state.step = config.steps - 1
    state.update(micros)  # the optimiser's memory comes with its first step
    kept = sum(t.nbytes for t in [*state.tensors().values(), *(t for m in micros for t in m.values())])
    if kind == "ldm":  # a run holds the VAE and the text tower too
        held = VAE(MODEL.vae), CLIP3D(MODEL.clip, towers=("text",))
        kept += sum(t.nbytes for network in held for t in network.state_dict().values())
    for optimiser in state.optimisers.values():
        optimiser.zero_grad()  # what was there before is not seen to go
    return kept + peak_of(partial(state.update, micros), CPU)


@pytest.mark.parametrize("blocks", (False, True), ids=("kept", "again"))
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_prediction_is_an_upper_bound_within_a_fifth(kind, blocks):
    config = replace(CONFIGS[kind], checkpoint_blocks=blocks)
    plan = make_plan(kind, config, CPU)
    assert plan.micro == (config.micro or config.batch) and plan.checkpoint == blocks
    peak = measured(kind, config, blocks, plan.micro)
    assert peak <= plan.peak <= 1.2 * peak, (plan.peak / 1e6, peak / 1e6, plan.fixed / 1e6)
    assert plan.seconds > 0 and "predicted peak" in plan.text()


@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_computed_again_give_the_same_gradients(kind):
    grads, peaks = [], []
    for blocks in (False, True):
        torch.manual_seed(0)
        recipe = probe_recipe(kind, CONFIGS[kind], CPU)
        if blocks:
            checkpoint_blocks(recipe.parts)
        torch.manual_seed(1)
        batch = recipe.example(CPU, 2, 0.25)
        no = partial(torch.autocast, "cpu", enabled=False)
        part = next(iter(recipe.parts))
        recipe.parts[part].train()
        recipe.begin(0)
        go = partial(recipe.gradients, part, recipe.loss, [batch], lambda x: x.backward(), no)
        go()
        grads.append({k: p.grad.clone() for k, p in recipe.parts[part].named_parameters() if p.grad is not None})
        recipe.begin(0)
        peaks.append(peak_of(go, CPU))
    assert grads[0].keys() == grads[1].keys()
    for key, value in grads[0].items():
        assert torch.allclose(value, grads[1][key], rtol=1e-4, atol=1e-6 * max(1, value.abs().max())), key
    assert peaks[1] < peaks[0]


def test_probes_are_of_two_sizes():
    """However coarse a network's grid is: a depth of one step of it can only be made wider."""
    for kind, config in CONFIGS.items():
        for size in ((32, 32, 64), (64, 64, 16), (128, 128, 32)):
            if kind == "clip":
                size = (32, 32, size[2])
            patches = {"patches": (size,)} if kind == "vae" else {}
            recipe = probe_recipe(kind, replace(config, model=replace(config.model, size=size), **patches), CPU)
            full, shares = probe_shares(recipe, CPU)
            sizes = [next(iter(recipe.example(CPU, 1, *s).values())).numel() for s in shares]
            assert full >= sizes[-1] and (len(sizes) == 1 or sizes[1] > sizes[0]), (kind, size)
            assert len(sizes) == 2 or full == sizes[0], (kind, size)


def test_the_memory_that_there_is_decides():
    config = CONFIGS["ldm"]
    free = make_plan("ldm", config, CPU)
    roomy = make_plan("ldm", replace(config, memory=f"{free.peak / 1e6 * 1.5:.1f}MB"), CPU)
    assert (roomy.micro, roomy.checkpoint) == (4, False)
    tight = make_plan("ldm", replace(config, memory=f"{free.peak / 1e6 * 0.75:.1f}MB"), CPU)
    assert tight.micro < 4 and tight.peak <= tight.limit
    with pytest.raises(ValueError, match=r"memory: wanted at least [0-9.]+ MB for this network, got 1MB"):
        make_plan("ldm", replace(config, memory="1MB"), CPU)


def test_sizes_are_read():
    assert write_size(1.234e9) == "1.3 GB" and write_size(5e6) == "5 MB"
    assert read_size("24GB") == 24e9 and read_size("1.5 GiB") == 1.5 * 2**30 and read_size("800mb") == 8e8
    for words in ("", "much", "-3GB", "0GB", "3TB"):
        with pytest.raises(ValueError, match="memory: wanted a size such as 24GB"):
            read_size(words)
