"""What is not there yet is asked for again soon; a heartbeat at which the SuperLink fails is sent again."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import HEARTBEAT_CALL_TIMEOUT
from flwr.supercore import heartbeat
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.task_identity import TaskIdentity
from httpx import HTTPStatusError, Request, Response

from fedalign.federation.flower import ready, server_app, supernode, waits

RECEIVING = (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree)


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that Flower waits, without waiting."""
    for receive in RECEIVING:
        monkeypatch.setattr(receive, "__kwdefaults__", receive.__kwdefaults__)  # undone at the end
    found: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            found.append(timeout or 0)
            return False

    others = {name: getattr(threading, name) for name in ("Lock", "Thread")}
    monkeypatch.setattr(inflatable_utils, "threading", SimpleNamespace(Event=Event, **others))
    monkeypatch.setattr(inflatable_utils, "random", SimpleNamespace(uniform=lambda low, high: 0.0))
    return found


def late(times: int, content: bytes = b"here") -> Callable[[str], bytes]:
    """Asked for an object so many times in vain."""
    left = times

    def pull(name: str) -> bytes:
        nonlocal left
        left -= 1
        if left >= 0:
            raise ObjectUnavailableError(name)
        return content

    return pull


def test_a_part_that_is_on_its_way_is_asked_for_soon_and_as_long_as_ever(waited: list[float]) -> None:
    assert inflatable_utils.pull_objects(["a"], late(6)) == {"a": b"here"}
    assert waited == [1, 2, 4, 8, 10, 10]  # else Flower has changed, and what is said of it is wrong
    waited.clear()
    waits.shorten()
    waits.shorten()  # twice is once
    assert inflatable_utils.pull_objects(["a"], late(6)) == {"a": b"here"}
    assert waited == [0.05, 0.1, 0.2, 0.4, 0.5, 0.5]
    tries = [(receive.__kwdefaults__ or {})["max_tries_per_object"] for receive in RECEIVING]
    assert tries == [500 * 20, 500 * 20]


def test_so_does_a_client_app(waited: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_run_id", 7), ("_task_id", 1), ("_node_id", 2)):
        monkeypatch.setattr(TaskIdentity, name, value)
    waits.shorten()
    message: Any = Message(RecordDict(), dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = message.object_id
    every = get_all_nested_objects(message)
    missing = late(1)

    def pull(name: str) -> bytes:
        missing(name)
        return every[name].deflate()

    taken: Any = inflatable_utils.pull_and_inflate_object_from_tree(get_object_tree(message), pull, lambda name: None)
    assert taken.object_id == message.object_id
    assert waited == [0.05]


def of_supernode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "flower_supernode", lambda: None)
    monkeypatch.setattr(supernode, "supernode", SimpleNamespace(_pull_and_store_message=None, _push_messages=None))
    supernode.main()


def of_client_app(monkeypatch: pytest.MonkeyPatch) -> None:
    program = SimpleNamespace(load=lambda: lambda: None)
    monkeypatch.setattr(ready, "metadata", SimpleNamespace(entry_points=lambda **_: [program]))
    monkeypatch.setattr(ready, "gc", SimpleNamespace(freeze=lambda: None))
    monkeypatch.setattr(ready, "_task", lambda place: [])
    ready.main("")


def of_server_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeartbeatSender, "_heartbeat", HeartbeatSender._heartbeat)  # put back afterwards
    for name in ("return_what_is_freed", "log_to_stderr", "quiet"):
        monkeypatch.setattr(server_app, name, lambda: None)
    with pytest.raises(KeyError, match="out"):
        server_app.main(SimpleNamespace(), SimpleNamespace(run_config={}))  # type: ignore[arg-type] # it fails at once


@pytest.mark.parametrize("begun", [of_supernode, of_client_app, of_server_app])
def test_every_station_asks_often(
    waited: list[float], begun: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["none"])
    begun(monkeypatch)
    inflatable_utils.pull_objects(["a"], late(1))
    assert waited == [0.05]


class Beats:
    """The SuperLink fails at the second heartbeat, with this code; after the fourth the sender is to end."""

    def __init__(self, code: int) -> None:
        self.code, self.sent, self.sender = code, 0, HeartbeatSender(self)

    def __call__(self) -> bool:
        self.sent += 1
        if self.sent == 2:
            request = Request("POST", "http://superlink")
            raise HTTPStatusError("failed", request=request, response=Response(self.code, request=request))
        if self.sent == 4:
            self.sender._stop_event.set()
        return True


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats follow each other at once."""
    monkeypatch.setattr(HeartbeatSender, "_heartbeat", HeartbeatSender._heartbeat)  # put back afterwards
    monkeypatch.setattr(heartbeat, "exponential", lambda **_: itertools.repeat(0.0))
    monkeypatch.setattr(heartbeat, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_CALL_TIMEOUT)


def test_a_heartbeat_at_which_the_superlink_fails_is_sent_again(hasty: None) -> None:
    theirs = Beats(500)
    with pytest.raises(HTTPStatusError):  # else Flower has mended it, and `outlast_failures` is needed no more
        theirs.sender._run()
    ours = Beats(500)
    waits.outlast_failures()
    ours.sender._run()
    assert (theirs.sent, ours.sent) == (2, 4)


def test_heartbeats_that_the_superlink_refuses_end(hasty: None) -> None:
    waits.outlast_failures()
    refused = Beats(400)
    with pytest.raises(HTTPStatusError):
        refused.sender._run()


def test_a_coordinator_outlasts_a_superlink_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = HeartbeatSender._heartbeat
    of_server_app(monkeypatch)
    assert HeartbeatSender._heartbeat is not theirs
