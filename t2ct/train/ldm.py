"""Latent diffusion: rectified flow's velocity, the text dropped for one sample in ten."""

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from t2ct.diffusion import NUM_TRAIN_TIMESTEPS, add_noise, shift_timestep, velocity
from t2ct.models import VAE, UNet, hu_to_unit
from t2ct.train.loop import has_bfloat16

TEXT_DROPPED = 0.1


@torch.inference_mode()
def encode_volumes(vae: VAE, hu: np.ndarray, batch: int = 2) -> tuple[Tensor, Tensor]:
    """(N, X, Y, Z) HU -> mu and sigma, (N, 4, X/4, Y/4, Z/4) float16."""
    means, sigmas = [], []
    for start in tqdm(range(0, len(hu), batch), desc="encoding"):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            mu, sigma = vae.encode(hu_to_unit(torch.from_numpy(hu[start : start + batch])[:, None]))
        means.append(mu.half())
        sigmas.append(sigma.half())
    return torch.cat(means).contiguous(), torch.cat(sigmas).contiguous()


def freeze_dead(unet: UNet) -> None:
    """Queries and keys of attention to a one-token context have no say and no gradient: optimisers skip them."""
    for name, parameter in unet.named_parameters():
        if any(part in name for part in (".attn2.to_q.", ".attn2.to_k.", ".transformer_blocks.0.norm2.")):
            parameter.requires_grad_(False)


def ldm_loss(
    model: nn.Module,
    mu: Tensor,
    embeds: Tensor,
    spacing: tuple[float, float, float],
    scale: float,
    batch: int,
    base_voxels: int,
):
    """The loss function for `loop.run`. embeds: (N, WORDINGS, D); scale: 1 / std of the latents; spacing in mm.

    Times are uniform, then shifted towards noise as sampling shifts them: there the text decides what there will be.
    The error is squared, where the published recipe takes its absolute value: a flow follows the mean velocity. The
    median that the absolute error asks for is "no nodule" at every place, since a nodule is nowhere likelier than not.
    Latents are the means, mu: a channel that the VAE does not use has sigma 1, a target of noise that nothing predicts.
    """
    spaced = 100 * torch.tensor(spacing).expand(batch, 3)
    ct = torch.ones(batch, dtype=torch.long)

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(mu), (batch,), generator=generator)
        wording = torch.randint(embeds.shape[1], (batch,), generator=generator)
        x0 = scale * mu[index].float()
        noise = torch.randn(x0.shape, generator=generator)
        # one time per stratum of [0, 1]: the same uniform law, less noise in the loss
        t = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        t = shift_timestep(t, mu[0, 0].numel(), base_voxels)
        context = embeds[index, wording][:, None]
        context = context * (torch.rand(batch, generator=generator) >= TEXT_DROPPED)[:, None, None]
        v = model(add_noise(x0, noise, t), t * NUM_TRAIN_TIMESTEPS, context, ct, spaced)
        return (v.float() - velocity(x0, noise)).square().mean(), {}

    return loss_of
