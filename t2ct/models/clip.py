"""CLIP3D: contrastive text and CT encoders of Text2CT (Molino et al. 2025, arXiv 2506.00633)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2ct.models.fields import check_fields
from t2ct.models.text import TextConfig, TextTransformer, check_input_ids
from t2ct.models.vision import VisionConfig, VisionTransformer, check_volume

TOWERS = ("text", "vision")


@dataclass(frozen=True)
class CLIP3DConfig:
    """Sizes of both towers and of the space they share; the defaults are the published network."""

    text: TextConfig = field(default_factory=TextConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    embed_dim: int = 768

    def __post_init__(self) -> None:
        for name, kind in (("text", TextConfig), ("vision", VisionConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"CLIP3DConfig.{name}: wanted {kind.__name__}, got {type(value).__name__}")
        check_fields(self, "CLIP3DConfig.")


class CLIP3D(nn.Module):
    """Text and CT volumes in one space of unit vectors.

    The state dict has the keys and shapes of the published file, dead weights and buffers included.
    towers=("text",) builds the part that generation needs, the text tower and its projection, whose keys are a
    subset of the whole: 124 M of the published 0.79 B parameters. towers=("vision",) is the other half.
    Both towers together also hold `logit_scale`.
    """

    def __init__(self, config: CLIP3DConfig | None = None, towers: Sequence[str] = TOWERS) -> None:
        super().__init__()
        if isinstance(towers, str) or not towers or not set(towers) <= set(TOWERS):
            raise ValueError(f"towers: wanted some of {TOWERS}, got {towers!r}")
        self.config = config = CLIP3DConfig() if config is None else config
        text, vision = config.text, config.vision
        self.model = model = nn.Module()  # the published keys begin with "model."
        if set(towers) == set(TOWERS):
            model.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if "vision" in towers:
            features = vision.grid**2 * vision.dim
            model.visual_projection = nn.Linear(features, config.embed_dim, bias=False)
            nn.init.normal_(model.visual_projection.weight, std=features**-0.5)
            model.vision_model = VisionTransformer(vision)
        if "text" in towers:
            model.text_projection = nn.Linear(text.width, config.embed_dim, bias=False)
            nn.init.normal_(model.text_projection.weight, std=text.width**-0.5)
            model.text_model = TextTransformer(text)

    def _part(self, name: str, tower: str) -> nn.Module:
        part = getattr(self.model, name, None)
        if part is None:
            raise RuntimeError(f"CLIP3D: wanted the {tower}, got a model built without it (argument towers)")
        return part

    @property
    def logit_scale(self) -> Tensor:
        """Natural logarithm of the contrastive temperature's inverse, a scalar parameter."""
        return self._part("logit_scale", "logit scale")  # type: ignore[return-value]

    def encode_text(self, input_ids: Tensor) -> Tensor:
        """input_ids (B, L) int64, an end-of-text id in every row -> unit-norm context (B, 1, embed_dim).

        Computes only up to the first end-of-text token of the longest row: the tower is causal. Raises TypeError or
        ValueError on other dtypes, shapes and ids, RuntimeError without a text tower.
        """
        tower = self._part("text_model", "text tower")
        input_ids = input_ids[:, : check_input_ids(input_ids, self.config.text)]
        states = tower(input_ids)
        first_eot = (input_ids == self.config.text.eot_id).int().argmax(-1)
        pooled = states[torch.arange(len(states), device=states.device), first_eot]
        return F.normalize(self.model.text_projection(pooled), dim=-1).unsqueeze(1)  # type: ignore[operator]

    def encode_volume(self, volume: Tensor) -> Tensor:
        """volume (B, 1, X, Y, Z) in raw HU, X = Y = image_size -> unit-norm embedding (B, embed_dim).

        Any floating or integer dtype; Z a multiple of temporal_patch_size. Raises TypeError or ValueError on other
        inputs, RuntimeError without a vision tower.
        """
        tower = self._part("vision_model", "vision tower")
        check_volume(volume, self.config.vision)
        tokens, _ = tower(volume)
        return F.normalize(self.model.visual_projection(tokens.mean(1).flatten(1)), dim=-1)  # type: ignore[operator]

    def forward(self, input_ids: Tensor, volume: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One contrastive step: text (B, embed_dim) and volume (B, embed_dim) embeddings, and exp(logit_scale)."""
        return self.encode_text(input_ids).squeeze(1), self.encode_volume(volume), self.logit_scale.exp()
