"""A folder of CTs with their reports: prepared with a manifest.csv, or CT-RATE with the CSVs it comes with."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from t2ct.data.phantoms import LABELS
from t2ct.text import form_prompt
from t2ct.train.data.source import BadVolume, Entry, Item, check_hu, fit

SPLITS = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test",
}  # fmt: skip
VALID_EVERY = 20  # without a split of its own, one volume in so many is kept for validation
SHOWN = 5  # of the volumes that an error counts


@dataclass(frozen=True)
class Row:
    """One volume of a table."""

    entry: Entry
    path: Path
    split: str


class FolderSource:
    """Volumes in NIfTI files, reoriented to RAS, clipped and stretched to `size`."""

    def __init__(self, rows: Sequence[Row], size: tuple[int, int, int]):
        self.entries: Sequence[Entry] = [row.entry for row in rows]
        self.size, self.paths = size, [row.path for row in rows]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Item:
        from t2ct.data.io import load_volume

        path = self.paths[index]
        try:
            volume = load_volume(path)
        except (OSError, ValueError) as error:
            raise BadVolume(str(error)) from error
        self.look(volume.hu, path)
        hu, spacing = fit(volume.hu, volume.spacing, self.size)
        return Item(hu, tuple(float(mm) for mm in spacing))  # type: ignore[arg-type]

    def look(self, hu: np.ndarray, path: Path) -> None:
        """Say what speaks against a volume being in HU; training goes on with a warning."""
        check_hu(hu, path.name)


def open_folder(
    folder: str | Path, split: str, size: tuple[int, int, int], *, texts: bool = True, labels: bool = False,
    skip_bad: bool = False, bad: list[str] | None = None,
) -> FolderSource:  # fmt: skip
    """The volumes of `split` in a folder with manifest.csv, or shaped as CT-RATE.

    manifest.csv: volume (a path inside the folder, which may be a link), report or findings and impression, optionally
    labels (18 zeros or ones; or 18 columns named as `LABELS`, in any order) and split (train, valid, test). CT-RATE:
    *_reports.csv with VolumeName, Findings_EN, Impressions_EN and perhaps *_labels.csv; the volumes anywhere below;
    files named train… are for training, valid… for validation.
    Missing volumes, and missing reports or labels where they are needed, are counted and named in one error, or left
    out and added to `bad`.
    """
    rows = read_rows(folder)
    problems = {}
    for row in rows:
        if not row.path.is_file():
            problems[row.entry.name] = "no such file"
        elif texts and not row.entry.texts:
            problems[row.entry.name] = "no report"
        elif labels and row.entry.labels is None:
            problems[row.entry.name] = "no labels"
    if problems:
        named = "; ".join(f"{name}: {why}" for name, why in list(problems.items())[:SHOWN])
        what = f"data: {len(problems)} of {len(rows)} volumes cannot be used: {named}"
        if not skip_bad:
            raise ValueError(f"{what} (--skip-bad leaves them out)")
        warnings.warn(what, stacklevel=2)
        if bad is not None:
            bad += [f"{name},{why}" for name, why in problems.items()]
    good = [row for row in rows if row.entry.name not in problems]
    if all(row.split == "" for row in good):
        good = [Row(r.entry, r.path, "train" if (i + 1) % VALID_EVERY else "valid") for i, r in enumerate(good)]
    chosen = [row for row in good if row.split == split]
    if not chosen and split == "train":
        raise ValueError(f"data: wanted at least one volume to train on, got none of {len(rows)} in {folder}")
    return FolderSource(chosen, size)


def read_rows(folder: str | Path) -> list[Row]:
    """All volumes that the tables of a folder name, whether they are there or not. Errors as of `open_folder`."""
    root = Path(folder)
    if not str(folder) or not root.is_dir():
        raise FileNotFoundError(f"data: wanted a folder or phantoms:N, got {str(folder)!r}, which is no folder")
    manifest = root / "manifest.csv"
    return list(_manifest(root, manifest) if manifest.is_file() else _ct_rate(root))


def _table(path: Path, wanted: Iterable[str] = ()) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file, each with where it stands; a cell that a short row lacks is empty."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            names = reader.fieldnames or []
            lines = ((reader.line_num, row) for row in reader)
            rows = [(f"{path.name} line {n}", {k: v or "" for k, v in row.items() if k}) for n, row in lines]
        except (csv.Error, UnicodeDecodeError) as error:  # an open quote, bytes that are no UTF-8
            raise ValueError(f"{path}: wanted a CSV table in UTF-8, got one that does not read ({error})") from error
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"{path}: wanted a column {missing[0]!r}, got {', '.join(names)}")
        return rows


def _manifest(root: Path, path: Path) -> Iterable[Row]:
    seen: dict[str, str] = {}
    lines = _table(path, ("volume",))
    named = [label for label in LABELS if lines and label in lines[0][1]]
    if named and len(named) < len(LABELS):
        absent = next(label for label in LABELS if label not in named)
        raise ValueError(f"{path}: wanted a column for each of {len(LABELS)} labels, got none for {absent!r}")
    for where, line in lines:
        name = line["volume"].strip()
        # As it is written: a link in the folder may lead anywhere, since scans are seldom copied.
        file = Path(os.path.abspath(root / name))
        if not name or not file.is_relative_to(os.path.abspath(root)):
            raise ValueError(f"{where}: wanted a volume inside {root}, got {name!r}")
        _refuse_twice(str(file), name, where, seen)
        split = (line.get("split") or "").strip().lower()
        if split and split not in SPLITS:
            raise ValueError(f"{where}: wanted a split of {', '.join(SPLITS)}, got {split!r}")
        parts = {"findings": line.get("findings"), "impression": line.get("impression")}
        text = _prompt(line.get("report")) or _prompt(parts)
        labels = ";".join(line[label] for label in named) if named else line.get("labels")
        yield Row(Entry(name, text, _labels(labels, where)), file, SPLITS.get(split, ""))


def _ct_rate(root: Path) -> Iterable[Row]:
    below = files_below(root)
    files = {path.name: path for path in below if path.name.endswith(".nii.gz")}
    reports = [path for path in below if fnmatch(path.name, "*report*.csv")]
    if not reports:
        raise FileNotFoundError(f"data: wanted manifest.csv or CT-RATE's *_reports.csv, got neither in {root}")
    labels = labels_by_name(below)
    seen: dict[str, str] = {}
    for path in reports:
        stem = path.name.lower()
        split = "train" if stem.startswith("train") else "valid" if stem.startswith("valid") else ""
        for where, line in _table(path, ("VolumeName", "Findings_EN", "Impressions_EN")):
            name = line["VolumeName"].strip()
            if not name or Path(name).name != name:
                raise ValueError(f"{where}: wanted the name of a file as VolumeName, got {name!r}")
            _refuse_twice(name, name, where, seen)
            text = _prompt({"findings": line["Findings_EN"], "impression": line["Impressions_EN"]})
            yield Row(Entry(name, text, labels.get(name)), files.get(name, root / name), split)


def labels_by_name(files: Iterable[Path]) -> dict[str, tuple[int, ...] | None]:
    """Labels of volumes by their file's name, from the tables *label*.csv among `files`."""
    labels: dict[str, tuple[int, ...] | None] = {}
    for path in (path for path in files if fnmatch(path.name, "*label*.csv")):
        for where, line in _table(path, ("VolumeName", *LABELS)):
            labels[line["VolumeName"].strip()] = _labels(";".join(line[label] for label in LABELS), where)
    return labels


def _refuse_twice(key: str, name: str, where: str, seen: dict[str, str]) -> None:
    """ValueError where this volume has a row already."""
    if key in seen:
        raise ValueError(f"{where}: wanted a row for each volume, got {name!r} twice, first in {seen[key]}")
    seen[key] = where


def files_below(root: Path) -> list[Path]:
    """Every file below, sorted, also behind links to folders, which rglob passes by."""
    found, known = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in known:  # a link to a folder that was seen: perhaps to one above it, without end
            folders.clear()
            continue
        known.add(real)
        found += [Path(folder, name) for name in names]
    return sorted(found)


def _prompt(text: str | dict[str, str | None] | None) -> tuple[str, ...]:
    """The prompt of a report as a tuple of one, or of none where nothing is said; never "nan"."""
    if text is None or (isinstance(text, str) and text.strip().lower() == "nan"):
        return ()
    try:
        return (form_prompt(text),)
    except ValueError:
        return ()


def _labels(words: str | None, where: str) -> tuple[int, ...] | None:
    if not words or not words.strip():
        return None
    parts = words.replace(",", ";").replace(" ", ";").split(";")
    values = [part.strip().removesuffix(".0") for part in parts if part.strip()]
    if len(values) != len(LABELS) or not set(values) <= {"0", "1"}:
        raise ValueError(f"{where}: wanted {len(LABELS)} labels of 0 or 1, got {len(values)}: {words!r:.60}")
    return tuple(map(int, values))
