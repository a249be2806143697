"""The plan: an upper bound, within 20 % of what a step is seen to take; blocks computed again change no gradient."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from t2ct.data.phantoms.reports.details import DETAILS
from t2ct.models import CLIP3D, VAE, UNetConfig, VAEConfig
from t2ct.models.judge import JudgeConfig
from t2ct.ops import group_norm
from t2ct.train.config import CLIPTraining, JudgeTraining, LDMTraining, VAETraining
from t2ct.train.loop import Run
from t2ct.train.memory import checkpoint_blocks, make_plan, read_size, write_size
from t2ct.train.memory.count import count_update, pace_of, seconds_of
from t2ct.train.memory.measure import fixed_bytes, moments_of, peak_of, probe_shares
from t2ct.train.memory.plan import _measured
from t2ct.train.memory.recipes import probe_recipe
from t2ct.train.parts.machine import has_bfloat16
from t2ct.train.presets import TINY, preset

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
    "judge": JudgeTraining(model=JudgeConfig(size=(32, 32, 32), details=DETAILS), batch=4, precision="float32",
                           ema=0.9, matrix_learning_rate=0.01),
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


EMULATED = pytest.mark.skipif(
    not has_bfloat16(), reason="torch emulates bfloat16 products on this processor, in memory that no plan counts"
)
CASES = [
    *((kind, "float32", False, 0) for kind in ("vae", "clip", "ldm")),
    pytest.param("judge", "float32", False, 0, marks=pytest.mark.xfail(reason="6 % too little, for a cause not found")),
    ("vae", "bf16", True, 0),
    *(pytest.param(kind, "bf16", True, 0, marks=EMULATED) for kind in ("clip", "ldm")),
    ("vae", "float32", False, 1),  # torch's convolutions of one small volume write every voxel 27 times
    pytest.param("clip", "bf16", False, 1, marks=EMULATED),
]


@pytest.mark.parametrize(("kind", "precision", "blocks", "micro"), CASES)
def test_the_prediction_is_an_upper_bound_within_a_fifth(kind, precision, blocks, micro):
    config = replace(CONFIGS[kind], checkpoint_blocks=blocks, precision=precision)
    config = replace(config, micro=micro or config.micro)
    said = []
    plan = make_plan(kind, config, CPU, told=said.append)
    assert plan.micro == (config.micro or config.batch) and plan.checkpoint == blocks and plan.micro == int(said[0][6])
    peak = measured(kind, config, blocks, plan.micro)
    assert peak <= plan.peak <= 1.2 * peak, (plan.peak / 1e6, peak / 1e6, plan.fixed / 1e6)
    assert plan.seconds > 0 and "predicted peak" in plan.text()


@pytest.mark.parametrize("kind", ("vae", "ldm"))
def test_what_a_gpu_is_asked_by_small_updates_is_a_bound_too(kind):
    """On a GPU small updates are run; here a CPU runs them."""
    config = CONFIGS[kind]
    predict = _measured(kind, config, CPU)
    micro = config.micro or config.batch
    fixed, peak, seconds = predict(micro, False, "none", "none")
    real = measured(kind, config, False, micro)
    assert fixed < real <= peak <= 1.2 * real and seconds() > 0


def test_published_sizes_are_counted_in_seconds_and_leave_no_trace():
    """Gigabytes that this machine may not have; afterwards tensors have numbers and kernels write."""
    config = preset("vae", "published")
    started = time.perf_counter()
    whole, again = (count_update("vae", config, 1, blocks, CPU) for blocks in (False, True))
    assert time.perf_counter() - started < 60
    assert 4e9 < again.peak < whole.peak < (12e9 if has_bfloat16() else 16e9)  # else in float32
    assert 1.0 < again.work["conv"] / whole.work["conv"] < 1.34  # a pass forward more, of three
    # Three convolutions' work for an update, forward and back twice: 20.9 M weights at their resolutions
    assert 1e13 < whole.work["conv"] < 1e15
    y = group_norm(torch.randn(1, 8, 4, 4, 4), torch.ones(8), torch.zeros(8), 2)
    assert y.std().item() == pytest.approx(1, abs=0.05)


def test_questions_are_counted_too_and_leave_nothing_behind():
    """Whatever the loss of answers keeps for itself must not be of the tensors that were only counted."""
    config = replace(CONFIGS["clip"], label_weight=1.0)
    plain, asked, again = (count_update("clip", c, 2, False, CPU) for c in (CONFIGS["clip"], config, config))
    assert plain.peak < asked.peak == again.peak
    assert measured("clip", config, False, 2) <= asked.peak


def test_the_speed_is_about_right():
    """Within a factor of four, under whatever else this machine does: hours are told from days."""
    config = replace(CONFIGS["ldm"], model=replace(MODEL, size=(64, 64, 64)))
    cost = count_update("ldm", config, 4, False, CPU)
    recipe = probe_recipe("ldm", config, CPU)
    run = Run(recipe, config, CPU)
    micros = [recipe.example(CPU, 4)]
    run.update(micros)
    started = time.perf_counter()
    for _ in range(3):
        run.update(micros)
    real = (time.perf_counter() - started) / 3
    assert real / 4 < seconds_of(cost.work, pace_of(torch.float32)) < real * 4


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
    config = replace(CONFIGS["ldm"], batch=2)
    free = make_plan("ldm", config, CPU)
    roomy = make_plan("ldm", replace(config, memory=f"{free.peak / 1e6 * 1.5:.1f}MB"), CPU)
    assert (roomy.micro, roomy.checkpoint) == (2, False)
    tight = make_plan("ldm", replace(config, memory=f"{free.peak / 1e6 * 0.85:.1f}MB"), CPU)
    assert (tight.micro < 2 or tight.checkpoint) and tight.peak <= tight.limit
    with pytest.raises(ValueError, match=r"memory: wanted at least [0-9.]+ MB for this network, got 1MB"):
        make_plan("ldm", replace(config, memory="1MB"), CPU)


@pytest.mark.parametrize("ema", (0.9, 0.0))
def test_a_gpu_leaves_to_the_host_what_it_must(ema, monkeypatch):
    """The planner's order alone, on sizes that are made up: nothing here runs on a GPU."""
    left, seen = {"none": 0, "average": 10, "optimiser": 30}, []

    def made_up(kind, config, device, world):
        def predict(micro, blocks, offload, shard):
            assert shard == "none"
            seen.append((offload, blocks, micro))
            fixed = 100 - left[offload]
            return 1e6 * fixed, 1e6 * (fixed + micro * (5 if blocks else 10)), lambda: 1.0

        return predict

    monkeypatch.setattr("t2ct.train.memory.plan._measured", made_up)
    gpu, config = torch.device("cuda"), replace(CONFIGS["ldm"], batch=4, micro=2, ema=ema)

    def plan(limit):
        found = make_plan("ldm", replace(config, memory=f"{limit}MB"), gpu)
        assert found.peak <= 1e6 * limit
        assert ("in the host's memory" in found.text()) == (found.offload != "none")
        return found.offload, found.checkpoint, found.micro

    assert plan(121) == ("none", False, 2)
    assert plan(111) == ("none", False, 1) and plan(106) == ("none", True, 1)
    assert plan(101) == (("average", False, 1) if ema else ("optimiser", False, 2))
    assert plan(81) == ("optimiser", False, 1)
    assert ("average" in {offload for offload, *_ in seen}) == bool(ema)
    with pytest.raises(ValueError, match="wanted at least"):
        plan(70)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_left_to_the_host_does_not_count(kind):
    config = replace(CONFIGS[kind], ema=0.9)
    recipe = probe_recipe(kind, config, torch.device("meta"))
    whole, average, optimiser = (
        fixed_bytes(replace(config, offload=where), recipe, 1) for where in ("none", "average", "optimiser")
    )
    assert whole == fixed_bytes(config, probe_recipe(kind, config, CPU), 1)
    first = next(iter(recipe.parts.values()))
    assert whole - average == sum(v.nbytes for v in first.state_dict().values())
    matrices = recipe.rates(next(iter(recipe.parts)))[1] > 0
    trained = sum(p.nbytes for part in recipe.parts.values() for p in part.parameters() if p.requires_grad)
    assert trained <= average - optimiser <= 2 * trained and (matrices or average - optimiser == 2 * trained)


def test_moments_of_eight_bits_count_less():
    config = replace(CONFIGS["ldm"], matrix_learning_rate=0.0)
    whole, few = (count_update("ldm", replace(config, optimiser_bits=b), 4, False, CPU) for b in (32, 8))
    sizes = [p.numel() for p in probe_recipe("ldm", config, CPU).model.parameters() if p.requires_grad]
    saved = sum(6 * n - n / 32 for n in sizes if n >= 4096 and n % 256 == 0)
    assert whole.fixed - few.fixed == pytest.approx(saved) and whole.peak - few.peak == pytest.approx(saved)
    recipe = probe_recipe("ldm", config, torch.device("meta"))
    analytic = [fixed_bytes(replace(config, optimiser_bits=b), recipe, 1) for b in (32, 8)]
    assert analytic[0] - analytic[1] == pytest.approx(saved)
    shared = fixed_bytes(replace(config, shard="optimiser"), recipe, 1, world=4)
    assert analytic[0] - shared == pytest.approx(0.75 * 8 * sum(sizes), rel=0.01)
    plans = [make_plan("ldm", replace(config, shard=s), CPU, world=4) for s in ("none", "optimiser")]
    assert plans[0].fixed - plans[1].fixed == pytest.approx(analytic[0] - shared)
    lone = replace(CONFIGS["clip"], shard="optimiser")  # its projection is most of it, and stays whole
    clip = probe_recipe("clip", lone, torch.device("meta"))
    largest = max(p.numel() for p in clip.model.parameters())
    assert 8 * largest <= moments_of(lone, clip, 64) < moments_of(lone, clip) / 2


def test_sizes_are_read():
    assert write_size(1.234e9) == "1.3 GB" and write_size(5e6) == "5 MB"
    assert read_size("24GB") == 24e9 and read_size("1.5 GiB") == 1.5 * 2**30 and read_size("800mb") == 8e8
    assert read_size("1TB") == 1e12 and read_size("6e9") == 6e9
    for words in ("", "much", "-3GB", "0GB", "3 apples"):
        with pytest.raises(ValueError, match="memory: wanted a positive size such as"):
            read_size(words)
