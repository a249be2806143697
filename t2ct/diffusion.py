"""Rectified flow and classifier-free guidance as pure functions.

A latent at time t in [0, 1] is x_t = (1 - t) * x0 + t * noise; the network predicts the velocity v = x0 - noise, and
sampling walks from t = 1 to t = 0 by x += v * dt (Liu et al. 2022, arXiv 2209.03003; MAISI's RFlowScheduler).
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
BASE_VOXELS = 32**3  # the latent size at which timesteps are not shifted, in the published configuration
MAX_GUIDANCE = 1e6  # beyond it velocities overflow in every dtype
SCHEDULES = ("compat", "exact")


class Step(NamedTuple):
    """One step of the sampler: the timestep the network sees (0 to 1000), and how far x moves along the velocity."""

    timestep: float
    dt: float


def shift_timestep(t, voxels: int, base_voxels: int = BASE_VOXELS):
    """t in [0, 1] (float or tensor) -> r*t / (1 + (r-1)*t) with r = (voxels / base_voxels)^(1/3): larger latents spend
    more of the path near pure noise. r = 2.52 for the published 128x128x32."""
    ratio = (voxels / base_voxels) ** (1 / 3)
    return ratio * t / (1 + (ratio - 1) * t)


def make_schedule(
    num_inference_steps: int, voxels: int, schedule: str = "exact", base_voxels: int = BASE_VOXELS
) -> list[Step]:
    """The steps from noise to latent, for latents of `voxels` = X*Y*Z.

    schedule "exact": float64 times; the dt sum to 1.
    schedule "compat": the published loop to the bit. Times are rounded to float16, and each dt is counted from the
    *integer part* of the next time, so that the published 30 steps walk 1.0087 instead of 1.
    ValueError for fewer than 1 or more than 1000 steps, or another schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    n = as_integer(num_inference_steps) or 0
    if not 1 <= n <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"num_inference_steps must be an integer from 1 to {NUM_TRAIN_TIMESTEPS}, got {num_inference_steps!r}"
        )
    if schedule == "exact":
        times = [shift_timestep(1 - i / n, voxels, base_voxels) for i in range(n + 1)]
        return [Step(t * NUM_TRAIN_TIMESTEPS, t - t_next) for t, t_next in zip(times, times[1:], strict=False)]
    # The order of operations is the published one: scaled to 1000 first, back inside the shift, scaled again.
    scaled = [(1.0 - i / n) * NUM_TRAIN_TIMESTEPS for i in range(n)]
    shifted = [shift_timestep(t / NUM_TRAIN_TIMESTEPS, voxels, base_voxels) * NUM_TRAIN_TIMESTEPS for t in scaled]
    half = [float(t) for t in np.array(shifted).astype(np.float16)]
    following = [int(t) for t in half[1:]] + [0]
    return [Step(t, (t - t_next) / NUM_TRAIN_TIMESTEPS) for t, t_next in zip(half, following, strict=True)]


def as_integer(value: Any) -> int | None:
    """Whatever is integral, numpy's and torch's integers too, as an int; None for anything else, bools too."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) * x0 + t * noise, for x0 and noise (B, C, X, Y, Z) and t (B,) in [0, 1]."""
    t = t.to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the network learns to predict: x0 - noise."""
    return x0 - noise


def guide(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: u + w * (c - u)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def check_guidance(guidance_scale: float, guidance_interval: Sequence[float] = (0.0, 1.0)) -> None:
    """ValueError unless the scale is a finite number and the interval two rising numbers from 0 to 1."""
    good = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
    if not good or not abs(guidance_scale) <= MAX_GUIDANCE:
        raise ValueError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
    try:
        low, high = (float(t) for t in guidance_interval)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval must be two rising times from 0 to 1, got {guidance_interval!r}")


def sample(
    predict: Callable[[Tensor, float], Tensor],
    latents: Tensor,
    steps: Iterable[Step],
    on_step_end: Callable[[int, float, Tensor], Tensor | None] | None = None,
) -> Tensor:
    """Walk `latents` (noise, any shape) along the velocity `predict(x, timestep)` returns. Not in place.

    on_step_end(index, timestep, x) runs after every step; a tensor that it returns replaces x.
    """
    x = latents
    for index, (timestep, dt) in enumerate(steps):
        x = x + predict(x, timestep) * dt
        if on_step_end is not None:
            replaced = on_step_end(index, timestep, x)
            x = x if replaced is None else replaced
    return x


def guided(
    unet: Callable[..., Tensor],
    context: Tensor,
    negative: Tensor | None,
    guidance_scale: float,
    class_labels: Tensor,
    spacing: Tensor,
    guidance_interval: Sequence[float] = (0.0, 1.0),
) -> Callable[[Tensor, float], Tensor]:
    """The guided velocity of `unet` as a function of (x, timestep), for `sample`.

    context, negative   (B, L, D); negative None = zeros, the unconditional context of the published system
    class_labels        (B,) int64; spacing (B, 3) in mm x 100
    guidance_interval   the times, 1 being noise, between which there is guidance (Kynkaanniemi et al. 2024, arXiv
                        2404.07724); at others the conditional velocity is taken as it is, in half the work
    A scale of 1 needs no unconditional pass, a scale of 0 no conditional one. Otherwise both go through the network as
    one batch, which computes what they share once.
    """
    check_guidance(guidance_scale, guidance_interval)
    low, high = (NUM_TRAIN_TIMESTEPS * float(t) for t in guidance_interval)
    negative = torch.zeros_like(context) if negative is None else negative
    both = context if guidance_scale == 1 else negative if guidance_scale == 0 else torch.cat((context, negative))

    @torch.no_grad()
    def predict(x: Tensor, timestep: float) -> Tensor:
        t = torch.full((x.shape[0],), timestep, dtype=torch.float32, device=x.device)
        seen = both if low <= timestep <= high else context
        v = unet(x, t, seen, class_labels, spacing)
        if seen.shape[0] == x.shape[0]:
            return v
        conditional, unconditional = v.chunk(2)
        return guide(unconditional, conditional, guidance_scale)

    return predict
