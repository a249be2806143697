"""The VAE: L1 + KL, perceptual distance and a critic as MAISI, or terms that need no other network."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from t2ct.files import write_files
from t2ct.models import VAE, hu_to_unit
from t2ct.models.layers import channels_last
from t2ct.train.config import VAETraining
from t2ct.train.data.augment import augment, cut
from t2ct.train.data.found import finding_weights, stretched
from t2ct.train.data.order import Draw, Samples, generator
from t2ct.train.data.source import Item, Source
from t2ct.train.parts.critic import Critic, RandomFeatures
from t2ct.train.parts.folders import export_folder
from t2ct.train.recipe import Batch, Distance, Recipe, Shown, placed, readable
from t2ct.train.show.figures import picture_pairs, reconstruction

MOST_WEIGHT = 50.0  # of a voxel of one finding
WINDOW = hu_to_unit(torch.tensor([-160.0, 240.0])).tolist()


def kl_divergence(mu: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma) || N(0, 1)), summed over each sample, averaged over the batch."""
    kl = 0.5 * (mu.square() + sigma.square() - 2 * sigma.clamp_min(1e-12).log() - 1)
    return kl.flatten(1).sum(1).mean()


def edge_loss(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean absolute difference of the forward differences along the three axes: what L1 alone lets blur."""
    total = torch.zeros((), device=x.device)
    for d in (2, 3, 4):
        error = (x.diff(dim=d) - y.diff(dim=d)).abs()
        total = total + (error if weight is None else error * weight.narrow(d, 1, error.shape[d])).mean()
    return total / 3


def window_loss(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean absolute difference inside the mediastinal window (W 400, L 40), as a share of its width."""
    low, high = WINDOW
    error = (x.clamp(low, high) - y.clamp(low, high)).abs()
    return (error if weight is None else error * weight).mean() / (high - low)


class Patches:
    """Prepares a sample: a patch of a volume in [0, 1], its augmentation, and the noise of its latent."""

    def __init__(self, config: VAETraining):
        self.config, self.factor = config, config.model.vae.factor
        self.channels = config.model.vae.latent_channels

    def patch_at(self, number: int) -> tuple[int, int, int]:
        """The size of sample `number`'s patch."""
        share = number / (self.config.batch * self.config.steps)
        at = max(i for i, start in enumerate(self.config.patch_from) if start <= share or i == 0)
        return self.config.patches[at]

    def __call__(self, item: Item, draw: Draw) -> Batch:
        rng = generator(self.config.seed, draw[1])
        size = self.patch_at(draw[1] - draw[2])  # of its batch: all patches of one are alike
        weighed = bool(self.config.finding_weight) and item.findings is not None
        values = item.hu[None]
        if weighed:
            weights = finding_weights(item.findings, self.config.finding_weight, MOST_WEIGHT)  # type: ignore[arg-type]
            values = np.stack((item.hu.astype(np.float32), stretched(weights, item.hu.shape)))
        patch = torch.from_numpy(cut(values, size, rng))
        x = hu_to_unit(patch[:1])
        if self.config.augment:
            x = augment(x, rng)
        noise = torch.randn((self.channels, *(n // self.factor for n in size)), generator=rng)
        made = {"x": x, "noise": noise}
        return made | {"weight": patch[1:]} if weighed else made


class VAERecipe(Recipe):
    """parts: "vae", and "critic" where it has a weight."""

    config: VAETraining
    better = -1

    def __init__(
        self, config: VAETraining, model: VAE, source: Source | None, valid: Source | None = None,
        bad: Path | None = None, perceptual: Distance | None = None,
    ):  # fmt: skip
        config.check_patches()
        self.config, self.model, self.source, self.valid, self.bad = config, model, source, valid, bad
        self.parts: dict[str, nn.Module] = {"vae": model}
        self.perceptual = perceptual
        if config.finding_weight and source and source.read(0).findings is None:
            told = "finding_weight: nothing to weigh, since these data do not know where their findings are"
            warnings.warn(told, stacklevel=2)
        device = next(model.parameters()).device
        if perceptual is None and config.perceptual == "random" and config.perceptual_weight:
            self.perceptual = placed(RandomFeatures(), device)
        self.critic: Critic | None = None
        self.judged = False
        self.pairs: list[tuple[Tensor, Tensor]] = []
        if config.adversarial_weight:
            self.critic = placed(Critic(config.critic_channels, config.critic_layers), device)
            self.least = 4 * 2**config.critic_layers
            self.parts["critic"] = self.critic
        self.shown = ("l1_hu", "kl", "sigma", "offset_hu", "perceptual", "fooled")

    def samples(self) -> Samples:
        assert self.source is not None
        return Samples(self.source, Patches(self.config), self.config.skip_bad, self.bad)

    def rates(self, part: str) -> tuple[float, float]:
        return (self.config.critic_learning_rate, 0.0) if part == "critic" else super().rates(part)

    def begin(self, step: int) -> None:
        self.judged = step >= self.config.critic_from * self.config.steps
        self.pairs = []

    def loss(self, part: str, batch: Batch) -> tuple[Tensor, Shown]:
        return self._critic_loss() if part == "critic" else self._vae_loss(batch)

    def _vae_loss(self, batch: Batch) -> tuple[Tensor, Shown]:
        c, x = self.config, channels_last(batch["x"])
        mu, sigma = self.model.encode(x)
        y = self.model.decode(mu + sigma * batch["noise"].to(mu.dtype))
        y, mu, sigma = y.float(), mu.float(), sigma.float()
        offset = (y - x).mean((1, 2, 3, 4), keepdim=True)
        raw, loss = y, torch.zeros((), device=x.device)
        if c.offset_weight < 1:
            # With one volume a step the common offset would be most of every gradient, now this way, now that, and
            # drown what is to be learnt.
            y, loss = y - offset, c.offset_weight * offset.abs().mean()
        weight, error = batch.get("weight"), (x - y).abs()
        l1, kl = error.mean(), kl_divergence(mu, sigma)
        loss = loss + (l1 if weight is None else (error * weight).mean())
        loss = loss + c.kl_weight * kl / (x[0].numel() if c.kl_per_voxel else 1)
        if c.edge_weight:
            loss = loss + c.edge_weight * edge_loss(x, y, weight)
        if c.square_weight:
            loss = loss + c.square_weight * (error.square() if weight is None else error.square() * weight).mean()
        if c.window_weight:
            loss = loss + c.window_weight * window_loss(x, y, weight)
        shown = {
            "l1_hu": 2000 * l1.item(),
            "kl": kl.item() / mu[0].numel(),
            "sigma": sigma.mean().item(),
            "offset_hu": 2000 * offset.mean().item(),
        }
        if self.perceptual is not None:
            distance = self.perceptual(x, raw)
            loss = loss + c.perceptual_weight * distance
            shown["perceptual"] = distance.item()
        if self.critic is not None:
            self.pairs.append((x, raw.detach()))
            if self.judged:
                self.critic.requires_grad_(False)
                opinion = self.critic(raw).float()
                self.critic.requires_grad_(True)
                loss = loss + c.adversarial_weight * (opinion - 1).square().mean()
                shown["fooled"] = opinion.mean().item()
        return loss, shown

    def _critic_loss(self) -> tuple[Tensor, Shown]:
        """LSGAN: real patches towards 1, reconstructions towards 0. The critic warms up before it counts."""
        assert self.critic is not None
        x, y = self.pairs.pop(0)
        real, fake = self.critic(x).float(), self.critic(y).float()
        return ((real - 1).square().mean() + fake.square().mean()) / 2, {}

    def validate(self, weights: nn.Module, folder: Path, step: int) -> dict[str, float]:
        if self.valid is None or not len(self.valid):
            return {}
        device = next(weights.parameters()).device
        size = max(self.config.patches, key=lambda p: p[0] * p[1] * p[2])
        pairs = []
        for _, item in readable(self.valid, self.config.valid_count, self.config.skip_bad):
            hu = cut(item.hu, size, None)
            x = channels_last(hu_to_unit(torch.from_numpy(hu)[None, None]).to(device))
            mu, _ = weights.encode(x)  # type: ignore[operator]
            pairs.append((x, weights.decode(mu).float()))  # type: ignore[operator]
        if not pairs:
            return {}
        folder.mkdir(parents=True, exist_ok=True)
        write_files({folder / f"reconstructions-{step:08d}.png": picture_pairs(pairs[:4])})
        return reconstruction(pairs)

    def export(self, folder: Path, weights: nn.Module) -> None:
        export_folder(folder, self.config, vae=weights)

    def example(self, device: torch.device, batch: int, depth: float = 1.0, width: float = 1.0) -> Batch:
        f, z = self.config.model.vae.factor, self.config.model.vae.latent_channels
        full = max(self.config.patches, key=lambda p: p[0] * p[1] * p[2])
        small = [max(f, round(n * share / f) * f) for n, share in zip(full, (width, width, depth), strict=True)]
        made = {"x": torch.rand(batch, 1, *small), "noise": torch.randn(batch, z, *(n // f for n in small))}
        return {name: value.to(device) for name, value in made.items()}
