"""What a model folder says of itself: config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from t2ct.diffusion import BASE_VOXELS, SCHEDULES
from t2ct.models import CLIP3DConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig

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

    @property
    def factor(self) -> int:
        """Every axis of a volume must be a multiple of this."""
        return self.vae.factor * self.unet.factor

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> PipelineConfig:
        """From a path or a dict; ValueError for what is no such config, with the field that is wrong."""
        content = source
        if not isinstance(source, Mapping):
            try:
                content = json.loads(Path(source).read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"config: wanted JSON, got {source} ({error})") from None
        if not isinstance(content, Mapping) or content.get("format", FORMAT) != FORMAT:
            got = content.get("format") if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"config: wanted format {FORMAT!r}, got {got!r}")
        values = {k: v for k, v in content.items() if k != "format"}
        _nest(values, {"vae": VAEConfig, "unet": UNetConfig})
        if "clip" in values:
            values["clip"] = dict(values["clip"])
            _nest(values["clip"], {"text": TextConfig, "vision": VisionConfig})
            _nest(values, {"clip": CLIP3DConfig})
        config = _build("pipeline", cls, values)
        if config.schedule not in SCHEDULES:
            raise ValueError(f"config: schedule must be one of {SCHEDULES}, got {config.schedule!r}")
        return config


def _nest(values: dict[str, Any], kinds: Mapping[str, type]) -> None:
    for name, kind in kinds.items():
        if name in values:
            values[name] = _build(name, kind, values[name])


def _build(name: str, kind: type, values: Mapping[str, Any]) -> Any:
    known = [f.name for f in fields(kind)]
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"config: {name} has no field {unknown[0]!r}, wanted some of {', '.join(known)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
