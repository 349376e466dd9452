"""Where the server's large tensors lie: in memory or, where they are too large for it, in mapped files.

What is mapped is read and written like any tensor; the operating system keeps in memory what it has room for. The files
have no name: whatever ends the process, the disk has their room again.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fedalign.maths.tensor_file import reserve

SLAB = 1 << 28  # bytes of a file at least
ALIGNED = 64  # bytes


class Heap:
    """Makes tensors for one party of a run.

    Args:
        folder: where the unnamed files lie; None: in memory, as `torch.zeros` makes them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._file = memoryview(b"")  # the last one
        self._used = 0  # bytes of it

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
        if self._used + nbytes > len(self._file):
            self._file, self._used = _mapped(self.folder, max(SLAB, nbytes)), 0
        start, self._used = self._used, self._used + nbytes + -nbytes % ALIGNED
        # a storage of its own: transformers copies tensors that share one before it saves them
        return torch.frombuffer(self._file, dtype=dtype, count=size, offset=start)

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values in this heap; in memory the tensor itself.

        Raises:
            OSError: The disk has no room for it.
        """
        return self.copy(tensor) if self.is_mapped else tensor

    def copy(self, tensor: Tensor) -> Tensor:
        """The same values in a tensor of their own.

        Raises:
            OSError: The disk has no room for it.
        """
        if not self.is_mapped:
            return tensor.clone()
        return self.zeros(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


def _mapped(folder: Path, nbytes: int) -> memoryview:
    """A new file without a name; it is gone once no tensor looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file.fileno(), nbytes)
        return memoryview(mmap.mmap(file.fileno(), nbytes))
