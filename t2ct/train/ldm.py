"""Latent diffusion: rectified flow's velocity, the text dropped for some samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct.diffusion import NUM_TRAIN_TIMESTEPS, add_noise, shift_timestep, velocity
from t2ct.files import write_files
from t2ct.models import CLIP3D, VAE, UNet
from t2ct.text import Tokenizer
from t2ct.train.config import LDMTraining
from t2ct.train.data.found import finding_weights
from t2ct.train.data.latents import Latent, LatentSource
from t2ct.train.data.order import Draw, Samples, generator
from t2ct.train.parts.folders import export_folder
from t2ct.train.parts.lora import lora_state, merged
from t2ct.train.parts.tokens import token_ids
from t2ct.train.parts.whitening import fitted, folded, kept, multiply, whitening
from t2ct.train.recipe import Batch, Recipe, Shown

FEWEST = 64  # latents that give a scale factor to rely on
SCALE_LATENTS = 256  # latents that the scale factor is measured on, where there are so many
MOST_WEIGHT = 8.0  # of a latent voxel for one finding
FULL = 16  # voxels of a small finding, of a latent voxel's 64, that count as wholly inside
VALID_NUMBER = 1 << 40  # numbers of validation samples: beyond every number of a run


def freeze_dead(unet: UNet) -> None:
    """Queries and keys of attention to a one-token context have no say and no gradient: optimisers skip them."""
    for name, parameter in unet.named_parameters():
        if any(part in name for part in (".attn2.to_q.", ".attn2.to_k.", ".transformer_blocks.0.norm2.")):
            parameter.requires_grad_(False)


def measure_scale(source: LatentSource, sampled: bool) -> float:
    """1 / standard deviation of the latents that diffusion will see, over at most 256 of them."""
    count = min(len(source), SCALE_LATENTS)
    total = square = number = 0.0
    for i in range(count):
        latent = source.read(i * len(source) // count)
        mu = latent.mu.double()
        total, number = total + mu.sum().item(), number + mu.numel()
        square += mu.square().sum().item() + (latent.sigma.double().square().sum().item() if sampled else 0.0)
    variance = square / number - (total / number) ** 2
    if not variance > 0:
        raise ValueError(f"latents: wanted some that differ, got a variance of {variance:g}")
    if count < FEWEST:
        warnings.warn(f"latents: wanted {FEWEST} or more to measure a scale factor on, got {count}", stacklevel=2)
    return 1 / math.sqrt(variance)


class Flows:
    """Prepares a sample: latent, context, spacing, and all that is drawn for it."""

    def __init__(
        self, config: LDMTraining, contexts: Sequence[Tensor], spacing: tuple[float, float, float],
        white: Tensor | None = None,
    ):  # fmt: skip
        self.config, self.contexts, self.spacing, self.white = config, contexts, torch.tensor(spacing), white

    def __call__(self, latent: Latent, draw: Draw) -> Batch:
        index, number, place = draw
        c, rng = self.config, generator(self.config.seed, number)
        texts = self.contexts[index]
        context = texts[int(torch.randint(len(texts), (1,), generator=rng))][None]
        kept = torch.rand((), generator=rng) >= c.text_dropped
        if c.text_noise:
            noise = torch.randn(context.shape, generator=rng)
            context = F.normalize(context + c.text_noise * noise / context.shape[-1] ** 0.5, dim=-1)
        if self.white is not None:
            context = context @ self.white
        x0 = latent.mu.float()
        eps = torch.randn(x0.shape, generator=rng)
        if c.latents == "sampled":
            x0 = x0 + latent.sigma.float() * eps
        if c.group > 1 and number < VALID_NUMBER:
            # What one patient's volumes differ by is what their reports say: under the same noise and at the same time
            # all else that moves the gradient is the same, and cancels where the network compares them.
            rng = generator(c.seed + 2, number - place % c.group)
        t = torch.rand((), generator=rng)
        if c.stratified and number < VALID_NUMBER:
            groups = c.batch // c.group
            strata = torch.randperm(groups, generator=generator(c.seed + 1, (number - place) // c.batch))
            t = (strata[place // c.group] + t) / groups
        if c.time == "logit-normal":
            t = torch.special.ndtri(t.clamp(1e-4, 1 - 1e-4)).sigmoid()
        made = {
            "x0": x0,
            "noise": torch.randn(x0.shape, generator=rng),
            "t": t,
            "context": context * kept,
            "spacing": 100 * (latent.spacing.float() if c.actual_spacing else self.spacing),
        }
        if c.small_weight and latent.small is not None:
            made["weight"] = 1 + c.small_weight * (latent.small.float() / FULL).clamp(max=1)
        if c.finding_weight and latent.findings is not None:
            more = torch.from_numpy(finding_weights(latent.findings.numpy(), c.finding_weight, MOST_WEIGHT))
            made["weight"] = more + made["weight"] - 1 if "weight" in made else more
        return made


class LDMRecipe(Recipe):
    """parts: "unet"."""

    config: LDMTraining
    better = -1

    def __init__(
        self, config: LDMTraining, model: UNet, vae: VAE | None, clip: CLIP3D | None, tokenizer: Tokenizer | None,
        source: LatentSource | None, valid: LatentSource | None = None,
        former: tuple[CLIP3D, Tokenizer] | None = None,
    ):  # fmt: skip
        """former: the encoder whose contexts the model knows, where it is not `clip`."""
        self.config, self.model, self.vae, self.clip, self.tokenizer = config, model, vae, clip, tokenizer
        self.source, self.valid, self.group = source, valid, config.group
        for name, held, what in (("small", "small", "small findings"), ("finding", "findings", "findings")):
            if getattr(config, f"{name}_weight") and source and getattr(source.read(0), held) is None:
                told = f"{name}_weight: nothing to weigh, since these data do not know where their {what} are"
                warnings.warn(told, stacklevel=2)
        self.scale = measure_scale(source, config.latents == "sampled") if source else 1.0
        self.contexts, self.white = None if source is None else self._contexts(source), None
        if former and source and self.contexts:
            known, new = torch.cat(self._contexts(source, *former)), torch.cat(self.contexts)
            multiply(model, fitted(new, known))
            told = f"{kept(new, known):.0%} of what tells the former encoder's contexts apart is in the new one's"
            warnings.warn(f"refit: {told}", stacklevel=2)
        if config.whiten and self.contexts:
            self.white = whitening(torch.cat(self.contexts))
            if config.start:
                multiply(model, torch.linalg.inv(self.white.double()))
        freeze_dead(model)
        self.parts: dict[str, nn.Module] = {"unet": model}

    def samples(self) -> Samples:
        assert self.source is not None and self.contexts is not None
        flows = Flows(self.config, self.contexts, self.config.model.spacing, self.white)
        return Samples(self.source, flows)  # type: ignore[arg-type]

    def loss(self, part: str, batch: Batch) -> tuple[Tensor, Shown]:
        return self._error(self.model, batch), {}

    def _error(self, model: nn.Module, batch: Batch) -> Tensor:
        """The error is squared by default, where the published recipe takes its absolute value: a flow follows the mean
        velocity. The median that the absolute error asks for is "no nodule" at every place, since a nodule is nowhere
        likelier than not."""
        c, x0 = self.config, self.scale * batch["x0"]
        t = batch["t"]
        if c.shift:
            t = shift_timestep(t, x0[0, 0].numel(), c.model.base_voxels)
        label = torch.full((len(x0),), c.model.class_label, dtype=torch.long, device=x0.device)
        noisy = add_noise(x0, batch["noise"], t)
        v = model(noisy, t * NUM_TRAIN_TIMESTEPS, batch["context"], label, batch["spacing"])
        error = v.float() - velocity(x0, batch["noise"])
        error = error.square() if c.loss == "squared" else error.abs()
        if "weight" in batch:
            error = error * batch["weight"][:, None]
        if c.min_snr:  # of the error of x0, which is t times that of the velocity
            error = error * torch.minimum((1 - t).square(), c.min_snr * t.square()).view(-1, 1, 1, 1, 1)
        return error.mean()

    @torch.no_grad()
    def _contexts(
        self, source: LatentSource, clip: CLIP3D | None = None, tokenizer: Tokenizer | None = None
    ) -> list[Tensor]:
        """The context of every report of every entry, (W, D) each; of the run's CLIP3D, or of another."""
        texts = [text for entry in source.entries for text in entry.texts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # a batch is as long as its longest
        batches = [order[i : i + 64] for i in range(0, len(order), 64)]
        made = torch.cat([self._embed([texts[i] for i in batch], clip, tokenizer) for batch in batches]).cpu()
        made = made[torch.tensor(order).argsort()]
        return list(made.split([len(entry.texts) for entry in source.entries]))

    def _embed(self, texts: Sequence[str], clip: CLIP3D | None, tokenizer: Tokenizer | None) -> Tensor:
        clip, tokenizer = clip or self.clip, tokenizer or self.tokenizer
        assert clip is not None and tokenizer is not None
        ids = token_ids(tokenizer, texts, clip.config.text.max_length)
        return clip.encode_text(ids.to(next(clip.parameters()).device))[:, 0].float()

    def validate(self, weights: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """The loss on the validation split, its noise and times the same every time."""
        if self.valid is None or not len(self.valid):
            return {}
        flows = Flows(self.config, self._contexts(self.valid), self.config.model.spacing, self.white)
        device, count = next(weights.parameters()).device, min(len(self.valid), self.config.valid_count)
        losses = []
        for i in range(count):
            sample = flows(self.valid.read(i), (i, VALID_NUMBER + i, 0))
            sample["t"] = torch.tensor((i + 0.5) / count)
            losses.append(self._error(weights, {k: v[None].to(device) for k, v in sample.items()}).item())
        return {"loss": sum(losses) / len(losses)}

    def preview(self, weights: nn.Module, folder: Path, step: int) -> None:
        from t2ct.pipeline import T2CTPipeline

        source = self.valid if self.valid is not None and len(self.valid) else self.source
        assert source is not None
        texts = [source.entries[i].texts[0] for i in range(min(len(source), self.config.preview_count))]
        folder.mkdir(parents=True, exist_ok=True)
        clip, tokens = self.clip, self.tokenizer
        with folded(weights, self.white) as unet:
            pipe = T2CTPipeline(self._pipeline_config(), self.vae, unet, clip, tokens, f"step {step}")  # type: ignore
            for i, text in enumerate(texts):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of a report that is cut: the run has said so
                    volume = pipe(text, generator=i, num_inference_steps=self.config.preview_steps, progress=False)
                volume.preview(folder / f"volume-{step:08d}-{i}.png")

    def _pipeline_config(self) -> Any:
        return replace(self.config.model, scale_factor=self.scale)

    def export(self, folder: Path, weights: nn.Module) -> None:
        if self.config.lora:
            folder.mkdir(parents=True, exist_ok=True)
            write_files({folder / "lora.safetensors": lora_state(weights)})
        with merged(weights) as whole, folded(whole, self.white) as unet:
            export_folder(
                folder, self.config, vae=self.vae, clip=self.clip, unet=unet, tokenizer=self.tokenizer, scale=self.scale
            )

    def example(self, device: torch.device, batch: int, depth: float = 1.0, width: float = 1.0) -> Batch:
        c, f = self.config.model, self.config.model.unet.factor
        full = [n // c.vae.factor for n in c.size]
        small = [max(1, round(n * share / f)) * f for n, share in zip(full, (width, width, depth), strict=True)]
        shape = (c.unet.in_channels, *small)
        made = {
            "x0": torch.randn(batch, *shape),
            "noise": torch.randn(batch, *shape),
            "t": torch.rand(batch),
            "context": torch.randn(batch, 1, c.unet.cross_attention_dim),
            "spacing": torch.ones(batch, 3),
        }
        return {name: value.to(device) for name, value in made.items()}
