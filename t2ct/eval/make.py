"""Generated volumes: made by a model from reports, or found in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2ct.data.io import load_volume, volume_files
from t2ct.data.volume import Volume
from t2ct.eval.look import Look
from t2ct.eval.store import Store
from t2ct.files import write_files
from t2ct.train.data.source import Source

BATCH_VOXELS = 2_000_000  # of the volumes generated at once
MOST_AT_ONCE = 8


class Maker:
    """Volumes of a pipeline, one from each report. The noise of report i has the seed i, whatever steps and guidance,
    so that settings differ by nothing else, and `t2ct generate --seed i` makes the same volume."""

    def __init__(self, pipe: Any, prompts: Sequence[str], batch: int | None = None):
        self.pipe, self.prompts = pipe, list(prompts)
        self.batch = batch or max(1, min(MOST_AT_ONCE, BATCH_VOXELS // int(np.prod(pipe.size))))
        config = pipe.config
        self.shape = (1, config.unet.in_channels, *(n // config.vae.factor for n in pipe.size))

    def cut(self) -> int:
        """How many of the reports are longer than the text tower reads."""
        limit = self.pipe.config.clip.text.max_length
        ids = self.pipe.tokenizer.encode(self.prompts, 1 << 20)
        lengths = (ids == self.pipe.tokenizer.end_id).int().argmax(1) + 1  # the first end is the text's
        return int((lengths > limit).sum())

    def make(self, start: int, stop: int, steps: int, guidance: float) -> list[Volume]:
        """The volumes of reports start to stop, at once."""
        seeds = range(start, stop)
        noise = [torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "[0-9]+ of [0-9]+ texts longer", UserWarning)  # `cut` told
            made = self.pipe(
                self.prompts[start:stop], num_inference_steps=steps, guidance_scale=guidance, latents=torch.cat(noise),
                progress=False,
            )  # fmt: skip
        return [replace(volume, seed=seed) for volume, seed in zip(made, seeds, strict=True)]

    def see(
        self, store: Store, name: str, count: int, steps: int, guidance: float, look: Look, keep: Path | None,
        step: Callable[[int], Any],
    ) -> None:  # fmt: skip
        """Generate and look at those of the first `count` volumes that `store` lacks; keep: a folder for the NIfTI
        files. Batches are always the same ones, so that a run that goes on has the bits of one that was not stopped."""
        for start, stop in batches(count, self.batch):
            if all(store.get(name, i) is not None and (keep is None or _path(keep, i).is_file())
                   for i in range(start, stop)):  # fmt: skip
                step(stop - start)
                continue
            for i, volume in zip(range(start, stop), self.make(start, stop, steps, guidance), strict=True):
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    write_files(volume_files(volume, _path(keep, i)))
                store.put(name, i, look(volume.hu))
                step(1)


def see(
    store: Store, name: str, source: Source, look: Look, whole: bool, step: Callable[[int], Any]
) -> None:  # fmt: skip
    """Read and look at those volumes of a source that `store` lacks."""
    for i in range(len(source)):
        if store.get(name, i) is None:
            store.put(name, i, look(source.read(i).hu, whole))
        step(1)


def kept(folder: Path, index: int) -> Volume:
    """A generated volume that was kept."""
    return load_volume(_path(folder, index))


def batches(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of groups of `size`."""
    for start in range(0, count, size):
        yield start, min(start + size, count)


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.nii.gz"
