"""Token ids without a warning for every report that is cut: one at the start says how many."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from itertools import islice

import torch

from t2ct.text import Tokenizer

LOOKED_AT = 2000  # reports


def token_ids(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> torch.Tensor:
    """(B, L) ids; texts that are longer are cut silently."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tokenizer.encode(texts, max_length)


def warn_of_cuts(tokenizer: Tokenizer, texts: Iterable[str], max_length: int) -> None:
    """One warning where reports are longer than the text tower reads."""
    looked = list(islice(texts, LOOKED_AT))
    ends = tokenizer.encode(looked, 1 << 20) == tokenizer.end_id if looked else torch.ones(0, 1)
    cut = int((ends.int().argmax(1) + 1 > max_length).sum()) if looked else 0
    if cut:
        warnings.warn(f"{cut} of {len(looked)} reports are longer than {max_length} tokens and are cut", stacklevel=2)
