"""Files that arrive in pieces, and what a client keeps of broadcasts, whatever happens on the way."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedalign.federation import received as received_module
from fedalign.federation import transfer
from fedalign.federation.flower.carrier import Download, Freight, Upload, taken_over
from fedalign.federation.messages import MessageError, decode
from fedalign.federation.received import Received
from fedalign.federation.transfer import (
    Entry,
    Part,
    Transfer,
    cut,
    digest,
    edges_of,
    entry_for,
    merged,
    minus,
    ranges_of,
    size_of,
)
from fedalign.files import fingerprint
from fedalign.maths.rounding import BLOCKS, bytes_of, pack, packed_nbytes
from fedalign.maths.tensor_file import Range
from fedalign.protocol import Broadcast, Lacking, Layout, Offer, Packed, ParameterGroup, Piece, WireDtype, parse_group
from fedalign.server.public import PublicModel, first, following
from tests.federation.test_messages import DTYPES, packed, same, travel

GROUPS = Layout(1, 3, {}).groups
SIZES = dict(zip(GROUPS, (700, 0, 33, 1, 2, 3, 2000, 257, 256), strict=True))
NAMED = {str(group): size for group, size in SIZES.items()}
MOST = 500  # bytes of a piece: the larger groups are cut


def weights(dtype: WireDtype, seed: int = 0) -> dict[ParameterGroup, Packed]:
    return packed(SIZES, dtype, seed)


def offered(freight: Freight) -> Offer:
    offer: Offer = decode(freight.offer, Offer)
    return offer


def freight_of(
    dtype: WireDtype = "float32", seed: int = 0, round: int = 1, changed: Mapping[str, Packed] | None = None
) -> Freight:
    every = weights(dtype, seed)
    return Freight(Broadcast(round, {g: (changed or {}).get(str(g), p) for g, p in every.items()}))


def piece(freight: Freight, part: Part, identity: str = "") -> Piece:
    is_added = identity == freight.differences.identity
    groups = freight.broadcast.differences if is_added else freight.broadcast.weights
    stream = torch.cat([one for packed in groups.values() for one in bytes_of(packed)])
    data = torch.cat([stream[start:stop] for start, stop in part])
    transfer = freight.differences if is_added else freight.transfer
    return Piece(None, freight.round, transfer.identity, edges_of(part), data, fingerprint([data.numpy().data]))


def lacking(answer: Lacking) -> list[tuple[int, int]]:
    return list(zip(answer.ranges[::2], answer.ranges[1::2], strict=True))


def pieces(freight: Freight, answer: Lacking) -> list[Part]:
    transfer = freight.differences if answer.transfer == freight.differences.identity else freight.transfer
    return list(transfer.cut(MOST, lacking(answer)))


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    most=st.integers(1, 50),
    edges=st.lists(st.integers(0, 200), max_size=6),
)
@settings(deadline=None, max_examples=200)
def test_pieces_are_no_larger_and_cut_only_what_is(sizes: list[int], most: int, edges: list[int]) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    inside = sorted(min(edge, sum(sizes)) for edge in edges[: len(edges) // 2 * 2])
    ranges = merged(ranges_of(inside))
    found = list(cut(ranges, starts, most))
    every = [one for part in found for one in part]
    assert every == sorted(every)
    assert merged(every) == ranges
    assert all(0 < size_of(part) <= most for part in found)
    for a, b in every:
        begun = [s for s, n in zip(starts, sizes, strict=True) if a < s < b < s + n]  # begun in it and not whole
        assert not begun or b in [stop for _, stop in ranges]
    for part, after in pairwise(found):  # none could have been larger
        (first, last), *_ = after
        edge = next((s for s in starts if first < s < last), last)
        assert size_of(part) + min(edge, first + most) - first > most


class Edge(int):
    """An edge that counts how often edges are compared."""

    compared = 0

    def __lt__(self, other: int) -> bool:
        Edge.compared += 1
        return int(self) < int(other)


@given(st.lists(st.integers(0, 60), max_size=12), st.lists(st.integers(0, 60), max_size=12))
def test_what_is_left_of_ranges_is_what_others_do_not_hold(edges: list[int], others: list[int]) -> None:
    ranges = merged(ranges_of(sorted(edges[: len(edges) // 2 * 2])))
    taken = [(min(pair), max(pair)) for pair in ranges_of(others[: len(others) // 2 * 2])]
    left = minus(ranges, taken)
    assert left == sorted(left)
    of_left, of_ranges, of_taken = ({at for one in some for at in range(*one)} for some in (left, ranges, taken))
    assert of_left == of_ranges - of_taken


def test_a_site_cannot_make_ranges_costly_by_their_number() -> None:
    number = 3000
    ranges = [(Edge(3 * i), Edge(3 * i + 1)) for i in range(number)]
    Edge.compared = 0
    assert minus(ranges, ranges) == []
    assert Edge.compared < 50 * number  # of each range with each other: 9 million


def test_thousands_of_ranges_are_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    number, joined = 1000, list[int]()

    def counted(ranges: Iterable[Range]) -> list[Range]:
        every = list(ranges)
        joined.append(len(every))
        return merged(every)

    monkeypatch.setattr("fedalign.federation.transfer.merged", counted)
    entries = {f"group {i}": Entry(torch.uint8, (3,)) for i in range(number)}
    transfer = Transfer(tmp_path / "file", entries).begin()
    transfer.write(tuple((3 * i, 3 * i + 1) for i in range(number)), torch.zeros(number, dtype=torch.uint8))
    loaded = Transfer.load(tmp_path / "file")
    assert loaded is not None
    assert loaded.lacking == transfer.lacking
    assert len(loaded.lacking) == number
    assert sum(joined) <= 5 * number


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_pieces_in_any_order_and_more_than_once_make_the_file(tmp_path: Path, dtype: WireDtype, seed: int) -> None:
    every = {str(group): one for group, one in weights(dtype).items()}
    stream = torch.cat([part for one in every.values() for part in bytes_of(one)])
    chance, entries = random.Random(seed), {name: entry_for(one) for name, one in every.items()}
    transfer = Transfer(tmp_path / "file", entries, {"of": "a test"}).begin()
    parts = list(transfer.cut(MOST, transfer.lacking))
    assert max(map(size_of, parts)) <= MOST < transfer.nbytes == len(stream)
    parts += chance.sample(parts, 3)
    chance.shuffle(parts)
    for part in parts:
        transfer.write(part, torch.cat([stream[start:stop] for start, stop in part]))
        if chance.random() < 0.5:  # the process was killed, and half a line with it
            with transfer.journal.open("a") as journal:
                journal.write("[0, 17")
            transfer = Transfer(tmp_path / "file", entries, {"of": "a test"}).begin()
    assert transfer.lacking == []
    assert same(
        {name: one.values for name, one in transfer.read().items()}, {n: one.values for n, one in every.items()}
    )
    tensors = load_file(tmp_path / "file")  # an ordinary file of safetensors
    for name, one in every.items():
        assert torch.equal(tensors[name], one.values)
        assert one.scale is None or torch.equal(tensors[f"{name}.scale"], one.scale)
        assert tensors[name].data_ptr() % one.values.dtype.itemsize == 0


def test_what_is_there_survives_and_another_file_is_begun_anew(tmp_path: Path) -> None:
    entries = {"a": entry_for(Packed(torch.ones(100)))}
    Transfer(tmp_path / "file", entries).begin().write(((8, 88),), torch.zeros(80, dtype=torch.uint8))
    assert Transfer(tmp_path / "file", entries).begin().lacking == [(0, 8), (88, 400)]
    loaded = Transfer.load(tmp_path / "file")
    assert loaded is not None
    assert loaded.lacking == [(0, 8), (88, 400)]
    other = {"b": entry_for(Packed(torch.ones(100)))}
    assert Transfer(tmp_path / "file", other).begin().lacking == [(0, 400)]
    for part in (((-1, 1),), ((399, 401),), ((10**12, 10**12 + 2),), ((0, 3),), ((0, 3), (2, 1)), ((4, 5), (2, 3))):
        with pytest.raises(ValueError, match="of 400"):
            Transfer(tmp_path / "file", other).begin().write(part, torch.zeros(2, dtype=torch.uint8))
    for text in ("", "x", "\x08\0\0\0\0\0\0\0[1]     ", "\x02\0\0\0\0\0\0\0{}"):
        (tmp_path / "file").write_text(text)
        assert text.endswith("{}") or Transfer.load(tmp_path / "file") is None


def test_what_a_journal_takes_grows_with_what_is_there(tmp_path: Path) -> None:
    """A site may say of any tensor that it has another by now: every other one leaves as many ranges as digests."""
    entries = {str(number): entry_for(Packed(torch.ones(1))) for number in range(400)}
    transfer = Transfer(tmp_path / "file", entries).begin()
    transfer.write(((0, 1600),), torch.zeros(1600, dtype=torch.uint8), dict.fromkeys(entries, "0" * 32))
    once = transfer.journal.stat().st_size
    transfer.forget([name for name in entries if int(name) % 2])
    assert transfer.journal.stat().st_size < once
    again = Transfer(tmp_path / "file", entries).begin()
    assert again.lacking == transfer.lacking
    assert again.digests == transfer.digests
    assert again.whole_names() == [name for name in entries if int(name) % 2 == 0]


@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    there=st.sets(st.integers(0, 26)),
    gone=st.lists(st.integers(0, 8)),
)
@settings(deadline=None, max_examples=100)
def test_what_is_forgotten_is_lacking_and_nothing_else(sizes: list[int], there: set[int], gone: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        entries = {
            str(number): entry_for(Packed(torch.zeros(size, dtype=torch.int8))) for number, size in enumerate(sizes)
        }
        transfer = Transfer(Path(folder) / "file", entries).begin()
        held = {at for at in there if at < transfer.nbytes}
        for at in held:
            transfer.write(((at, at + 1),), torch.zeros(1, dtype=torch.uint8))
        names = [str(number) for number in gone if number < len(sizes)]
        transfer.forget(names)
        held -= {transfer.starts[n] + at for n in names for at in range(entries[n].nbytes)}
        for one in (transfer, Transfer(Path(folder) / "file", entries).begin()):
            lacking = {at for start, stop in one.lacking for at in range(start, stop)}
            assert lacking == set(range(transfer.nbytes)) - held


# ------------------------------------------------------------------------------------------------- a client's own


@pytest.fixture
def received(tmp_path: Path) -> Received:
    return Received("ward", tmp_path)


def bring(received: Received, freight: Freight) -> int:
    """All that a client lacks; how many bytes that was."""
    moved, answer = 0, received.offered(offered(freight), NAMED)
    for part in pieces(freight, answer):
        answer = received.take(piece(freight, part, answer.transfer))
        moved += size_of(part)
    assert answer.ranges == ()
    return moved


def comes_out(received: Received, freight: Freight) -> bool:
    """Whether a broadcast of digests alone is the whole one."""
    answer = received.completed(Broadcast(freight.round, {}, kept=freight.digests), NAMED)
    return isinstance(answer, Broadcast) and same(answer.weights, freight.broadcast.weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_come_in_pieces_and_what_did_not_change_does_not(received: Received, dtype: WireDtype) -> None:
    first = freight_of(dtype)
    assert bring(received, first) == sum(packed_nbytes(size, dtype) for size in SIZES.values())
    assert comes_out(received, first)
    assert received.offered(offered(first), NAMED).ranges == ()  # of the same nothing is lacking
    group = GROUPS[6]
    second = freight_of(dtype, round=2, changed={str(group): pack(torch.ones(2000), dtype, 1)})
    assert bring(received, second) == packed_nbytes(2000, dtype)
    assert comes_out(received, second)
    assert not comes_out(received, first)  # two models are not kept
    assert sorted(path.name for path in received.weights.parent.iterdir()) == []


def test_what_came_with_a_broadcast_is_kept_as_well(received: Received) -> None:
    first, second = freight_of(), freight_of(round=2, changed={"shared": Packed(torch.ones(700))})
    whole = received.completed(first.broadcast, NAMED)
    assert same(whole, first.broadcast)
    changed = {group: one for group, one in second.broadcast.weights.items() if str(group) == "shared"}
    kept = {name: digest for name, digest in second.digests.items() if name != "shared"}
    assert same(received.completed(Broadcast(2, changed, kept=kept), NAMED), second.broadcast)
    assert bring(received, second) == 0


def test_a_client_that_lost_what_it_kept_says_so(received: Received) -> None:
    freight = freight_of()
    assert isinstance(received.completed(Broadcast(1, {}, kept=freight.digests), NAMED), Lacking)
    bring(received, freight)
    content = bytearray(received.weights.read_bytes())
    content[-100] ^= 1
    received.weights.write_bytes(bytes(content))
    assert isinstance(received.completed(Broadcast(1, {}, kept=freight.digests), NAMED), Lacking)
    assert bring(received, freight) > 0
    assert comes_out(received, freight)


def accidents(received: Received, freight: Freight) -> Iterator[tuple[str, Piece]]:
    part, *_ = pieces(freight, received.offered(offered(freight), NAMED))
    good = piece(freight, part)
    flipped = good.data.clone()
    flipped[3] ^= 1
    yield "damaged", Piece(None, 1, good.transfer, good.ranges, flipped, good.digest)
    yield "of another transfer", Piece(None, 1, "0" * 32, good.ranges, good.data, good.digest)
    other = freight_of(seed=1)
    yield "of another round", piece(other, part)


def test_pieces_that_are_damaged_or_of_something_else_are_not_kept(received: Received) -> None:
    freight = freight_of()
    before = received.offered(offered(freight), NAMED)
    for what, bad in accidents(received, freight):
        answer = received.take(bad)
        assert answer == before, what
        assert answer.transfer == freight.transfer.identity
    assert bring(received, freight) == freight.transfer.nbytes


def test_a_piece_that_is_too_large_is_refused_and_nothing_is_written(received: Received) -> None:
    freight = freight_of()
    received.offered(offered(freight), NAMED)
    data = torch.zeros(freight.transfer.nbytes + 1, dtype=torch.uint8)
    size = received.arriving.stat().st_size
    for ranges in ((0, len(data)), (0, len(data) - 1), (0,)):
        with pytest.raises(MessageError, match="a piece of "):
            received.take(Piece(None, 1, freight.transfer.identity, ranges, data, fingerprint([data.numpy().data])))
    assert received.arriving.stat().st_size == size
    assert bring(received, freight) == freight.transfer.nbytes


def test_no_room_is_made_for_what_the_model_does_not_have(received: Received) -> None:
    digests = freight_of().digests
    for offer, reason in (
        (Offer(1, "float32", digests | {"expert[7,7]": "0" * 32}), r"expert\[7,7\], which this model does not train"),
        (Offer(1, "float64", digests), "an offer in float64: must be one of float32"),
    ):
        with pytest.raises(MessageError, match=reason):
            received.offered(offer, NAMED)
    assert not received.arriving.exists()


@pytest.mark.parametrize(("group", "size"), [("expert[7,7]", 1), ("shared", 701), ("expert[0,2]", 0)])
def test_no_broadcast_is_kept_of_what_the_model_does_not_have(received: Received, group: str, size: int) -> None:
    """Else each broadcast could add groups to those that the client was sent before."""
    freight = freight_of()
    bring(received, freight)
    kept = {name: digest for name, digest in freight.digests.items() if name != group}
    more = Broadcast(2, {parse_group(group): Packed(torch.zeros(size))}, kept=kept)
    with pytest.raises(MessageError, match=rf"weights of {re.escape(group)}, of which this model does not train so"):
        received.completed(more, NAMED)
    assert comes_out(received, freight)


def test_values_that_are_not_as_announced_are_lacking_again(received: Received) -> None:
    """Each piece is sound in itself, and the whole is not what its digest says."""
    freight = freight_of()
    lies = {**freight.digests, "shared": "0" * 32}
    offer = Offer(1, "float32", lies)
    answer = received.offered(offer, NAMED)
    for part in pieces(freight, answer):
        one = piece(freight, part)
        answer = received.take(replace(one, transfer=answer.transfer))
    assert lacking(answer) == [(0, 2800)]
    assert (
        json.loads(received.arriving.with_name("arriving.safetensors.journal").read_text().splitlines()[1])[0] == 2800
    )
    assert not received.weights.exists()


def test_a_client_restarted_in_the_middle_goes_on_where_it_was(received: Received, tmp_path: Path) -> None:
    freight = freight_of()
    every = pieces(freight, received.offered(offered(freight), NAMED))
    for part in every[:7]:
        received.take(piece(freight, part))
    again = Received("ward", tmp_path)
    left = pieces(freight, again.offered(offered(freight), NAMED))
    assert sum(map(size_of, left)) == sum(map(size_of, every[7:]))
    for part in reversed(left):
        again.take(piece(freight, part))
    assert again.take(piece(freight, left[0])).ranges == ()  # the last one, once more
    assert comes_out(again, freight)


def test_more_gaps_than_can_be_said_at_once_are_filled_one_after_another(
    received: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (transfer, received_module):
        monkeypatch.setattr(module, "MOST_EDGES", 4)
    first = freight_of()
    bring(received, first)
    second = freight_of(round=2, changed={str(g): Packed(torch.ones(SIZES[g])) for g in GROUPS[::2]})
    download = Download(second)
    questions = 0
    while download.unsure:
        assert download.take(None, received.offered(offered(second), NAMED))
        for part in download.cut(MOST, download.left):
            assert download.take(part, received.take(piece(second, part)))
        questions += 1
    assert (questions, download.undone, download.left) == (2, 0, [])
    assert comes_out(received, second)


def test_an_update_that_a_power_cut_left_half_written_is_fetched_again(tmp_path: Path) -> None:
    """The journal has reached the disk and says that all is there; of the last tensors only zeros are."""
    every = {str(group): one for group, one in weights("float32").items() if SIZES[group]}
    entries = {name: entry_for(one) for name, one in every.items()}
    stream = torch.cat([part for one in every.values() for part in bytes_of(one)])
    file = Transfer(tmp_path / "update", entries).begin()
    file.write(((0, file.nbytes),), stream, {name: digest(one) for name, one in every.items()})
    last = list(entries)[-2:]
    content = bytearray(file.file.read_bytes())
    nbytes = sum(entries[name].nbytes for name in last)
    content[-nbytes:] = bytes(nbytes)
    file.file.write_bytes(content)
    upload = Upload("ward", 1, taken_over(Transfer(file.file, entries)), MOST)
    assert upload.unsure
    assert upload.take(None, Piece("ward", 1, "", (), torch.empty(0, dtype=torch.uint8), ""))
    assert upload.left == [(file.nbytes - nbytes, file.nbytes)]


# --------------------------------------------------------------------------------------------------------- differences


def public(dtype: WireDtype, rounds: int) -> list[Freight]:
    """Broadcasts that follow one another; of the gates none changes after the first."""
    chance = torch.Generator().manual_seed(0)
    master = {group: torch.randn(size, generator=chance) for group, size in SIZES.items()}
    model: PublicModel = first(master, dtype, lambda tensor: tensor)
    found = []
    for number in range(1, rounds + 1):
        message = Broadcast(number, model.weights, differences=model.differences, before=model.before)
        found.append(Freight(message))
        new = {g: v if g.kind == "gate" else v + 0.1 * torch.randn(len(v), generator=chance) for g, v in master.items()}
        model, master = following(model, master, new, dtype, number, lambda tensor: tensor), new
    return found


@pytest.fixture(params=BLOCKS)
def small(request: pytest.FixtureRequest) -> WireDtype:
    dtype: WireDtype = request.param
    return dtype


def weighed(freight: Freight) -> tuple[int, int]:
    """Bytes of what changed: as differences, and whole."""
    message = freight.broadcast
    changed = message.differences or message.weights
    return sum(p.nbytes for p in message.differences.values()), sum(message.weights[g].nbytes for g in changed)


def test_differences_come_in_pieces_and_what_comes_out_is_what_was_announced(
    received: Received, small: WireDtype
) -> None:
    one, two, three, four, five = public(small, 5)
    assert bring(received, one) == weighed(one)[1]
    for freight in (two, three):
        assert bring(received, freight) == weighed(freight)[0]
        assert comes_out(received, freight)
        assert bring(received, freight) == 0
    assert bring(received, five) == weighed(five)[1]  # it missed one: it gets whole what has changed
    assert comes_out(received, five)
    late = Received("ward", received.weights.parent / "late")
    assert bring(late, four) == weighed(one)[1]
    assert bring(late, five) == weighed(five)[0]
    assert late.weights.read_bytes() == received.weights.read_bytes()
    assert [path.name for path in late.weights.parent.iterdir()] == [late.weights.name]


def test_differences_travel_with_a_broadcast_as_well(received: Received, small: WireDtype) -> None:
    one, two, three = public(small, 3)
    for before, freight in ((None, one), (one, two), (two, three)):
        lacks = freight.lacked({} if before is None else before.digests)
        assert bool(lacks.whole) == (before is None)
        assert len(lacks.differences) == (0 if before is None else len(freight.broadcast.differences))
        assert freight.weighs(lacks) == weighed(freight)[before is None]
        message: Broadcast = decode(travel(freight.parcel(lacks)), Broadcast)
        for _ in range(2):  # its answer was lost, and it is asked again
            answer = received.completed(message, NAMED)
            assert isinstance(answer, Broadcast)
            assert same(answer.weights, freight.broadcast.weights)
            assert (answer.kept, answer.differences, answer.before) == ({}, {}, {})
    assert three.lacked(one.digests).differences == ()  # it missed one
    assert three.lacked(three.digests) == three.lacked(three.digests | {"more": ""})
    assert three.weighs(three.lacked(three.digests)) == 0


def test_a_client_without_what_a_difference_is_added_to_says_so(received: Received, small: WireDtype) -> None:
    one, two, three = public(small, 3)
    message: Broadcast = decode(travel(three.parcel(three.lacked(two.digests))), Broadcast)
    for held in (None, one):
        if held is not None:
            bring(received, held)
        answer = received.completed(message, NAMED)
        assert answer == Lacking("ward", 3, "", ())
    bring(received, two)
    assert isinstance(received.completed(message, NAMED), Broadcast)


def test_a_client_restarted_in_the_middle_of_differences_goes_on_where_it_was(
    received: Received, small: WireDtype
) -> None:
    one, two = public(small, 2)
    bring(received, one)
    answer = received.offered(offered(two), NAMED)
    every = pieces(two, answer)
    for part in every[:3]:
        received.take(piece(two, part, answer.transfer))
    again = Received("ward", received.weights.parent)
    left = again.offered(offered(two), NAMED)
    assert pieces(two, left) == every[3:]
    for part in every[3:]:
        left = again.take(piece(two, part, left.transfer))
    assert left.ranges == ()
    assert again.take(piece(two, every[-1], left.transfer)).ranges == ()  # the last one, once more
    assert comes_out(again, two)


def test_differences_that_a_kill_left_behind_are_added_to_nothing_else(received: Received, small: WireDtype) -> None:
    one, two = public(small, 2)
    bring(received, one)
    answer = received.offered(offered(two), NAMED)
    files = [received.added, received.added.with_name(f"{received.added.name}.journal")]
    left = {file: file.read_bytes() for file in files}
    other = freight_of("bfloat16", seed=7).broadcast
    with pytest.raises(MessageError, match="a broadcast without shared, which this model trains"):
        received.completed(replace(other, weights=dict(list(other.weights.items())[-1:])), NAMED)
    assert isinstance(received.completed(other, NAMED), Broadcast)
    held = received.weights.read_bytes()
    for file, content in left.items():
        file.write_bytes(content)
    for part in pieces(two, answer):
        said = received.take(piece(two, part, answer.transfer))
    assert said.transfer == ""
    assert received.weights.read_bytes() == held
    assert not any(file.exists() for file in files)
    bring(received, two)
    assert comes_out(received, two)


def test_a_client_killed_before_it_could_add_adds_then(
    received: Received, small: WireDtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = public(small, 2)
    bring(received, one)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(received_module, "advanced", killed)
        with pytest.raises(KeyboardInterrupt):
            bring(received, two)
    assert bring(Received("ward", received.weights.parent), two) == 0
    assert comes_out(received, two)


def test_damaged_weights_to_add_to_cost_those_groups(received: Received, small: WireDtype) -> None:
    one, two = public(small, 2)
    bring(received, one)
    content = bytearray(received.weights.read_bytes())
    content[-100] ^= 1  # of an expert
    received.weights.write_bytes(bytes(content))
    download, moved = Download(two), []
    while download.unsure:
        download.take(None, received.offered(offered(two), NAMED))
        for part in download.cut(MOST, download.left):
            moved.append(size_of(part))
            sent: Piece = decode(download.ask(part).parcel, Piece)
            if not download.take(part, received.take(sent)):
                break
    assert (download.left, download.undone) == ([], 1)
    assert weighed(two)[0] < sum(moved) <= weighed(two)[0] + 2 * 2000
    assert comes_out(received, two)


def test_no_differences_are_taken_that_could_not_be_added(received: Received) -> None:
    one, two = public("int8", 2)
    bring(received, one)
    offer = offered(two)
    for wrong in (
        replace(offer, difference="float32"),
        replace(offer, difference="int9"),
        replace(offer, dtype="float32"),
        replace(offer, before={**offer.before, "expert[7,7]": "0" * 32}),
    ):
        with pytest.raises(MessageError, match=r"an offer of differences in (int8|int9|float32) to weights in"):
            received.offered(wrong, NAMED)
    group = next(iter(two.broadcast.differences))
    lone = Broadcast(2, {}, differences={group: two.broadcast.differences[group]})
    with pytest.raises(MessageError, match="a difference of shared, and no digest of what it makes"):
        received.completed(lone, NAMED)
    with pytest.raises(MessageError, match="of which this model does not train so many"):
        received.completed(replace(lone, kept={"shared": two.digests["shared"]}), NAMED | {"shared": 699})
    assert comes_out(received, one)
