"""What training reads: prepared folders, CT-RATE as it comes, phantoms."""

from t2ct.train.data.phantoms import VALID_COUNT, PhantomSource
from t2ct.train.data.source import BadVolume, Cached, Entry, Item, Source
from t2ct.train.data.tables import open_folder

MOST_PHANTOMS = 100_000  # t2ct.eval.listens measures on the seeds from there on

__all__ = [
    "BadVolume", "Cached", "Entry", "Item", "PhantomSource", "Source", "open_data", "open_folder", "phantom_count",
]  # fmt: skip


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
        return PhantomSource(phantom_count(spec), split, size, valid_count)
    return open_folder(spec, split, size, texts=texts, labels=labels, skip_bad=skip_bad, bad=bad)


def phantom_count(spec: str) -> int:
    """N of `phantoms:N`; ValueError."""
    word = spec.partition(":")[2]
    count = int(word) if word.isascii() and word.isdigit() and len(word) < 10 else 0
    if not 1 <= count <= MOST_PHANTOMS:
        raise ValueError(f"data: wanted phantoms:N with N from 1 to {MOST_PHANTOMS}, or a folder, got {spec!r:.100}")
    return count
