"""Flower's SuperNode, mended: of a message whose run ends while it is received nothing stays; hurried and stubborn.

Flower 1.41 and 1.42 keep such a message and its task. A ClientApp then answers it while another message is under way,
or ends without an answer an hour later. From there on the SuperNode sends each answer only when the next message has
come, and the coordinator of the next run waits for it in vain.

An answer that the SuperLink fails to take, as one does whose database is locked for 5 s, Flower drops: the coordinator
waits for it until its patience ends. This one hands it over again.

Flower looks for a message each 3 s, and for its answer each 0.5 s: half of the time that a piece of 64 MB takes. While
messages come, this one looks more often.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.common.constant import Status, SubStatus
from flwr.supercore.object_store import ObjectStore
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.cli import flower_supernode
from flwr.supernode.nodestate import NodeState
from httpx import HTTPStatusError, codes

from fedalign.federation.flower import waits

PROGRAM = "flower-supernode"
BUSY = 10.0  # seconds after a message for which the next one, or its answer, is looked for ...
OFTEN = 10  # ... so many times as often
STUBBORN = 120.0  # seconds for which the SuperLink is asked again for what it failed at
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


def stubborn(ask: Callable[..., Any], sleep: Callable[[float], None] = time.sleep) -> Callable[..., Any]:
    """`ask`, done again while the SuperLink answers that it failed (HTTP 500), for `STUBBORN` seconds at most.

    Args:
        ask: a call to the SuperLink that may be made twice.
        sleep: waits between two calls.

    Raises:
        HTTPStatusError: As of the last call.
    """

    def is_final(error: Exception) -> bool:
        return isinstance(error, HTTPStatusError) and error.response.status_code != codes.INTERNAL_SERVER_ERROR

    again = RetryInvoker(
        lambda: exponential(max_delay=10),
        HTTPStatusError,
        max_tries=None,
        max_time=STUBBORN,
        should_giveup=is_final,
        wait_function=sleep,
    )
    return partial(again.invoke, ask)


def main() -> None:
    """Be `flower-supernode`."""
    waits.shorten()
    take, answer, hurry = supernode._pull_and_store_message, supernode._push_messages, Hurry()
    supernode._pull_and_store_message = lambda **given: receive_whole(take, hurry=hurry, **given)
    supernode._push_messages = lambda send, push_object, **rest: answer(
        send=stubborn(send), push_object=stubborn(push_object), **rest
    )
    vars(supernode)["time"] = SimpleNamespace(sleep=hurry.sleep)  # it needs nothing else of it
    sys.argv[0] = PROGRAM
    flower_supernode()


if __name__ == "__main__":
    main()
