"""What is encoded comes back, and what is not exactly a message is refused as such."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedalign import protocol
from fedalign.federation import messages
from fedalign.federation.messages import (
    ARRAYS,
    MESSAGES,
    SCALARS,
    Message,
    MessageError,
    Parcel,
    decode,
    encode,
    fields_of,
)
from fedalign.maths.rounding import pack
from fedalign.protocol import (
    PROTOCOL,
    SHARED,
    Broadcast,
    Concealed,
    Evaluation,
    Failure,
    Fetch,
    Hello,
    Lacking,
    Layout,
    Offer,
    Packed,
    ParameterGroup,
    Piece,
    Recount,
    Start,
    Statistics,
    Sum,
    WireDtype,
    parse_group,
)

GROUPS = Layout(2, 3, {}).groups
DTYPES: tuple[WireDtype, ...] = ("float32", "bfloat16", "int8", "int4")


def travel(parcel: Parcel) -> Parcel:
    """What arrives: the head read anew, each array in one piece."""
    arrays = {name: (torch.cat([piece.clone() for piece in pieces]),) for name, pieces in parcel.arrays.items()}
    return Parcel(json.loads(parcel.text), arrays)


def packed(sizes: Mapping[ParameterGroup, int], dtype: WireDtype, seed: int = 0) -> dict[ParameterGroup, Packed]:
    generator = torch.Generator().manual_seed(seed)
    return {group: pack(torch.randn(size, generator=generator), dtype, seed) for group, size in sizes.items()}


def hello(client: str = "ward", **changes: Any) -> Hello:
    hashes = {"architecture": "a" * 64, "weights": "b" * 64, "tokenizer": "c" * 64, "chat_template": "d" * 64}
    about: dict[str, Any] = {
        "protocol": PROTOCOL,
        "version": "0",
        "layers": 2,
        "experts": 3,
        "examples": 40,
        "held_out": 4,
        "token_counts": True,
        "embeddings": False,
    }
    return Hello(client=client, **hashes | about | changes)


def statistics(client: str = "ward", round: int = 3) -> Statistics:
    generator = torch.Generator().manual_seed(1)
    cells = torch.rand(2, 3, generator=generator)
    sketch = torch.randn(2, 3, 4, generator=generator).half()
    return Statistics(
        client=client,
        round=round,
        examples=40,
        tokens=900,
        steps=3,
        learning_rate=1e-3,
        loss=1.25,
        prob_L_E=cells,
        load_L_E=cells * 100,
        margin_L_E=cells - 0.5,
        centroid_L_E_D=sketch,
        centroid_scale_L=torch.ones(2),
        update_L_E_S=sketch + 1,
        norm_G=torch.arange(15.0),
        token_count_M_V=torch.arange(14.0).view(2, 7),
        token_met_M_B=torch.tensor([[126], [127]], dtype=torch.uint8),
        frozen=(GROUPS[8],),
        metrics={"train_seconds": 0.5, "temperature_celsius": 3.0},
    )


def every_message(dtype: WireDtype = "float32") -> list[Message]:
    groups = packed({SHARED: 700, GROUPS[1]: 0, GROUPS[9]: 257}, dtype)
    constants = {"a.bias": torch.arange(3), "b.flag": torch.tensor([True]), "c.step": torch.tensor(7.0)}
    totals = {
        "examples": torch.tensor([7]),
        "heights shared": torch.arange(3).byte(),
        "load_L_E": torch.ones(2, 3).long(),
    }
    residues = {"clipped shared": torch.tensor([-1]), "heights shared": torch.ones(3, 48).int()}
    residues |= {"load_L_E": torch.zeros(2, 3).long(), "shared": torch.arange(-300, 400).short()}
    return [
        hello(),
        Start("ward", groups, constants),
        Broadcast(3, groups, {"target_L_E": torch.rand(2, 3, dtype=torch.float64)}),
        Broadcast(0, {}, score=True),
        Broadcast(2, {}, labels=(3, 0, 1 << 62)),
        hello("ward", labels=(4, 0, 12)),
        statistics(),
        dataclasses.replace(statistics(), held_out=12, held_out_loss=0.75, held_out_accuracy=0.5),
        Start("ward", {}, {}, {"shared": "float32[700]"}),
        Offer(3, "int8", {"shared": "e" * 32}),
        Lacking("ward", 3, "f" * 32, (0, 7, 9, 12)),
        Lacking("ward", 3, "", ()),
        Piece(None, 3, "f" * 32, (7, 9, 10, 13), torch.arange(5, dtype=torch.uint8), "a" * 32),
        Piece("ward", 3, "", (), torch.empty(0, dtype=torch.uint8), "a" * 32, {"shared": "e" * 32}, ("head",)),
        Broadcast(4, {}, kept={"shared": "e" * 32}),
        Broadcast(
            4, groups, kept={"head": "e" * 32}, differences=packed({GROUPS[2]: 65}, "int4"), before={"head": "a" * 32}
        ),
        Offer(3, "bfloat16", {"shared": "e" * 32}, "int4", {"shared": "a" * 32}),
        Fetch("ward", 3, ("shared", "gate[0,1]"), 7, 1000, {"head": "e" * 32}),
        Fetch("ward", 3, (), 0, 0),
        Evaluation("ward", 10, 0.75, 0.5),
        Evaluation(None, 10, 0.75, None),
        Failure("ward", "train", "its loss is nan"),
        hello("ward", examples=0, held_out=0, mask_key="a" * 64, mask_signature="3066" * 50),
        Broadcast(5, {}, keys={"east": "b" * 64, "ward": "a" * 64 + " 3066"}),
        Recount(5, {"ward": "a" * 64 + " " + "f" * 208}),
        Sum(5, ("east", "ward"), totals, {"east": "b" * 64}, (SHARED, GROUPS[9])),
        Concealed("ward", 5, ("east", "ward"), residues),
        Concealed("ward", 5, ("ward",), {}),
    ]


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same type, dtype and shape throughout."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if dataclasses.is_dataclass(one) and not isinstance(one, ParameterGroup):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slab", [1, 100, 1 << 25])  # every group in its own array, some together, all in one
def test_every_message_comes_back_as_it_was(dtype: WireDtype, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "SLAB", slab)
    for message in every_message(dtype):
        assert same(decode(travel(encode(message)), type(message)), message)


def test_every_kind_of_message_is_tried() -> None:
    assert {type(message) for message in every_message()} == set(MESSAGES.values())


def test_all_that_the_protocol_says_may_travel_does() -> None:
    classes = {cls for _, cls in inspect.getmembers(protocol, inspect.isclass) if dataclasses.is_dataclass(cls)}
    parts = {
        protocol.ParameterGroup,
        protocol.Factors,
        protocol.Layout,
        protocol.Packed,
        protocol.Plan,
        protocol.TokenRows,
        protocol.Consent,
        protocol.Request,
        protocol.Update,
        protocol.Moved,
        protocol.Totals,
        protocol.Begun,
    }  # of a message, or the server's
    parts |= {
        protocol.LayerRouting,
        protocol.Step,
        protocol.LocalRound,
        protocol.Reports,
        protocol.Part,
        protocol.Shares,
    }  # of algorithms
    assert classes - parts == set(MESSAGES.values())


def test_every_type_of_field_can_be_read() -> None:
    used = {kind for cls in MESSAGES.values() for kind in fields_of(cls).values()}
    assert used == SCALARS.keys() | ARRAYS.keys()


Words: TypeAlias = str
Maybe: TypeAlias = str | None
Kept: TypeAlias = Mapping[ParameterGroup, Packed]


@dataclasses.dataclass
class Spelt:
    """Names of types that `protocol` does not use."""

    a: Words
    b: Maybe
    c: Kept
    d: tuple[ParameterGroup, ...]


def test_a_type_is_a_type_however_it_is_spelt() -> None:
    assert fields_of(Spelt) == {"a": str, "b": str | None, "c": Kept, "d": tuple[ParameterGroup, ...]}
    assert all(kind in SCALARS or kind in ARRAYS for kind in fields_of(Spelt).values())


def test_groups_are_put_together_into_few_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "SLAB", 100)
    sizes = dict(zip(GROUPS, [10, 10, 10, 1000, 0, 24, 1, 0], strict=False))
    parcel = encode(Broadcast(1, packed(sizes, "float32")))
    assert [sum(map(len, pieces)) for pieces in parcel.arrays.values()] == [30, 1000, 25, 0]
    assert parcel.arrays["weights.1"][0].dtype == torch.float32


def test_tensors_of_one_type_are_one_array_and_as_many_values_as_announced() -> None:
    residues = {"a": torch.arange(6).short().view(2, 3), "b": torch.zeros(0).short(), "c": torch.tensor([7])}
    parcel = travel(encode(Concealed("ward", 1, ("ward",), residues)))
    assert {name: len(pieces[0]) for name, pieces in parcel.arrays.items()} == {
        "residues/int16": 6,
        "residues/int64": 1,
    }
    for wrong in (["int16", [2, 2]], ["int16", [2, 4]], ["int64", [2, 3]], ["int16", [-2, -3]], ["int16", 6], "int16"):
        head = {**parcel.head, "residues": {**parcel.head["residues"], "a": wrong}}
        with pytest.raises(MessageError, match="damaged concealed"):
            decode(Parcel(head, parcel.arrays), Concealed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_a_parcel_are_those_of_the_message_and_its_head(dtype: WireDtype) -> None:
    update = Broadcast(1, packed(dict.fromkeys(GROUPS, 300), dtype))
    parcel = encode(update)
    assert parcel.nbytes == update.nbytes + len(parcel.text)
    assert update.nbytes == 15 * {"float32": 1200, "bfloat16": 600, "int8": 300 + 8, "int4": 150 + 20}[dtype]
    report = statistics()
    assert sum(piece.nbytes for (piece,) in encode(report).arrays.values()) == report.nbytes - 64 - 8 * 2


@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.dictionaries(st.sampled_from(GROUPS), st.integers(0, 600), max_size=15),
    slab=st.integers(1, 3000),
)
@settings(deadline=None, max_examples=60)
def test_groups_of_any_size_come_back(dtype: WireDtype, sizes: dict[ParameterGroup, int], slab: int) -> None:
    update = Broadcast(1, packed(sizes, dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "SLAB", slab)
        assert same(decode(travel(encode(update)), Broadcast), update)


def test_what_a_message_does_not_hold_is_not_said_to_leave() -> None:
    every = statistics()
    without = dataclasses.replace(every, token_count_M_V=torch.zeros(0, 0), held_out_loss=None, metrics={})
    told, withheld = {*encode(every).filled}, {*encode(without).filled}
    assert told - withheld == {name for name in ("token_count_M_V", "metrics", "held_out_loss") if name in told}
    assert "token_count_M_V" in told
    assert {"client", "examples", "norm_G", "prob_L_E"} <= withheld
    assert not {"protocol", "kind"} & told


def test_what_is_encoded_is_not_copied() -> None:
    update = Broadcast(1, packed({SHARED: 10}, "float32"))
    (piece,) = encode(update).arrays["weights.0"]
    assert piece.data_ptr() == update.weights[SHARED].values.data_ptr()


def test_tensors_that_are_not_contiguous_travel() -> None:
    target = torch.arange(6.0).view(2, 3).T
    arrived = decode(travel(encode(Broadcast(1, {}, {"target": target}))), Broadcast)
    assert torch.equal(arrived.state["target"], target)


def test_groups_of_two_precisions_are_our_own_mistake() -> None:
    mixed = packed({SHARED: 4}, "float32") | packed({GROUPS[1]: 4}, "bfloat16")
    with pytest.raises(ValueError, match="too many values"):
        encode(Broadcast(1, mixed))


def test_numbers_that_are_not_finite_travel_to_be_checked_by_who_understands_them() -> None:
    assert math.isnan(decode(travel(encode(Evaluation("ward", 1, math.nan, None))), Evaluation).loss)


@pytest.mark.parametrize("spoken", [0, PROTOCOL + 1, None, True, str(PROTOCOL), float(PROTOCOL), [PROTOCOL], {}])
def test_another_protocol_is_named(spoken: Any) -> None:
    parcel = encode(hello())
    with pytest.raises(MessageError, match=rf"it speaks protocol .*, this is {PROTOCOL}: install the same version"):
        decode(Parcel({**parcel.head, "protocol": spoken}, {}), Hello)


@pytest.mark.parametrize("kind", ["nothing", "", None, 3, [], {}, "Hello", "failure"])
def test_another_kind_of_message_is_named(kind: Any) -> None:
    with pytest.raises(MessageError, match="unexpected message"):
        decode(Parcel({**encode(hello()).head, "kind": kind}, {}), Hello)


def test_a_message_may_be_one_of_several() -> None:
    failure = Failure("ward", "train", "no")
    assert decode(encode(failure), (Statistics, Failure)) == failure
    with pytest.raises(MessageError, match="unexpected message 'failure'"):
        decode(encode(failure), (Statistics, Hello))


@pytest.mark.parametrize("message", every_message(), ids=lambda message: type(message).__name__)
def test_a_missing_or_additional_field_is_refused(message: Message) -> None:
    parcel = travel(encode(message))
    for field in dataclasses.fields(message):
        head = {name: value for name, value in parcel.head.items() if name != field.name}
        reason = "speaks protocol None" if field.name == "protocol" else f"damaged .*KeyError: '{field.name}'"
        with pytest.raises(MessageError, match=reason):
            decode(Parcel(head, parcel.arrays), type(message))
    with pytest.raises(MessageError, match="no field 'more'"):
        decode(Parcel({**parcel.head, "more": 1}, parcel.arrays), type(message))
    with pytest.raises(MessageError, match=r"no array 'more'"):
        decode(Parcel(parcel.head, {**parcel.arrays, "more": (torch.zeros(1),)}), type(message))


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (hello(), "examples", True),
        (hello(), "examples", 4.0),
        (hello(), "examples", "4"),
        (hello(), "examples", None),
        (hello(), "examples", 1 << 63),
        (hello(), "embeddings", 1),
        (hello(), "token_counts", "false"),
        (hello(), "client", 4),
        (hello(), "client", None),
        (hello(), "client", ["ward"]),
        (hello(), "client", "\ud800"),
        (Evaluation("w", 1, 0.5, None), "loss", "0.5"),
        (Evaluation("w", 1, 0.5, None), "loss", True),
        (Evaluation("w", 1, 0.5, None), "loss", None),
        (Evaluation("w", 1, 0.5, None), "loss", 10**400),
        (Evaluation("w", 1, 0.5, None), "accuracy", False),
        (Evaluation("w", 1, 0.5, None), "client", 7),
        (Offer(1, "int8", {}), "digests", ["shared"]),
        (Offer(1, "int8", {}), "digests", {"shared": 3}),
        (Lacking("w", 1, "", ()), "ranges", [1.0]),
        (Lacking("w", 1, "", ()), "ranges", "12"),
        (Lacking("w", 1, "", ()), "ranges", [True]),
        (Fetch("w", 1, (), 0, 0), "names", "shared"),
        (Fetch("w", 1, (), 0, 0), "names", [["shared"]]),
        (Failure("w", "train", "no"), "stage", "lunch"),
        (Failure("w", "train", "no"), "stage", ["train"]),
        (statistics(), "metrics", []),
        (statistics(), "metrics", {"steps": "3"}),
        (statistics(), "metrics", {"steps": True}),
        (statistics(), "metrics", {"steps": 10**400}),
        (statistics(), "metrics", {"steps": [1]}),
    ],
)
def test_a_scalar_of_the_wrong_type_is_refused_and_named(message: Message, field: str, value: Any) -> None:
    parcel = travel(encode(message))
    with pytest.raises(MessageError, match=rf"damaged .*{field} = .*: must be"):
        decode(Parcel({**parcel.head, field: value}, parcel.arrays), type(message))


@pytest.mark.parametrize(
    "data",
    [
        torch.tensor(1, dtype=torch.uint8),
        torch.zeros(4, 2, dtype=torch.uint8),
        torch.zeros(8),
        torch.zeros(8, dtype=torch.bfloat16),
        torch.zeros(8, dtype=torch.int8),
    ],
    ids=str,
)
def test_a_piece_is_bytes_and_nothing_else(data: Tensor) -> None:
    """It is written to disk as it is: eight float32 are 32 bytes, and a number by itself has no length."""
    with pytest.raises(MessageError, match=r"a damaged piece: ValueError: data is .*: must be bytes"):
        decode(travel(encode(Piece("w", 1, "", (), data, "0"))), Piece)


def test_whole_numbers_are_floats_too() -> None:
    parcel = encode(Evaluation("w", 1, 1.0, None))
    loss = decode(Parcel({**parcel.head, "loss": 2}, {}), Evaluation).loss
    assert type(loss) is float


@pytest.mark.parametrize(
    "about",
    [
        ["float32", [2, 4]],
        ["float32", [-1, 3]],
        ["float32", [-2, -3]],
        ["float32", [2.0, 3]],
        ["float32", [True, 6]],
        ["float32", [6, 10**30]],
        ["float32", 6],
        ["float32", "23"],
        ["float32", None],
        ["float32", {"2": 3}],
        ["float64", [2, 3]],
        ["complex64", [2, 3]],
        [["float32"], [2, 3]],
        ["float32"],
        ["float32", [2, 3], 0],
        "float32",
        {},
        None,
        7,
    ],
)
def test_a_tensor_that_is_not_as_announced_is_refused(about: Any) -> None:
    parcel = travel(encode(statistics()))
    with pytest.raises(MessageError, match="damaged statistics"):
        decode(Parcel({**parcel.head, "prob_L_E": about}, parcel.arrays), Statistics)


@pytest.mark.parametrize(
    "array", [(torch.zeros(5),), (torch.zeros(7),), (torch.zeros(6).half(),), (), (torch.zeros(3),) * 2]
)
def test_an_array_that_is_not_as_announced_is_refused(array: tuple[Tensor, ...]) -> None:
    parcel = travel(encode(statistics()))
    with pytest.raises(MessageError, match="damaged statistics"):
        decode(Parcel(parcel.head, {**parcel.arrays, "prob_L_E": array}), Statistics)
    without = {name: pieces for name, pieces in parcel.arrays.items() if name != "prob_L_E"}
    with pytest.raises(MessageError, match="damaged statistics: KeyError: 'prob_L_E'"):
        decode(Parcel(parcel.head, without), Statistics)


NAMES = ["shared", "embeddings"]


@pytest.mark.parametrize(
    "about",
    [
        {"dtype": "float32", "groups": NAMES, "sizes": [3, 2]},  # shorter than what is there
        {"dtype": "float32", "groups": NAMES, "sizes": [3, 4]},
        {"dtype": "float32", "groups": NAMES, "sizes": [7, -1]},
        {"dtype": "float32", "groups": NAMES, "sizes": ["3", "3"]},
        {"dtype": "float32", "groups": NAMES, "sizes": [3.0, 3.0]},
        {"dtype": "float32", "groups": NAMES, "sizes": [True, 5]},
        {"dtype": "float32", "groups": NAMES, "sizes": [6]},
        {"dtype": "float32", "groups": NAMES, "sizes": [3, 3, 0]},
        {"dtype": "float32", "groups": NAMES, "sizes": [3, 10**30]},
        {"dtype": "float32", "groups": NAMES, "sizes": [3, 10**400]},
        {"dtype": "float32", "groups": NAMES, "sizes": {"3": 3, "4": 3}},
        {"dtype": "float32", "groups": NAMES, "sizes": None},
        {"dtype": "float32", "groups": NAMES},
        {"dtype": "float32", "groups": ["shared", "shared"], "sizes": [3, 3]},
        {"dtype": "float32", "groups": "shared", "sizes": [1] * 6},
        {"dtype": "float32", "groups": {"shared": 0, "embeddings": 0}, "sizes": [3, 3]},
        {"dtype": "float32", "groups": ["shared", 3], "sizes": [3, 3]},
        {"dtype": "float32", "groups": ["shared", None], "sizes": [3, 3]},
        {"dtype": "bfloat16", "groups": NAMES, "sizes": [3, 3]},
        {"dtype": "int8", "groups": NAMES, "sizes": [3, 3]},
        {"dtype": "float64", "groups": NAMES, "sizes": [3, 3]},
        {"dtype": ["float32"], "groups": NAMES, "sizes": [3, 3]},
        {"groups": NAMES, "sizes": [3, 3]},
        [],
        "groups",
        None,
    ],
)
def test_groups_that_are_not_as_announced_are_refused(about: Any) -> None:
    parcel = travel(encode(Broadcast(1, packed({SHARED: 3, GROUPS[1]: 3}, "float32"))))
    assert parcel.head["weights"] == {"dtype": "float32", "groups": NAMES, "sizes": [3, 3]}
    with pytest.raises(MessageError, match="damaged broadcast"):
        decode(Parcel({**parcel.head, "weights": about}, parcel.arrays), Broadcast)


@pytest.mark.parametrize("scale", [(torch.ones(2),), (torch.ones(4),), (torch.ones(3).half(),), ()])
def test_scales_that_do_not_fit_are_refused(scale: tuple[Tensor, ...]) -> None:
    parcel = travel(encode(Broadcast(1, packed({SHARED: 257, GROUPS[1]: 3}, "int8"))))
    with pytest.raises(MessageError, match="damaged broadcast"):
        decode(Parcel(parcel.head, {**parcel.arrays, "weights.0.scale": scale}), Broadcast)
    with pytest.raises(MessageError, match="damaged broadcast"):
        decode(Parcel(parcel.head, {"weights.0": parcel.arrays["weights.0"]}), Broadcast)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "shared[0,0]",
        "embeddings[0,0]",
        "head[0,0]",
        "words",
        "gate",
        "gate[0]",
        "gate[0,0",
        "gate[0,0]]",
        "gate[0,0] ",
        "gate[0,0,0]",
        "gate[-1,0]",
        "gate[+1,0]",
        "gate[01,0]",
        "gate[1_0,0]",
        "gate[ 1,0]",
        "gate[1.0,0]",
        "gate[\u0663,0]",
        "expert[,]",
        "expert[" + "9" * 5000 + ",0]",
        "router[0,0]",
        "Shared",
        "../../etc",
    ],
)
def test_a_name_that_is_no_groups_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"no parameter group|integer string conversion"):
        parse_group(name)
    with pytest.raises(MessageError, match="damaged statistics"):
        decode(Parcel({**travel(encode(statistics())).head, "frozen": [name]}, encode(statistics()).arrays), Statistics)


def test_a_group_asked_for_twice_is_refused() -> None:
    with pytest.raises(MessageError, match="each once"):
        decode(
            Parcel({**encode(statistics()).head, "frozen": ["shared", "shared"]}, encode(statistics()).arrays),
            Statistics,
        )


def test_what_is_refused_is_told_briefly() -> None:
    head = {**encode(hello()).head, "client": ["x" * 10**6]}
    with pytest.raises(MessageError) as caught:
        decode(Parcel(head, {}), Hello)
    assert len(str(caught.value)) < 300
    with pytest.raises(MessageError) as caught:
        decode(Parcel({"protocol": "x" * 10**6}, {}), Hello)
    assert len(str(caught.value)) < 300


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value has parts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key)
        yield from places(part, (*path, key))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.just(10**400)
    | st.just("shared"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_any_change_of_a_head_gives_a_message_error_or_a_message(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(every_message(data.draw(st.sampled_from(DTYPES)))))
    parcel = travel(encode(message))
    head = copy.deepcopy(dict(parcel.head))
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from([*places(head)]))
        part: Any = head
        for key in path:
            part = part[key]
        if data.draw(st.booleans()) and isinstance(part, dict):
            del part[last]
        else:
            part[last] = data.draw(JSON)
        if not head:
            break
    try:
        read = decode(Parcel(head, parcel.arrays), tuple(MESSAGES.values()))
    except MessageError:
        return
    again = encode(decode(travel(encode(read)), type(read)))
    assert again.text == encode(read).text
