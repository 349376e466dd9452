"""The one codec: what `protocol` calls a message, as a small JSON head and flat arrays, and back.

Engines and sockets carry parcels and know nothing of what is in them. Groups travel in slabs, consecutive groups in
one array, since an engine spends about as long on a small array as on a large one. bfloat16 and int8 stay what they
are. What arrives is not trusted: a parcel that is not exactly one message is a `MessageError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalign.protocol import (
    PROTOCOL,
    SHARED,
    Broadcast,
    Evaluation,
    Failure,
    Hello,
    Packed,
    ParameterGroup,
    Request,
    Start,
    Statistics,
    Update,
)
from fedalign.wire import BLOCK

Message = Hello | Start | Broadcast | Statistics | Request | Update | Evaluation | Failure
MESSAGES: dict[str, type[Any]] = {
    "hello": Hello,
    "start": Start,
    "broadcast": Broadcast,
    "statistics": Statistics,
    "request": Request,
    "update": Update,
    "evaluation": Evaluation,
    "failure": Failure,
}
SLAB = 1 << 25  # bytes that an array of groups holds at least, but for the last
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8)
} | {"uint8": torch.uint8, "bool": torch.bool}
SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "str | None": (str, type(None)),
    "float | None": (float, int, type(None)),
    "Literal['join', 'train', 'update', 'evaluate']": (str,),
    "Mapping[str, float]": (dict,),
}


class MessageError(Exception):
    """A parcel that cannot be read; the message says why."""


@dataclass(frozen=True)
class Parcel:
    """One message, ready to travel."""

    head: Mapping[str, Any]  # JSON: kind, protocol, scalars, and what the arrays are
    arrays: Mapping[str, tuple[Tensor, ...]]  # name -> the pieces whose bytes follow one another

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, without what an engine puts around them."""
        return len(self.text) + sum(piece.nbytes for pieces in self.arrays.values() for piece in pieces)

    @property
    def text(self) -> bytes:
        """The head as it travels."""
        return json.dumps(self.head, separators=(",", ":")).encode()


def encode(message: Message) -> Parcel:
    """Make a parcel of any message. Tensors are not copied."""
    kind = next(kind for kind, cls in MESSAGES.items() if type(message) is cls)
    head: dict[str, Any] = {"protocol": PROTOCOL, "kind": kind}
    arrays: dict[str, tuple[Tensor, ...]] = {}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if field.type == "Tensor":
            head[field.name] = _tensor(field.name, value, arrays)
        elif field.type == "Mapping[str, Tensor]":
            named = sorted(value.items())
            head[field.name] = {key: _tensor(f"{field.name}/{key}", tensor, arrays) for key, tensor in named}
        elif field.type == "Mapping[ParameterGroup, Packed]":
            head[field.name] = _slabs(field.name, value, arrays)
        elif field.type == "tuple[ParameterGroup, ...]":
            head[field.name] = [str(group) for group in value]
        else:
            head[field.name] = dict(value) if isinstance(value, Mapping) else value
    return Parcel(head, arrays)


def decode(parcel: Parcel, expected: type[Any] | tuple[type[Any], ...]) -> Any:
    """Read a message of one of the expected types; its tensors are views of the parcel's arrays.

    Raises:
        MessageError: Another protocol, another kind of message, or a field that is missing or not what it must be.
    """
    head = parcel.head
    if head.get("protocol") != PROTOCOL:
        raise MessageError(f"it speaks protocol {head.get('protocol')}, this is {PROTOCOL}: install the same version")
    cls = MESSAGES.get(str(head.get("kind")))
    if cls is None or not issubclass(cls, expected):
        raise MessageError(f"unexpected message {head.get('kind')!r}")
    try:
        return cls(**{field.name: _field(field, parcel) for field in dataclasses.fields(cls)})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise MessageError(f"a damaged {head['kind']}: {type(error).__name__}: {error}") from None


def parse_group(key: str) -> ParameterGroup:
    """The group of a name, which is its `str`.

    >>> parse_group("expert[3,5]")
    ParameterGroup(kind='expert', layer=3, expert=5)
    """
    if key == SHARED.kind:
        return SHARED
    kind, _, cell = key.rstrip("]").partition("[")
    layer, expert = cell.split(",")
    if kind not in ("gate", "expert"):
        raise ValueError(f"no parameter group {key!r}")
    return ParameterGroup("gate" if kind == "gate" else "expert", int(layer), int(expert))


def _field(field: dataclasses.Field[Any], parcel: Parcel) -> Any:
    about = parcel.head[field.name]
    if field.type == "Tensor":
        return _read_tensor(field.name, about, parcel)
    if field.type == "Mapping[str, Tensor]":
        return {key: _read_tensor(f"{field.name}/{key}", entry, parcel) for key, entry in about.items()}
    if field.type == "Mapping[ParameterGroup, Packed]":
        return dict(_read_slabs(field.name, about, parcel))
    if field.type == "tuple[ParameterGroup, ...]":
        return tuple(parse_group(key) for key in about)
    if not isinstance(about, SCALARS[str(field.type)]) or isinstance(about, bool):
        raise TypeError(f"{field.name} = {about!r:.100}: must be {field.type}")
    if isinstance(about, dict) and not all(isinstance(value, float | int) for value in about.values()):
        raise TypeError(f"{field.name}: must hold numbers")
    return about


def _tensor(name: str, tensor: Tensor, arrays: dict[str, tuple[Tensor, ...]]) -> list[Any]:
    arrays[name] = (tensor.contiguous().reshape(-1),)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _read_tensor(name: str, about: Sequence[Any], parcel: Parcel) -> Tensor:
    dtype, shape = about
    (flat,) = parcel.arrays[name]
    if flat.dtype != DTYPES[dtype]:
        raise TypeError(f"{name} is {flat.dtype}, announced as {dtype}")
    return flat.view(shape)


def _slabs(name: str, groups: Mapping[ParameterGroup, Packed], arrays: dict[str, tuple[Tensor, ...]]) -> Any:
    sizes = [len(packed.values) for packed in groups.values()]
    dtype = str(next(iter(groups.values())).values.dtype).removeprefix("torch.") if groups else "float32"
    scaled = any(packed.scale is not None for packed in groups.values())
    every = list(groups.values())
    for number, part in enumerate(_cut(sizes, dtype)):
        arrays[f"{name}.{number}"] = tuple(packed.values for packed in every[part])
        if scaled:
            arrays[f"{name}.{number}.scale"] = tuple(p.scale for p in every[part] if p.scale is not None)
    return {"dtype": dtype, "scaled": scaled, "groups": [str(group) for group in groups], "sizes": sizes}


def _read_slabs(name: str, about: Mapping[str, Any], parcel: Parcel) -> Iterator[tuple[ParameterGroup, Packed]]:
    sizes, keys = about["sizes"], about["groups"]
    if len(sizes) != len(keys) or not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"{name}: {len(keys)} groups, {len(sizes)} sizes")
    for number, part in enumerate(_cut(sizes, about["dtype"])):
        (values,) = parcel.arrays[f"{name}.{number}"]
        if values.dtype != DTYPES[about["dtype"]]:
            raise TypeError(f"{name} is {values.dtype}, announced as {about['dtype']}")
        pieces = torch.split(values, sizes[part])
        scales: Sequence[Tensor | None] = [None] * len(pieces)
        if about["scaled"]:
            (scale,) = parcel.arrays[f"{name}.{number}.scale"]
            scales = torch.split(scale, [math.ceil(size / BLOCK) for size in sizes[part]])
        for key, piece, piece_scale in zip(keys[part], pieces, scales, strict=True):
            yield parse_group(key), Packed(piece, piece_scale)


def _cut(sizes: Sequence[int], dtype: str) -> Iterator[slice]:
    """Slices of consecutive groups, each of SLAB bytes or more but for the last."""
    first, nbytes = 0, 0
    for index, size in enumerate(sizes):
        nbytes += size * DTYPES[dtype].itemsize
        if nbytes >= SLAB or index == len(sizes) - 1:
            yield slice(first, index + 1)
            first, nbytes = index + 1, 0
