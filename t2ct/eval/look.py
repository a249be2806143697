"""What is taken from a volume once, so that no table has to read it again: features, scores, embedding, few pixels."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from t2ct import weights
from t2ct.checks import EMBEDDED, FILES, find_files
from t2ct.config import PipelineConfig
from t2ct.data.phantoms import LABELS
from t2ct.data.phantoms.reports.details import DETAILS
from t2ct.models import CLIP3D
from t2ct.models.judge import FILE, Judge, fit_volume, load_judge
from t2ct.text import Tokenizer
from t2ct.train.parts.folders import find_folder
from t2ct.train.parts.tokens import token_ids

SLICES = 8  # of each plane, over the middle 80 % of the volume
PIXELS = (24, 24, 16)  # grid on which volumes are compared voxel by voxel
SCANS = (
    "phantoms have trained that in the package, and of scans it says little; t2ct train judge --data SCANS --out judge "
    "trains one, then --judge judge"
)
HOW = "t2ct train judge --preset embedded --out judge trains one; then --judge judge"


class Look:
    """Takes from a volume (X, Y, Z) int16 HU, in float32:

    logits (18,) of the judge; details (D,): its logits of side, lobe and size, if it has them; features (F,): of the
    3-D backbone, by default the judge's pooled maps; slices (3, SLICES, F): of the 2-D backbone, axial, coronal,
    sagittal; embedding (E,): of CLIP3D, if there is one; pixels: HU on a coarse grid.
    """

    def __init__(
        self, judge: Judge, clip: Clip | None = None, backbones: Sequence[Backbone] = (),
        device: torch.device | str = "cpu",
    ):  # fmt: skip
        for dims in (2, 3):
            if len(same := [b.spec for b in backbones if b.dims == dims]) > 1:
                raise ValueError(f"backbone: wanted one of {dims} dimensions at most, got {' and '.join(same)}")
        self.judge, self.clip, self.device = judge.to(device), clip, device
        self.solid = next((b for b in backbones if b.dims == 3), None)
        self.flat = next((b for b in backbones if b.dims == 2), None)

    @torch.no_grad()
    def __call__(self, hu: np.ndarray, whole: bool = True) -> dict[str, np.ndarray]:
        """whole: False leaves out the slices, which cost most."""
        x = torch.from_numpy(np.ascontiguousarray(hu)).to(self.device).float()[None, None]
        own = self.judge.features(x)
        seen = {
            "logits": self.judge.calibrated(self.judge.head(own))[0],
            "features": own[0, : self.judge.num_maps] if self.solid is None else self.solid(x)[0],
            "pixels": F.adaptive_avg_pool3d(x, PIXELS)[0, 0],
        }
        if self.judge.config.details == DETAILS:
            seen["details"] = self.judge.details(own)[0]
        if whole:
            seen["slices"] = torch.stack([self._slices(x, axis) for axis in (2, 1, 0)])
        if self.clip is not None:
            seen["embedding"] = self.clip.volume(x)[0]
        found = {name: value.float().cpu().numpy() for name, value in seen.items()}
        bad = [name for name, value in found.items() if not np.isfinite(value).all()]
        if bad:
            raise ValueError(f"{' and '.join(bad)}: wanted finite numbers, got NaN or infinity from a volume")
        return found

    def _slices(self, x: Tensor, axis: int) -> Tensor:
        """Features (SLICES, F) of slices across `axis` of the volume."""
        n = x.shape[2 + axis]
        places = torch.linspace(0.1 * (n - 1), 0.9 * (n - 1), SLICES).round().long().to(x.device)
        cut = x[0, 0].index_select(axis, places).movedim(axis, 0)  # (SLICES, H, W)
        if self.flat is not None:
            return self.flat(cut[:, None])
        thin = self._thin(axis)
        return thin.features(cut[:, None].unsqueeze(2 + axis))[:, : thin.num_maps]

    def _thin(self, axis: int) -> Judge:
        """The judge for one slice: drawn out along its normal, one voxel deep where the network is deepest.

        A 2-D network with the judge's weights, summed along the normal: the reverse of inflating a 2-D network to three
        dimensions (Carreira and Zisserman 2017).
        """
        size = list(self.judge.config.size)
        size[axis] = self.judge.config.factor
        thin = copy.copy(self.judge)  # shares the weights
        thin.config = replace(self.judge.config, size=(size[0], size[1], size[2]))
        return thin


class Backbone:
    """A network of one's own that gives features: `PATH:factory`, a function in a Python file that returns a module.

    The module takes HU, (N, 1, X, Y, Z) float32, or slices (N, 1, H, W) if it has an attribute `dims` of 2, and returns
    features (N, F), or maps (N, F, …) that are averaged.
    """

    def __init__(self, spec: str, size: tuple[int, int, int], device: torch.device | str = "cpu"):
        """Raises FileNotFoundError or ValueError, after a trial on an empty volume, for what cannot be used."""
        path, colon, name = spec.rpartition(":")
        if not colon or not path or not name.isidentifier():
            raise ValueError(f"backbone: wanted PATH:factory, such as nets.py:resnet, got {spec!r}")
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"backbone: wanted a Python file, got {path!r}, which is not there")
        self.spec, self.hash = spec, hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        try:
            found = importlib.util.spec_from_file_location(f"t2ct_backbone_{self.hash}", file)
            if found is None or found.loader is None:
                raise ValueError("no Python file")
            module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            network = getattr(module, name)()
        except Exception as error:  # whatever the file does
            told = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"backbone: {spec} does not load: {told}") from error
        if not isinstance(network, nn.Module):
            raise ValueError(f"backbone: wanted a torch module from {spec}, got {type(network).__name__}")
        self.dims = getattr(network, "dims", 3)
        if self.dims not in (2, 3):
            raise ValueError(f"backbone: wanted dims of 2 or 3, got {self.dims!r} in {spec}")
        self.network = network.to(device).eval().requires_grad_(False)
        state = {k: v.contiguous().cpu() for k, v in network.state_dict().items()}
        self.hash += "-" + hashlib.sha256(save(state)).hexdigest()[:16]  # the file may take its weights from anywhere
        trial = torch.zeros(2, 1, *size[: self.dims], device=device) - 1000
        try:
            got = self(trial)
        except Exception as error:
            told = " ".join(str(error).split())[:200]
            raise ValueError(f"backbone: {spec} fails on {tuple(trial.shape)}: {told}") from error
        if got.ndim != 2 or len(got) != 2 or not torch.isfinite(got).all():
            raise ValueError(f"backbone: wanted finite features (2, F) from {spec}, got {tuple(got.shape)}")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        out = self.network(x)
        if not isinstance(out, Tensor):
            raise ValueError(f"backbone: wanted a tensor from {self.spec}, got {type(out).__name__}")
        return out.float().flatten(2).mean(2) if out.ndim > 2 else out.float()


class Clip:
    """Both towers of CLIP3D, for any size of volume."""

    def __init__(self, network: CLIP3D, tokenizer: Tokenizer, hash: str):
        self.network, self.tokenizer, self.hash = network, tokenizer, hash
        vision = network.config.vision
        self.size = (vision.image_size, vision.image_size, vision.depth)
        self.device = next(network.parameters()).device

    @torch.no_grad()
    def volume(self, hu: Tensor) -> Tensor:
        """(N, 1, X, Y, Z) HU -> (N, E)."""
        return self.network.encode_volume(fit_volume(hu, self.size))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(N, E) float32."""
        ids = token_ids(self.tokenizer, list(texts), self.network.config.text.max_length).to(self.device)
        parts = [self.network.encode_text(part)[:, 0].float().cpu() for part in ids.split(64)]
        return torch.cat(parts).numpy()

    def sentences(self, template: str) -> np.ndarray:
        """Embeddings of a sentence about every finding, (18, E)."""
        return self.texts([template.format(name) for name in LABELS])


def open_clip(model: Any, path: str | Path | None = None, device: torch.device | str = "cpu") -> Clip | str:
    """A CLIP3D with both towers: that of the run or folder `path`, by default the model's own; or, of the latter, why
    there is none. A model needs the text tower alone, and its folder may hold no other."""
    files: dict[str, Any]
    if path is None:
        files = find_files(model)
    else:
        folder = find_folder(path, "clip")
        files = {name: folder / FILES[name] for name in ("clip", "tokenizer")} | {"config": folder / "config.json"}
    config = PipelineConfig.from_json(files["config"]) if files["config"] is not None else PipelineConfig()
    with torch.device("meta"):
        network = CLIP3D(config.clip)
    try:
        found = weights.load_into(network, files["clip"], torch.device(device), torch.float32)
    except ValueError as error:
        if path is not None:
            raise
        told = " ".join(str(error).split())[:160]
        return f"the model has no vision tower of CLIP3D, and no --clip RUN names one ({told})"
    return Clip(network, Tokenizer.from_file(files["tokenizer"]), found["hash"][:16])


def open_judge(
    path: str | Path | None, model: Any, device: torch.device | str, phantoms: bool
) -> tuple[Judge, str]:  # fmt: skip
    """The judge at `path`, by default that in the model's folder, else that in the package; the hash of its weights.

    phantoms: that is what it is to look at; where the package's is to look at anything else, a warning says what it
    has learnt from. FileNotFoundError says how one is trained.
    """
    if path is None:
        path = model if isinstance(model, (str, Path)) and (Path(model) / FILE).is_file() else EMBEDDED
        if Path(path).resolve() == EMBEDDED.resolve() and not phantoms:
            warnings.warn(f"judge: {SCANS}", stacklevel=2)
    try:
        judge = load_judge(path, device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. {HOW}") from None
    if judge.config.classes != len(LABELS):
        raise ValueError(f"judge: wanted {len(LABELS)} findings, got {judge.config.classes} in {path}")
    return judge, hashlib.sha256(save({k: v.cpu() for k, v in judge.state_dict().items()})).hexdigest()[:16]
