"""What training reads: prepared folders, CT-RATE as it comes, phantoms."""

from t2ct.train.data.phantoms import VALID_COUNT, PhantomSource
from t2ct.train.data.source import BadVolume, Cached, Entry, Item, Source
from t2ct.train.data.tables import open_folder

MOST_PHANTOMS = 100_000  # t2ct.eval.listens measures on the seeds from there on

__all__ = [
    "BadVolume", "Cached", "Entry", "Item", "PhantomSource", "Source", "open_data", "open_folder", "phantom_counts",
]  # fmt: skip


def open_data(
    spec: str, split: str, size: tuple[int, int, int], *, texts: bool = True, labels: bool = False,
    skip_bad: bool = False, bad: list[str] | None = None, valid_count: int = VALID_COUNT,
) -> Source:  # fmt: skip
    """The volumes of `split` ("train" or "valid") that `spec` names: `phantoms:N`, `phantoms:NxK`, or a folder.

    size: voxels that every volume is brought to. texts, labels: are they needed? bad: a list that names what is
    skipped. valid_count: of phantoms, how many there are for validation at most.
    ValueError or FileNotFoundError say what is wrong before any volume is read.
    """
    if spec.startswith("phantoms:"):
        patients, times = phantom_counts(spec)
        return PhantomSource(patients, split, size, valid_count, times)
    return open_folder(spec, split, size, texts=texts, labels=labels, skip_bad=skip_bad, bad=bad)


def phantom_counts(spec: str) -> tuple[int, int]:
    """N patients, each K times, of `phantoms:NxK`; K is 1 where nothing is said. ValueError."""
    words = spec.partition(":")[2].split("x")
    numbers = [int(w) if w.isascii() and w.isdigit() and len(w) < 10 else 0 for w in (*words, "1")[:3]]
    if len(words) > 2 or not 1 <= numbers[0] * numbers[1] <= MOST_PHANTOMS:
        wanted = f"phantoms:N, or phantoms:NxK, of 1 to {MOST_PHANTOMS} in all, or a folder"
        raise ValueError(f"data: wanted {wanted}, got {spec!r:.100}")
    return numbers[0], numbers[1]
