"""Rectified flow: times and steps from their formulas, the published loop replayed, guidance, the sampler."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from t2ct import diffusion
from t2ct.diffusion import Step, add_noise, guide, guided, make_schedule, sample, shift_timestep, velocity

PUBLISHED = 128 * 128 * 32


def published_loop(n, voxels):
    """The reference sampler, written out: float64 times, one cast to float16, steps counted from the next's int."""
    times = torch.from_numpy(np.array([_shift_1000((1.0 - i / n) * 1000, voxels) for i in range(n)]).astype(np.float16))
    following = torch.cat([times[1:], torch.zeros(1)])
    return [(t.item(), float(t - int(f)) / 1000) for t, f in zip(times, following, strict=True)]


def _shift_1000(t, voxels):
    t = t / 1000
    ratio = (voxels / 32**3) ** (1.0 / 3)
    return ratio * t / (1 + (ratio - 1) * t) * 1000


@pytest.mark.parametrize("n,voxels", [(30, PUBLISHED), (10, PUBLISHED), (30, 16 * 16 * 8), (1, 64), (1000, 32**3)])
def test_compat_is_the_published_loop_to_the_bit(n, voxels):
    assert [tuple(step) for step in make_schedule(n, voxels, "compat")] == published_loop(n, voxels)


def test_compat_equals_monai():
    schedulers = pytest.importorskip("monai.networks.schedulers.rectified_flow")
    theirs = schedulers.RFlowScheduler(
        use_discrete_timesteps=False, use_timestep_transform=True, sample_method="uniform", scale=1.4
    )
    theirs.set_timesteps(num_inference_steps=30, input_img_size_numel=PUBLISHED)
    steps = make_schedule(30, PUBLISHED, "compat")
    assert [s.timestep for s in steps] == theirs.timesteps.tolist()
    x = y = torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    following = torch.cat([theirs.timesteps[1:], torch.zeros(1)])
    for step, t, t_next in zip(steps, theirs.timesteps, following, strict=True):
        y, _ = theirs.step(torch.sin(y), t, y, t_next)
        x = sample(lambda x, t: torch.sin(x), x, [step])
    assert torch.equal(x, y)


def test_the_published_steps_overshoot():
    assert round(sum(s.dt for s in make_schedule(30, PUBLISHED, "compat")), 4) == 1.0087


@pytest.mark.parametrize("n", [1, 7, 30, 999])
@pytest.mark.parametrize("voxels", [8, 16 * 16 * 8, PUBLISHED])
def test_exact_steps_sum_to_one(n, voxels):
    steps = make_schedule(n, voxels, "exact")
    assert math.isclose(sum(s.dt for s in steps), 1, rel_tol=1e-12)
    assert math.isclose(steps[0].timestep, 1000, rel_tol=1e-12)
    assert all(s.dt > 0 for s in steps)
    for a, b in zip(steps, steps[1:], strict=False):
        assert math.isclose(a.timestep - b.timestep, 1000 * a.dt, rel_tol=1e-9)


def test_shift_is_its_formula():
    r = Fraction(5, 2)  # 32^3 * 2.5^3 voxels
    for t in (Fraction(0), Fraction(1, 3), Fraction(9, 10), Fraction(1)):
        assert math.isclose(shift_timestep(float(t), int(32**3 * r**3)), r * t / (1 + (r - 1) * t), rel_tol=1e-12)
    assert shift_timestep(0.3, 500, base_voxels=500) == pytest.approx(0.3, rel=1e-15)


def test_noise_and_velocity_are_a_straight_line():
    x0, noise = torch.randn(3, 4, 2, 2, 2).double(), torch.randn(3, 4, 2, 2, 2).double()
    t = torch.tensor([0.0, 0.25, 1.0]).double()
    x = add_noise(x0, noise, t)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[2], noise[2])
    assert torch.allclose(x + velocity(x0, noise) * t.view(-1, 1, 1, 1, 1), x0, atol=1e-12)  # walking all the way back


@pytest.mark.parametrize("schedule", ["exact"])
def test_sampling_a_known_flow(schedule):
    """With the true velocity towards one x0, any number of exact steps lands on it."""
    x0, noise = torch.randn(1, 4, 4, 4, 4).double(), torch.randn(1, 4, 4, 4, 4).double()
    for n in (1, 3, 30):
        z = sample(lambda x, t: velocity(x0, noise), noise, make_schedule(n, 64, schedule))
        assert torch.allclose(z, x0, atol=1e-12)


def test_sample_calls_back_and_takes_a_replacement():
    seen = []

    def on_step_end(index, timestep, x):
        seen.append((index, timestep))
        return torch.zeros_like(x) if index == 1 else None

    start = torch.ones(2)
    z = sample(lambda x, t: torch.ones_like(x), start, [Step(900, 0.5), Step(400, 0.25), Step(100, 0.25)], on_step_end)
    assert seen == [(0, 900), (1, 400), (2, 100)]
    assert torch.equal(z, torch.full((2,), 0.25))
    assert torch.equal(start, torch.ones(2))


def test_guidance():
    """One batch of both contexts, u + w (c - u); a scale of 1 or 0 runs one branch only."""
    calls = []

    def unet(x, t, context, labels, spacing):
        calls.append(len(context))
        return x.repeat(len(context) // len(x), 1, 1, 1, 1) * 0 + context.mean(2)[:, :, None, None, None] + t[0] / 1000

    x, context = torch.zeros(2, 1, 2, 2, 2), torch.tensor([[[2.0, 4.0]], [[1.0, 1.0]]])
    for w, size in ((5.0, 4), (1.0, 2), (0.0, 2), (-1.5, 4)):
        v = guided(unet, context, None, w, torch.ones(2), torch.ones(2, 3))(x, 500.0)
        assert calls.pop() == size
        want = torch.stack([guide(torch.tensor(0.0), c.mean(), w) for c in context]) + 0.5
        assert torch.allclose(v[:, 0, 0, 0, 0], want)
    negative = torch.ones(2, 1, 2)
    v = guided(unet, context, negative, 3.0, torch.ones(2), torch.ones(2, 3))(x, 0.0)
    assert torch.allclose(v[:, 0, 0, 0, 0], torch.tensor([1 + 3 * 2.0, 1.0]))
    calls.clear()
    velocity = guided(unet, context, negative, 3.0, torch.ones(2), torch.ones(2, 3), (0.25, 0.75))
    for timestep, size in ((1000.0, 2), (751.0, 2), (750.0, 4), (250.0, 4), (249.0, 2)):
        v = velocity(x, timestep)[:, 0, 0, 0, 0] - timestep / 1000
        assert torch.allclose(v, torch.tensor([7.0, 1.0] if size == 4 else [3.0, 1.0])) and calls.pop() == size
    without = guided(unet, context, negative, 0.0, torch.ones(2), torch.ones(2, 3), (0.25, 0.75))
    assert torch.allclose(without(x, 0.0)[:, 0, 0, 0, 0], torch.tensor([3.0, 1.0]))  # outside: what the text says


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match="num_inference_steps must be an integer from 1 to 1000, got"):
        make_schedule(steps, 64)


def test_whatever_is_integral_counts_steps():
    assert make_schedule(np.int64(5), 64) == make_schedule(torch.tensor(5), 64) == make_schedule(5, 64)


def test_bad_schedule_and_scale():
    with pytest.raises(ValueError, match=r"schedule must be one of \('compat', 'exact'\), got 'linear'"):
        make_schedule(3, 64, "linear")
    diffusion.check_guidance(np.float32(3))
    for scale in (float("nan"), float("inf"), 10**400, "5", True):
        with pytest.raises(ValueError, match="guidance_scale must be a finite number, got"):
            diffusion.check_guidance(scale)
    for interval in ((0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.0, float("nan")), (0.5,), 0.5, None, ("a", "b")):
        with pytest.raises(ValueError, match="guidance_interval must be two rising times from 0 to 1, got"):
            diffusion.check_guidance(5.0, interval)
