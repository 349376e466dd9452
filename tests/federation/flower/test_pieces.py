"""Whole runs whose messages are cut small, over links on which things go wrong: the same bytes as in one process."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalign.config.run import Config
from fedalign.federation.flower import carrier, talks
from fedalign.federation.flower import sites as federation
from fedalign.federation.flower.carrier import NOTHING, Cargo, Carrier, Freight
from fedalign.federation.flower.coordinator import Coordinator
from fedalign.federation.flower.link import Reply
from fedalign.federation.flower.talks import WAKE, Ask, Talk
from fedalign.federation.messages import Parcel, decode, encode
from fedalign.federation.service import Service
from fedalign.federation.transfer import edges_of, minus, size_of
from fedalign.files import fingerprint
from fedalign.protocol import SHARED, Broadcast, Failure, Fetch, Lacking, Packed, Piece, Request, Start, Statistics
from fedalign.server.results import WRITTEN, RunFolder
from fedalign.server.run import execute
from tests.federation.flower.scripted import Clock, Node, ScriptedLink
from tests.federation.flower.test_coordinator import (  # noqa: F401 # fixtures
    SITES,
    Direct,
    coordinated,
    house,
    in_process,
    same_runs,
    sites,
)
from tests.federation.test_messages import travel
from tests.foreign import check_foreign_files_are_kept
from tests.server.test_run import Silent, metrics

PIECE_MB = 0.01
SMALL = (f"wire.piece_mb={PIECE_MB}", "run.rounds=1")
Change = Callable[[str, Parcel], Parcel | str | None]


class Careless(Direct):
    """A link that counts bytes of pieces as they reach a site or leave it, and to which something may happen.

    `accident(verb, node, number)` says what becomes of a message: "" nothing, "lost" on its way there, "unheard" on
    its way back, "damaged", "twice", or an exception that it raises itself.
    """

    def __init__(self, services: dict[str, Any], accident: Callable[[str, int, int], str] = lambda *_: "") -> None:
        super().__init__(services)
        self.accident = accident
        self.number = 0
        self.moved: Counter[tuple[str, int, str, tuple[int, ...], int]] = (
            Counter()
        )  # way, node, of what, range -> times
        self.longest = 0

    def ask(self, kind: str, parcel: Parcel, nodes: Sequence[int]) -> dict[str, int]:
        self.longest = max(self.longest, sum(p.nbytes for pieces in parcel.arrays.values() for p in pieces))
        return super().ask(kind, parcel, nodes)

    def replies(self, messages: Sequence[str]) -> Iterator[Reply]:
        for message in messages[::-1]:  # not in the order of asking
            if message in self._waiting:
                kind, parcel, node = self._waiting.pop(message)
                self.number += 1
                what = self.accident(kind, node, self.number) if kind in ("piece", "update") else ""
                if what == "lost":
                    yield Reply(message, "its SuperNode is gone")
                    continue
                there = spoilt(travel(parcel)) if what == "damaged" and kind == "piece" else travel(parcel)
                for _ in range(1 + (what == "twice")):
                    answer = self.services[node].answer(kind, there)
                self._count(kind, node, there, answer)
                if what == "unheard":
                    yield Reply(message, "its process ended before it could answer")
                    continue
                self.longest = max(self.longest, sum(p.nbytes for pieces in answer.arrays.values() for p in pieces))
                yield Reply(
                    message, spoilt(travel(answer)) if what == "damaged" and kind == "update" else travel(answer)
                )

    def _count(self, kind: str, node: int, asked: Parcel, answer: Parcel) -> None:
        if kind == "piece":
            piece = decode(asked, Piece)
            self.moved["down", node, piece.transfer, piece.ranges, len(piece.data)] += 1
        elif kind == "update" and answer.head["kind"] == "piece":
            fetch = decode(asked, Fetch)
            self.moved["up", node, f"{fetch.round} {fetch.names}", (fetch.start,), len(decode(answer, Piece).data)] += 1

    @property
    def again(self) -> list[int]:
        """Bytes of each piece that moved more than once."""
        return [key[-1] for key, times in self.moved.items() for _ in range(times - 1) if key[-1]]


def spoilt(parcel: Parcel) -> Parcel:
    piece = decode(parcel, Piece)
    data = piece.data.clone()
    data[len(data) // 2] ^= 1
    return encode(replace(piece, data=data))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in (federation, talks, carrier):
        monkeypatch.setattr(module, "time", clock)


def go(out: Path, link: Direct, config: Config, *, resume: bool = False) -> dict[str, Any]:
    folder = RunFolder(out)
    if not resume:
        folder.begin(config)
    return execute(Coordinator.connect(link, config, folder), folder, Silent())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("undisturbed")}


@pytest.fixture
def expected(
    undisturbed: dict[str, Path],
    coordinated: Callable[..., Config],  # noqa: F811 # a fixture
    house: Path,  # noqa: F811 # a fixture
) -> Path:
    """The run in one process, done once."""
    out = undisturbed["folder"] / "here"
    if not out.exists():
        in_process(out, house, coordinated(*SMALL))
    return out


Small = tuple[Config, Callable[[], dict[str, Any]]]


@pytest.fixture
def small(
    coordinated: Callable[..., Config],  # noqa: F811 # a fixture
    house: Path,  # noqa: F811 # a fixture
    tmp_path: Path,
) -> Small:
    """A run whose messages are cut small, and what starts its sites, also once more on the same disks."""
    config = coordinated(*SMALL)
    return config, lambda: sites(tmp_path / "sites", house, config)


def test_what_is_larger_than_a_piece_travels_in_pieces_whatever_it_is(
    small: Small,
    tmp_path: Path,
    expected: Path,
) -> None:
    config, started = small
    link = Careless(started())
    summary = go(tmp_path / "run", link, config)
    same_runs(tmp_path / "run", expected)
    assert summary["failures"] == []
    assert link.longest <= config.wire.piece_nbytes
    assert link.again == []
    down = sum(key[-1] for key in link.moved if key[0] == "down")
    up = sum(key[-1] for key in link.moved if key[0] == "up" and not key[2].startswith("0 "))
    line = metrics(tmp_path / "run")[1]
    assert line["bytes_down"] == pytest.approx(down, abs=1000)  # the algorithm's state travels with the broadcast
    assert line["bytes_up"] - line["bytes_up_statistics"] == up
    assert not (tmp_path / "run" / "transfers").exists()
    for name in ("received", "arriving", "update"):
        assert not list((tmp_path / "sites").rglob(f"{name}.safetensors*"))


@pytest.mark.parametrize("what", ["lost", "unheard", "damaged", "twice"])
def test_a_piece_that_goes_wrong_costs_that_piece(
    small: Small,
    tmp_path: Path,
    expected: Path,
    what: str,
) -> None:
    (config, started), chance, happened = small, random.Random(what), []

    def accident(verb: str, node: int, number: int) -> str:
        if chance.random() < 0.15:
            happened.append(verb)
            return what
        return ""

    link = Careless(started(), accident)
    summary = go(tmp_path / "run", link, config)
    same_runs(tmp_path / "run", expected, resumed=True)
    assert summary["failures"] == []
    assert {"piece", "update"} == set(happened)
    assert len(link.again) <= len(happened)
    assert all(nbytes <= config.wire.piece_nbytes for nbytes in link.again)
    assert bool(link.again) == (what in ("unheard", "damaged"))


@pytest.mark.parametrize("way", ["piece", "update"])
@pytest.mark.parametrize("seed", range(3))
def test_a_coordinator_that_is_killed_in_a_transfer_goes_on_where_it_was(
    small: Small,
    tmp_path: Path,
    expected: Path,
    way: str,
    seed: int,
) -> None:
    (config, started), chance = small, random.Random(f"{way}{seed}")
    services = started()
    left = chance.randrange(5, 40)

    def accident(verb: str, node: int, number: int) -> str:
        nonlocal left
        left -= verb == way
        if verb == way and left == 0:
            raise KeyboardInterrupt
        return ""

    link = Careless(services, accident)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", link, config)
    moved = link.moved
    link = Careless(services if seed else started())  # the sites restarted, too
    link.moved = moved
    go(tmp_path / "run", link, config, resume=True)
    same_runs(tmp_path / "run", expected, resumed=True)
    assert sum(link.again) <= len(SITES) * carrier.AHEAD * config.wire.piece_nbytes  # what was under way at each site


DIFFERENCES = (f"wire.piece_mb={PIECE_MB / 5}", "run.rounds=2", "wire.down=int8", "algorithm.name=fedavg")


@pytest.fixture
def differing(
    undisturbed: dict[str, Path],
    coordinated: Callable[..., Config],  # noqa: F811 # a fixture
    house: Path,  # noqa: F811 # a fixture
) -> tuple[Config, Path]:
    """A run whose broadcasts are differences in pieces, and the same in one process."""
    config, out = coordinated(*DIFFERENCES), undisturbed["folder"] / "differing"
    if not out.exists():
        in_process(out, house, config)
    return config, out


def sent_down(link: Careless) -> int:
    return sum(key[-1] * times for key, times in link.moved.items() if key[0] == "down")


def test_differences_travel_in_pieces(
    differing: tuple[Config, Path],
    house: Path,  # noqa: F811 # a fixture
    tmp_path: Path,
) -> None:
    config, expected = differing
    link = Careless(sites(tmp_path / "sites", house, config))
    assert go(tmp_path / "run", link, config)["failures"] == []
    same_runs(tmp_path / "run", expected)  # the same bytes_down, too
    assert link.again == []
    assert link.longest <= config.wire.piece_nbytes
    assert sum(line["bytes_down"] for line in metrics(tmp_path / "run")) == sent_down(link)


@pytest.mark.parametrize("seed", range(4))
def test_a_coordinator_that_is_killed_in_differences_goes_on_where_it_was(
    differing: tuple[Config, Path],
    house: Path,  # noqa: F811 # a fixture
    tmp_path: Path,
    seed: int,
) -> None:
    """Weights of the layout and of a checkpoint are in two orders, and make one transfer."""
    config, expected = differing
    services = sites(tmp_path / "sites", house, config)
    calm = sum(line["bytes_down"] for line in metrics(expected))
    at = random.Random(seed).randrange(1, calm)

    def accident(verb: str, node: int, number: int) -> str:
        if sent_down(link) > at:
            raise KeyboardInterrupt
        return ""

    link = Careless(services, accident)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", link, config)
    before = sent_down(link)
    assert at < before < calm
    link = Careless(services if seed % 2 else sites(tmp_path / "sites", house, config))  # the sites restarted, too
    go(tmp_path / "run", link, config, resume=True)
    same_runs(tmp_path / "run", expected, resumed=True)
    assert before + sent_down(link) <= calm + len(SITES) * carrier.AHEAD * config.wire.piece_nbytes


def test_a_site_that_is_killed_and_started_again_goes_on_where_it_was(
    small: Small,
    tmp_path: Path,
    expected: Path,
) -> None:
    """Its model, its process and its node's number are new; its disk is not."""
    config, started = small
    services = started()
    fresh = started()
    kills: list[str] = []

    def accident(verb: str, node: int, number: int) -> str:
        if (verb, 1) == (verb, node) and verb not in kills and number > 20:
            kills.append(verb)
            link.services[1] = list(fresh.values())[1]
            return "unheard"
        return ""

    link = Careless(services, accident)
    summary = go(tmp_path / "run", link, config)
    same_runs(tmp_path / "run", expected, resumed=True)
    assert summary["failures"] == []
    assert sorted(kills) == ["piece", "update"]
    assert len(link.again) <= 2


def test_an_update_that_has_changed_meanwhile_is_fetched_anew(
    small: Small,
    tmp_path: Path,
    expected: Path,
) -> None:
    """The coordinator has a part of an update from before it was killed, and the site has trained to another since."""
    config, started = small
    services = started()
    fetched = 0

    def accident(verb: str, node: int, number: int) -> str:
        nonlocal fetched
        fetched += verb == "update" and node == 2
        if fetched == 9:
            raise KeyboardInterrupt
        return ""

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", Careless(services, accident), config)
    check_foreign_files_are_kept(tmp_path / "run", "run", WRITTEN)
    (kept,) = (tmp_path / "run" / "transfers").glob("round-00001/ward.update.safetensors")
    content = bytearray(kept.read_bytes())
    journal = kept.with_name(f"{kept.name}.journal")
    first, *lines = journal.read_text().splitlines()
    content[-50:] = bytes(50)
    kept.write_bytes(bytes(content))
    changed = [line.replace('": "', '": "f') if number % 2 else line for number, line in enumerate(lines)]
    journal.write_text("".join(f"{line}\n" for line in (first, *changed)))
    go(tmp_path / "run", Careless(services), config, resume=True)
    same_runs(tmp_path / "run", expected, resumed=True)


def forgetful(kind: str, asked: Parcel, answer: Parcel, whole: list[int]) -> Parcel:
    """A site that acknowledges each piece, and then says that it lacks all of it."""
    if answer.head["kind"] != "lacking" or kind not in ("offer", "piece"):
        return answer
    said = decode(answer, Lacking)
    whole += said.ranges[-1:] if kind == "offer" and not whole else []
    edges = (0, *whole)
    if kind == "piece":
        piece = decode(asked, Piece)
        edges = (0, *piece.ranges, *whole)
    return encode(replace(said, ranges=edges))


def fickle(kind: str, asked: Parcel, answer: Parcel, whole: list[int]) -> Parcel:
    """A site that acknowledges the first piece alone, knows nothing of the others, and then lacks all of it again."""
    if answer.head["kind"] != "lacking" or kind not in ("offer", "piece"):
        return answer
    said = decode(answer, Lacking)
    whole += said.ranges[-1:] if not whole else []
    if kind == "piece" and (piece := decode(asked, Piece)).ranges[0]:
        return encode(replace(said, transfer="another"))
    return encode(replace(said, ranges=(0 if kind == "offer" else len(piece.data), *whole)))


def inconstant(kind: str, asked: Parcel, answer: Parcel, whole: list[int]) -> Parcel:
    """A site whose digests are never those of what it sends."""
    if answer.head["kind"] != "piece" or kind != "update":
        return answer
    whole.append(len(whole))
    piece = decode(answer, Piece)
    return encode(replace(piece, digests=dict.fromkeys(piece.digests, f"{len(whole):032x}")))


@pytest.mark.parametrize("lie", [forgetful, fickle, inconstant])
def test_a_site_that_takes_back_what_it_said_does_not_hold_up_the_others(
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lie: Callable[[str, Parcel, Parcel, list[int]], Parcel],
) -> None:
    config, started = small
    services = started()
    liar, whole = services["lab"], list[int]()
    honest = liar.answer
    monkeypatch.setattr(liar, "answer", lambda kind, parcel: lie(kind, parcel, honest(kind, parcel), whole))

    def accident(verb: str, node: int, number: int) -> str:
        assert number < 2000, "without end"
        return ""

    go(tmp_path / "run", Careless(services, accident), config)
    failures = metrics(tmp_path / "run")[-1]["failures"]
    assert {(failure["client"], failure["reason"]) for failure in failures} == {
        ("lab", "6 times it took back what it had acknowledged or sent")
    }


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_site_that_drips_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """It is never silent for long: each piece comes just before it would be too late."""
    clock = Clock()
    monkeypatch.setattr(carrier, "time", clock)
    groups = {SHARED: 1000}
    cargo = Cargo(tmp_path, groups, "float32", 40)
    post = Carrier(cargo, 100.0, lambda name: 1, lambda name: 1)
    broadcast = Broadcast(1, {SHARED: Packed(torch.zeros(1000))})
    talk: Talk[Any]
    if way == "down":
        ((_, talk),) = post.broadcast("train", broadcast, ["lab"], Statistics)
    else:
        _, talk = post.update(Request("lab", 1, (SHARED,)))
    transfer, held = Freight(broadcast).transfer.identity, 0

    def answered(ask: Ask) -> Any:
        nonlocal held
        clock.now += 60
        if way == "down":
            held += 40 * (ask.tag is not None)
            answer: Any = Lacking("lab", 1, transfer, (held, 4000))
        else:
            data, digest = torch.zeros(40, dtype=torch.uint8), fingerprint([bytes(40)])
            answer = Piece("lab", 1, "", (), data, digest, {"shared": fingerprint([bytes(4000)])})
        return ask.tag, Reply("", encode(answer))

    def held_to_its_end() -> Talk[None]:
        ended.append((yield from talk))

    ended: list[object] = []
    outer = held_to_its_end()
    asks = deque(next(outer) or ())
    with contextlib.suppress(StopIteration):
        while True:
            asks += outer.send(answered(asks.popleft())) or ()
    told = "its transfer of 4.0 kB took longer than 100.16 s: federation.timeout_seconds, and 25.0 kB a second"
    assert ended == [Failure("lab", "train" if way == "down" else "update", told)]
    assert clock.now == 1120.0


@pytest.mark.parametrize(
    ("seconds", "sizes"),
    [
        (1.0, [100, 100, 200, 200, 400, 400, 800, 800, 800, 200]),
        (20.0, [100] * 40),
        (50.0, [100, 100, 50, 50, *[40] * 92, 20]),
    ],
)
def test_pieces_grow_on_a_fast_line_and_shrink_on_a_slow_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, sizes: list[int]
) -> None:
    clock = Clock()
    for name, value in (("time", clock), ("FIRST", 100), ("LEAST", 40)):
        monkeypatch.setattr(carrier, name, value)
    post = Carrier(Cargo(tmp_path, {SHARED: 1000}, "float32", 800), 1e6, lambda name: 1, lambda name: 1)
    broadcast = Broadcast(1, {SHARED: Packed(torch.randn(1000))})
    transfer, asked, lacking = Freight(broadcast).transfer, list[int](), [(0, 4000)]
    ((_, talk),) = post.broadcast("train", broadcast, ["lab"], Statistics)
    asks = deque(next(talk) or ())
    while (ask := asks.popleft()).verb != "train":
        asked += [ask.nbytes] * (ask.verb == "piece")
        lacking = minus(lacking, ask.tag or ())
        clock.now += seconds
        asks += talk.send((ask.tag, Reply("", encode(Lacking("lab", 1, transfer.identity, edges_of(lacking)))))) or ()
    assert asked == sizes


def test_a_line_that_became_slow_gets_pieces_that_it_can_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site is not lost because its pieces grew while its line was fast."""
    clock = Clock()
    for name, value in (("time", clock), ("FIRST", 100), ("LEAST", 10)):
        monkeypatch.setattr(carrier, name, value)
    post = Carrier(Cargo(tmp_path, {SHARED: 1000}, "float32", 800), 1e6, lambda name: 1, lambda name: 1)
    broadcast = Broadcast(1, {SHARED: Packed(torch.randn(1000))})
    transfer, lost, lacking = Freight(broadcast).transfer, list[int](), [(0, 4000)]
    ((_, talk),) = post.broadcast("train", broadcast, ["lab"], Statistics)
    asks = deque(next(talk) or ())
    while (ask := asks.popleft()).verb != "train":
        clock.now += 20 * (size_of(lacking) < 2500)  # such a piece neither grows nor shrinks
        if slow := ask.nbytes > 30 and size_of(lacking) < 2500:
            lost.append(ask.nbytes)
        else:
            lacking = minus(lacking, ask.tag or ())
        said = encode(Lacking("lab", 1, transfer.identity, edges_of(lacking)))
        asks += talk.send((ask.tag, None if slow else Reply("", said))) or ()
        while not asks:
            asks += talk.send((WAKE, None)) or ()
    assert lacking == []
    assert lost[0] == 800
    assert len(lost) <= 5


def test_no_piece_stays_in_memory_until_it_is_answered(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator lets go of one that it has sent, and of one that has come before it looks for the next."""
    config, started = small
    sent, came = list[weakref.ref[Parcel]](), list[weakref.ref[Parcel]]()

    class Watched(Careless):
        def ask(self, kind: str, parcel: Parcel, nodes: Sequence[int]) -> dict[str, int]:
            if kind == "piece":
                sent.append(weakref.ref(parcel))
            return super().ask(kind, travel(parcel), nodes)

        def replies(self, messages: Sequence[str]) -> Iterator[Reply]:
            assert [one for one in (*sent, *came) if one() is not None] == []
            for reply in super().replies(messages):
                if isinstance(reply.content, Parcel) and reply.content.head["kind"] == "piece":
                    came.append(weakref.ref(reply.content))
                yield reply

    go(tmp_path / "run", Watched(started()), config)
    assert len(sent) > 10
    assert len(came) > 10


@pytest.mark.parametrize(
    "constant",
    [
        {"a": "float32[4294967296,4294967296]"},  # of 2 ** 64 values 0 are left in 64 bits
        {"a": "float32[2147483648,4294967296]"},
        {"a": f"float32[{10**30}]"},
        {"a": f"float32[0,{10**30}]"},
        {"a": f"float32[1{',1' * 100}]"},
        {"a": "float32[-1]"},
        {"a": "float33[1]"},
        {"a": "float32[1]", "b": "float32[30]"},
    ],
    ids=str,
)
def test_a_start_that_no_model_has_is_refused_and_no_room_is_made_for_it(
    tmp_path: Path, constant: dict[str, str]
) -> None:
    post = Carrier(Cargo(tmp_path, {SHARED: 10}, "float32", 40, 100), 100.0, lambda name: 1, lambda name: 1)
    _, answer = begun(post, {f"constant/{name}": about for name, about in constant.items()})
    assert isinstance(answer, Failure)
    assert answer.reason.startswith(("no tensor: ", "it would send 124 bytes beside the weights"))
    assert list(tmp_path.iterdir()) == []


def test_a_start_whose_names_are_those_of_scales_does_not_end_the_next_sites(tmp_path: Path) -> None:
    post = Carrier(Cargo(tmp_path, {SHARED: 10}, "float32", 40, 100), 100.0, lambda name: 1, lambda name: 1)
    for constant in ({"constant/a": "float32[1]", "constant/a.scale": "float32[]"}, {}):
        asks, answer = begun(post, constant)
        assert (asks[0].verb, answer) == ("update", None)


def begun(post: Carrier, constant: dict[str, str]) -> tuple[list[Ask], Any]:
    """The next thing that a site is asked that says what the first round starts from, or what became of it."""
    talk = post.start("lab")
    next(talk)
    start = Start("lab", {}, {}, {"shared": "float32[10]", **constant})
    try:
        return talk.send((None, Reply("", encode(start)))) or [], None
    except StopIteration as end:
        return [], end.value


def test_a_talk_that_ends_with_an_answer_under_way_leaves_it_be() -> None:
    """Both answers of a site are there in one look; the first ends its talk."""
    link = ScriptedLink(Clock(), {1: Node({"update": lambda _: NOTHING})})
    told: list[object] = []

    def talk() -> Talk[str]:
        told.append((yield [Ask("update", Parcel(NOTHING.head, {})), Ask("update", Parcel(NOTHING.head, {}))]))
        return "over"

    talks_of = talks.Talks(link, lambda name: 1, 100.0, 1.0, lambda *_: None)
    assert list(talks_of.hold([("lab", talk())])) == [("lab", "over")]
    assert len(told) == 1


def test_small_messages_are_as_many_as_without_pieces(
    coordinated: Callable[..., Config],  # noqa: F811 # a fixture
    house: Path,  # noqa: F811 # a fixture
    tmp_path: Path,
) -> None:
    config = coordinated("run.rounds=2")
    link = Careless(sites(tmp_path / "sites", house, config))
    go(tmp_path / "run", link, config)
    counts = Counter(kind for kind, _ in link.asked)
    assert counts == {"hello": 3, "start": 1, "train": 6, "update": 6, "evaluate": 3, "finish": 3}


def test_pieces_need_no_model(
    small: Small,
    tmp_path: Path,
) -> None:
    config, started = small
    services = started()
    loaded: list[str] = []
    link = Careless(services)
    for service in link.services:
        assert isinstance(service, Service)
        honest = service._open_client

        def opening(honest: Any = honest) -> Any:
            loaded.append(link.asked[-1][0])
            return honest()

        service._open_client = opening
        answer = service.answer

        def closing(
            verb: str, parcel: Parcel, *, scores: bool = True, service: Service = service, answer: Any = answer
        ) -> Parcel:
            said: Parcel = answer(verb, parcel, scores=scores)
            if verb in ("offer", "piece", "update"):
                assert service._client is None
            else:
                service.close()  # as a process that ends
            return said

        service.answer = closing  # type: ignore[method-assign] # as each message starts a process
    go(tmp_path / "run", link, config)
    assert set(loaded) <= {"hello", "start", "train", "evaluate"}
