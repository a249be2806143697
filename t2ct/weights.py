"""Reading weights: only the tensors that are asked for, never code, never twice in memory."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

WRAPPERS = ("unet_state_dict", "state_dict")  # how published training scripts wrap a state dict


def load_into(model: nn.Module, path: str | Path, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Give `model`, built on the meta device, the tensors of its own keys from a .safetensors or .pt file.

    Other tensors in the file are never read. A tensor already on `device` in `dtype` stays mapped from the file; others
    are converted one by one, and the file's pages given back, so that the peak is what is kept plus one tensor.

    Returns {"hash": sha256 of the tensors, "extras": numbers that stood beside a wrapped state dict (scale_factor)}.
    Raises FileNotFoundError, or ValueError naming what the file lacks (the first three keys), a shape that differs,
    integers for floating numbers, a truncated file, or a pickle that would need code to run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: wanted a file, got {path}")
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    floating = {key for key, value in model.state_dict().items() if value.is_floating_point()}
    source, extras = _open(path)
    _check(path, wanted, {key: _shape(source, key) for key in wanted if key in source.keys()})  # noqa: SIM118
    digest, loaded = hashlib.sha256(), {}
    for key in sorted(wanted):
        tensor = source.get_tensor(key)
        if key in floating and not tensor.is_floating_point():
            raise ValueError(f"weights: wanted floating numbers as {key}, got {tensor.dtype} in {path}")
        _hash(digest, key, tensor)
        target = dtype if tensor.is_floating_point() else tensor.dtype
        loaded[key] = tensor.to(device=device, dtype=target)
        if loaded[key] is not tensor:
            _forget(tensor)
    model.load_state_dict(loaded, strict=True, assign=True)
    model.requires_grad_(False).eval()
    return {"hash": digest.hexdigest(), "extras": extras}


def hash_of(parts: Iterable[str]) -> str:
    """One short name for several hashes."""
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


class _Pickled:
    """A .pt file's state dict with the two methods of a safetensors file."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def keys(self):
        return self.tensors.keys()

    def get_tensor(self, key: str) -> Tensor:
        return self.tensors[key]


def _open(path: Path) -> tuple[Any, dict[str, float]]:
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, "pt"), {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"weights: wanted a whole safetensors file, got {path} ({error})") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(
            f"weights: wanted tensors only, got {path}, which asks to run code; refused ({reason})"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"weights: wanted a whole torch file, got {path} ({str(error).splitlines()[0][:120]})"
        ) from None
    extras: dict[str, float] = {}
    if isinstance(content, dict):
        extras = {k: float(v) for k, v in content.items() if isinstance(v, (int, float)) or _is_scalar(v)}
        content = next((content[w] for w in WRAPPERS if w in content), content)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"weights: wanted a state dict of tensors, got {type(content).__name__} in {path}")
    return _Pickled(content), extras


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _shape(source: Any, key: str) -> tuple[int, ...]:
    if isinstance(source, _Pickled):
        return tuple(source.tensors[key].shape)
    return tuple(source.get_slice(key).get_shape())


def _check(path: Path, wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    missing = [key for key in wanted if key not in found]
    if missing:
        raise ValueError(
            f"weights: {path} lacks {len(missing)} of {len(wanted)} tensors, first {', '.join(missing[:3])}"
        )
    other = [f"{k} wanted {wanted[k]}, got {found[k]}" for k in wanted if wanted[k] != found[k]]
    if other:
        raise ValueError(f"weights: {path} has {len(other)} tensors of another shape: {'; '.join(other[:3])}")


def _hash(digest: Any, key: str, tensor: Tensor) -> None:
    """Values as float32, so that the same weights stored in float16 and in float32 have one hash."""
    digest.update(key.encode())
    values = tensor.float() if tensor.is_floating_point() else tensor.long()
    digest.update(values.contiguous().flatten().view(torch.uint8).numpy().data)


def _forget(tensor: Tensor) -> None:
    """Give the mapped pages of a tensor that was copied back to the system; they are the file's and can be read again.

    Without this the file's pages count beside the copy until the file is closed.
    """
    page, start = mmap.PAGESIZE, tensor.data_ptr()
    first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
