"""Talks with many sites at once: each is a generator that says what to ask next, and is told what came of it.

One loop asks, looks what has arrived, and knows when a silence has lasted too long: `timeout_seconds` after a site was
last heard, and longer the more bytes are on their way to it or from it, at the rate that was measured so far.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from fedalign.federation.flower.link import Link, Reply
from fedalign.federation.messages import Parcel
from fedalign.units import clock, size

T = TypeVar("T")
SLOWEST = 1e5  # bytes a second that a line is taken to carry until it was measured
PATIENCE = 4.0  # times as long as a transfer should take
MEASURABLE = 1 << 20  # bytes of a message whose time tells the rate; of a smaller one it tells the latency


@dataclass(frozen=True)
class Ask:
    """A message to a site."""

    verb: str
    parcel: Parcel
    nbytes: int = 0  # that it or its answer moves
    tag: Any = None  # comes back with the answer
    answers_with_bytes: bool = False


Answered = tuple[Any, Reply | None]  # the tag, and the reply, or None after a silence
Talk = Generator[list[Ask] | None, Answered, T]  # what to ask; None: wake me at the next look, whatever has come
SENT = Parcel({}, {})  # takes the place of what was sent: no piece stays in memory until it is answered
WAKE = "wake"  # the tag of a look that brought nothing


@dataclass
class _Open(Generic[T]):
    """A talk that is not over."""

    name: str
    talk: Talk[T]
    asked: dict[str, tuple[Ask, float]] = field(default_factory=dict)  # message -> what, when
    heard: float = -math.inf
    dozes: bool = False
    is_over: bool = False  # another of its answers may have come in the same look


_Step = tuple[_Open[T], Answered | None]  # and what it is told; None: it begins


class Talks:
    """Holds talks over a link.

    One that ends with a message under way leaves the reply to be.

    Args:
        link: to the sites.
        node_of: the node of a site.
        timeout: seconds of silence.
        pause: seconds between two looks, at most.
        silent: is told of a message whose reply did not come in time: its id, the site, what was asked, and when.
    """

    def __init__(
        self,
        link: Link,
        node_of: Callable[[str], int],
        timeout: float,
        pause: float,
        silent: Callable[[str, str, Ask, float], None],
    ) -> None:
        self.link, self.node_of, self.timeout, self.pause, self.silent = link, node_of, timeout, pause, silent
        self.rates: dict[str, float] = {}  # bytes a second of each site's line, as last measured

    def hold(self, talks: Iterable[tuple[str, Talk[T]]], at_once: int | None = None) -> Iterator[tuple[str, T]]:
        """Hold talks, `at_once` of them at a time, and yield what each came to as it does."""
        waiting, talking, pause = iter(talks), dict[str, _Open[T]](), self.pause / 8
        while True:
            fresh = [_Open(*one) for one in islice(waiting, None if at_once is None else at_once - len(talking))]
            talking |= {one.name: one for one in fresh}
            heard = bool(fresh)
            for steps in chain([list[_Step[T]]((one, None) for one in fresh)], self._looks(talking)):
                heard = heard or any(answer is not None and answer[0] is not WAKE for _, answer in steps)
                for name, result in self._go_on(steps):
                    del talking[name]
                    yield name, result
            if heard:
                pause = self.pause / 8
                continue
            if not talking:
                return
            time.sleep(pause)
            pause = min(pause * 1.5, self.pause)

    def _go_on(self, steps: list[_Step[T]]) -> list[tuple[str, T]]:
        """Tell talks what has come, ask what they ask next, and return those that are over; `steps` is emptied."""
        over: list[tuple[str, T]] = []
        while steps:
            asks: list[tuple[_Open[T], Ask]] = []
            for one, answer in steps:
                if one.is_over:
                    continue
                try:
                    wanted = next(one.talk) if answer is None else one.talk.send(answer)
                except StopIteration as end:
                    over.append((one.name, end.value))
                    one.is_over = True
                    one.asked.clear()
                    continue
                one.dozes = wanted is None
                asks += [(one, ask) for ask in wanted or ()]
                if wanted:
                    wanted.clear()  # the talk itself would hold on to it
            steps.clear()
            steps += self._ask(asks)
        return over

    def _ask(self, asks: list[tuple[_Open[T], Ask]]) -> list[_Step[T]]:
        """Send messages, what several sites are asked alike at once; the answers of those that cannot be reached."""
        alike: dict[tuple[str, int], list[tuple[_Open[T], Ask]]] = defaultdict(list)
        for one, ask in asks:
            alike[ask.verb, id(ask.parcel)].append((one, ask))
        gone: list[_Step[T]] = []
        for same in alike.values():
            by_node = {self.node_of(one.name): (one, ask) for one, ask in same}
            sent = self.link.ask(same[0][1].verb, same[0][1].parcel, list(by_node))
            now = time.monotonic()
            for message, node in sent.items():
                one, ask = by_node.pop(node)
                one.asked[message] = replace(ask, parcel=SENT), now
            gone += [(one, (ask.tag, Reply("", "not connected"))) for one, ask in by_node.values()]
        return gone

    def _looks(self, talking: Mapping[str, _Open[T]]) -> Iterator[list[_Step[T]]]:
        """The answers that are there. Large ones are taken one by one, so that no two are in memory."""
        asked = [(message, one, ask) for one in talking.values() for message, (ask, _) in one.asked.items()]
        large = [[message] for message, _, ask in asked if ask.answers_with_bytes]
        small = [message for message, _, ask in asked if not ask.answers_with_bytes]
        of = {message: one for message, one, _ in asked}
        for messages in ([small] if small else []) + large:
            wanted = [message for message in messages if message in of[message].asked]  # its talk may be over now
            yield [self._heard(of[reply.message], reply) for reply in self.link.replies(wanted)] if wanted else []
        yield [step for one in list(talking.values()) for step in self._silences(one)]
        yield [(one, (WAKE, None)) for one in list(talking.values()) if one.dozes]

    def _heard(self, one: _Open[T], reply: Reply) -> _Step[T]:
        (ask, asked), now = one.asked.pop(reply.message), time.monotonic()
        seconds, one.heard = now - asked, now  # not since the last answer: two may be found in one look
        if ask.nbytes >= MEASURABLE and not isinstance(reply.content, str) and seconds > 0:
            self.rates[one.name] = ask.nbytes / seconds
        return one, (ask.tag, reply)

    def _silences(self, one: _Open[T]) -> Iterator[_Step[T]]:
        now, moving = time.monotonic(), sum(ask.nbytes for ask, _ in one.asked.values())
        patience = self.timeout + PATIENCE * moving / self.rates.get(one.name, SLOWEST)
        for message, (ask, asked) in list(one.asked.items()):
            if now - max(asked, one.heard) >= patience:
                del one.asked[message]
                self.silent(message, one.name, ask, asked)
                yield one, (ask.tag, None)


class Meter:
    """Bytes of a transfer, with as many sites as there are: its rate, and how long it will take.

    Args:
        way: "down" or "up".
        tell: shows a line.
    """

    def __init__(self, way: str, tell: Callable[[str], None]) -> None:
        self.way, self.tell = way, tell
        self._begun, self._expected, self._moved = time.monotonic(), 0, 0

    def expect(self, nbytes: int) -> None:
        """So many bytes are to be moved."""
        if self._moved == self._expected:
            self._begun, self._expected, self._moved = time.monotonic(), 0, 0
        self._expected += nbytes

    def moved(self, nbytes: int) -> None:
        """So many are there."""
        self._moved += nbytes
        seconds, left = time.monotonic() - self._begun, self._expected - self._moved
        if left <= 0:
            self.tell("")
        elif seconds > 0:
            rate = self._moved / seconds
            self.tell(
                f"{self.way} {size(self._moved)} of {size(self._expected)}, {size(rate)}/s, {clock(left / rate)} left"
            )
