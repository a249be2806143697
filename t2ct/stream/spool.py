"""Where tensors lie that are not in the device's memory: a file beside a CPU, pinned memory beside a GPU."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


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
            self.file.close()
            raise OSError(error.errno, f"{folder}: no room for a spool of {planes * self.plane:,} bytes") from None

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


def check_folder(folder: str | Path | None) -> Path | None:
    """The folder for spool files, or None. ValueError where it is no folder that can be written to."""
    if folder is None:
        return None
    path = Path(folder)
    if not path.is_dir() or not os.access(path, os.W_OK):
        raise ValueError(f"spool_dir: wanted a folder that can be written to, got {str(folder)!r}")
    return path
