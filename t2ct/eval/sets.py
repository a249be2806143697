"""The volumes that are evaluated: unseen ones with their reports, training ones, and those of another system."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from t2ct.data.volume import NIFTI_SUFFIXES
from t2ct.train.data import phantom_counts
from t2ct.train.data.phantoms import PhantomSource
from t2ct.train.data.source import BadVolume, Entry, Item, Source, hu_evidence
from t2ct.train.data.tables import FolderSource, Row, read_rows

LOOKED_AT = 4  # volumes whose voxels are read before anything long starts
SHOWN = 5  # names in a notice
Size = tuple[int, int, int]


class Volumes(FolderSource):
    """Volumes to evaluate: what is not in HU is refused, where training would only warn."""

    def look(self, hu: np.ndarray, path: Path) -> None:
        evidence = hu_evidence(hu)
        if evidence:
            raise BadVolume(f"{path}: wanted HU, got a volume with {evidence}")


@dataclass
class Sets:
    """What there is to evaluate with. test: unseen volumes and their reports. train: what a model may have learnt by
    heart, if known. notices: what was left out. split: which of its data `test` is; "": they have no splits."""

    test: Source
    train: Source | None
    notices: list[str] = field(default_factory=list)
    split: str = "test"


def open_sets(spec: str | Path, size: Size, count: int | None = None, train_count: int = 0) -> Sets:
    """The sets that `spec` names: `phantoms:N`, a folder with manifest.csv, or one shaped as CT-RATE.

    size: voxels that every volume is brought to. count: how many unseen volumes at most (of phantoms N at most);
    train_count: how many training volumes at most. Of a folder the rows of the split "test" are unseen, without them
    those of "valid", without these all of them; those of "train" are training volumes.

    Headers of all volumes and the voxels of a few are read here. Raises FileNotFoundError or ValueError: no such
    folder, an empty one, no volume that has a report, columns of labels that are missing, volumes that are not in HU.
    """
    if count is not None and count < 1:
        raise ValueError(f"count: wanted an integer of at least 1, got {count}")
    if str(spec).startswith("phantoms:"):
        n, _ = phantom_counts(str(spec))
        n = min(n, count or n)
        train = PhantomSource(train_count, "train", size) if train_count else None
        return Sets(PhantomSource(n, "test", size), train)
    notices: list[str] = []
    rows = _usable(read_rows(Path(spec)), Path(spec), notices)
    split = next((s for s in ("test", "valid") if any(row.split == s for row in rows)), "")
    chosen = [row for row in rows if row.split == split][:count]
    if not chosen:
        chosen = rows[:count] if split == "" else chosen
    known = [row for row in rows if row.split == "train" and split][:train_count]
    check_files([*chosen, *known], size, notices)
    return Sets(Volumes(chosen, size), Volumes(known, size) if known else None, notices, split)


def open_volumes(folder: str | Path, size: Size | None = None) -> Volumes:
    """All volumes in a folder, made by whatever system: with manifest.csv, with CT-RATE's tables, or NIfTI files alone.

    size: default: that of most of them. Errors and checks as in `open_sets`, but volumes need no reports.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"volumes: wanted a folder, got {str(folder)!r}, which is none")
    notices: list[str] = []
    try:
        rows = _usable(read_rows(root), root, notices, texts=False)
    except FileNotFoundError:
        files = sorted(_nifti(root))
        if not files:
            raise ValueError(f"volumes: wanted NIfTI files, got none in {folder}") from None
        rows = [Row(Entry(path.name, ()), path, "") for path in files]
    return Volumes(rows, check_files(rows, size, notices))


def check_files(rows: Sequence[Row], size: Size | None, notices: list[str]) -> Size:
    """Read all headers and a few volumes; the size given, or that of most. Mixed grids are warned of."""
    import nibabel as nib

    shapes: Counter[Size] = Counter()
    spacings: Counter[tuple[float, ...]] = Counter()
    bad: list[str] = []
    for row in rows:
        try:
            image: Any = nib.load(row.path)  # type: ignore[attr-defined]
            if len(image.shape) != 3:
                raise ValueError(f"shape {image.shape}, wanted three axes")
            order = np.argsort(nib.io_orientation(image.affine)[:, 0])  # axes as RAS will have them; no voxel is read
            x, y, z = (int(image.shape[axis]) for axis in order)
            shapes[x, y, z] += 1
            zooms = image.header.get_zooms()
            spacings[tuple(round(float(zooms[axis]), 2) for axis in order)] += 1
        except Exception as error:  # the reader raises what it likes
            bad.append(f"{row.entry.name}: {' '.join(str(error).split())[:120]}")
    if bad:
        raise ValueError(f"data: {len(bad)} of {len(rows)} volumes cannot be opened: {listed(bad)}")
    wanted = size or shapes.most_common(1)[0][0]
    if set(shapes) != {wanted} or len(spacings) > 1:
        told = f"{_counted(shapes, 'x', 'sizes')}, {_counted(spacings, ' x ', 'spacings')}"
        _notice(notices, f"{told}: all are stretched to {'x'.join(map(str, wanted))} voxels")
    few = Volumes([rows[i] for i in sorted({int(i) for i in np.linspace(0, len(rows) - 1, LOOKED_AT)})], wanted)
    for k in range(len(few)):
        few.read(k)
    return wanted


def matched(test: Source, made: Volumes) -> tuple[list[int], list[int], str | None]:
    """Indices of the unseen volumes and of those another system made from their reports, by file name; what is left
    over, in words. ValueError where no name occurs in both."""
    names = {Path(entry.name).name: i for i, entry in enumerate(made.entries)}
    pairs = [(i, names[name]) for i, e in enumerate(test.entries) if (name := Path(e.name).name) in names]
    if not pairs:
        raise ValueError(
            f"model: wanted volumes named as those of the data, such as {test.entries[0].name!r}, "
            f"got {made.entries[0].name!r} and {len(made) - 1} more"
        )
    ours, theirs = (list(side) for side in zip(*pairs, strict=True))
    without = [Path(test.entries[i].name).name for i in range(len(test)) if i not in set(ours)]
    unknown = [Path(made.entries[i].name).name for i in range(len(made)) if i not in set(theirs)]
    parts = [f"{len(without)} reports have no generated volume: {listed(without)}"] if without else []
    parts += [f"{len(unknown)} generated volumes have no report: {listed(unknown)}"] if unknown else []
    return ours, theirs, "; ".join(parts) or None


class Part:
    """Some volumes of a source, in a given order."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices, self.size = source, list(indices), source.size
        self.entries: Sequence[Entry] = [source.entries[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Item:
        return self.source.read(self.indices[index])


def labels_of(source: Source, what: str = "data") -> np.ndarray | None:
    """(N, 18) bool, or None where no volume has labels. ValueError where only some have."""
    entries = [source.entries[i] for i in range(len(source))]
    without = [e.name for e in entries if e.labels is None]
    if len(without) == len(entries):
        return None
    if without:
        told = f"{len(without)} of {len(entries)} without: {listed(without)}"
        raise ValueError(f"{what}: wanted labels of all volumes or of none, got {told}")
    return np.array([e.labels for e in entries], bool)


def listed(names: Iterable[str]) -> str:
    """The first few of `names`, and how many more."""
    names = list(names)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _usable(rows: Sequence[Row], root: Path, notices: list[str], texts: bool = True) -> list[Row]:
    """Rows that have a file, and a report where one is needed; the others, and files without a row, are listed."""
    gone = [row.entry.name for row in rows if not row.path.is_file()]
    there = [row for row in rows if row.path.is_file()]
    silent = [row.entry.name for row in there if texts and not row.entry.texts]
    known = {row.path.resolve() for row in rows}
    unnamed = [str(path.relative_to(root)) for path in sorted(_nifti(root)) if path.resolve() not in known]
    for names, told in (
        (gone, "reports without a volume"), (silent, "volumes with an empty report"),
        (unnamed, "volumes without a report"),
    ):  # fmt: skip
        if names:
            _notice(notices, f"{len(names)} {told} are left out: {listed(names)}")
    good = [row for row in there if not texts or row.entry.texts]
    if not good:
        raise ValueError(f"data: wanted volumes with reports, got none of {len(rows)} in {root}")
    return good


def _nifti(root: Path) -> list[Path]:
    found = [path for path in root.rglob("*") if path.name.lower().endswith(NIFTI_SUFFIXES)]
    return [path for path in found if path.is_file() and not path.name.startswith((".", "mask"))]


def _notice(notices: list[str], text: str) -> None:
    notices.append(text)
    warnings.warn(f"data: {text}", stacklevel=2)


def _counted(found: Counter, between: str, what: str) -> str:
    first = between.join(f"{v:g}" for v in found.most_common(1)[0][0])
    return first if len(found) == 1 else f"{len(found)} {what} (most often {first})"
