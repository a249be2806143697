"""Recipes without their data, and their blocks computed again for the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from t2ct.models import CLIP3D, VAE, UNet
from t2ct.models.judge import Judge
from t2ct.train.config import CLIPTraining, JudgeTraining, LDMTraining, Training, VAETraining
from t2ct.train.parts.blocks import blocks_of
from t2ct.train.recipe import Recipe, placed


def probe_recipe(kind: str, config: Training, device: torch.device) -> Recipe:
    """The recipe of a configuration without its data, for measuring."""
    from t2ct.train.clip import CLIPRecipe
    from t2ct.train.judge import JudgeRecipe
    from t2ct.train.ldm import LDMRecipe
    from t2ct.train.vae import VAERecipe

    if isinstance(config, VAETraining):
        return VAERecipe(config, placed(VAE(config.model.vae), device), None)
    if isinstance(config, CLIPTraining):
        return CLIPRecipe(config, placed(CLIP3D(config.model.clip), device), None, None)
    if isinstance(config, JudgeTraining):
        return JudgeRecipe(config, placed(Judge(config.model), device), None)
    assert isinstance(config, LDMTraining)
    return LDMRecipe(config, placed(UNet(config.model.unet), device), None, None, None, None)


def checkpoint_blocks(parts: Mapping[str, nn.Module]) -> None:
    """Blocks compute their insides again for the gradient: only what goes in is kept. In place; same values."""
    for part in parts.values():
        for module in blocks_of(part):
            again = partial(checkpoint, type(module).forward, module, use_reentrant=False, preserve_rng_state=False)
            module.forward = _when_trained(module, again)  # type: ignore[method-assign]


def _when_trained(module: nn.Module, again: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return again(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    return forward
