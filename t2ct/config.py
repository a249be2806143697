"""What a model folder says of itself: config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from t2ct.diffusion import BASE_VOXELS, SCHEDULES
from t2ct.models import CLIP3DConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from t2ct.models.fields import POSITIVE, Range, check_fields, check_grid

FORMAT = "t2ct-pipeline-1"


@dataclass(frozen=True)
class PipelineConfig:
    """The networks' sizes and how to sample; the defaults are the published system."""

    name: str = "published"
    size: tuple[int, int, int] = (512, 512, 128)  # voxels of a volume it was trained on
    spacing: tuple[float, float, float] = (0.75, 0.75, 3.0)  # mm
    scale_factor: float = 1.0287  # latents are multiplied by it for diffusion; a checkpoint may bring its own
    schedule: str = "compat"
    base_voxels: int = BASE_VOXELS
    class_label: int = 1  # CT
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    clip: CLIP3DConfig = field(default_factory=CLIP3DConfig)

    def __post_init__(self) -> None:
        check_grid("size", self.size, self.vae.factor)
        check_fields(self, spacing=POSITIVE, scale_factor=POSITIVE, base_voxels=Range(1),
                     class_label=Range(0, self.unet.num_class_embeds - 1))  # fmt: skip
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")

    @property
    def factor(self) -> int:
        """Every axis of a volume must be a multiple of this."""
        return self.vae.factor * self.unet.factor

    def check_together(self) -> None:
        """ValueError where the networks do not fit one another; while only one is trained, the others need not."""
        latent = (self.unet.in_channels, self.unet.out_channels)
        for name, wanted, got in (
            ("unet.in_channels and out_channels", (self.vae.latent_channels,) * 2, latent),
            ("unet.cross_attention_dim", self.clip.embed_dim, self.unet.cross_attention_dim),
            ("vae.in_channels", 1, self.vae.in_channels),
        ):
            if wanted != got:
                raise ValueError(f"config: {name}: wanted {wanted}, as the other networks have it, got {got}")

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> PipelineConfig:
        """From a path or a dict; ValueError for what is no such config, with the field that is wrong."""
        content = source
        if not isinstance(source, Mapping):
            try:
                content = json.loads(Path(source).read_text(encoding="utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"config: wanted JSON, got {source} ({error})") from None
        if not isinstance(content, Mapping) or content.get("format", FORMAT) != FORMAT:
            got = content.get("format") if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"config: wanted format {FORMAT!r}, got {got!r}")
        values = {k: v for k, v in content.items() if k != "format"}
        _nest(values, {"vae": VAEConfig, "unet": UNetConfig})
        if "clip" in values:
            values["clip"] = dict(_table("clip", values["clip"]))
            _nest(values["clip"], {"text": TextConfig, "vision": VisionConfig})
            _nest(values, {"clip": CLIP3DConfig})
        return _build("pipeline", cls, values)


def _nest(values: dict[str, Any], kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        if name in values:
            values[name] = _build(name, kind, values[name])


def _build(name: str, kind: type, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(kind)]
    unknown = [key for key in _table(name, values) if key not in known]
    if unknown:
        raise ValueError(f"config: {name} has no field {unknown[0]!r}, wanted some of {', '.join(known)}")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except (ValueError, TypeError) as error:
        raise ValueError(f"config: {error}") from None


def _table(name: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"config: {name}: wanted an object of fields, got {values!r:.80}")
    return values
