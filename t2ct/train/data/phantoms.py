"""Phantoms on the fly: `phantoms:N` is N patients to train on and a few others to look at; `phantoms:NxK` shows each of
the N patients K times, with other findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from t2ct.data.phantoms import FINDINGS, Finding, describe, phantom
from t2ct.data.phantoms.organs import ORGAN
from t2ct.data.phantoms.reports.details import details_of
from t2ct.train.data.source import HU_LIMIT, Entry, Item

WORDINGS = 4  # reports written of each phantom
# How many findings a training phantom has. More, and more even, than a hospital's: rare findings would be learnt last.
SHARE_BY_COUNT = (0.12, 0.16, 0.22, 0.22, 0.16, 0.12)
VALID_COUNT = 64  # phantoms for validation, at most
VALID_SEED = 500_000_000  # beyond every seed that is trained on, or measured by t2ct.eval.listens
TEST_SEED = 600_000_000
OTHER_SEED = 700_000_000  # whose findings a patient has the third time
CELL = 4  # voxels of a latent voxel along an axis
# Findings so small that the mean of a volume's error hardly sees them.
SMALL = (
    "pericardial effusion", "consolidation", "lung nodule", "atelectasis", "arterial wall calcification",
    "medical material", "coronary artery wall calcification", "hiatal hernia", "lymphadenopathy",
    "pulmonary fibrotic sequela", "peribronchial thickening", "bronchiectasis", "interlobular septal thickening",
)  # fmt: skip


def draw_names(
    seed: int, known: Sequence[str] = tuple(FINDINGS), share_by_count: Sequence[float] = SHARE_BY_COUNT
) -> list[str]:
    """The findings of training phantom `seed`; pleural effusion counts double, its side being the hardest to learn.

    known: the findings to draw from, pleural effusion among them. share_by_count: how often there are 0, 1, 2, …
    """
    rng = np.random.default_rng([seed, 2025])
    names = [*known, "pleural effusion"]
    chosen = rng.choice(names, size=rng.choice(len(share_by_count), p=share_by_count), replace=False)
    return sorted(set(chosen.tolist()))


def draw_shown(seed: int, shown: int) -> list[str] | list[Finding]:
    """What patient `seed` has the `shown`-th time: by pairs new findings, and the same with right for left.

    Anatomy, noise of the scanner and wording follow the seed alone, so that two volumes of one patient differ by what
    their reports say. Where no finding has another side, the second of a pair lacks the last; where nothing is left
    then, it has a right pleural effusion.
    """
    pair, second = divmod(shown, 2)
    if not shown:
        return draw_names(seed)
    other = seed + pair * OTHER_SEED
    found = list(describe(other, draw_names(other)).present)
    if not second:
        return found
    turned = [_turned(f) for f in found]
    if turned != found:
        return turned
    return found[:-1] or list(describe(seed, [Finding("pleural effusion", side="right")]).present)


def _turned(f: Finding) -> Finding:
    """The finding on the other side, if it can be there."""
    other = {"right": "left", "left": "right"}.get(f.side or "", f.side)
    if other == f.side or other not in FINDINGS[f.name].sides:
        return f
    return replace(f, side=other, lobe="lower" if f.lobe == "middle" else f.lobe)


def small_findings(mask: np.ndarray) -> np.ndarray:
    """mask (X, Y, Z) -> (X/4, Y/4, Z/4) uint8: how many of the 64 voxels of a latent voxel are of a small finding."""
    inside = np.isin(mask, [ORGAN[name] for name in SMALL])
    x, y, z = (n // CELL for n in inside.shape)
    return inside.reshape(x, CELL, y, CELL, z, CELL).sum((1, 3, 5), dtype=np.uint8)


def finding_cells(bits: np.ndarray) -> np.ndarray:
    """`Phantom.bits` (X, Y, Z) -> (X/2, Y/2, Z/2) uint32: the findings of every cell of 2^3 voxels."""
    x, y, z = (n // 2 for n in bits.shape)
    cells = bits[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2)
    return np.bitwise_or.reduce(cells, axis=(1, 3, 5))


class PhantomSource:
    """`count` phantoms: seeds 0 to count - 1 to train on ("train"); for validation an eighth as many (4 to
    `valid_count`) other seeds ("valid"); `count` others that only evaluation sees ("test"). Those to train on are shown
    `times` times each, one after another."""

    def __init__(
        self, count: int, split: str, size: tuple[int, int, int], valid_count: int = VALID_COUNT, times: int = 1
    ):
        first, n = (VALID_SEED, min(valid_count, max(4, count // 8))) if split == "valid" else (0, count)
        first += TEST_SEED * (split == "test")
        self.size, self.times = size, times if split == "train" else 1
        self.seeds = range(first, first + n)
        self.entries: Sequence[Entry] = _Entries(self.seeds, self.times)

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Item:
        seed, shown = self.seeds[index // self.times], index % self.times
        made = phantom(seed, draw_shown(seed, shown), self.size)
        spacing = tuple(float(mm) for mm in np.abs(np.diag(made.affine)[:3]))
        hu = np.clip(made.hu, -HU_LIMIT, HU_LIMIT)
        assert made.bits is not None
        return Item(hu, spacing, small_findings(made.mask), finding_cells(made.bits))  # type: ignore[arg-type]


class _Entries(Sequence):
    """Reports written when they are asked for, and kept."""

    def __init__(self, seeds: range, times: int):
        self.seeds, self.times, self.known = seeds, times, dict[int, Entry]()

    def __len__(self) -> int:
        return len(self.seeds) * self.times

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index not in self.known:
            self.known[index] = _entry(self.seeds[index // self.times], index % self.times)
        return self.known[index]


def _entry(seed: int, shown: int) -> Entry:
    from t2ct.data.phantoms.phantom import Phantom

    told = describe(seed, draw_shown(seed, shown))
    nothing = np.zeros((0, 0, 0), np.int16)
    words = Phantom(seed, nothing, np.eye(4), told.report, told.prompt, told.labels, told.present, nothing)
    labels, details = (tuple(v.tolist()) for v in (told.labels, details_of(told.present)))
    name = f"phantom {seed}" + (f", time {shown + 1}" if shown else "")
    return Entry(name, tuple(words.wordings(WORDINGS)), labels, details)
