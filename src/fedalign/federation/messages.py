"""The one codec: what `protocol` calls a message, as a small JSON head and flat arrays, and back.

Engines and sockets carry parcels and know nothing of what is in them. Groups travel in slabs, consecutive groups in
one array, since an engine spends about as long on a small array as on a large one. bfloat16 and int8 stay what they
are. What arrives is not trusted: a parcel that is not exactly one message is a `MessageError`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from fedalign.maths.rounding import SCALED, TORCH_DTYPE
from fedalign.protocol import (
    PROTOCOL,
    Broadcast,
    Concealed,
    Evaluation,
    Failure,
    Fetch,
    Hello,
    Lacking,
    Offer,
    Packed,
    ParameterGroup,
    Piece,
    Recount,
    Stage,
    Start,
    Statistics,
    Sum,
    is_name,
    parse_group,
)
from fedalign.units import shown

Message = (
    Hello
    | Start
    | Offer
    | Lacking
    | Piece
    | Broadcast
    | Statistics
    | Fetch
    | Evaluation
    | Failure
    | Recount
    | Sum
    | Concealed
)
MESSAGES: dict[str, type[Any]] = {
    "hello": Hello,
    "start": Start,
    "offer": Offer,
    "lacking": Lacking,
    "piece": Piece,
    "broadcast": Broadcast,
    "statistics": Statistics,
    "fetch": Fetch,
    "evaluation": Evaluation,
    "failure": Failure,
    "recount": Recount,
    "sum": Sum,
    "concealed": Concealed,
}
SLAB = 1 << 25  # bytes that an array of groups holds at least, but for the last
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, *INTEGERS, torch.bool)}
WIRE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPE.values()}
Arrays = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Verb:
    """Something that a client can be asked for."""

    stage: Stage  # of a round, where a client is missing that does not answer
    needs_model: bool


VERBS: Mapping[str, Verb] = {
    "hello": Verb("join", needs_model=True),
    "start": Verb("join", needs_model=True),
    "offer": Verb("train", needs_model=False),
    "piece": Verb("train", needs_model=False),
    "train": Verb("train", needs_model=True),
    "count": Verb("train", needs_model=False),
    "conceal": Verb("update", needs_model=False),
    "update": Verb("update", needs_model=False),
    "evaluate": Verb("evaluate", needs_model=True),
    "finish": Verb("join", needs_model=False),
}


def stage_of(verb: str) -> Stage:
    """Where a client is missing that does not answer this, whatever was asked for."""
    return VERBS[verb].stage if verb in VERBS else "join"


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

    @property
    def filled(self) -> tuple[str, ...]:
        """The names of its fields that hold something, sorted; its kind and protocol are none."""
        empty = [name for name, pieces in self.arrays.items() if not any(piece.nbytes for piece in pieces)]
        names = [name for name, value in self.head.items() if value not in (None, "", [], {})]
        return tuple(sorted({*names} - {"protocol", "kind", *empty}))


def encode(message: Message) -> Parcel:
    """Make a parcel of any message. Tensors are not copied."""
    kind = next(kind for kind, cls in MESSAGES.items() if type(message) is cls)
    head: dict[str, Any] = {"protocol": PROTOCOL, "kind": kind}
    arrays: Arrays = {}
    for name, kind_of_field in FIELDS[type(message)].items():
        write = ARRAYS[kind_of_field][0] if kind_of_field in ARRAYS else _scalar
        head[name] = write(name, getattr(message, name), arrays)
    return Parcel(head, arrays)


def fields_of(message: type[Any]) -> dict[str, Any]:
    """The names and types of the fields of a message's class."""
    types = get_type_hints(message, localns={"Tensor": Tensor})  # `protocol` does not import torch
    return {field.name: types[field.name] for field in dataclasses.fields(message)}


FIELDS = {cls: fields_of(cls) for cls in MESSAGES.values()}


def decode(parcel: Parcel, expected: type[Any] | tuple[type[Any], ...]) -> Any:
    """Read a message of one of the expected types; its tensors are views of the parcel's arrays.

    Raises:
        MessageError: Another protocol, another kind of message, or a field that is missing or not what it must be.
    """
    head, arrays = parcel.head, dict(parcel.arrays)
    if _protocol(head) != PROTOCOL:
        raise MessageError(
            f"it speaks protocol {head.get('protocol')!r:.40}, this is {PROTOCOL}: install the same version"
        )
    cls = MESSAGES.get(str(head.get("kind")))
    if cls is None or not issubclass(cls, expected):
        raise MessageError(f"unexpected message {head.get('kind')!r:.40}")
    fields = FIELDS[cls]
    try:
        if extra := head.keys() - {"protocol", "kind", *fields}:
            raise ValueError(f"no field {min(extra)!r:.40}")
        message = cls(**{name: _field(name, kind, head[name], arrays) for name, kind in fields.items()})
        if arrays:
            raise ValueError(f"no array {min(arrays)!r:.40}")
        _check_name(message)
        if isinstance(message, Piece):
            _check_bytes(message.data)
    except Exception as error:  # whatever a stranger can think of
        raise MessageError(shown(f"a damaged {head['kind']}: {type(error).__name__}: {error!s:.200}")) from None
    return message


def _check_name(message: Message) -> None:
    """Who speaks has a name that can be shown; what failed before a site was known has none."""
    name = getattr(message, "client", None)
    if name is not None and not is_name(name) and not (isinstance(message, Failure) and name == ""):
        raise ValueError(f"client = {name!r:.80}: must be 1 to 64 printable characters")


def _check_bytes(data: Tensor) -> None:
    """They are counted, compared and written to disk as they are: of another type they would be more than they seem."""
    if data.dtype != torch.uint8 or data.dim() != 1:
        raise ValueError(f"data is {data.dtype} {list(data.shape)!r:.40}: must be bytes")


def _protocol(head: Mapping[str, Any]) -> int | None:
    protocol = head.get("protocol")
    return protocol if type(protocol) is int else None


def _field(name: str, kind: Any, about: Any, arrays: Arrays) -> Any:
    """The value of a field; the arrays that it is made of are taken."""
    if kind in ARRAYS:
        return ARRAYS[kind][1](name, about, arrays)
    try:
        return _text(about) if name == "client" and about is not None else SCALARS[kind](about)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} = {about!r:.40}: must be {_called(kind)}") from None


def _called(kind: Any) -> str:
    """A type as `protocol` writes it."""
    return "Stage" if kind == Stage else str(getattr(kind, "__name__", kind) if isinstance(kind, type) else kind)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # JSON can hold half a character
    return value


def _words(value: Any) -> str:
    """The words of another party, as they may be shown; a name is looked at by itself."""
    return shown(_text(value))


def _integer(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise TypeError
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise TypeError
    return float(value)


def _numbers(value: Any) -> dict[str, float]:
    if not isinstance(value, dict):
        raise TypeError
    return {_words(key): _number(item) for key, item in value.items()}


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise TypeError
    return {_words(key): _words(item) for key, item in value.items()}


def _listed(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def items(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError
        return tuple(read(item) for item in value)

    return items


def _stage(value: Any) -> Any:
    if value not in get_args(Stage):
        raise ValueError
    return value


SCALARS: dict[Any, Callable[[Any], Any]] = {
    str: _words,
    int: _integer,
    bool: _truth,
    float: _number,
    str | None: lambda value: None if value is None else _words(value),
    float | None: lambda value: None if value is None else _number(value),
    Stage: _stage,
    Mapping[str, float]: _numbers,
    Mapping[str, str]: _texts,
    tuple[str, ...]: _listed(_words),
    tuple[int, ...]: _listed(_integer),
}


def _scalar(name: str, value: Any, arrays: Arrays) -> Any:
    return dict(value) if isinstance(value, Mapping) else [*value] if isinstance(value, tuple) else value


def _groups(about: Any) -> tuple[ParameterGroup, ...]:
    groups = tuple(parse_group(key) for key in about)
    if not isinstance(about, list) or len(set(groups)) != len(groups):
        raise ValueError("must be a list of parameter groups, each once")
    return groups


def _tensor(name: str, tensor: Tensor, arrays: Arrays) -> list[Any]:
    arrays[name] = (tensor.contiguous().reshape(-1),)
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _read_tensor(name: str, about: Any, arrays: Arrays) -> Tensor:
    dtype, shape = about
    return _take(name, DTYPES[dtype], arrays).view(_shape(name, shape))


def _tensors(name: str, named: Mapping[str, Tensor], arrays: Arrays) -> Any:
    """All tensors of one type in one array, one behind the other."""
    about = {}
    for key, tensor in sorted(named.items()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        arrays[f"{name}/{dtype}"] = (*arrays.get(f"{name}/{dtype}", ()), tensor.contiguous().reshape(-1))
        about[key] = [dtype, list(tensor.shape)]
    return about


def _read_tensors(name: str, about: Any, arrays: Arrays) -> dict[str, Tensor]:
    shapes = {_text(key): (dtype, _shape(key, shape)) for key, (dtype, shape) in about.items()}
    found = dict[str, Tensor]()
    for dtype in {dtype for dtype, _ in shapes.values()}:
        same = {key: shape for key, (one, shape) in shapes.items() if one == dtype}
        parts = _take(f"{name}/{dtype}", DTYPES[dtype], arrays).split([math.prod(shape) for shape in same.values()])
        found |= {key: part.view(shape) for (key, shape), part in zip(same.items(), parts, strict=True)}
    return {key: found[key] for key in shapes}


def _shape(name: str, shape: Any) -> list[int]:
    if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"{name}: shape {shape!r:.40}")
    return shape


def _take(name: str, dtype: torch.dtype, arrays: Arrays) -> Tensor:
    (flat,) = arrays.pop(name)
    if flat.dtype != dtype:
        raise TypeError(f"{name} is {flat.dtype}, announced as {dtype}")
    return flat


def _slabs(name: str, groups: Mapping[ParameterGroup, Packed], arrays: Arrays) -> Any:
    every = list(groups.values())
    sizes = [len(packed.values) for packed in every]
    (dtype,) = {str(packed.values.dtype).removeprefix("torch.") for packed in every} or {"float32"}
    for number, part in enumerate(_cut(sizes, dtype)):
        arrays[f"{name}.{number}"] = tuple(packed.values for packed in every[part])
        if dtype in SCALED:
            arrays[f"{name}.{number}.scale"] = tuple(p.scale for p in every[part] if p.scale is not None)
    return {"dtype": dtype, "groups": [str(group) for group in groups], "sizes": sizes}


def _read_slabs(name: str, about: Mapping[str, Any], arrays: Arrays) -> Iterator[tuple[ParameterGroup, Packed]]:
    groups, sizes, dtype = _groups(about["groups"]), about["sizes"], about["dtype"]
    if len(sizes) != len(groups) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{name}: {len(groups)} groups, {len(sizes)} sizes")
    for number, part in enumerate(_cut(sizes, dtype)):
        pieces = torch.split(_take(f"{name}.{number}", WIRE_DTYPES[dtype], arrays), sizes[part])
        scales: Sequence[Tensor | None] = [None] * len(pieces)
        if dtype in SCALED:
            scale = _take(f"{name}.{number}.scale", torch.float32, arrays)
            scales = torch.split(scale, [math.ceil(size / SCALED[dtype].stored) for size in sizes[part]])
        for group, piece, piece_scale in zip(groups[part], pieces, scales, strict=True):
            yield group, Packed(piece, piece_scale)


def _cut(sizes: Sequence[int], dtype: str) -> Iterator[slice]:
    """Slices of consecutive groups, each of SLAB bytes or more but for the last."""
    first, nbytes = 0, 0
    for index, size in enumerate(sizes):
        nbytes += size * DTYPES[dtype].itemsize
        if nbytes >= SLAB or index == len(sizes) - 1:
            yield slice(first, index + 1)
            first, nbytes = index + 1, 0


ARRAYS: dict[Any, tuple[Callable[[str, Any, Arrays], Any], Callable[[str, Any, Arrays], Any]]] = {  # written, read
    Tensor: (_tensor, _read_tensor),
    Mapping[str, Tensor]: (_tensors, _read_tensors),
    Mapping[ParameterGroup, Packed]: (_slabs, lambda *slabs: dict(_read_slabs(*slabs))),
    tuple[ParameterGroup, ...]: (lambda _, groups, __: [*map(str, groups)], lambda _, about, __: _groups(about)),
}


# ------------------------------------------------------------------------------------------------------------ framing


def to_wire(parcel: Parcel) -> tuple[bytes, dict[str, tuple[str, list[memoryview]]]]:
    """The head as text, and of each array its type and the bytes of its pieces, which are not copied."""
    return parcel.text, {
        name: (
            str(pieces[0].dtype).removeprefix("torch."),
            [piece.contiguous().view(torch.uint8).numpy().data for piece in pieces],
        )
        for name, pieces in parcel.arrays.items()
    }


def from_wire(text: str | bytes, arrays: Mapping[str, tuple[str, bytes | bytearray]]) -> Parcel:
    """The inverse, without a copy: tensors are views of the bytes that were received.

    Raises:
        MessageError: They are not a parcel.
    """
    try:
        head = json.loads(text)
        tensors = {name: (_viewed(DTYPES[dtype], data),) for name, (dtype, data) in arrays.items()}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise MessageError(shown(f"not a message of FedAlign-MoE: {type(error).__name__}: {error!s:.200}")) from None
    if not isinstance(head, dict):
        raise MessageError("not a message of FedAlign-MoE: its head is no table")
    return Parcel(head, tensors)


def _viewed(dtype: torch.dtype, data: bytes | bytearray) -> Tensor:
    if not data:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes to it
        return torch.frombuffer(data, dtype=dtype)
