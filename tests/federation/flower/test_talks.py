"""How long a silence may last, and what a transfer is said to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from fedalign.federation.flower import talks
from fedalign.federation.flower.link import Reply
from fedalign.federation.flower.talks import SLOWEST, Ask, Meter, Talk, Talks
from fedalign.federation.messages import Parcel
from fedalign.protocol import PROTOCOL, Failure
from tests.federation.flower.scripted import Clock, Node, ScriptedLink

NOTHING = Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(talks, "time", clock)
    return clock


def asking(*sizes: int) -> Talk[list[bool]]:
    """Asks one thing after another; whether each was answered."""
    answered = []
    for nbytes in sizes:
        _, reply = yield [Ask("piece", NOTHING, nbytes)]
        answered.append(isinstance(reply, Reply))
    return answered


def talking(clock: Clock, delay: float) -> tuple[Talks, list[str]]:
    silent: list[str] = []
    node = Node({"piece": lambda _: Failure("a", "train", "heard")}, delay=delay)
    link = ScriptedLink(clock, {1: node})
    return Talks(link, lambda _: 1, 100, 1.0, lambda message, name, ask, asked: silent.append(name)), silent


def test_a_silence_ends_after_the_timeout(clock: Clock) -> None:
    held, silent = talking(clock, delay=150)
    assert list(held.hold([("a", asking(0))])) == [("a", [False])]
    assert 1100 <= clock.now <= 1102
    assert silent == ["a"]


def test_a_long_transfer_is_no_silence(clock: Clock) -> None:
    held, silent = talking(clock, delay=150)
    assert list(held.hold([("a", asking(0, 0, int(100 * SLOWEST)))])) == [("a", [False, False, True])]
    assert silent == ["a", "a"]


def test_patience_follows_the_rate_that_was_measured(clock: Clock) -> None:
    held, _ = talking(clock, delay=10)
    assert list(held.hold([("a", asking(10**8))])) == [("a", [True])]
    assert held.rates["a"] == pytest.approx(10**7, rel=0.1)
    slow = Node({"piece": lambda _: Failure("a", "train", "heard")}, delay=150)
    held.link = ScriptedLink(clock, {1: slow})
    assert list(held.hold([("a", asking(10**8))])) == [("a", [False])]  # 100 s and 4 times 10 s are over
    assert list(held.hold([("a", asking(2 * 10**8))])) == [("a", [True])]


def test_answers_that_come_together_tell_no_faster_line(clock: Clock) -> None:
    def ahead() -> Talk[int]:
        _, first = yield [Ask("piece", Parcel(NOTHING.head, {}), 10**8) for _ in range(2)]
        _, second = yield []
        return isinstance(first, Reply) + isinstance(second, Reply)

    class Read(ScriptedLink):
        def replies(self, messages: Sequence[str]) -> Iterator[Reply]:
            for reply in super().replies(messages):
                clock.now += 1e-3
                yield reply

    held, silent = talking(clock, delay=20)
    held.link = Read(clock, {1: Node({"piece": lambda _: Failure("a", "train", "heard")}, delay=20)})
    assert list(held.hold([("a", ahead())])) == [("a", 2)]
    assert held.rates["a"] <= 10**7
    held.link = ScriptedLink(clock, {1: Node({"piece": lambda _: Failure("a", "train", "heard")}, delay=130)})
    assert list(held.hold([("a", asking(10**8))])) == [("a", [True])]
    assert silent == []


def test_a_meter_tells_the_rate_and_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, told = Clock(), list[str]()
    monkeypatch.setattr(talks, "time", clock)
    meter = Meter("down", told.append)
    meter.expect(300_000_000)
    clock.now += 10
    meter.moved(100_000_000)
    assert told == ["down 100.0 MB of 300.0 MB, 10.0 MB/s, 0:20 left"]
    meter.moved(200_000_000)
    assert told[-1] == ""
