"""Where tensors lie that are not in the device's memory: a file beside a CPU, pinned memory beside a GPU."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_CLAIM = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FileSpool:
    """`count` planes of `plane` numbers in a file that has no name: it is gone when it is closed, or its process is.

    The whole of it is claimed from the disk at once, so that a full disk shows before the work. Raises OSError then.
    """

    def __init__(self, folder: str | Path, planes: int, shape: tuple[int, int, int], dtype: torch.dtype):
        self.plane = shape[0] * shape[1] * shape[2] * dtype.itemsize
        self.file = tempfile.TemporaryFile(dir=folder, prefix="t2ct-spool-")  # noqa: SIM115  it lives as long as its node
        try:
            os.posix_fallocate(self.file.fileno(), 0, planes * self.plane)
        except OSError as error:
            if error.errno in NO_CLAIM:  # a file system that cannot: it shows when the planes are written
                return
            self.file.close()
            if error.errno in FULL:
                raise OSError(error.errno, f"{folder}: no room for a spool of {planes * self.plane:,} bytes") from None
            raise

    def write(self, start: int, tile: Tensor) -> None:
        """Planes from `start` on; tile (X, Y, Z, C), contiguous."""
        self._move(os.pwrite, start, tile)

    def read(self, start: int, into: Tensor) -> None:
        """Planes from `start` on, as many as `into` has."""
        self._move(lambda fd, part, at: os.preadv(fd, [part], at), start, into)

    def _move(self, call, start: int, tile: Tensor) -> None:
        data = memoryview(tile.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(data):
            count = call(self.file.fileno(), data[done:], start * self.plane + done)
            if not count:
                raise OSError(f"the spool ends at {start * self.plane + done} bytes")
            done += count

    def wait(self) -> None:
        """Writes of a file are done when they return."""

    def close(self) -> None:
        self.file.close()


class PinnedSpool:
    """The same in pinned memory of the host, written on a stream of its own beside the computation. It has not run on a
    GPU yet."""

    def __init__(self, device: torch.device, planes: int, shape: tuple[int, int, int], dtype: torch.dtype):
        self.host = torch.empty(planes, *shape, dtype=dtype, pin_memory=True)
        self.stream = torch.cuda.Stream(device)

    def write(self, start: int, tile: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(tile.device))
        with torch.cuda.stream(self.stream):
            self.host[start : start + len(tile)].copy_(tile, non_blocking=True)
        tile.record_stream(self.stream)

    def read(self, start: int, into: Tensor) -> None:
        into.copy_(self.host[start : start + len(into)], non_blocking=True)

    def wait(self) -> None:
        """Reads that follow see what was written."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def close(self) -> None:
        self.stream.synchronize()
        del self.host


def check_room(folder: str | Path, wanted: int) -> None:
    """OSError where the disk of `folder` has not `wanted` bytes free: before the work, not in the middle of it."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        told = f"{folder}: no room for a spool of {wanted:,} bytes, {free:,} are free"
        raise OSError(errno.ENOSPC, told)


def check_folder(folder: str | Path | None) -> Path | None:
    """The folder for spool files, or None. ValueError where it is no folder that can be written to."""
    if folder is None:
        return None
    path = Path(folder)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"spool_dir: wanted a folder that can be written to, got {str(folder)!r}")
    return path
