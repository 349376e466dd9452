"""A message whose run ends while a SuperNode receives it leaves nothing that could answer later."""

from __future__ import annotations

import inspect
import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeStateFactory
from httpx import HTTPStatusError, Request, Response

from fedalign.federation.flower import supernode
from fedalign.federation.flower.supernode import BUSY, OFTEN, STUBBORN, Hurry, receive_whole, stubborn

FLOWER = start_client_internal._pull_and_store_message


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
    """What fails so many times before it takes an answer, and what it was handed."""

    def __init__(self, failures: int, code: int = 500) -> None:
        self.failures, self.code, self.taken = failures, code, list[str]()

    def send(self, message: Any, *_: Any) -> tuple[set[str], str]:
        self.taken.append(message.metadata.message_id)
        if len(self.taken) <= self.failures:
            request = Request("POST", "http://superlink")
            raise HTTPStatusError("database is locked", request=request, response=Response(self.code, request=request))
        return set(), "session"


def answered(superlink: SuperLink, send: Any) -> SuperNode:
    """A SuperNode whose ClientApp has answered, and which hands that over."""
    node = SuperNode()
    assert node.receive(FLOWER) == 7
    node.state.get_messages_legacy(run_ids=[7], is_reply=False)
    reply = Message(RecordDict(), reply_to=node.message)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    node.store.preregister(7, get_object_tree(reply))
    node.state.store_message(reply)
    start_client_internal._push_messages(node.state, node.store, send, lambda *_: None)
    return node


def test_an_answer_that_the_superlink_fails_to_take_is_handed_over_again() -> None:
    theirs = SuperLink(failures=3)
    answered(theirs, theirs.send)
    assert len(theirs.taken) == 1  # else Flower hands it over again itself, and ours need not
    ours, slept = SuperLink(failures=3), list[float]()
    answered(ours, stubborn(ours.send, slept.append))
    assert len(ours.taken) == 4
    assert len(slept) == 3
    assert max(slept) <= 10


def test_what_the_superlink_refuses_is_not_handed_over_again() -> None:
    refuses = SuperLink(failures=3, code=400)
    answered(refuses, stubborn(refuses.send, lambda _: pytest.fail("it is asked again")))
    assert len(refuses.taken) == 1


def test_the_superlink_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode, "STUBBORN", 0.0)
    dead = SuperLink(failures=10**9)
    answered(dead, stubborn(dead.send, lambda _: None))
    assert len(dead.taken) == 1
    assert STUBBORN > 0


def test_our_supernode_is_stubborn_with_answers_and_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: dict[str, Any] = {}
    theirs = SimpleNamespace(_pull_and_store_message=None, _push_messages=lambda **given: handed.update(given))
    monkeypatch.setattr(supernode, "supernode", theirs)
    monkeypatch.setattr(supernode, "flower_supernode", lambda: None)
    monkeypatch.setattr(supernode, "waits", SimpleNamespace(shorten=lambda: None))
    monkeypatch.setattr(supernode, "stubborn", lambda ask: ("again", ask))
    monkeypatch.setattr("sys.argv", ["none"])
    supernode.main()
    theirs._push_messages(state=1, object_store=2, send=3, push_object=4)
    assert handed == {"state": 1, "object_store": 2, "send": ("again", 3), "push_object": ("again", 4)}
