"""Safetensors files of known content, laid out before their values are there, and tensors that move into one."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

K = TypeVar("K")
CODES = {  # of all types that safetensors knows and torch has, in its order
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ABOUT = "__metadata__"
Range = tuple[int, int]  # of bytes: first, and behind the last


class Named(NamedTuple):
    """A tensor that a file has or will have."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def head(tensors: Iterable[Named], about: Mapping[str, str]) -> tuple[bytes, dict[str, Range]]:
    """The head of a file of these tensors, and where in the file the values of each lie.

    What has the largest elements comes first, so that each element lies where its type wants it.
    """
    every = list(tensors)
    at, offsets = 0, dict[str, Range]()
    for name, dtype, shape in sorted(every, key=lambda one: -one[1].itemsize):
        end = at + dtype.itemsize * math.prod(shape)
        offsets[name], at = (at, end), end
    table: dict[str, object] = {ABOUT: dict(about)} if about else {}
    for name, dtype, shape in every:
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": list(offsets[name])}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    found = len(text).to_bytes(8, "little") + text
    return found, {name: (len(found) + start, len(found) + stop) for name, (start, stop) in offsets.items()}


def unwritable(value: object) -> str | None:
    """The part of this that no file can hold as tensors by their names, or None.

    >>> unwritable({"a": torch.zeros(2)}), unwritable(None), unwritable({"a": 1.0})
    (None, 'a NoneType, and no tensors by their names', "'a', a float and no tensor")
    """
    if not isinstance(value, Mapping):
        return f"a {type(value).__name__}, and no tensors by their names"
    for name, one in value.items():
        if not isinstance(name, str):
            return f"{name!r:.60} as a name, which is no text"
        if not isinstance(one, Tensor):
            return f"{name!r:.60}, a {type(one).__name__} and no tensor"
        if one.layout != torch.strided or one.dtype not in CODES:
            return f"{name!r:.60}, a tensor of {one.dtype} and {one.layout}, which no file can hold"
    return None


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values, as safetensors wants them: each tensor's in one piece, and none of them another's as well.

    Parts of one tensor that do not overlap take no memory anew.
    """
    found, end = {name: tensor.contiguous() for name, tensor in tensors.items()}, 0
    for name, tensor in sorted(found.items(), key=lambda one: one[1].data_ptr()):
        start = tensor.data_ptr()
        if start < end:
            found[name] = tensor.clone()
        end = max(end, start + tensor.nbytes)
    return found


def in_order(tensors: Iterable[Named]) -> list[Named]:
    """In the order in which safetensors itself writes them: by type, then by name."""
    order = list(CODES)
    return sorted(tensors, key=lambda one: (order.index(one[1]), one[0]))


def create(file: Path, tensors: Iterable[Named], about: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """A new file of zeros; its tensors, mapped, by name: what is written to them is in the file.

    Raises:
        OSError: The disk has no room for it.
    """
    every = list(tensors)
    start, places = head(every, about or {})
    nbytes = max([len(start), *(stop for _, stop in places.values())])
    with file.open("w+b") as opened:
        opened.write(start)
        opened.flush()
        reserve(opened.fileno(), nbytes)
        whole = torch.frombuffer(mmap.mmap(opened.fileno(), nbytes), dtype=torch.uint8)
    return {name: whole[slice(*places[name])].view(dtype).view(shape) for name, dtype, shape in every}


def move(tensors: MutableMapping[K, Tensor], file: Path) -> None:
    """Write tensors to a new file, each under its key as text; the file's own, mapped, take their place.

    They do so one by one: what a tensor took elsewhere is free before the next is written.

    Raises:
        OSError: The disk has no room for it.
    """
    there = create(file, (Named(str(key), one.dtype, tuple(one.shape)) for key, one in tensors.items()))
    for key in tensors:
        tensors[key] = there.pop(str(key)).copy_(tensors[key])
    mine = load_file(file)  # whoever writes to these does not change the file
    for key in tensors:
        tensors[key] = mine[str(key)]


def reserve(file: int, nbytes: int) -> None:
    """Take the room on the disk now: where a page of a mapping cannot be had later, the process is killed."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
        return
    at, zeros = os.fstat(file).st_size, bytes(1 << 20)
    for start in range(at, nbytes, len(zeros)):
        os.pwrite(file, zeros[: nbytes - start], start)
