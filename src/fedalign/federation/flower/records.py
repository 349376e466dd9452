"""Parcels as Flower's records: the head as one string, each array as raw bytes, bfloat16 and int8 as they are."""

from __future__ import annotations

import json
import warnings

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedalign.messages import DTYPES, MessageError, Parcel

HEAD, ARRAYS = "head", "arrays"


def to_records(parcel: Parcel) -> RecordDict:
    """What Flower sends; each array is copied once."""
    arrays = ArrayRecord({name: _to_array(pieces) for name, pieces in parcel.arrays.items()})
    return RecordDict({HEAD: ConfigRecord({"json": parcel.text.decode()}), ARRAYS: arrays})


def from_records(records: RecordDict) -> Parcel:
    """The inverse, without a copy: tensors are views of what Flower received.

    Raises:
        MessageError: The records are not a parcel.
    """
    try:
        head = json.loads(str(records.config_records[HEAD]["json"]))
        arrays = {name: (_from_array(array),) for name, array in records.array_records[ARRAYS].items()}
    except (KeyError, ValueError, RecursionError) as error:
        raise MessageError(f"not a message of FedAlign-MoE: {type(error).__name__}: {error!s:.200}") from None
    if not isinstance(head, dict):
        raise MessageError("not a message of FedAlign-MoE: its head is no table")
    return Parcel(head, arrays)


def _to_array(pieces: tuple[Tensor, ...]) -> Array:
    dtype = str(pieces[0].dtype).removeprefix("torch.")
    data = b"".join(piece.contiguous().view(torch.uint8).numpy().data for piece in pieces)
    return Array(dtype=dtype, shape=(sum(len(piece) for piece in pieces),), stype="raw", data=data)


def _from_array(array: Array) -> Tensor:
    dtype = DTYPES[array.dtype]
    if not array.data:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nobody writes to it
        return torch.frombuffer(array.data, dtype=dtype)
