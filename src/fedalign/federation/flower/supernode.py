"""Flower's SuperNode, mended: of a message whose run ends while it is received nothing stays; hurried and patient.

Flower 1.41 and 1.42 keep such a message and its task. A ClientApp then answers it while another message is under way,
or ends without an answer an hour later. From there on the SuperNode sends each answer only when the next message has
come, and the coordinator of the next run waits for it in vain.

A SuperLink whose database is locked for 5 s fails at what it is asked (HTTP 500). Flower's SuperNode then drops an
answer, for which the coordinator waits in vain, or leaves the federation for good: when it starts, looks for a message
or says that it lives. This one takes such a SuperLink for one that is away, and asks again until it answers.

A SuperLink counts a SuperNode that was killed as online for a minute, and refuses its key meanwhile. Flower's SuperNode
then ends. This one waits for that minute.

Flower looks for a message each 3 s, and for its answer each 0.5 s: half of the time that a piece of 64 MB takes. While
messages come, this one looks more often.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE, Status, SubStatus
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.object_store import ObjectStore
from flwr.supernode import fleet_http_connection
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeState
from httpx import HTTPStatusError, ReadError, codes

from fedalign.federation.flower import waits

PROGRAM = "flower-supernode"
log = logging.getLogger("flwr")
AGAIN = 5.0  # seconds until a key that was refused is tried again
BUSY = 10.0  # seconds after a message for which the next one, or its answer, is looked for ...
OFTEN = 10  # ... so many times as often
ONLINE = float(HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL)  # seconds for which a SuperNode without sign of life is
REFUSAL = ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED
REFUSED = (
    "the SuperLink refuses this site's key. Its last SuperNode was killed less than %.0f s ago, or the key is not "
    "registered, or revoked; asking again for %.0f s"
)
UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


class Hurry:
    """Sleeps as it is told, but for a part of it alone within `BUSY` seconds after `heard` was set."""

    heard = -math.inf

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds / OFTEN if time.monotonic() - self.heard < BUSY else seconds)


def receive_whole(
    flower: Callable[..., int | None], state: NodeState, object_store: ObjectStore, hurry: Hurry, **rest: Any
) -> int | None:
    """A message taken in as Flower's `_pull_and_store_message` does; one that is not taken whole is forgotten.

    Args:
        flower: that function. It takes one message at a time, and none before the last one was answered.
        state: the SuperNode's messages and tasks.
        object_store: the parts of its messages.
        hurry: hears of each message.
        rest: its other arguments.

    Returns:
        the id of the run whose message was taken in, or None.
    """
    pulled: list[Message] = []

    def noted() -> Any:
        found = receive()
        if found is not None:
            pulled.append(found[0])
            hurry.heard = time.monotonic()
        return found

    receive = rest.pop("receive")
    run = flower(state=state, object_store=object_store, receive=noted, **rest)
    if run is None:
        for message in pulled:
            forget(message, state, object_store)
    return run


def forget(message: Message, state: NodeState, object_store: ObjectStore) -> None:
    """Remove a message, its parts, and its run's tasks: the token of a ClientApp that has begun is no longer good."""
    about = message.metadata
    for task in state.get_tasks(run_ids=[about.run_id], statuses=UNFINISHED):
        state.finish_task(task.task_id, SubStatus.FAILED, "its run ended while the message was received")
    state.delete_messages(message_ids=[about.message_id])
    object_store.delete(about.message_id)


class Patient(FleetHttpClient):
    """A SuperNode's calls to the SuperLink: what fails there (HTTP 500) is as a connection that fails.

    Flower makes such a call again, at growing intervals and without end. So it does with a heartbeat, but for the one
    that says goodbye. A message's calls end with its run, of which the SuperLink then says that it does not run.
    """

    def _unary_unary(self, *, path: str, **given: Any) -> Any:
        try:
            return super()._unary_unary(path=path, **given)
        except HTTPStatusError as error:
            if error.response.status_code != codes.INTERNAL_SERVER_ERROR:
                raise
            log.warning("the SuperLink failed at %s (HTTP 500)", path)
            raise ReadError(f"it failed at {path}", request=error.request) from error

    def ActivateNode(self, request: ActivateNodeRequest) -> ActivateNodeResponse:
        """Come online; a key that is refused is tried until its last SuperNode cannot be online any more."""
        deadline = time.monotonic() + ONLINE + AGAIN
        told = False
        while True:
            try:
                return super().ActivateNode(request)
            except HTTPStatusError as error:
                refused = FlowerError.from_json(error.response.text)
                if refused is None or refused.code != REFUSAL or time.monotonic() >= deadline:
                    raise
            if not told:
                log.warning(REFUSED, ONLINE, deadline - time.monotonic())
            told = True
            time.sleep(AGAIN)


def main() -> None:
    """Be `flower-supernode`."""
    waits.shorten()
    take, hurry = supernode._pull_and_store_message, Hurry()
    supernode._pull_and_store_message = lambda **given: receive_whole(take, hurry=hurry, **given)
    vars(fleet_http_connection)["FleetHttpClient"] = Patient
    vars(supernode)["time"] = SimpleNamespace(sleep=hurry.sleep)  # it needs nothing else of it
    sys.argv[0] = PROGRAM
    flower_supernode()


if __name__ == "__main__":
    main()
