"""Low-rank adapters (Hu et al. 2021) of the UNet's linear layers: few weights to train, a small file to keep."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear layer whose weight stands still, plus up @ down of rank r; it begins as the layer it was.

    The keys of the layer stay as they were; `down` (r, in) and `up` (out, r) come beside them.
    """

    down: nn.Parameter
    up: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.down), self.up)


def add_lora(model: nn.Module, rank: int, seed: int = 0) -> None:
    """Freeze `model` and give every linear layer of its attentions and feed-forwards adapters of `rank`, in place."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    found = [
        m
        for name, m in model.named_modules()
        if type(m) is nn.Linear and ".transformer_blocks." in name and not name.endswith(("attn2.to_q", "attn2.to_k"))
    ]
    if not found:
        raise ValueError("lora: wanted a network with attention, got one without")
    for layer in found:
        rows, columns = layer.weight.shape
        if rank > min(rows, columns):
            raise ValueError(f"lora: wanted a rank of at most {min(rows, columns)}, got {rank}")
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        layer.__class__ = LoRALinear
        layer.down = nn.Parameter(down.to(layer.weight.device))
        layer.up = nn.Parameter(torch.zeros(rows, rank, device=layer.weight.device))


def lora_state(model: nn.Module) -> bytes:
    """The adapters alone, as a safetensors file."""
    kept = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if k.endswith((".down", ".up"))}
    return save(kept, {"format": "t2ct-lora-1"})


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its adapters inside its weights, and their keys gone; afterwards as it was."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    kept = [(m.weight.detach().clone(), m.down, m.up) for m in layers]
    with torch.no_grad():
        for m in layers:
            m.weight += m.up @ m.down
            del m.down, m.up
            m.__class__ = nn.Linear  # type: ignore[assignment]
    try:
        yield model
    finally:
        with torch.no_grad():
            for m, (weight, down, up) in zip(layers, kept, strict=True):
                m.weight.copy_(weight)
                m.__class__ = LoRALinear
                m.down, m.up = down, up


def apply_lora(model: nn.Module, path: str | Path) -> str:
    """Add the adapters in a file to the weights of `model`, in place; returns the file's sha256.

    ValueError where they do not fit.
    """
    try:
        with safe_open(path, "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open has no iteration
            known = (file.metadata() or {}).get("format")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"lora: wanted a safetensors file of adapters, got {path} ({error})") from None
    if known != "t2ct-lora-1":
        raise ValueError(f"lora: wanted a file of adapters, got {path} of format {known!r}")
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name in sorted(key.removesuffix(".down") for key in found if key.endswith(".down")):
            down, up = found[f"{name}.down"].float(), found.get(f"{name}.up", torch.empty(0)).float()
            layer = layers.get(name)
            wanted = tuple(layer.weight.shape) if isinstance(layer, nn.Linear) else None
            pair = down.ndim == up.ndim == 2 and up.shape[1] == down.shape[0]
            got = (up.shape[0], down.shape[1]) if pair else "no pair of matrices"
            if not isinstance(layer, nn.Linear) or wanted != got:
                raise ValueError(f"lora: {name} wanted {wanted}, got {got} in {path}")
            weight = layer.weight.float() + (up @ down).to(layer.weight.device)
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
