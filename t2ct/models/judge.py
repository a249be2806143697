"""The judge: a 3-D classifier of the 18 findings of CT-RATE, which says what a CT shows, drawn or generated.

A small residual network on the VAE's blocks. Molino et al. 2025 ask CT-Net (Draelos et al. 2021) the same
question; this one sees the whole volume in three dimensions and three windows, and is small enough to be shipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from t2ct.models.layers import Conv, GroupNormSiLU, channels_last, check_channels, check_volume
from t2ct.models.vae import Downsample, ResBlock

FORMAT = "t2ct-judge-1"
FILE = "judge.safetensors"
AXES = 3  # a channel for the place along each axis: the same spot means another finding elsewhere


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of a judge; the defaults are the one for phantoms of 352 x 352 x 320 mm (0.8 M parameters)."""

    size: tuple[int, int, int] = (96, 96, 48)  # voxels that every volume is brought to
    channels: tuple[int, ...] = (16, 32, 64, 96)
    norm_groups: int = 8  # few channels in a group: in larger ones what is small drowns, and is learnt late
    num_res_blocks: int = 1
    classes: int = 18
    details: tuple[str, ...] = ()  # further questions, of a head of their own: side, lobe, size
    # HU, each a channel in [-1, 1]: everything, the air in the lungs, the mediastinum
    windows: tuple[tuple[float, float], ...] = ((-1000.0, 1000.0), (-1000.0, -500.0), (-160.0, 240.0))
    norm_eps: float = 1e-5

    @property
    def factor(self) -> int:
        """Every axis of `size` must be a multiple of this: the stem and each further level halve it."""
        return 2 ** len(self.channels)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> JudgeConfig:
        """What `to_json` wrote; ValueError for anything else."""
        content = json.loads(text)
        known = {f.name for f in fields(cls)}
        if not isinstance(content, Mapping) or content.get("format") != FORMAT or set(content) - {"format"} != known:
            raise ValueError(f"judge: wanted a configuration of format {FORMAT!r}, got {text[:80]!r}")
        return cls(**{name: _deep_tuple(value) for name, value in content.items() if name != "format"})


def _deep_tuple(value: Any) -> Any:
    return tuple(map(_deep_tuple, value)) if isinstance(value, list) else value


class Level(nn.Module):
    """Residual blocks on one grid, on half the grid before where `halve`; (B, in, …) -> (B, out, …) and what is pooled
    of it, (B, 2 * out)."""

    def __init__(self, c: JudgeConfig, in_channels: int, out_channels: int, halve: bool):
        super().__init__()
        self.halve = Downsample(in_channels) if halve else nn.Identity()
        widths = [in_channels] + [out_channels] * c.num_res_blocks
        self.blocks = nn.ModuleList([ResBlock(a, b, c.norm_groups, c.norm_eps) for a, b in pairwise(widths)])
        self.norm = GroupNormSiLU(c.norm_groups, out_channels, c.norm_eps)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.halve(h)
        for block in self.blocks:
            h = block(h)
        seen = self.norm(h)
        return h, torch.cat((seen.mean((2, 3, 4)), seen.amax((2, 3, 4))), 1)


class Judge(nn.Module):
    """Which of the findings a CT shows.

    config: JudgeConfig; ValueError where its entries do not fit one another. The calibration (`scale`, `shift`, both
    (classes,) buffers) turns what the network says into logits whose sigmoids are probabilities; it begins as 1 and 0
    and `t2ct train judge` fits it to the validation split.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: JudgeConfig | None = None):
        super().__init__()
        self.config = c = config or JudgeConfig()
        check_channels("JudgeConfig", c.channels, c.norm_groups)
        if len(c.size) != 3 or any(n < c.factor or n % c.factor for n in c.size):
            raise ValueError(f"JudgeConfig: size must be three positive multiples of {c.factor}, got {c.size}")
        if not c.windows or any(len(w) != 2 or not w[0] < w[1] for w in c.windows):
            raise ValueError(f"JudgeConfig: windows must be pairs of rising HU, got {c.windows}")
        self.stem = Conv(len(c.windows) + AXES, c.channels[0], stride=2)
        widths = (c.channels[0], *c.channels)
        self.levels = nn.ModuleList([Level(c, *pair, halve=i > 0) for i, pair in enumerate(pairwise(widths))])
        self.head = nn.Linear(2 * sum(c.channels), c.classes)
        self.detail_head = nn.Linear(self.num_features, len(c.details)) if c.details else None
        self.register_buffer("scale", torch.ones(c.classes))
        self.register_buffer("shift", torch.zeros(c.classes))

    @property
    def num_features(self) -> int:
        """F of `features`."""
        return self.head.in_features

    def forward(self, hu: Tensor) -> Tensor:
        """hu (N, 1, X, Y, Z) floating, HU, any grid over a whole chest, RAS -> calibrated logits (N, classes)."""
        return self.calibrated(self.raw(hu))

    def calibrated(self, raw: Tensor) -> Tensor:
        """What `raw` says as logits."""
        return raw * self.scale + self.shift

    def raw(self, hu: Tensor) -> Tensor:
        """The logits before calibration, (N, classes): what training sees."""
        return self.head(self.features(hu))

    def features(self, hu: Tensor) -> Tensor:
        """hu as `forward` takes it -> (N, F): mean and maximum over the volume of every map of every level. A maximum
        finds what is small, and on the fine levels finds it after few steps of training."""
        h, pooled = self.stem(self.prepared(hu)), []
        for level in self.levels:
            h, seen = level(h)
            pooled.append(seen)
        return torch.cat(pooled, 1)

    def details(self, features: Tensor) -> Tensor:
        """`features` -> logits (N, len(config.details)); about a finding that is absent they say nothing."""
        return features.new_zeros(len(features), 0) if self.detail_head is None else self.detail_head(features)

    def prepared(self, hu: Tensor) -> Tensor:
        """hu as `forward` takes it -> (N, windows + 3, *size): HU in each window, and the place along each axis."""
        check_volume("judge: hu", hu, 1)
        low, high = min(w[0] for w in self.config.windows), max(w[1] for w in self.config.windows)
        x = fit_volume(hu.clamp(low, high), self.config.size)  # clipped first, as the volumes of training
        seen = [(2 / (b - a)) * (x.clamp(a, b) - a) - 1 for a, b in self.config.windows]
        axes = (torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in self.config.size)
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"))
        return channels_last(torch.cat((*seen, places.expand(len(x), *places.shape)), 1))


def fit_volume(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """x (N, C, X, Y, Z) stretched to `size` voxels: the mean of what a voxel covers where every axis has at least twice
    the wanted voxels, else trilinear. As training reads volumes."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if all(n >= 2 * m for n, m in zip(x.shape[2:], size, strict=True)):
        return F.interpolate(x, size=tuple(size), mode="area")
    return F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)


def load_judge(path: str | Path, device: torch.device | str = "cpu") -> Judge:
    """The judge in a .safetensors file, or in judge.safetensors of a model's folder or of a run (RUN/final), in float32
    and for evaluation. Its configuration is in the file's metadata.

    Raises FileNotFoundError, or ValueError for a file that is none or does not fit its own configuration.
    """
    places = (Path(path), Path(path) / FILE, Path(path) / "final" / FILE)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"judge: wanted a file, or a folder with {FILE}, got {str(path)!r}")
    try:
        with safe_open(file, "pt") as opened:
            told = (opened.metadata() or {}).get("config", "{}")
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it has no iteration
        with torch.device("meta"):
            judge = Judge(JudgeConfig.from_json(told))
        floats = {k: v.to(device, torch.float32).contiguous() for k, v in state.items()}
        judge.load_state_dict(floats, assign=True)
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"judge: wanted the weights of a judge, got {file} ({reason})") from None
    return judge.requires_grad_(False).eval()
