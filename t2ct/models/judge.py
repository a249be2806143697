"""The judge: a 3-D classifier of the 18 findings of CT-RATE, which says what a CT shows, drawn or generated.

A small residual network on the VAE's blocks that first says where: every level adds to the evidence for each finding in
cells of 4 x 4 x 4 voxels, and the answer is drawn from how much there is, and where. Molino et al. 2025 ask CT-Net
(Draelos et al. 2021) the same question; this one sees the whole volume in three dimensions and three windows, and is
small enough to be shipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from t2ct.models.fields import ANY, DEPTH, POSITIVE, check_fields, check_grid, check_value
from t2ct.models.layers import Conv, GroupNormSiLU, channels_last, check_channels, check_volume, norm_silu_conv
from t2ct.models.vae import Downsample, ResBlock

FORMAT = "t2ct-judge-2"
FILE = "judge.safetensors"
AXES = 3  # a channel for the place along each axis: the same spot means another finding elsewhere
CELL = 4  # voxels of a cell of evidence, along an axis
BLOCKS = (2, 2, 3)  # of cells, whose evidence is averaged: right and left, back and front, lower, middle and upper
RARE = -4.6  # log odds of a finding in a cell before anything is learnt: one in a hundred


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of a judge; the defaults are the one for phantoms of 352 x 352 x 320 mm (1.0 M parameters).

    ValueError for what is no size, and where entries do not fit one another.
    """

    size: tuple[int, int, int] = (96, 96, 48)  # voxels that every volume is brought to
    channels: tuple[int, ...] = (16, 48, 64, 96)  # of the stem, on half the grid, then of each level that halves it
    norm_groups: int = 8  # few channels in a group: in larger ones what is small drowns, and is learnt late
    num_res_blocks: int = 1  # on every grid but the stem's, which has most voxels, and one convolution
    classes: int = 18
    details: tuple[str, ...] = ()  # further questions, of a head of their own: side, lobe, size
    # HU, each a channel in [-1, 1]: everything, the air in the lungs, the mediastinum
    windows: tuple[tuple[float, float], ...] = ((-1000.0, 1000.0), (-1000.0, -500.0), (-160.0, 240.0))
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_value("JudgeConfig.channels", self.channels, tuple[int, ...])
        check_grid("JudgeConfig.size", self.size, self.factor)
        check_fields(self, "JudgeConfig.", num_res_blocks=DEPTH, windows=ANY, norm_eps=POSITIVE)
        check_channels("JudgeConfig", self.channels, self.norm_groups)
        if not self.windows or any(not low < high for low, high in self.windows):
            raise ValueError(f"JudgeConfig: windows must be pairs of rising HU, got {self.windows}")

    @property
    def factor(self) -> int:
        """Every axis of `size` must be a multiple of this, whole cells that the stem and each level halve."""
        return max(CELL, 2 ** len(self.channels))

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
    """Residual blocks on half the grid; (B, in, …) -> (B, out, …)."""

    def __init__(self, c: JudgeConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.halve = Downsample(in_channels)
        widths = [in_channels] + [out_channels] * c.num_res_blocks
        self.blocks = nn.ModuleList([ResBlock(a, b, c.norm_groups, c.norm_eps) for a, b in pairwise(widths)])

    def forward(self, h: Tensor) -> Tensor:
        h = self.halve(h)
        for block in self.blocks:
            h = block(h)
        return h


class Judge(nn.Module):
    """Which of the findings a CT shows.

    The calibration (`scale`, `shift`, both (classes,) buffers) turns what the network says into logits whose sigmoids
    are probabilities; it begins as 1 and 0 and `t2ct train judge` fits it to the validation split.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: JudgeConfig | None = None):
        super().__init__()
        self.config = c = config or JudgeConfig()
        self.stem = Conv(len(c.windows) + AXES, c.channels[0], stride=2)
        # What is as small as a voxel or two, a calcification, a nodule, is told from a vessel here or nowhere.
        self.fine_norm = GroupNormSiLU(c.norm_groups, c.channels[0], c.norm_eps)
        self.fine = Conv(c.channels[0], c.channels[0])
        self.levels = nn.ModuleList([Level(c, *pair) for pair in pairwise(c.channels)])
        self.norms = nn.ModuleList([GroupNormSiLU(c.norm_groups, width, c.norm_eps) for width in c.channels])
        self.votes = nn.ModuleList([Conv(width, c.classes, kernel=1) for width in c.channels])
        for vote in self.votes:
            weight, bias = vote.parameters()
            nn.init.normal_(weight, std=0.01)
            nn.init.constant_(bias, RARE / len(c.channels))
        self.head = nn.Linear(self.num_maps + (math.prod(BLOCKS) + 2) * c.classes, c.classes)
        self.detail_head = nn.Linear(self.num_features, len(c.details)) if c.details else None
        self.register_buffer("scale", torch.ones(c.classes))
        self.register_buffer("shift", torch.zeros(c.classes))

    @property
    def num_features(self) -> int:
        """F of `features`."""
        return self.head.in_features

    @property
    def num_maps(self) -> int:
        """How many of the features, the first, are means and maxima of maps: what is seen, not what is made of it."""
        return 2 * sum(self.config.channels)

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
        """hu as `forward` takes it -> (N, F): of `look`, what the heads are given."""
        return self.look(hu)[1]

    def evidence(self, hu: Tensor) -> Tensor:
        """hu as `forward` takes it -> where the findings are, (N, classes, X/4, Y/4, Z/4) float32 of `config.size`:
        log odds that some of a finding lies in a cell, as far as training was told where findings are."""
        return self.look(hu)[0]

    def look(self, hu: Tensor) -> tuple[Tensor, Tensor]:
        """hu as `forward` takes it -> `evidence` and `features`: mean and maximum over the volume of every map of every
        level, then of each finding the logarithm of its share of twelve parts of the volume and of all of it, and the
        strongest evidence. The share says how much and on which side, the strongest evidence finds what is small."""
        h, pooled, votes = self.stem(self.prepared(hu)), [], []
        h, _ = norm_silu_conv(self.fine_norm, self.fine, h, h)
        cells = tuple(n // CELL for n in self.config.size)
        for k, (norm, vote) in enumerate(zip(self.norms, self.votes, strict=True)):
            h = self.levels[k - 1](h) if k else h
            seen = norm(h)
            pooled += [seen.mean((2, 3, 4)), seen.amax((2, 3, 4))]
            for_cells = F.max_pool3d(seen, CELL // 2) if k == 0 else seen
            votes.append(F.interpolate(vote(for_cells), size=cells))
        evidence = torch.stack(votes).sum(0).float()
        odds = evidence.sigmoid()
        shares = (F.adaptive_avg_pool3d(odds, BLOCKS).flatten(1), odds.mean((2, 3, 4)))
        logs = [(torch.log(share + 1e-6) + 7) / 3 for share in shares]  # about as large as the maps
        found = torch.cat((*pooled, *logs, evidence.amax((2, 3, 4)) / 4), 1)
        return evidence, found.to(hu.dtype)

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
        if bad := [k for k, v in floats.items() if not v.isfinite().all()]:
            raise ValueError(f"{bad[0]} is not finite")  # it would say nothing of any volume
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"judge: wanted the weights of a judge, got {file} ({reason})") from None
    return judge.requires_grad_(False).eval()
