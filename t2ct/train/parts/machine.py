"""What this machine has: memory, and the products that it is good at."""

from __future__ import annotations

import ctypes
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """On a CPU under glibc: what an update frees stays with the process for the next one, and is given back at the end.

    By default glibc hands large blocks back at once, and the system clears every page again when gradients are made
    anew: a quarter of the step of a network with many weights and few voxels (benchmarks/bench_training.py).
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:  # glibc's own values
        libc.mallopt(M_MMAP_MAX, 65536)
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


def memory_used(device: torch.device) -> float:
    """The most memory that was in use, in GB: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def find_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions and matrix products; "auto": bfloat16 where it is native, else float32."""
    if name == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else has_bfloat16()
        return torch.bfloat16 if native else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[name]


@cache
def has_bfloat16() -> bool:
    """Does this processor have bfloat16 products? Emulated ones would be slower than float32."""
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has no such function
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))
