"""Our messages over Flower's grid, whose SuperLink and nodes are played here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedalign.federation.flower import link
from fedalign.federation.flower.link import (
    REASONS,
    UNKNOWN,
    GridLink,
    Reply,
    RunAbout,
    from_records,
    reason,
    to_records,
)
from fedalign.federation.messages import MessageError, Parcel, decode, encode
from fedalign.protocol import SHARED, Broadcast
from tests.federation.test_messages import packed, same

Answer = Callable[[Message], Message]
RUN = RunAbout("[run]\nseed = 1\n", "night-7", "/out")


@pytest.fixture(autouse=True)
def _in_a_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_run_id": 1, "_node_id": 1, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


class PlayedGrid(Grid):
    """Keeps messages as a SuperLink does, and answers with `answer`."""

    def __init__(self, nodes: list[int], answer: Answer) -> None:
        self.online, self.answer = nodes, answer
        self.pushed: list[Message] = []
        self.too_large = False
        self._replies: dict[str, Message] = {}

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> object:  # type: ignore[override] # Flower's may be written to
        return None

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in [] if self.too_large else messages:
            known = message.metadata.dst_node_id in self.online
            message.metadata.__dict__["_message_id"] = f"m{len(self.pushed)}" if known else ""
            ids.append(message.metadata.message_id)
            self.pushed.append(message)
            if known:
                self._replies[message.metadata.message_id] = self.answer(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(one) for one in message_ids if one in self._replies]

    def send_and_receive(self, *_: object, **__: object) -> Iterable[Message]:
        raise NotImplementedError


def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def test_nodes_are_sorted() -> None:
    assert list(GridLink(PlayedGrid([7, 2, 5], echo), RUN, 60).nodes()) == [2, 5, 7]


def test_a_question_reaches_each_node_and_its_answer_comes_back_once() -> None:
    update = Broadcast(1, packed({SHARED: 300}, "int8"))
    grid = PlayedGrid([1, 2], echo)
    link = GridLink(grid, RUN, expiry=77.0)
    asked = link.ask("update", encode(update), [2, 1])
    assert list(asked.values()) == [2, 1]
    assert [one.metadata.dst_node_id for one in grid.pushed] == [2, 1]
    assert {(one.metadata.message_type, one.metadata.ttl) for one in grid.pushed} == {("query.update", 77.0)}
    replies = list(link.replies([*asked]))
    assert [reply.message for reply in replies] == list(asked)
    for reply in replies:
        assert isinstance(reply.content, Parcel)
        assert same(decode(reply.content, Broadcast), update)
    assert list(link.replies([*asked])) == []


def test_what_all_nodes_are_sent_is_made_once() -> None:
    grid = PlayedGrid([1, 2, 3], echo)
    GridLink(grid, RUN, 60).ask("train", encode(Broadcast(1, packed({SHARED: 3}, "float32"))), [1, 2, 3])
    assert len({id(one.content) for one in grid.pushed}) == 1
    assert same(decode(from_records(grid.pushed[0].content), Broadcast).round, 1)


def test_each_message_says_what_run_it_belongs_to() -> None:
    grid = PlayedGrid([1], echo)
    GridLink(grid, RUN, 60).ask("train", encode(Broadcast(1, {})), [1])
    assert RunAbout.of(grid.pushed[0]) == RUN
    with pytest.raises(MessageError, match="not a message of FedAlign-MoE: no 'run'"):
        RunAbout.of(Message(to_records(encode(Broadcast(1, {}))), 1, "train"))


def test_nodes_that_the_superlink_knows_no_more_are_left_out() -> None:
    link = GridLink(PlayedGrid([1, 3], echo), RUN, 60)
    asked = link.ask("train", encode(Broadcast(1, {})), [1, 2, 3, 4])
    assert list(asked.values()) == [1, 3]
    assert len(list(link.replies([*asked]))) == 2


def test_what_is_too_large_for_flower_reaches_nobody() -> None:
    grid = PlayedGrid([1], echo)
    grid.too_large = True
    assert GridLink(grid, RUN, 60).ask("train", encode(Broadcast(1, {})), [1]) == {}


def test_nothing_is_asked_of_nobody() -> None:
    link = GridLink(PlayedGrid([], echo), RUN, 60)
    assert link.ask("train", encode(Broadcast(1, {})), []) == {}
    assert list(link.replies([])) == []


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda m: Message(Error(5, "gone"), reply_to=m), "its SuperNode is gone"),
        (lambda m: Message(Error(8), reply_to=m), "its process ended before it could answer"),
        (lambda m: Message(Error(42, "strange"), reply_to=m), "Flower's error 42: strange"),
        (lambda m: Message(RecordDict(), reply_to=m), "not a message of FedAlign-MoE"),
        (
            lambda m: Message(RecordDict({"head": ConfigRecord({"json": "["})}), reply_to=m),
            "not a message of FedAlign-MoE",
        ),
    ],
)
def test_what_is_no_answer_is_a_reason(answer: Answer, expected: str) -> None:
    link = GridLink(PlayedGrid([1], answer), RUN, 60)
    (asked,) = link.ask("train", encode(Broadcast(1, {})), [1])
    (reply,) = link.replies([asked])
    assert reply == Reply(asked, reply.content)
    assert isinstance(reply.content, str)
    assert reply.content.startswith(expected)


def test_flowers_errors_are_those_that_we_explain() -> None:
    from flwr.common.constant import ErrorCode  # noqa: PLC0415 - not public, so this test says when it moves

    codes = {value for name, value in vars(ErrorCode).items() if name.isupper()}
    assert codes > REASONS.keys()
    assert ErrorCode.NODE_UNAVAILABLE == 5
    assert ErrorCode.CLIENT_APP_CRASHED == 8
    assert all(reason(Error(code)) == words for code, words in REASONS.items())


def test_a_parcel_is_a_reply_like_any_other() -> None:
    failure = encode(Broadcast(0, {}))
    grid = PlayedGrid([4], lambda message: Message(to_records(failure), reply_to=message))
    link = GridLink(grid, RUN, 60)
    (reply,) = link.replies(list(link.ask("finish", failure, [4])))
    assert reply.content == failure


class SlowGrid(PlayedGrid):
    """As Flower's over HTTP: it takes replies out of the SuperLink, then waits for the parts of some."""

    def __init__(self, nodes: list[int], parts: dict[int, threading.Event]) -> None:
        super().__init__(nodes, echo)
        self.parts, self.silent, self.lost, self.looks = parts, set[int](), set[int](), 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.looks += 1
        found = []
        for asked in list(message_ids):
            reply = self._replies.get(asked)
            if reply is None:
                found.append(unknown(asked))
            elif reply.metadata.src_node_id not in self.silent:
                found.append(self._replies.pop(asked))
        for reply in found:
            if not reply.has_error() and (parts := self.parts.get(reply.metadata.src_node_id)):
                assert parts.wait(30)
        return [unknown(r.metadata.reply_to_message_id) if r.metadata.src_node_id in self.lost else r for r in found]


def unknown(asked: str) -> Message:
    """Flower's answer about a message that it does not know, or a reply whose parts never came."""
    reply = Message(Error(UNKNOWN, "unknown"), reply_to=Message(RecordDict(), 1, "query"))
    reply.metadata.__dict__["_reply_to_message_id"] = asked
    return reply


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Parts of a reply that have not come yet, for which a look waits only shortly."""
    monkeypatch.setattr(link, "PROMPT", 0.1)
    event = threading.Event()
    yield event
    event.set()


def until(link: GridLink, messages: list[str], number: int) -> list[Reply]:
    """Look until so many replies have come."""
    came, deadline = list[Reply](), time.monotonic() + 30
    while len(came) < number:
        assert time.monotonic() < deadline
        came += link.replies([message for message in messages if message not in {one.message for one in came}])
    return came


def test_a_reply_that_does_not_come_whole_holds_up_nobody_elses(parts: threading.Event) -> None:
    """Node 1 holds the parts of its reply back; 2 has answered before it was noticed, and 3 answers after it."""
    grid = SlowGrid([1, 2, 3], {1: parts})
    grid.silent = {3}
    link = GridLink(grid, RUN, 60)
    asked = list(link.ask("train", encode(Broadcast(1, {})), [1, 2, 3]))
    assert list(link.replies(asked)) == []
    assert list(link.replies(asked)) == []  # and neither 1 nor 2 is taken for unknown
    grid.silent = set()
    (third,) = until(link, asked, 1)
    assert third.message == asked[2]
    assert grid.looks == 3
    parts.set()
    rest = until(link, asked[:2], 2)
    assert {reply.message for reply in rest} == set(asked[:2])
    assert all(isinstance(reply.content, Parcel) for reply in [third, *rest])
    assert [reply.content for reply in link.replies(asked[:1])] == [REASONS[UNKNOWN]]  # each came once


def test_a_reply_that_never_comes_whole_is_a_reason(parts: threading.Event) -> None:
    grid = SlowGrid([1], {1: parts})
    grid.lost = {1}
    link = GridLink(grid, RUN, 60)
    asked = list(link.ask("train", encode(Broadcast(1, {})), [1]))
    assert list(link.replies(asked)) == []
    parts.set()
    (reply,) = until(link, asked, 1)
    assert reply == Reply(asked[0], REASONS[UNKNOWN])


def test_of_two_looks_that_waited_the_one_that_found_the_reply_counts(parts: threading.Event) -> None:
    """As after a SuperLink that was away for longer than a look is waited for: both looks have asked about both."""
    grid = SlowGrid([1, 2], {1: parts, 2: parts})
    link = GridLink(grid, RUN, 60)
    asked = list(link.ask("train", encode(Broadcast(1, {})), [1, 2]))
    grid.silent = {2}
    assert list(link.replies(asked)) == []  # finds 1
    grid.silent = set()
    assert list(link.replies(asked)) == []  # finds 2, and knows nothing of 1
    parts.set()
    assert all(isinstance(reply.content, Parcel) for reply in until(link, asked, 2))


def test_what_nobody_asks_for_any_more_is_forgotten(parts: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = SlowGrid([1, 2], {1: parts})
    link = GridLink(grid, RUN, expiry=60)
    first, second = link.ask("train", encode(Broadcast(1, {})), [1, 2])
    assert list(link.replies([first])) == []
    parts.set()
    assert len(until(link, [second], 1)) == 1
    deadline = time.monotonic() + 30
    while not link._came:
        assert time.monotonic() < deadline
        assert list(link.replies([])) == []
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert list(link.replies([])) == []
    assert link._came == {}


def test_a_slow_look_that_failed_says_so(parts: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = SlowGrid([1], {})
    link = GridLink(grid, RUN, 60)
    asked = list(link.ask("train", encode(Broadcast(1, {})), [1]))

    def fail(_: Iterable[str]) -> Iterable[Message]:
        assert parts.wait(30)
        raise ValueError("no SuperLink")

    monkeypatch.setattr(grid, "pull_messages", fail)
    assert list(link.replies(asked)) == []
    parts.set()
    with pytest.raises(ValueError, match="no SuperLink"):
        until(link, asked, 1)


class BusyGrid(PlayedGrid):
    """Its SuperLink fails a number of times before it answers."""

    failures = 0

    def get_node_ids(self) -> Iterable[int]:
        if self.failures:
            self.failures -= 1
            raise httpx.ReadTimeout("too busy")
        return super().get_node_ids()


def test_a_superlink_that_fails_for_a_moment_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    grid = BusyGrid([2, 1], echo)
    grid.failures = 3
    assert list(GridLink(grid, RUN, expiry=60).nodes()) == [1, 2]
    assert slept == [0.5, 1.0, 2.0]


def test_a_superlink_that_fails_for_good_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    grid = BusyGrid([1], echo)
    grid.failures = 1000
    with pytest.raises(httpx.ReadTimeout, match="too busy"):
        GridLink(grid, RUN, expiry=60).nodes()
    assert grid.failures > 900
