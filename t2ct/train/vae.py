"""The VAE on patches: L1 + gradient L1 + KL (reference recipe: MAISI, without its perceptual and adversarial terms)."""

import numpy as np
import torch
from torch import Tensor

from t2ct.models import VAE, hu_to_unit
from t2ct.models.layers import channels_last

# Of the KL summed over a patch's latents; at the published 1e-7 half the channels of a VAE this small collapse.
KL_WEIGHT = 1e-8
EDGE_WEIGHT = 1.0


def kl_divergence(mu: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma) || N(0, 1)), summed over each sample, averaged over the batch."""
    kl = 0.5 * (mu.square() + sigma.square() - 2 * sigma.clamp_min(1e-12).log() - 1)
    return kl.flatten(1).sum(1).mean()


def edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the forward differences along the three axes: what L1 alone lets blur."""
    return sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3, 4)) / 3  # type: ignore[return-value]


def draw_patches(hu: np.ndarray, batch: int, patch: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """(batch, 1, *patch) in [0, 1]: random volumes, random corners."""
    indices = torch.randint(len(hu), (batch,), generator=generator).tolist()
    corners = [
        torch.randint(n - p + 1, (batch,), generator=generator).tolist()
        for n, p in zip(hu.shape[1:], patch, strict=True)
    ]
    cut = [
        hu[(i, *(slice(c[k], c[k] + p) for c, p in zip(corners, patch, strict=True)))] for k, i in enumerate(indices)
    ]
    return hu_to_unit(torch.from_numpy(np.stack(cut))[:, None])


def vae_loss(model: VAE, hu: np.ndarray, batch: int, patch: tuple[int, int, int]):
    """The loss function for `loop.run`."""

    def loss_of(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x = channels_last(draw_patches(hu, batch, patch, generator))
        y, mu, sigma = model(x, generator)
        l1, edge, kl = (x - y).abs().mean(), edge_loss(x, y), kl_divergence(mu, sigma)
        return l1 + EDGE_WEIGHT * edge + KL_WEIGHT * kl, {
            "l1_hu": 2000 * l1.item(),
            "kl": kl.item(),
            "std": mu.std().item(),
        }

    return loss_of
