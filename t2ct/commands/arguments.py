"""Argument types shared by the commands: each turns one word into a value or says what was wanted and what came."""

from __future__ import annotations

import math
from argparse import ArgumentParser, ArgumentTypeError

MODEL_FILES = ("vae", "unet", "clip", "tokenizer")


def seed(word: str) -> int:
    """An int from 0 to 2**63 - 1, what torch's and numpy's generators both take."""
    return _integer(word, 0, 2**63 - 1)


def steps(word: str) -> int:
    """A number of sampling steps."""
    return _integer(word, 1, 1000)


def workers(word: str) -> int:
    """A number of processes; 0: none beside the command's own."""
    return _integer(word, 0, 1024)


def voxels(word: str) -> int:
    """A positive multiple of 4: the VAE halves every axis twice."""
    value = _integer(word, 4, 2**15)
    if value % 4:
        raise ArgumentTypeError(f"wanted a multiple of 4, got {value}")
    return value


def guidance(word: str) -> float:
    """A finite guidance scale."""
    return _finite(word)


def share(word: str) -> float:
    """A number from 0 to 1."""
    value = _finite(word)
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"wanted a number from 0 to 1, got {word}")
    return value


def millimetres(word: str) -> float:
    """A positive, finite length in mm."""
    value = _finite(word)
    if value <= 0:
        raise ArgumentTypeError(f"wanted a length above 0 mm, got {word}")
    return value


def model(word: str) -> str | dict[str, str]:
    """A folder, or `vae=vae.pt,unet=unet.pt,…` as a dict of files."""
    if "=" not in word:
        return word
    files: dict[str, str] = {}
    for part in word.split(","):
        name, _, path = part.partition("=")
        if name not in MODEL_FILES or not path or name in files:
            wanted = ",".join(f"{key}=FILE" for key in MODEL_FILES)
            raise ArgumentTypeError(f"wanted a folder or {wanted}, got {part!r} in {word!r}")
        files[name] = path
    return files


def size(word: str) -> tuple[int, int, int]:
    """Voxels of a volume, "512x512x128"."""
    parts = word.lower().split("x")
    if len(parts) != 3:
        raise ArgumentTypeError(f"wanted voxels such as 512x512x128, got {word!r}")
    x, y, z = map(voxels, parts)
    return x, y, z


def add_memory(parser: ArgumentParser) -> None:
    """--memory and --spool: what decoding may take, and where it may keep the rest."""
    parser.add_argument("--memory", metavar="SIZE", help="for the VAE, such as 6GB: default: what is free")
    parser.add_argument("--spool", metavar="DIR", help="folder for files of what does not fit; default: computed again")


def _integer(word: str, lowest: int, highest: int) -> int:
    try:
        value = int(word)
    except ValueError:
        value = lowest - 1
    if not lowest <= value <= highest:
        raise ArgumentTypeError(f"wanted an integer from {lowest} to {highest}, got {word!r}")
    return value


def _finite(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ArgumentTypeError(f"wanted a finite number, got {word!r}")
    return value
