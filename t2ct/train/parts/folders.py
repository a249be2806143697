"""Folders of weights: what a run leaves in RUN/final, and reading them, wherever they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from t2ct import weights
from t2ct.checks import FILES, model_folder
from t2ct.config import PipelineConfig
from t2ct.files import write_files
from t2ct.models import CLIP3D, VAE, UNet
from t2ct.text import Tokenizer
from t2ct.train.config import Training


def export_folder(
    folder: Path, config: Training, *, vae: nn.Module | None = None, clip: nn.Module | None = None,
    unet: nn.Module | None = None, tokenizer: Tokenizer | None = None, scale: float | None = None,
    model: PipelineConfig | None = None,
) -> None:  # fmt: skip
    """Write the networks in config.export, and the config.json that describes them, all together."""
    model = model or config.model
    model = model if scale is None else replace(model, scale_factor=scale)
    dtype = getattr(torch, config.export)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[Path, bytes] = {}
    for name, network in (("vae", vae), ("clip", clip), ("unet", unet)):
        if network is not None:
            state = network.state_dict().items()
            kept = {k: (v.to(dtype) if v.is_floating_point() else v).contiguous().cpu() for k, v in state}
            content[folder / FILES[name]] = save(kept)
    if tokenizer is not None:
        content[folder / FILES["tokenizer"]] = tokenizer.to_json().encode()
    content[folder / "config.json"] = model.to_json().encode()
    write_files(content)


def find_folder(path: str | Path, what: str) -> Path:
    """The folder of weights that `path` names: a run (its final/), a model's folder, or "embedded"."""
    folder = model_folder(path)
    if (folder / "config.json").is_file():
        return folder
    raise FileNotFoundError(f"{what}: wanted a finished run or a model's folder, got {str(path)!r}: no config.json")


def run_facts(path: Path) -> dict[str, Any]:
    """What a run's JSON file says of it."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: wanted JSON, got what does not read ({error})") from None
    wanted = ("kind", "preset", "data")
    if not isinstance(facts, dict) or any(name not in facts for name in wanted):
        raise ValueError(f"{path}: wanted a run's {', '.join(wanted)}, got {str(facts)[:60]}")
    return facts


def load_part(path: str | Path, name: str, device: torch.device) -> tuple[Any, PipelineConfig, str]:
    """The network `name` ("vae", "clip": its text tower, "unet") of a run or a model's folder in float32; the folder's
    config; the hash of the weights."""
    folder = find_folder(path, name)
    config = PipelineConfig.from_json(folder / "config.json")
    with torch.device("meta"):
        network: nn.Module
        if name == "vae":
            network = VAE(config.vae)
        elif name == "unet":
            network = UNet(config.unet)
        else:
            network = CLIP3D(config.clip, towers=("text",))
    loaded = weights.load_into(network, folder / FILES[name], device, torch.float32)
    return network, config, loaded["hash"]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run or a model's folder."""
    return Tokenizer.from_file(find_folder(path, "clip") / FILES["tokenizer"])


def start_from(network: nn.Module, path: str, name: str) -> None:
    """Give a network, ready to be trained, the weights that a run, a folder or a .safetensors/.pt file holds."""
    if not path:
        return
    file = Path(path) if Path(path).is_file() else find_folder(path, "start") / f"{name}.safetensors"
    device = next(network.parameters()).device
    state, live = network.state_dict(), {k for k, p in network.named_parameters() if p.requires_grad}
    meta = type(network)(network.config)  # type: ignore[call-arg]
    weights.load_into(meta, file, device, torch.float32)
    loaded = meta.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(loaded[key])
    for key, parameter in network.named_parameters():
        parameter.requires_grad_(key in live)
