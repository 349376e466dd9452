"""A link without Flower: nodes that answer, late or never, as a test wants it, on a clock that only waiting moves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedalign.federation.flower.link import Reply
from fedalign.federation.messages import Message, Parcel, encode
from fedalign.federation.transfer import digest
from fedalign.files import fingerprint
from fedalign.maths.rounding import bytes_of, cut_out
from fedalign.protocol import Fetch, Packed, Piece
from tests.federation.test_messages import travel

Answer = Message | Parcel | str | None  # None: silence; a string: what Flower says instead
Script = Callable[[Parcel], Answer]


@dataclass
class Clock:
    """Stands in for the module `time`."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Node:
    """A node and what it says to each kind of message."""

    script: Mapping[str, Script]
    since: float = 0.0  # when it connects
    until: float = float("inf")  # when it is gone
    delay: float = 0.0  # seconds to each answer
    known: bool = True  # to the SuperLink, which refuses messages to other nodes
    registered: str | None = None  # the name that its key was registered with
    asked: list[str] = field(default_factory=list)


class ScriptedLink:
    """A `Link` whose nodes are scripts."""

    def __init__(self, clock: Clock, nodes: Mapping[int, Node]) -> None:
        self.clock = clock
        self.there = dict(nodes)
        self.outstanding: dict[str, tuple[float, Answer]] = {}  # message -> when its reply is there, and the reply
        self.most: dict[str, int] = {}  # kind -> most messages of it without a reply at any time
        self.order: list[tuple[str, int]] = []  # kind and node, as asked
        self._numbers = itertools.count()
        self._kinds: dict[str, str] = {}

    def nodes(self) -> Mapping[int, str | None]:
        there = sorted(n for n, node in self.there.items() if node.since <= self.clock.now < node.until)
        return {number: self.there[number].registered for number in there}

    def ask(self, kind: str, parcel: Parcel, nodes: Sequence[int]) -> dict[str, int]:
        asked = {}
        for number in nodes:
            node = self.there[number]
            if not node.known:
                continue
            message = f"{kind}/{next(self._numbers)}"
            self.order.append((kind, number))
            node.asked.append(kind)
            script = node.script.get(kind)
            answer = script(travel(parcel)) if script and number in self.nodes() else None
            self.outstanding[message] = (self.clock.now + node.delay, answer)
            self._kinds[message] = kind
            waiting = sum(self._kinds[one] == kind for one in self.outstanding)
            self.most[kind] = max(self.most.get(kind, 0), waiting)
            asked[message] = number
        return asked

    def replies(self, messages: Sequence[str]) -> Iterator[Reply]:
        for message in [one for one in messages if one in self.outstanding]:
            due, answer = self.outstanding[message]
            if answer is not None and due <= self.clock.now:
                del self.outstanding[message]
                yield Reply(message, arrived(answer))


def handed(client: str, fetch: Fetch, kept: Mapping[str, Packed]) -> Piece:
    """The piece that a client hands over of what it keeps."""
    parts = [part for name in fetch.names for part in bytes_of(kept[name])]
    data = cut_out(parts, fetch.start, fetch.nbytes)
    digests = {name: digest(kept[name]) for name in fetch.names}
    return Piece(client, fetch.round, "", (), data, fingerprint([data.numpy().data]), digests)


def arrived(answer: Message | Parcel | str) -> Parcel | str:
    if isinstance(answer, str):
        return answer
    return travel(answer if isinstance(answer, Parcel) else encode(answer))
