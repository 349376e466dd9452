"""Parcels through Flower's own objects, cut up and put together as it does on the wire."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from fedalign.federation import messages
from fedalign.federation.flower.link import from_records, to_records
from fedalign.federation.messages import MESSAGES, MessageError, Parcel, decode, encode
from fedalign.maths.rounding import pack
from fedalign.protocol import SHARED, Broadcast, Packed, WireDtype
from tests.federation.test_messages import DTYPES, GROUPS, every_message, packed, same


def through_flower(parcel: Parcel) -> Parcel:
    """As a node receives it."""
    records = to_records(parcel)
    contents = {name: part.deflate() for name, part in get_all_nested_objects(records).items()}
    received = inflate_object_from_contents(records.object_id, contents)
    assert isinstance(received, RecordDict)
    return from_records(received)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slab", [1, 100, 1 << 25])
def test_every_message_travels(dtype: WireDtype, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "SLAB", slab)
    for message in every_message(dtype):
        assert same(decode(through_flower(encode(message)), tuple(MESSAGES.values())), message)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_few_bits_travel_as_few_bits(dtype: WireDtype) -> None:
    update = Broadcast(1, {SHARED: pack(torch.randn(1024), dtype, 0)})
    records = to_records(encode(update))
    (array, *scale) = records.array_records["arrays"].values()
    assert array.dtype == dtype
    assert len(array.data) == 1024 * {"bfloat16": 2, "int8": 1}[dtype]
    assert [len(one.data) for one in scale] == ([4 * 4] if dtype == "int8" else [])
    assert len(records.array_records["arrays"]) == len(encode(update).arrays)


def test_nothing_but_head_and_arrays_is_sent() -> None:
    parcel = encode(Broadcast(1, packed({SHARED: 3}, "float32")))
    records = to_records(parcel)
    assert {*records} == {"head", "arrays"}
    assert json.loads(str(records.config_records["head"]["json"])) == parcel.head
    assert len(records.config_records["head"]) == 1


def test_equal_arrays_and_empty_ones_keep_their_places() -> None:
    zeros = Packed(torch.zeros(4000))
    update = Broadcast(1, {SHARED: zeros, GROUPS[1]: zeros, GROUPS[2]: Packed(torch.empty(0)), GROUPS[3]: zeros})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "SLAB", 1)
        assert same(decode(through_flower(encode(update)), Broadcast), update)


def test_more_than_a_chunk_of_flowers_travels() -> None:
    update = Broadcast(1, {SHARED: Packed(torch.randn(3_000_000))})  # 12 MB, chunks are 5
    assert same(decode(through_flower(encode(update)), Broadcast), update)


def test_an_array_is_copied_once_on_its_way_out_and_not_on_its_way_in() -> None:
    update = Broadcast(1, {SHARED: Packed(torch.randn(1 << 20)), GROUPS[1]: Packed(torch.randn(1 << 20))})
    size = update.nbytes
    tracemalloc.start()  # torch's own memory is not counted, what Flower carries is
    records = to_records(encode(update))
    assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    arrived = decode(from_records(records), Broadcast)
    assert tracemalloc.get_traced_memory()[1] - before < 0.1 * size
    tracemalloc.stop()
    (array,) = records.array_records["arrays"].values()
    start = torch.frombuffer(bytearray(array.data), dtype=torch.float32)
    assert torch.equal(arrived.weights[SHARED].values, start[: 1 << 20])


HEAD = encode(Broadcast(1, {})).text.decode()


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"head": ConfigRecord({"json": HEAD})}),
        RecordDict({"arrays": ArrayRecord({})}),
        RecordDict({"head": ConfigRecord({}), "arrays": ArrayRecord({})}),
        RecordDict({"head": ArrayRecord({}), "arrays": ConfigRecord({})}),
        RecordDict({"head": ConfigRecord({"json": "{"}), "arrays": ArrayRecord({})}),
        RecordDict({"head": ConfigRecord({"json": "[1]"}), "arrays": ArrayRecord({})}),
        RecordDict({"head": ConfigRecord({"json": 7}), "arrays": ArrayRecord({})}),
        RecordDict({"head": ConfigRecord({"json": "[" * 100_000}), "arrays": ArrayRecord({})}),
        RecordDict({"head": ConfigRecord({"json": '{"a": ' * 100_000}), "arrays": ArrayRecord({})}),
        RecordDict({"head": ConfigRecord({"json": "9" * 10_000}), "arrays": ArrayRecord({})}),
        *(
            RecordDict({"head": ConfigRecord({"json": HEAD}), "arrays": ArrayRecord({"a": array})})
            for array in (
                Array(dtype="float32", shape=(1,), stype="raw", data=b"abc"),  # not whole numbers
                Array(dtype="complex64", shape=(1,), stype="raw", data=bytes(8)),
                Array(dtype="", shape=(), stype="numpy.ndarray", data=b""),
            )
        ),
    ],
)
def test_what_is_no_parcel_is_refused(records: RecordDict) -> None:
    with pytest.raises(MessageError, match="not a message of FedAlign-MoE"):
        from_records(records)
