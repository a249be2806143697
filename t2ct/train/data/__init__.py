"""What training reads: prepared folders, CT-RATE as it comes, phantoms."""

from t2ct.train.data.phantoms import PhantomSource
from t2ct.train.data.source import BadVolume, Cached, Entry, Item, Source
from t2ct.train.data.tables import open_folder

__all__ = ["BadVolume", "Cached", "Entry", "Item", "PhantomSource", "Source", "open_data", "open_folder"]


def open_data(
    spec: str, split: str, size: tuple[int, int, int], *, texts: bool = True, skip_bad: bool = False,
    bad: list[str] | None = None,
) -> Source:  # fmt: skip
    """The volumes of `split` ("train" or "valid") that `spec` names: `phantoms:N`, or a folder.

    size: voxels that every volume is brought to. texts: reports are needed. bad: a list that names what is skipped.
    ValueError or FileNotFoundError say what is wrong before any volume is read.
    """
    if spec.startswith("phantoms:"):
        return PhantomSource(_count(spec), split, size)
    return open_folder(spec, split, size, texts=texts, skip_bad=skip_bad, bad=bad)


def _count(spec: str) -> int:
    word = spec.partition(":")[2]
    if not word.isdigit() or int(word) < 1:
        raise ValueError(f"data: wanted phantoms:N with N of at least 1, or a folder, got {spec!r}")
    return int(word)
