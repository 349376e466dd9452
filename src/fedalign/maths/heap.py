"""Where the server's large tensors lie: in memory or, where they are too large for it, in mapped files.

What is mapped is read and written like any tensor; the operating system keeps in memory what it has room for. The files
have no name: whatever ends the process, the disk has their room again.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SLAB = 1 << 28  # bytes of a file at least
ALIGNED = 64  # bytes


class Heap:
    """Makes tensors for one party of a run.

    Args:
        folder: where the unnamed files lie; None: in memory, as `torch.zeros` makes them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._rest = torch.empty(0, dtype=torch.uint8)  # of the last file

    @property
    def is_mapped(self) -> bool:
        """Whether its tensors lie in files."""
        return self.folder is not None

    def zeros(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor [size] of zeros.

        Raises:
            OSError: The disk has no room for it.
        """
        if self.folder is None or not size:
            return torch.zeros(size, dtype=dtype)
        nbytes = size * dtype.itemsize
        if nbytes > len(self._rest):
            self._rest = _mapped(self.folder, max(SLAB, nbytes))
        part, self._rest = self._rest[:nbytes], self._rest[nbytes + -nbytes % ALIGNED :]
        return part.view(dtype)

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values [N] in this heap; in memory the tensor itself.

        Raises:
            OSError: The disk has no room for it.
        """
        return self.copy(tensor) if self.is_mapped else tensor

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values [N] in a tensor of their own.

        Raises:
            OSError: The disk has no room for it.
        """
        return self.zeros(len(tensor), tensor.dtype).copy_(tensor) if self.is_mapped else tensor.clone()


def _mapped(folder: Path, nbytes: int) -> Tensor:
    """Bytes of a new file without a name; the file is gone once no tensor looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        _reserve(file.fileno(), nbytes)
        return torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8)


def _reserve(file: int, nbytes: int) -> None:
    """Take the room on the disk now: where a page of a mapping cannot be had later, the process is killed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
        return
    zeros = bytes(1 << 20)
    for start in range(0, nbytes, len(zeros)):
        os.write(file, zeros[: nbytes - start])
