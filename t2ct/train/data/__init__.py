"""What training reads: prepared folders, CT-RATE as it comes, phantoms."""

from t2ct.train.data.phantoms import VALID_COUNT, PhantomSource
from t2ct.train.data.source import BadVolume, Cached, Entry, Item, Source
from t2ct.train.data.tables import open_folder

__all__ = ["BadVolume", "Cached", "Entry", "Item", "PhantomSource", "Source", "open_data", "open_folder"]


def open_data(
    spec: str, split: str, size: tuple[int, int, int], *, texts: bool = True, labels: bool = False,
    skip_bad: bool = False, bad: list[str] | None = None, valid_count: int = VALID_COUNT,
) -> Source:  # fmt: skip
    """The volumes of `split` ("train" or "valid") that `spec` names: `phantoms:N`, or a folder.

    size: voxels that every volume is brought to. texts, labels: are they needed? bad: a list that names what is
    skipped. valid_count: of phantoms, how many there are for validation at most.
    ValueError or FileNotFoundError say what is wrong before any volume is read.
    """
    if spec.startswith("phantoms:"):
        return PhantomSource(_count(spec), split, size, valid_count)
    return open_folder(spec, split, size, texts=texts, labels=labels, skip_bad=skip_bad, bad=bad)


def _count(spec: str) -> int:
    word = spec.partition(":")[2]
    if not word.isdigit() or int(word) < 1:
        raise ValueError(f"data: wanted phantoms:N with N of at least 1, or a folder, got {spec!r}")
    return int(word)
