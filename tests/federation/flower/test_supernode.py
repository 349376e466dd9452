"""A message whose run ends while a SuperNode receives it leaves nothing that could answer later."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.fleet_pb2 import ActivateNodeResponse
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse as Heartbeat
from flwr.supercore import heartbeat
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.exit import ExitCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.retry import http_retry
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeStateFactory
from httpx import HTTPStatusError

from fedalign.federation.flower import supernode
from fedalign.federation.flower.supernode import BUSY, OFTEN, ONLINE, Hurry, Patient, receive_whole

FLOWER = start_client_internal._pull_and_store_message
PUSH = "push-messages"


@pytest.fixture(autouse=True)
def in_run_7(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages made here are of this run."""
    for name, value in (("_run_id", 7), ("_task_id", 1), ("_node_id", 2)):
        monkeypatch.setattr(TaskIdentity, name, value)


class SuperNode:
    """What receives a message of run 7, which ends at a call of `ends_at`."""

    def __init__(self, ends_at: str = "") -> None:
        stores = ObjectStoreFactory()
        self.state, self.store, self.ends_at = NodeStateFactory(stores).state(), stores.store(), ends_at
        self.state.set_node_id(1)
        self.state.store_run(Run.create_empty(7))
        self.message: Any = Message(RecordDict(), dst_node_id=1, message_type="train")
        self.message.metadata.__dict__["_message_id"] = self.message.object_id

    def call(self, name: str, answer: Any) -> Any:
        if name == self.ends_at:
            raise RunNotRunningException
        return answer

    def receive(self, take: Any) -> Any:
        return take(
            state=self.state,
            object_store=self.store,
            node_config={},
            receive=lambda: (self.message, get_object_tree(self.message)),
            get_run=lambda run: pytest.fail("it knows the run"),
            get_fab=lambda fab, run: pytest.fail("it knows the run"),
            pull_object=lambda run, name: self.call("pull", get_all_nested_objects(self.message)[name].deflate()),
            confirm_message_received=lambda run, name: self.call("confirm", None),
            trusted_entities=None,
        )

    @property
    def left(self) -> tuple[int, list[str], bool]:
        """Messages that a ClientApp would get, states of tasks, and whether parts of the message are there."""
        states = [task.status.status for task in self.state.get_tasks()]
        messages = self.state.get_messages_legacy(run_ids=[7], is_reply=False)
        return len(messages), states, self.store.get(self.message.object_id) is not None


@pytest.mark.parametrize("ends_at", ["pull", "confirm"])
def test_nothing_is_left_of_a_message_whose_run_ends_meanwhile(ends_at: str) -> None:
    theirs = SuperNode(ends_at)
    assert theirs.receive(FLOWER) is None
    assert theirs.left == (1, ["pending"], True)  # else Flower has mended it, and our program is needed no more
    node = SuperNode(ends_at)
    assert node.receive(partial(receive_whole, FLOWER, hurry=Hurry())) is None
    assert node.left == (0, ["finished"], False)


def test_a_client_app_that_has_begun_on_such_a_message_cannot_answer() -> None:
    node = SuperNode("confirm")
    token: list[str] = []

    def begun(name: str, answer: Any) -> Any:
        if name == "confirm":
            (task,) = node.state.get_tasks()
            token.append(str(node.state.claim_task(task.task_id)))
            assert node.state.activate_task(task.task_id)
            raise RunNotRunningException
        return answer

    node.call = begun  # type: ignore[method-assign] # it begins meanwhile
    assert node.receive(partial(receive_whole, FLOWER, hurry=Hurry())) is None
    assert node.state.get_task_by_token(token[0]) is None
    assert node.left == (0, ["finished"], False)


def test_a_message_that_comes_whole_is_taken_as_ever() -> None:
    node = SuperNode()
    assert node.receive(partial(receive_whole, FLOWER, hurry=Hurry())) == 7
    assert node.left == (1, ["pending"], True)
    (task,) = node.state.get_tasks()
    assert task.type == TaskType.CLIENT_APP


def test_a_supernode_looks_more_often_while_messages_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own module sleeps by its name `time`, and uses nothing else of it."""
    slept: list[float] = []
    clock = SimpleNamespace(now=100.0, sleep=slept.append)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(supernode, "time", clock)
    assert set(re.findall(r"(?<!\w)time\.(\w+)\(", inspect.getsource(start_client_internal))) == {"sleep"}
    hurry, node = Hurry(), SuperNode()
    hurry.sleep(3)
    assert node.receive(partial(receive_whole, FLOWER, hurry=hurry)) == 7
    hurry.sleep(3)
    clock.now += BUSY
    hurry.sleep(3)
    assert slept == [3, 3 / OFTEN, 3]


class SuperLink:
    """A server over HTTP that fails at each path (or one) so many times before it answers, and what it was asked."""

    def __init__(self, failures: int, code: int = 500) -> None:
        superlink = self
        self.failures, self.code, self.only, self.asked = failures, code, "", Counter[str]()
        self.reason = b""
        self.answers: dict[str, Any] = {
            "activate-node": ActivateNodeResponse(node_id=7),
            "send-node-heartbeat": Heartbeat(success=True),
        }

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                path = self.path.removeprefix("/v1/fleet/")
                self.rfile.read(int(self.headers["content-length"]))
                superlink.asked[path] += 1
                failed = superlink.asked[path] <= superlink.failures and superlink.only in ("", path)
                answer = superlink.answers.get(path)
                body = superlink.reason if failed else b"" if answer is None else answer.SerializeToString()
                self.send_response(superlink.code if failed else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def connected(self) -> Any:
        """As a SuperNode is, without a key."""
        address = f"127.0.0.1:{self.server.server_address[1]}"
        return fleet_http_connection.http_request_response(server_address=address, insecure=True)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower asks again without a wait."""
    monkeypatch.setattr(http_retry, "exponential", lambda **_: itertools.repeat(0.0))
    monkeypatch.setattr(heartbeat, "exponential", lambda **_: itertools.repeat(0.0))


@pytest.fixture
def failing() -> Iterator[Callable[..., SuperLink]]:
    """Makes a SuperLink that fails."""
    made: list[SuperLink] = []

    def make(*how: int) -> SuperLink:
        made.append(SuperLink(*how))
        return made[-1]

    yield make
    for superlink in made:
        superlink.server.shutdown()
        superlink.server.server_close()


def test_flowers_own_supernode_does_not_start_at_a_superlink_that_fails_once(
    failing: Callable[..., SuperLink], at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else Flower has mended it, and `Patient` is needed no more."""
    ended = RuntimeError("ended")
    monkeypatch.setattr(fleet_http_connection, "flwr_exit", lambda *_: (_ for _ in ()).throw(ended))
    superlink = failing(1)
    with pytest.raises(RuntimeError, match="ended"), superlink.connected():
        pytest.fail("it is connected")
    assert superlink.asked == {"register-node": 1}


def test_our_supernode_outlasts_a_superlink_that_fails(
    failing: Callable[..., SuperLink], at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", Patient)
    superlink = failing(3)
    with superlink.connected() as connection:
        node, receive, send = connection[:3]
        assert node == 7
        assert receive() is None
        deadline = time.monotonic() + 30
        while superlink.asked["send-node-heartbeat"] < 4:  # the fourth is answered
            assert time.monotonic() < deadline
            time.sleep(0.01)
        message: Any = Message(RecordDict(), dst_node_id=1, message_type="train")
        reply = Message(RecordDict(), reply_to=message)
        assert send(reply, get_object_tree(reply), 1.0) == (set(), "")
    asked = dict(superlink.asked)
    assert [asked.pop(path) for path in ("deactivate-node", "unregister-node")] == [1, 1]  # a goodbye is said once
    assert asked == dict.fromkeys(("register-node", "activate-node", "pull-messages", "send-node-heartbeat", PUSH), 4)


def test_what_a_superlink_refuses_is_not_asked_again(
    failing: Callable[..., SuperLink], at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", Patient)
    superlink = failing(0)
    with superlink.connected() as connection:
        superlink.failures, superlink.code, superlink.only = 10**9, 400, "pull-messages"
        with pytest.raises(HTTPStatusError):
            connection[1]()
    assert superlink.asked["pull-messages"] == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Passes by what our program sleeps, which it keeps."""
    clock = SimpleNamespace(now=100.0, slept=[])

    def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(supernode, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


def refusing(superlink: SuperLink, code: ApiErrorCode) -> SuperLink:
    """It answers as Flower's does where a key cannot come online."""
    said = API_ERROR_MAP[code]
    superlink.only, superlink.code = "activate-node", said.http_status_code
    superlink.reason = json.dumps({"code": code, "detail": said.public_message}).encode()
    return superlink


def test_a_site_that_was_killed_waits_until_its_key_may_come_online(
    failing: Callable[..., SuperLink], clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", Patient)
    monkeypatch.setattr(supernode.log, "propagate", True)
    superlink = refusing(failing(12), ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
    with superlink.connected() as connection:
        assert connection[0] == 7
    assert superlink.asked["activate-node"] == 13
    assert sum(clock.slept) == ONLINE == 60.0
    (told,) = (record.getMessage() for record in caplog.records)
    assert "killed less than 60 s ago, or the key is not registered, or revoked; asking again for 65 s" in told


@pytest.mark.parametrize(
    ("code", "asked"), [("FLEET_NODE_ACTIVATION_FAILED", 14), ("FLEET_INVALID_HEARTBEAT_INTERVAL", 1)]
)
def test_a_key_that_stays_refused_ends_the_supernode(
    failing: Callable[..., SuperLink], clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, code: str, asked: int
) -> None:
    ended: list[tuple[int, str]] = []

    def end(*how: Any) -> None:
        ended.append(how)
        raise RuntimeError("ended")

    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", Patient)
    monkeypatch.setattr(fleet_http_connection, "flwr_exit", end)
    superlink = refusing(failing(10**9), ApiErrorCode[code])
    with pytest.raises(RuntimeError, match="ended"), superlink.connected():
        pytest.fail("it is connected")
    assert superlink.asked["activate-node"] == asked
    assert ended[0][0] == ExitCode.SUPERNODE_CONNECTION_ERROR


def test_our_supernode_is_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_http_connection, "FleetHttpClient", FleetHttpClient)  # put back afterwards
    monkeypatch.setattr(supernode, "supernode", SimpleNamespace(_pull_and_store_message=None))
    monkeypatch.setattr(supernode, "flower_supernode", lambda: None)
    monkeypatch.setattr(supernode, "waits", SimpleNamespace(shorten=lambda: None))
    monkeypatch.setattr("sys.argv", ["none"])
    supernode.main()
    assert vars(fleet_http_connection)["FleetHttpClient"] is Patient
