"""Tensors in memory and in mapped files."""

import errno
import os
from pathlib import Path

import pytest
import torch

from fedalign.maths import heap as heaps
from fedalign.maths.heap import Heap


def test_a_mapped_tensor_is_like_any_other(tmp_path: Path) -> None:
    heap = Heap(tmp_path / "new")
    first, second = heap.zeros(1001), heap.zeros(7, torch.int8)
    assert not first.any()
    assert not second.any()
    first += torch.arange(1001)
    second.fill_(3)
    kept = heap.keep(first)
    assert kept.data_ptr() != first.data_ptr()
    first.zero_()
    assert torch.equal(kept, torch.arange(1001).float())
    assert second.tolist() == [3] * 7
    assert heap.zeros(0).shape == (0,)
    assert not list((tmp_path / "new").iterdir())  # its files have no name


def test_tensors_that_are_larger_than_a_file_get_one_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heaps, "SLAB", 1 << 12)
    heap = Heap(tmp_path)
    tensors = [heap.zeros(size).fill_(size) for size in (100, 5000, 900, 200, 1)]
    assert all(bool((tensor == len(tensor)).all()) for tensor in tensors)


def test_in_memory_nothing_is_copied_that_need_not_be() -> None:
    heap, tensor = Heap(), torch.ones(5)
    assert heap.keep(tensor) is tensor
    assert heap.copy(tensor).data_ptr() != tensor.data_ptr()
    assert not heap.is_mapped


def test_a_full_disk_is_an_error_and_not_a_killed_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space"):
        Heap(tmp_path).zeros(5)
