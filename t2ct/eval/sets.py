"""The volumes that are evaluated: unseen ones with their reports, training ones, and those of another system."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from t2ct.data.volume import NIFTI_SUFFIXES
from t2ct.train.data import phantom_counts
from t2ct.train.data.phantoms import PhantomSource
from t2ct.train.data.source import BadVolume, Entry, Item, Source, hu_evidence
from t2ct.train.data.tables import FolderSource, Row, files_below, labels_by_name, read_rows

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
    heart, if known, of `train_total` volumes. notices: what was left out, in short; left_out: all of it, a line each.
    split: which of its data `test` is; "": they have no splits."""

    test: Source
    train: Source | None
    notices: list[str] = field(default_factory=list)
    split: str = "test"
    left_out: list[str] = field(default_factory=list)
    train_total: int | None = None

    @property
    def known_to_judges(self) -> str | None:
        """Why a judge may know the volumes, if it may."""
        if self.split == "test":
            return None
        if self.split:
            return f'the volumes are of the split "{self.split}", on which judges are chosen and calibrated'
        return "training may have seen the volumes, which have no split"


def open_sets(
    spec: str | Path, size: Size, count: int | None = None, train_count: int = 0, skip_bad: bool = False
) -> Sets:  # fmt: skip
    """The sets that `spec` names: `phantoms:N`, a folder with manifest.csv, or one shaped as CT-RATE.

    size: voxels that every volume is brought to. count: how many unseen volumes at most (of phantoms N at most);
    train_count: how many training volumes at most. Of a folder the rows of the split "test" are unseen, without them
    those of "valid", without these all of them; those of "train" are training volumes.

    Headers of all volumes and the voxels of a few are read here; skip_bad: the voxels of all, and what cannot be used
    is left out. Raises FileNotFoundError or ValueError: no such folder, an empty one, no volume that has a report,
    columns of labels that are missing, volumes that are not in HU.
    """
    if count is not None and count < 1:
        raise ValueError(f"count: wanted an integer of at least 1, got {count}")
    if str(spec).startswith("phantoms:"):
        n, _ = phantom_counts(str(spec))
        n = min(n, count or n)
        learnt = PhantomSource(train_count, "train", size) if train_count else None
        return Sets(PhantomSource(n, "test", size), learnt)
    notices: list[str] = []
    left_out: list[str] = []
    rows = _usable(read_rows(Path(spec)), Path(spec), notices, left_out)
    split = next((s for s in ("test", "valid") if any(row.split == s for row in rows)), "")
    chosen = [row for row in rows if row.split == split][:count]
    if not chosen:
        chosen = rows[:count] if split == "" else chosen
    train = [row for row in rows if row.split == "train" and split]
    known = train[:train_count]
    if skip_bad:
        chosen, known = (_readable(some, size, notices, left_out) for some in (chosen, known))
    check_files([*chosen, *known], size, notices)
    told = Volumes(known, size) if known else None
    return Sets(Volumes(chosen, size), told, notices, split, left_out, len(train))


def open_volumes(folder: str | Path, size: Size | None = None, count: int | None = None) -> Volumes:
    """All volumes in a folder, or the first `count`, made by whatever system: with manifest.csv, with CT-RATE's tables
    (reports, labels or both), or NIfTI files alone.

    size: default: that of most of them. Errors and checks as in `open_sets`, but volumes need no reports.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"volumes: wanted a folder, got {str(folder)!r}, which is none")
    notices: list[str] = []
    try:
        rows = _usable(read_rows(root), root, notices, [], texts=False)
    except FileNotFoundError:
        files = sorted(_nifti(root))
        if not files:
            raise ValueError(f"volumes: wanted NIfTI files, got none in {folder}") from None
        labels = labels_by_name(files_below(root))
        rows = [Row(Entry(str(path.relative_to(root)), (), labels.get(path.name)), path, "") for path in files]
    rows = rows[:count]
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
    told = f"{_counted(shapes, 'x', 'sizes')}, {_counted(spacings, ' x ', 'spacings')}"
    if set(shapes) != {wanted}:
        _notice(notices, f"{told}: all are stretched to {'x'.join(map(str, wanted))} voxels, whatever they cover")
    elif len(spacings) > 1:
        _notice(notices, f"{told}: as many voxels for all, which cover more or less of a patient")
    few = Volumes([rows[i] for i in sorted({int(i) for i in np.linspace(0, len(rows) - 1, LOOKED_AT)})], wanted)
    for k in range(len(few)):
        few.read(k)
    return wanted


def matched(test: Source, made: Volumes) -> tuple[list[int], list[int], str | None]:
    """Indices of the unseen volumes and of those another system made from their reports: by path, else by file name;
    what is left over, in words. ValueError where no name occurs in both, or a file name more than once in either."""
    paths = {entry.name: i for i, entry in enumerate(made.entries)}
    names: dict[str, list[int]] = {}
    for i, entry in enumerate(made.entries):
        names.setdefault(Path(entry.name).name, []).append(i)
    pairs, of = [], dict[int, str]()
    for i, entry in enumerate(test.entries):
        found = [paths[entry.name]] if entry.name in paths else names.get(Path(entry.name).name, [])
        if len(found) > 1 or (found and found[0] in of):
            other = made.entries[found[1]].name if len(found) > 1 else of[found[0]]
            raise ValueError(
                f"model: wanted one volume for each report, by path or by file name, got "
                f"{made.entries[found[0]].name!r} for {entry.name!r} beside {other!r}"
            )
        if found:
            of[found[0]] = entry.name
            pairs.append((i, found[0]))
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


def _usable(
    rows: Sequence[Row], root: Path, notices: list[str], left_out: list[str], texts: bool = True
) -> list[Row]:  # fmt: skip
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
            left_out += [f"{name}: {told}" for name in names]
    good = [row for row in there if not texts or row.entry.texts]
    if not good:
        raise ValueError(f"data: wanted volumes with reports, got none of {len(rows)} in {root}")
    return good


def _readable(rows: Sequence[Row], size: Size, notices: list[str], left_out: list[str]) -> list[Row]:
    """Rows whose volumes can be read and are in HU; the others are listed."""
    bad, source = {}, Volumes(rows, size)
    for i in tqdm(range(len(rows)), "reading", unit="volume", disable=None):
        try:
            source.read(i)
        except BadVolume as error:
            bad[i] = " ".join(str(error).split())
    if bad:
        _notice(notices, f"{len(bad)} volumes that cannot be used are left out: {listed(bad.values())}")
        left_out += [f"{rows[i].entry.name}: {told}" for i, told in bad.items()]
    return [row for i, row in enumerate(rows) if i not in bad]


def _nifti(root: Path) -> list[Path]:
    found = [path for path in root.rglob("*") if path.name.lower().endswith(NIFTI_SUFFIXES)]
    no_volume = (".", "mask", "parts.nii", "findings.nii")  # as `t2ct phantom` writes beside its volume
    return [path for path in found if path.is_file() and not path.name.startswith(no_volume)]


def _notice(notices: list[str], text: str) -> None:
    notices.append(text)
    warnings.warn(f"data: {text}", stacklevel=2)


def _counted(found: Counter, between: str, what: str) -> str:
    first = between.join(f"{v:g}" for v in found.most_common(1)[0][0])
    return first if len(found) == 1 else f"{len(found)} {what} (most often {first})"
