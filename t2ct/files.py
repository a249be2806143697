"""Files that appear whole or not at all.

Every file is first written beside its final place and synced, then renamed onto it, which a POSIX file system does in
one step. A crash, a full disk or Ctrl-C on the way leaves whatever was there before.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


def check_outputs(paths: Iterable[PathLike], *, overwrite: bool = True) -> None:
    """Raise now if one of the files `paths` could not be written later: call it before long work.

    Raises FileNotFoundError (no such folder), IsADirectoryError, PermissionError or OSError (folder not writable),
    FileExistsError.
    """
    for path in map(Path, paths):
        folder = path.parent
        if not folder.is_dir():
            raise FileNotFoundError(f"output {path}: wanted an existing folder, got {folder}, which is none")
        if path.is_dir():
            raise IsADirectoryError(f"output {path}: wanted a file, got a folder")
        if path.exists() and not overwrite:
            raise FileExistsError(
                f"output {path}: wanted a new file, got one that exists (--overwrite or overwrite=True replaces it)"
            )
        _try_to_write(folder)


def check_output_folder(folder: PathLike) -> None:
    """Raise now if `folder` could not be made or written into later. Makes nothing."""
    path = Path(folder)
    if not os.fspath(folder):  # which would be the folder that one happens to be in
        raise ValueError("output: wanted a folder, got ''")
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"output {path}: wanted a folder, got a file")
    while not path.exists():
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(f"output {folder}: wanted a folder, but {path} is a file")
    _try_to_write(path)


def write_files(contents: Mapping[Any, bytes]) -> None:
    """Write all `contents` (path → bytes), replacing what exists. Nothing is renamed before everything is on disk.

    Raises OSError (folder missing, disk full, …); then, and on Ctrl-C, no new file is left behind.
    """
    waiting: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            # A short name of its own, not the target's plus a suffix: that could exceed the longest name allowed.
            handle, temporary = tempfile.mkstemp(prefix=".t2ct-", suffix=".part", dir=Path(path).parent)
            waiting[Path(path)] = Path(temporary)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp makes files private; these are ordinary ones
        for path, part in waiting.items():
            os.replace(part, path)
    finally:
        for part in waiting.values():
            part.unlink(missing_ok=True)


def _try_to_write(folder: Path) -> None:
    # Asking os.access is not enough: it says yes to root on a read-only file system and knows nothing of quotas or
    # network mounts.
    try:
        with tempfile.TemporaryFile(prefix=".t2ct-", dir=folder):
            pass
    except OSError as error:
        raise type(error)(
            f"output folder {folder}: wanted one that can be written to, got {error.strerror or error}"
        ) from error


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
