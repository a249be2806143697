"""A training set of phantoms: drawn once by all cores, kept in shards, resumed where it stopped."""

import io
import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from t2ct.data.phantoms import FINDINGS, phantom
from t2ct.files import write_files

SHARD = 250  # phantoms a file: a minute's work, and what a stop can lose
WORDINGS = 4  # reports written of each phantom
# How many findings a training phantom has. More, and more even, than a hospital's: rare findings would be learnt last.
SHARE_BY_COUNT = (0.12, 0.36, 0.34, 0.18)


@dataclass(frozen=True)
class PhantomSet:
    """hu (N, X, Y, Z) int16; prompts: N tuples of WORDINGS texts; labels (N, 18) uint8."""

    hu: np.ndarray
    prompts: list[tuple[str, ...]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.hu)


def draw_names(seed: int) -> list[str]:
    """The findings of training phantom `seed`; pleural effusion counts double, its side being the hardest to learn."""
    rng = np.random.default_rng([seed, 2025])
    names = [*FINDINGS, "pleural effusion"]
    chosen = rng.choice(names, size=rng.choice(len(SHARE_BY_COUNT), p=SHARE_BY_COUNT), replace=False)
    return sorted(set(chosen.tolist()))


def _shard(job: tuple[Path, range, tuple[int, int, int]]) -> None:
    path, seeds, size = job
    drawn = [phantom(seed, draw_names(seed), size) for seed in seeds]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        hu=np.stack([p.hu for p in drawn]),
        labels=np.stack([p.labels for p in drawn]),
        prompts=np.array(json.dumps([p.wordings(WORDINGS) for p in drawn])),
    )
    write_files({path: buffer.getvalue()})


def phantom_set(
    folder: Path, count: int, size: tuple[int, int, int], first_seed: int = 0, workers: int = 2
) -> PhantomSet:
    """`count` phantoms of `size` voxels, seeds from `first_seed`; shards already in `folder` are kept.

    count must be a multiple of SHARD. A phantom of 96x96x48 takes 0.88 MB of disk.
    """
    if count % SHARD:
        raise ValueError(f"count must be a multiple of {SHARD}, got {count}")
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(first_seed, first_seed + count, SHARD)
    paths = [folder / f"phantoms-{'x'.join(map(str, size))}-{start:08d}.npz" for start in starts]
    jobs = [(p, range(s, s + SHARD), size) for p, s in zip(paths, starts, strict=True) if not p.exists()]
    if jobs:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            list(tqdm(pool.imap(_shard, jobs), total=len(jobs), desc=f"phantoms, shards of {SHARD}"))
    hu, prompts, labels = np.empty((count, *size), np.int16), [], []
    for i, path in enumerate(paths):  # straight into their place: gigabytes that need not be held twice
        with np.load(path) as shard:
            hu[i * SHARD : (i + 1) * SHARD] = shard["hu"]
            prompts += [tuple(texts) for texts in json.loads(str(shard["prompts"]))]
            labels.append(shard["labels"])
    return PhantomSet(hu, prompts, np.concatenate(labels))
