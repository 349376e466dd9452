"""Safetensors files that are laid out first and filled later, and tensors that move into one."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedalign.maths.heap import Heap
from fedalign.maths.tensor_file import CODES, Named, apart, create, in_order, move, unwritable


def mapped_from(tensor: torch.Tensor) -> str:
    """The file that a tensor's values are mapped from; empty: none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, last = line.split(maxsplit=5)
        first, stop = (int(edge, 16) for edge in place.split("-"))
        if first <= tensor.data_ptr() < stop:
            return last
    return ""


def test_a_filled_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    values = {f"{kind}.{n}": torch.arange(n).to(kind).view(-1, n) for n, kind in enumerate(reversed(CODES), start=2)}
    values |= {"scalar": torch.tensor(2.5), "nothing": torch.empty(0), "a": torch.ones(3), "Z": torch.ones(1)}
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    places = create(
        tmp_path / "ours", in_order(Named(n, v.dtype, tuple(v.shape)) for n, v in values.items()), {"format": "pt"}
    )
    for name, place in places.items():
        place.copy_(values[name])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("mapped", [False, True])
def test_what_moves_into_a_file_is_read_from_there_and_gone_elsewhere(tmp_path: Path, mapped: bool) -> None:
    heap = Heap(tmp_path / "heap" if mapped else None)
    tensors = {name: heap.zeros(5, dtype).fill_(3) for name, dtype in {"b": torch.bfloat16, "a": torch.float32}.items()}
    tensors |= {"none": torch.empty(0)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    old = [weakref.ref(tensor) for tensor in tensors.values()]
    move(tensors, tmp_path / "file")
    assert not any(one() is not None for one in old)
    stored = load_file(tmp_path / "file")
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(stored[name], before[name])
    assert mapped_from(tensors["a"]) == str(tmp_path / "file")
    tensors["a"].zero_()
    assert bool((load_file(tmp_path / "file")["a"] == 3).all())


def test_one_tensor_at_a_time_is_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {number: torch.full((4,), float(number)) for number in range(5)}
    old, most = [weakref.ref(tensor) for tensor in tensors.values()], list[int]()
    copy = torch.Tensor.copy_

    def counted(to: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
        most.append(sum(one() is not None for one in old))
        return copy(to, of)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    move(tensors, tmp_path / "file")
    assert most == [5, 4, 3, 2, 1]


def test_what_shares_memory_can_be_saved(tmp_path: Path) -> None:
    flat = torch.arange(6.0)
    tensors = {"a": flat, "same": flat, "part": flat[2:4], "across": flat.view(2, 3).T}
    halves = dict(zip(("left", "right"), torch.arange(8.0).split(4), strict=True))
    before = {name: tensor.clone() for name, tensor in (tensors | halves).items()}
    assert all(apart(halves)[name] is half for name, half in halves.items())
    tensors |= halves
    save_file(apart(tensors), tmp_path / "file")
    stored = load_file(tmp_path / "file")
    assert all(torch.equal(stored[name], before[name]) for name in tensors)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ([torch.zeros(1)], "and no tensors by their names"),
        ({3: torch.zeros(1)}, "3 as a name, which is no text"),
        (
            {"a": torch.eye(2).to_sparse()},
            "'a', a tensor of torch.float32 and torch.sparse_coo, which no file can hold",
        ),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, "'a', a tensor of torch.complex128 and torch.strided"),
    ],
)
def test_what_no_file_can_hold_is_told(value: object, told: str) -> None:
    assert told in str(unwritable(value))
