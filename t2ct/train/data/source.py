"""A set of volumes with their reports, read one by one, brought to one size, kept on disk once read."""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from t2ct.files import write_files

ITEM = 2  # rises with what an `Item` holds: what was kept of another is read again
BYTES = 2 + 4 / 2**3 + 1 / 4**3  # of an `Item`, a voxel
HU_LIMIT = 1000  # the networks see HU clipped to +-1000


class BadVolume(ValueError):
    """A volume that cannot be used, with its name."""


@dataclass(frozen=True)
class Entry:
    """What is known of a volume before it is read: name, reports that say the same, labels (18,) or None, details as
    `t2ct.data.phantoms.reports.details.details_of` or None."""

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...] | None = None
    details: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Item:
    """hu: (X, Y, Z) int16. spacing: mm. Where known: small, (X/4, Y/4, Z/4) uint8, voxels of small findings; findings,
    (X/2, Y/2, Z/2) uint32, a bit for each of `LABELS` that lies in a cell of 2^3 voxels."""

    hu: np.ndarray
    spacing: tuple[float, float, float]
    small: np.ndarray | None = None
    findings: np.ndarray | None = None

    @property
    def known(self) -> dict[str, np.ndarray]:
        """The maps that are known, by name."""
        maps = {"small": self.small, "findings": self.findings}
        return {name: values for name, values in maps.items() if values is not None}


class Source(Protocol):
    """Volumes of one size."""

    entries: Sequence[Entry]
    size: tuple[int, int, int]

    def __len__(self) -> int: ...

    def read(self, index: int) -> Item:
        """Raises BadVolume."""
        ...


def fingerprint(source: Source) -> str:
    """One short name for which volumes and texts these are, and at what size. Of files their length and when they were
    written count too: other volumes may have the names of those before."""
    told: list = [source.size, [(e.name, e.texts) for e in source.entries]]
    if paths := getattr(source, "paths", None):
        facts = [Path(path).stat() if Path(path).is_file() else None for path in paths]
        told.append([f and (f.st_size, int(f.st_mtime)) for f in facts])
    content = json.dumps(told)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def fit(hu: np.ndarray, spacing: Sequence[float], size: tuple[int, int, int]) -> tuple[np.ndarray, Sequence[float]]:
    """hu (X, Y, Z) stretched to `size` voxels, int16, clipped to +-1000, and its voxels' size then, in mm.

    Trilinear where an axis has not twice the wanted voxels, the mean of what a voxel covers where all have.
    """
    hu = np.clip(hu, -HU_LIMIT, HU_LIMIT).astype(np.int16, copy=False)
    if hu.shape == tuple(size):
        return np.ascontiguousarray(hu), spacing
    x = torch.from_numpy(np.ascontiguousarray(hu)).float()[None, None]
    if all(n >= 2 * m for n, m in zip(hu.shape, size, strict=True)):
        x = F.interpolate(x, size=tuple(size), mode="area")
    else:
        x = F.interpolate(x, size=tuple(size), mode="trilinear", align_corners=False)
    scaled = [mm * n / m for mm, n, m in zip(spacing, hu.shape, size, strict=True)]
    return x[0, 0].round_().to(torch.int16).numpy(), scaled


def hu_evidence(hu: np.ndarray) -> str | None:
    """What speaks against the values of a chest CT (X, Y, Z) being HU: not rescaled, rescaled twice, something else."""
    low, middle, high = np.percentile(hu[::4, ::4, ::2], (1, 50, 99))
    shown = f"1st, 50th and 99th percentile are {low:.0f}, {middle:.0f} and {high:.0f}"
    if low > -500:
        return f"no air in it: {shown}; slope and intercept were not applied, or no HU"
    if high < -300:
        return f"nothing denser than lung: {shown}; the intercept was applied twice?"
    if high > 5000:
        return f"denser than any tissue: {shown}; the slope was applied twice?"
    return None


def check_hu(hu: np.ndarray, name: str) -> None:
    """Warn, with the evidence, where values are no HU."""
    evidence = hu_evidence(hu)
    if evidence:
        warnings.warn(f"{name}: {evidence}", stacklevel=2)


class Unread:
    """A source of which only what is known besides the volumes counts: none is read, drawn or kept."""

    def __init__(self, source: Source):
        self.entries, self.size = source.entries, source.size

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Item:
        return Item(np.zeros((1, 1, 1), np.int16), (1.0, 1.0, 1.0))


class Cached:
    """A source whose volumes, once read, lie in `folder` and are read from there."""

    def __init__(self, source: Source, folder: Path):
        self.source, self.entries, self.size = source, source.entries, source.size
        self.folder = folder / f"{'x'.join(map(str, source.size))}-{fingerprint(source)}-{ITEM}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Item:
        path = self.folder / f"{index:07d}.npz"
        try:
            with np.load(path) as kept:
                maps = {name: kept[name] for name in kept.files if name not in ("hu", "spacing")}
                return Item(kept["hu"], tuple(kept["spacing"].tolist()), **maps)
        except Exception:  # not there, or damaged: whatever it is, the volume is read again
            item = self.source.read(index)
        buffer = io.BytesIO()
        np.savez(buffer, hu=item.hu, spacing=np.array(item.spacing), **item.known)  # type: ignore[arg-type]
        try:
            write_files({path: buffer.getvalue()})
        except OSError as error:
            warnings.warn(f"cache {path}: not written ({error}); the volume is read again next time", stacklevel=2)
        return item


def cached(source: Source, folder: Path, gigabytes: float) -> Source:
    """The source through a cache in `folder`, if all its volumes fit in `gigabytes`."""
    need = len(source) * BYTES * float(np.prod(source.size)) / 1e9
    return Cached(source, folder) if need <= gigabytes else source
