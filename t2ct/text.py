"""Prompts and tokens: how a report becomes the text that the networks were trained on, and its token ids."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers
    import torch

START = "<|startoftext|>"
END = "<|endoftext|>"
PARTS = ("findings", "impression")
_QUOTE_LIMIT = 200  # characters of a cut text that the warning repeats in full


def form_prompt(text: str | Mapping[str, Any]) -> str:
    """The prompt of a report, in the form used in training: "Findings: … Impression: …".

    text is a str, taken as it is, or a mapping with any of the keys "findings" and "impression", whose missing parts
    (absent, None, NaN, blank, "nan") are left out. Runs of white space, newlines included, become one space.
    Raises TypeError on other types, ValueError on unknown keys and for lone surrogates and where no text remains.
    """
    if isinstance(text, str):
        prompt = " ".join(text.split())
    elif isinstance(text, Mapping):
        unknown = [key for key in text if key not in PARTS]
        if unknown:
            raise ValueError(f"text: wanted the keys {' and '.join(PARTS)}, got {unknown[0]!r}")
        parts = {name: _part(name, text.get(name)) for name in PARTS}
        prompt = " ".join(f"{name.capitalize()}: {part}" for name, part in parts.items() if part)
    else:
        raise TypeError(f"text: wanted a str or a mapping of {' and '.join(PARTS)}, got {type(text).__name__}")
    if not prompt:
        raise ValueError(f"text: wanted a prompt of at least one word, got {text!r}")
    check_text("text", prompt)
    return prompt


def check_text(name: str, text: str) -> None:
    """ValueError for half of a surrogate pair, as bytes become that are no UTF-8: no tokenizer, no file takes it."""
    bad = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if bad is not None:
        raise ValueError(f"{name}: wanted characters, got the lone surrogate {bad!r} in {text!r:.80}")


def _part(name: str, value: Any) -> str:
    # A table's empty cell arrives as a NaN, which alone differs from itself, or as its text.
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise TypeError(f"text[{name!r}]: wanted a str, got {type(value).__name__}")
    value = " ".join(value.split())
    return "" if value.lower() == "nan" else value


class Tokenizer:
    """A byte-pair tokenizer whose last two ids are the start and the end of a text.

    Reads the tokenizer.json of openai/clip-vit-large-patch14 (ids 49406 and 49407) and those that `train` writes.
    The end has the highest id, so that argmax over a row finds its first end, as the text tower expects.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        size = tokenizer.get_vocab_size()
        got = (tokenizer.token_to_id(START), tokenizer.token_to_id(END))
        if got != (size - 2, size - 1):
            raise ValueError(f"tokenizer: wanted {START} and {END} as ids {size - 2} and {size - 1}, got {got}")
        # Length, start and end are `encode`'s own affair, whatever the file says.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A report that spells out a special token is text like any other.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.start_id, self.end_id = got

    @property
    def vocab_size(self) -> int:
        return self.end_id + 1

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Open a tokenizer.json. Raises FileNotFoundError, or ValueError where the file is not such a tokenizer."""
        from tokenizers import Tokenizer as Backend

        if not Path(path).is_file():
            raise FileNotFoundError(f"tokenizer: wanted a tokenizer.json, got no file at {path}")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: wanted a tokenizer.json, got {path}: {error}") from error
        return cls(backend)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, path: str | Path | None = None) -> Tokenizer:
        """Learn a lower-cased byte-level BPE of exactly vocab_size tokens from texts, and write it to path if given.

        vocab_size counts the 256 bytes and the two special tokens. Raises ValueError where the texts hold too few
        distinct pairs for it.
        """
        from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend

        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + 2:
            raise ValueError(f"vocab_size: wanted at least {len(alphabet) + 2}, got {vocab_size}")
        backend = Backend(models.BPE())
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        # The leading space makes the first word of a text the token that it is elsewhere.
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2, min_frequency=2, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        learned = backend.get_vocab_size() + 2
        if learned != vocab_size:
            raise ValueError(f"vocab_size: wanted {vocab_size}, got texts that give only {learned} tokens")
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (START, END)])
        if path is not None:
            backend.save(str(path))
        return cls(backend)

    def encode(self, texts: Sequence[str], max_length: int) -> torch.Tensor:
        """Token ids, int64 (B, L): start, text, end, then ends up to the longest row; L <= max_length.

        Texts of more than max_length tokens, start and end included, are cut there, the end staying last; one
        warning for the call says what was cut. Raises TypeError and ValueError.
        """
        import torch

        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"texts: wanted a list of str, got {type(texts).__name__} {texts!r:.80}")
        if not texts:
            raise ValueError("texts: wanted at least one text, got none")
        for text in texts:
            check_text("texts", text)
        if max_length < 3:
            raise ValueError(f"max_length: wanted at least 3 (start, one token, end), got {max_length}")
        room = max_length - 2
        rows, cut = [], []
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            rows.append([self.start_id, *encoding.ids[:room], self.end_id])
            if len(encoding.ids) > room:
                cut.append(_quote(text[encoding.offsets[room][0] :]))
        if cut:
            warnings.warn(
                f"{len(cut)} of {len(texts)} texts longer than {max_length} tokens; cut: {', '.join(cut)}", stacklevel=2
            )
        length = max(map(len, rows))
        return torch.tensor([row + [self.end_id] * (length - len(row)) for row in rows], dtype=torch.int64)

    def to_json(self) -> str:
        """The whole tokenizer as the text of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, special tokens left out, in the tokenizer's own (lower) case."""
        text = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text.replace("</w>", " ").strip()  # CLIP's vocabulary marks the ends of words


def _quote(text: str) -> str:
    text = text.strip()
    half = _QUOTE_LIMIT // 2
    return f'"{text}"' if len(text) <= _QUOTE_LIMIT else f'"{text[:half]} … {text[-half:]}"'
