"""Latents of a data set, computed once: mu and sigma in shards, marked with the VAE that made them.

`t2ct latents` writes FOLDER/train and FOLDER/valid, each an index.json and shards of safetensors; a second call goes on
where the first stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from t2ct.files import check_output_folder, write_files
from t2ct.models import VAE, hu_to_unit
from t2ct.models.layers import channels_last
from t2ct.stream import Budget
from t2ct.train.data import BadVolume, Source, open_data
from t2ct.train.data.found import coarser
from t2ct.train.data.order import reading
from t2ct.train.data.source import Entry, Item, cached, fingerprint
from t2ct.train.parts.folders import load_part
from t2ct.train.parts.machine import find_precision
from t2ct.train.recipe import ranks

FORMAT = "t2ct-latents-1"
SHARD = 64
TAKEN = "volumes"  # of a shard's metadata: which ones it holds
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Latent:
    """mu, sigma (C, x, y, z) float16; spacing mm; where known, small (x, y, z) uint8, voxels of small findings, and
    findings (x, y, z) int32, a bit for each finding that lies there."""

    mu: Tensor
    sigma: Tensor
    spacing: Tensor
    small: Tensor | None = None
    findings: Tensor | None = None


class LatentSource:
    """Latents of one split, read from their shards one by one."""

    def __init__(self, folder: Path, vae_hash: str = ""):
        path = folder / "index.json"
        if not path.is_file():
            raise FileNotFoundError(f"latents: wanted index.json, got none in {folder}; t2ct latents makes it")
        self.folder = folder
        try:
            self.index = json.loads(path.read_text(encoding="utf-8"))
            known, vae = self.index["format"], str(self.index["vae"])
            self.entries = [Entry(e["name"], tuple(e["texts"])) for e in self.index["entries"]]
            self.size = tuple(self.index["size"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"latents: wanted what t2ct latents writes, got {path} ({error!r:.100})") from None
        if known != FORMAT:
            raise ValueError(f"latents: wanted format {FORMAT!r}, got {known!r} in {path}")
        if vae_hash and vae != vae_hash:
            raise ValueError(f"latents: wanted those of the VAE {vae_hash[:16]}, got {folder}, made by {vae[:16]}")
        absent = [p for p in (_shard(folder, n) for n in range(-(-len(self.entries) // SHARD))) if not p.is_file()]
        if absent:
            raise ValueError(f"latents: wanted all shards of {path}, got no {absent[0].name}")
        self._open: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # another process opens its own

    def read(self, index: int) -> Latent:
        shard, at = divmod(index, SHARD)
        if shard not in self._open:
            self._open[shard] = safe_open(_shard(self.folder, shard), "pt")
        file = self._open[shard]
        names = [f.name for f in fields(Latent) if f.name in file.keys()]  # noqa: SIM118  it has no iteration
        return Latent(**{name: file.get_slice(name)[at] for name in names})


def _shard(folder: Path, number: int) -> Path:
    return folder / f"latents-{number:05d}.safetensors"


def of_shard(number: int, count: int) -> range:
    """The volumes of `count` that belong in shard `number`."""
    return range(number * SHARD, min(count, (number + 1) * SHARD))


def _taken(path: Path, meant: range) -> list[int]:
    """The volumes that are in a shard: where one could not be read, the next one stands with its own report."""
    with safe_open(path, "pt") as file:
        told = (file.metadata() or {}).get(TAKEN)
    return list(meant) if told is None else json.loads(told)


@torch.no_grad()
def encode(
    vae: VAE, hu: np.ndarray, device: torch.device, precision: str = "auto", memory_budget: Budget = None,
    spool_dir: str | Path | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(X, Y, Z) HU -> mu and sigma, (C, X/4, Y/4, Z/4) float16 on the CPU, in patches inside the budget. The one place
    where volumes are encoded."""
    dtype = find_precision(precision, device)
    x = channels_last(hu_to_unit(torch.from_numpy(hu)[None, None]).to(device))
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        mu, sigma = vae.encode(x, memory_budget, spool_dir=spool_dir)
    return mu[0].half().cpu().contiguous(), sigma[0].half().cpu().contiguous()


def encode_source(
    source: Source, vae: VAE, vae_hash: str, folder: Path, device: torch.device, *, precision: str = "auto",
    skip_bad: bool = False, told: Callable[[str], None] = print, quiet: bool = False, workers: int = 0,
    memory_budget: Budget = None, spool_dir: str | Path | None = None,
) -> LatentSource:  # fmt: skip
    """Latents of every volume of `source` into `folder`; shards that are there are kept, ranks share the others.
    `workers` processes read volumes ahead; memory_budget, spool_dir: of each encoding, as `VAE.encode`.

    ValueError where folder holds latents of another VAE or of other data; BadVolume unless skip_bad.
    """
    data, (rank, world) = fingerprint(source), ranks()
    mark = {"vae": vae_hash, "data": data, "precision": str(find_precision(precision, device))}
    folder.mkdir(parents=True, exist_ok=True)
    shards = range(-(-len(source) // SHARD))
    mine = [n for n in shards if n % world == rank and not _whole(_shard(folder, n), mark)]
    bar = tqdm(total=len(mine) * SHARD, desc="encoding", disable=quiet or rank != 0 or not mine, mininterval=2)
    of = {n: of_shard(n, len(source)) for n in mine}
    order = [[index] for number in mine for index in of[number]]
    with bar, reading(_Reads(source, skip_bad), order, workers, False, _only) as items:
        for number in mine:
            rows, taken = [], []
            for _ in of[number]:
                item, skipped, at = next(items)
                taken.append(at)
                for words in skipped:
                    told(words)
                if isinstance(item, BadVolume):
                    raise item
                rows.append(_encoded(item, vae, partial(encode, vae, device=device, precision=precision,
                                                        memory_budget=memory_budget, spool_dir=spool_dir)))  # fmt: skip
                bar.update()
            names = [name for name in rows[0] if all(name in row for row in rows)]
            tensors = {name: torch.stack([row[name] for row in rows]) for name in names}
            write_files({_shard(folder, number): save(tensors, mark | {TAKEN: json.dumps(taken)})})
    if world > 1:
        dist.barrier()
    if rank == 0:
        taken = [at for n in shards for at in _taken(_shard(folder, n), of_shard(n, len(source)))]
        entries = [{"name": e.name, "texts": list(e.texts)} for e in (source.entries[at] for at in taken)]
        index_json = {"format": FORMAT, **mark, "size": list(source.size), "entries": entries}
        write_files({folder / "index.json": json.dumps(index_json, ensure_ascii=False).encode()})
    if world > 1:
        dist.barrier()
    return LatentSource(folder, vae_hash)


class _Reads(Dataset):
    """Volume `index` of a source, or the next that can be read, what to tell of those that cannot, and which it is."""

    def __init__(self, source: Source, skip_bad: bool):
        self.source, self.skip_bad = source, skip_bad

    def __getitem__(self, index: int) -> tuple[Item | BadVolume, list[str], int]:
        skipped: list[str] = []
        for further in range(len(self.source)):
            at = (index + further) % len(self.source)
            try:
                return self.source.read(at), skipped, at
            except BadVolume as error:
                if not self.skip_bad:
                    return BadVolume(f"{error} (--skip-bad puts the next volume in its place)"), skipped, at
                skipped.append(f"skipped: {error}")
        return BadVolume("data: no volume can be read"), skipped, index


def _only(rows: Sequence[Any]) -> Any:
    (row,) = rows
    return row


def _encoded(item: Item, vae: VAE, encoder: Callable[[np.ndarray], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    mu, sigma = encoder(item.hu)
    row = {"mu": mu, "sigma": sigma, "spacing": torch.tensor(item.spacing)}
    if item.small is not None:
        row["small"] = torch.from_numpy(item.small)
    if item.findings is not None:  # of cells of 2^3 voxels
        row["findings"] = torch.from_numpy(coarser(item.findings, vae.config.factor // 2))
    return row


def _whole(path: Path, mark: dict[str, str]) -> bool:
    """Is this shard there, readable and of this VAE and these data? Of others: ValueError."""
    if not path.exists():
        return False
    try:
        with safe_open(path, "pt") as file:
            got = file.metadata() or {}
    except (SafetensorError, OSError):
        return False  # damaged: made again
    for name, value in mark.items():
        if got.get(name) != value:
            raise ValueError(
                f"latents: wanted an empty folder or those of {name} {value[:16]}, got {path} of {got.get(name)!r:.20}"
            )
    return True


def make_latents(
    data: str, vae: str, out: str | Path, *, device: str | torch.device = "cpu", precision: str = "auto",
    skip_bad: bool = False, cache_gb: float = 0.0, quiet: bool = False, workers: int = 0, memory_budget: Budget = None,
    spool_dir: str | Path | None = None,
) -> Path:  # fmt: skip
    """What `t2ct latents` does: latents of the training and the validation split of `data` by the VAE in the run or
    folder `vae`, into the folder `out`; returns it. Arguments as of `encode_source`. ValueError, before any volume is
    read, where the budget is less than encoding one takes."""
    check_output_folder(out)
    root, device = Path(out), torch.device(device)
    model, config, digest = load_part(vae, "vae", device)
    dtype = find_precision(precision, device)
    model.plan("encode", (1, 1, *config.size), memory_budget, spool_dir=spool_dir, dtype=dtype)
    for split in SPLITS:
        source = open_data(data, split, config.size, skip_bad=skip_bad)
        source = cached(source, root / "cache", cache_gb)
        if len(source):
            encode_source(
                source, model, digest, root / split, device, precision=precision, skip_bad=skip_bad, quiet=quiet,
                workers=workers, memory_budget=memory_budget, spool_dir=spool_dir,
            )
    return root
