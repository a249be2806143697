"""How much memory: what a user writes, what a device has free."""

from __future__ import annotations

import contextlib
import ctypes
import re
from numbers import Real
from pathlib import Path

import torch

UNITS = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
UNITS |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}
MOST = 2.0**63  # bytes; no machine has them
MARGIN = 0.9  # of what is free: other programs and the allocator's own pages want some
_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(value: str | Real | float, name: str = "memory_budget") -> int:
    """6_000_000_000 of "6GB", "6 GB", 6e9 or "6e9"; "6GiB" is 6 * 1024^3.

    Raises TypeError for what is no number or text, ValueError for text that says no size and for sizes below 1 byte.
    """
    if isinstance(value, bool) or not isinstance(value, (str, Real)):
        raise TypeError(f'{name}: wanted bytes such as 6e9 or "6GB", got {type(value).__name__}')
    number, unit = float("nan"), ""
    if not isinstance(value, str):
        number = float(value) if value < MOST else float("inf")
    elif match := _NUMBER.fullmatch(value):
        number, unit = float(match[1]), match[2].upper()
    if unit not in UNITS or not 1 <= number * UNITS[unit] < MOST:
        raise ValueError(f'{name}: wanted a positive size such as "6GB", "6GiB" or 6e9, got {value!r}')
    return int(round(number * UNITS[unit], 3))  # 2.01 kB is 2010 bytes


def format_bytes(count: float) -> str:
    """1234567 -> "1.23 MB"."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count / 1000:.3g} TB"


def enough_bytes(count: int) -> str:
    """As `format_bytes`, rounded up: who names so much as a budget has `count` bytes at least."""
    scale = 10 ** max(0, len(str(count)) - 3)
    return format_bytes(-(-count // scale) * scale)


def free_memory(device: torch.device | str) -> int:
    """Bytes that new tensors on `device` may take, less a margin: of a GPU what its driver and torch's cache have free,
    of a CPU what the system and this process's control group leave."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(MARGIN * (torch.cuda.mem_get_info(device)[0] + cached))
    limits = [_available(), _control_group()]
    known = [limit for limit in limits if limit is not None]
    return int(MARGIN * min(known)) if known else 2**62


def give_back() -> None:
    """Return what the C library keeps of freed memory, up to 64 MB, to the system."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def _available() -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:  # macOS and others: all of it, for want of better
            import os

            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None


def _control_group(root: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int | None:
    """What the groups that this process is in, and those above them, leave; pages of files can be had back."""
    try:
        lines = [line.split(":", 2) for line in Path(own).read_text().splitlines()]
    except OSError:
        lines = []
    paths = {kinds: path.strip("/") for _, kinds, path in (line for line in lines if len(line) == 3)}
    second = ("", paths.get("", ""), "memory.max", "memory.current", "inactive_file")
    first = ("memory", next((p for kinds, p in paths.items() if "memory" in kinds.split(",")), ""),
             "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # fmt: skip
    left = []
    for top, path, limit, used, files in (second, first):
        names = path.split("/") if path else []
        for group in (Path(root, top, *names[:n]) for n in range(len(names) + 1)):
            try:
                most = (group / limit).read_text().strip()
                if most == "max":
                    continue
                taken = int((group / used).read_text())
                with contextlib.suppress(OSError, ValueError, KeyError):
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    taken -= int(stat[files])
                left.append(max(0, int(most) - max(0, taken)))
            except (OSError, ValueError):
                continue
    return min(left, default=None)
