"""The VAE: L1 + KL of the reference recipe (MAISI), and in place of its perceptual and adversarial terms three that
need no other network: L1 of the edges, squares, and L1 in the mediastinal window.
"""

import numpy as np
import torch
from torch import Tensor

from t2ct.models import VAE, hu_to_unit
from t2ct.models.layers import channels_last

# Of the KL a voxel; at ten times this half the channels of a VAE this small collapse.
KL_WEIGHT = 1.5e-3
EDGE_WEIGHT = 1.0
OFFSET_WEIGHT = 0.2
SQUARE_WEIGHT = 5.0  # small bright things (calcifications, nodules) are few voxels: L1 alone, a median, drops them
WINDOW_WEIGHT = 0.05
WINDOW = hu_to_unit(torch.tensor([-160.0, 240.0])).tolist()  # fluid and muscle lie 40 HU apart: 2 % of the whole range


def kl_divergence(mu: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma) || N(0, 1)), summed over each sample, averaged over the batch."""
    kl = 0.5 * (mu.square() + sigma.square() - 2 * sigma.clamp_min(1e-12).log() - 1)
    return kl.flatten(1).sum(1).mean()


def edge_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of the forward differences along the three axes: what L1 alone lets blur."""
    return sum((x.diff(dim=d) - y.diff(dim=d)).abs().mean() for d in (2, 3, 4)) / 3  # type: ignore[return-value]


def window_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference inside the mediastinal window (W 400, L 40), as a share of its width."""
    low, high = WINDOW
    return (x.clamp(low, high) - y.clamp(low, high)).abs().mean() / (high - low)


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
        y, mu, sigma = (t.float() for t in model(x, generator))  # under autocast they come in bfloat16
        # The common offset apart, and lightly: with one volume a step it would be most of every gradient, now this
        # way, now that, and drown what is to be learnt.
        offset = (y - x).mean()
        y = y - offset
        l1, kl = (x - y).abs().mean(), kl_divergence(mu, sigma) / x[0].numel()
        loss = l1 + EDGE_WEIGHT * edge_loss(x, y) + SQUARE_WEIGHT * (x - y).square().mean()
        loss = loss + WINDOW_WEIGHT * window_loss(x, y) + OFFSET_WEIGHT * offset.abs() + KL_WEIGHT * kl
        shown = {"l1_hu": l1.item(), "offset_hu": offset.item()}
        return loss, {k: 2000 * v for k, v in shown.items()} | {"sigma": sigma.mean().item(), "std": mu.std().item()}

    return loss_of
