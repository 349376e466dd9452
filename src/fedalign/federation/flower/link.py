"""Parcels over Flower's grid: ask nodes, and look what has come back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass
from typing import Protocol, TypeVar

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedalign.federation.messages import DTYPES, MessageError, Parcel, from_wire, to_wire
from fedalign.units import shown

T = TypeVar("T")
log = logging.getLogger("fedalign")
PATIENCE = 120.0  # seconds for which a failing SuperLink is asked again
PROMPT = 10.0  # seconds for which a look is waited for: about what a piece of a transfer may take
UNKNOWN = 3  # Flower's error code of a message that the SuperLink does not know, or of a reply that never came whole
RUN = "run"
REASONS = {  # Flower's error codes, as far as they say something about a site
    1: "its ClientApp cannot be loaded; is the same version of fedalign-moe installed there?",
    2: "its ClientApp failed; the reason is in the site's own log",
    UNKNOWN: "nobody answered before the message expired",
    4: "its reply was lost on the way",
    5: "its SuperNode is gone",
    8: "its process ended before it could answer",
}


@dataclass(frozen=True)
class Reply:
    """The reply to a message."""

    message: str  # the id of what was asked
    content: Parcel | str  # or the reason why there is none


@dataclass(frozen=True)
class RunAbout:
    """The run that a message belongs to."""

    config: str  # as TOML
    key: str  # what clients keep their part of the run under
    out: str  # the run's folder at the coordinator; a simulation's clients keep their part there

    @classmethod
    def of(cls, message: Message) -> RunAbout:
        """The inverse of what `GridLink.ask` adds.

        Raises:
            MessageError: It is not there.
        """
        try:
            about = message.content.config_records[RUN]
            return cls(str(about["config"]), str(about["key"]), str(about["out"]))
        except KeyError as error:
            raise MessageError(f"not a message of FedAlign-MoE: no {error}") from None


class Link(Protocol):
    """The part of an engine that `FlowerFederation` uses."""

    def nodes(self) -> Mapping[int, str | None]:
        """The nodes that are connected now, and the name with which each one's key was registered, if it was."""

    def ask(self, verb: str, parcel: Parcel, nodes: Sequence[int]) -> dict[str, int]:
        """Ask each node the same; message id -> node, in the order of `nodes`. Nodes that are gone are left out."""

    def replies(self, messages: Sequence[str]) -> Iterator[Reply]:
        """Replies to these messages that came since they were last asked for."""


@dataclass(frozen=True)
class Look:
    """A look for the replies to some messages, in a thread of its own."""

    messages: frozenset[str]
    found: Future[list[Message]]

    @classmethod
    def begin(cls, messages: Sequence[str], pull: Callable[[], Iterable[Message]]) -> Look:
        """Begin to look."""
        found = Future[list[Message]]()

        def look() -> None:
            try:
                found.set_result(list(pull()))
            except Exception as error:
                found.set_exception(error)

        threading.Thread(target=look, daemon=True).start()
        return cls(frozenset(messages), found)


class GridLink:
    """A `Link` over the grid that Flower hands to a ServerApp.

    A reply is there before its parts are, and Flower's grid waits for these: for three minutes where its site has died,
    for two hours where a site holds them back. The others' replies would wait as long. So a look that takes longer than
    `PROMPT` goes on in its thread, and others are made beside it; what it brings is handed on once it is over.

    Args:
        grid: Flower's.
        run: what a ClientApp must know of the run with every message, since each may start a new process.
        expiry: seconds after which a message and its reply are worth nothing.
    """

    def __init__(self, grid: Grid, run: RunAbout, expiry: float) -> None:
        self.grid = grid
        self.run = run
        self.expiry = expiry
        self._slow: list[Look] = []  # that were not over in time
        self._came: dict[str, tuple[Message, float]] = {}  # what they have brought, and when, until it is asked for

    def nodes(self) -> Mapping[int, str | None]:
        """The nodes that are connected now, and the name with which each one's key was registered, if it was."""
        found = sorted(patiently(lambda: list(self.grid.get_nodes())), key=lambda node: node.node_id)
        return {node.node_id: node.name if node.HasField("name") else None for node in found}

    def ask(self, verb: str, parcel: Parcel, nodes: Sequence[int]) -> dict[str, int]:
        """Ask each node the same; what they share is made and sent once. Nodes that are gone are left out."""
        records = to_records(parcel)
        records[RUN] = ConfigRecord({**asdict(self.run)})
        messages = [Message(records, node, message_type(verb), ttl=self.expiry) for node in nodes]
        ids = list(patiently(lambda: self.grid.push_messages(messages))) if messages else []
        # Flower returns an empty id for a node that it knows no more, and no ids for what is too large for it
        return {message: node for message, node in zip(ids, nodes, strict=bool(ids)) if message}

    def replies(self, messages: Sequence[str]) -> Iterator[Reply]:
        """Replies to these messages that came since they were last asked for."""
        self._gather()
        here = [self._came.pop(message)[0] for message in messages if message in self._came]
        there = {reply.metadata.reply_to_message_id for reply in here}
        here += self._look([message for message in messages if message not in there])
        while here:
            reply = here.pop(0)
            yield Reply(reply.metadata.reply_to_message_id, _content(reply))

    def _look(self, messages: Sequence[str]) -> list[Message]:
        """Look now; what has not come whole in time is found later."""
        if not messages:
            return []
        look = Look.begin(messages, lambda: patiently(lambda: self.grid.pull_messages(messages)))
        if wait([look.found], PROMPT).not_done:
            self._slow.append(look)
            return []
        return [reply for reply in look.found.result() if not self._is_coming(reply)]

    def _gather(self) -> None:
        """Take what slow looks have brought, and forget what nobody asks for any more."""
        over = [look for look in self._slow if look.found.done()]
        self._slow = [look for look in self._slow if look not in over]
        now = time.monotonic()
        self._came = {
            message: (reply, came) for message, (reply, came) in self._came.items() if now < came + self.expiry
        }
        for reply in sorted((reply for look in over for reply in look.found.result()), key=_is_unknown):
            if not self._is_coming(reply):
                self._came.setdefault(reply.metadata.reply_to_message_id, (reply, now))

    def _is_coming(self, reply: Message) -> bool:
        """Whether it says no more than that a look which is not over has taken the true one out of the SuperLink."""
        message = reply.metadata.reply_to_message_id
        return _is_unknown(reply) and any(message in look.messages for look in self._slow)


def message_type(verb: str) -> str:
    """Flower has two verbs of its own, and calls all others queries."""
    return verb if verb in ("train", "evaluate") else f"query.{verb}"


def patiently(call: Callable[[], Iterable[T]]) -> Iterable[T]:
    """Call again while the SuperLink answers with an error of its own: under load it may be too busy for a moment."""
    deadline, pause = time.monotonic() + PATIENCE, 0.5
    while True:
        try:
            return call()
        except httpx.HTTPError as error:
            if time.monotonic() > deadline:
                raise
            log.warning("the SuperLink failed (%s): trying again", error)
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def _is_unknown(reply: Message) -> bool:
    return reply.has_error() and reply.error.code == UNKNOWN


def _content(reply: Message) -> Parcel | str:
    if reply.has_error():
        return reason(reply.error)
    try:
        return from_records(reply.content)
    except MessageError as error:
        return str(error)


def reason(error: Error) -> str:
    """Flower's error in words; some of them are the node's own."""
    return REASONS.get(error.code, shown(f"Flower's error {error.code}: {error.reason}"))


HEAD, ARRAYS = "head", "arrays"


def to_records(parcel: Parcel) -> RecordDict:
    """The records that Flower sends; each array is copied once."""
    text, arrays = to_wire(parcel)
    made = {name: _to_array(dtype, b"".join(pieces)) for name, (dtype, pieces) in arrays.items()}
    return RecordDict({HEAD: ConfigRecord({"json": text.decode()}), ARRAYS: ArrayRecord(made)})


def from_records(records: RecordDict) -> Parcel:
    """The inverse, without a copy.

    Raises:
        MessageError: The records are not a parcel.
    """
    try:
        text, arrays = str(records.config_records[HEAD]["json"]), records.array_records[ARRAYS]
    except KeyError as error:
        raise MessageError(f"not a message of FedAlign-MoE: no {error}") from None
    return from_wire(text, {name: (array.dtype, array.data) for name, array in arrays.items()})


def _to_array(dtype: str, data: bytes) -> Array:
    return Array(dtype=dtype, shape=(len(data) // DTYPES[dtype].itemsize,), stype="raw", data=data)
