"""Flower's SuperNode, mended: a message whose run ends while it is received leaves nothing behind.

Flower 1.41 and 1.42 keep such a message and its task. A ClientApp then answers it while another message is under way,
or ends without an answer an hour later. From there on the SuperNode sends each answer only when the next message has
come, and the coordinator of the next run waits for it in vain.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flwr.app import Message
from flwr.common.constant import Status, SubStatus
from flwr.supercore.object_store import ObjectStore
from flwr.supernode import start_client_internal as supernode
from flwr.supernode.cli import flower_supernode
from flwr.supernode.nodestate import NodeState

PROGRAM = "flower-supernode"
UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)


def receive_whole(
    flower: Callable[..., int | None], state: NodeState, object_store: ObjectStore, **rest: Any
) -> int | None:
    """A message taken in as Flower's `_pull_and_store_message` does; one that is not taken whole is forgotten.

    Args:
        flower: that function. It takes one message at a time, and none before the last one was answered.
        state: the SuperNode's messages and tasks.
        object_store: the parts of its messages.
        rest: its other arguments.

    Returns:
        the id of the run whose message was taken in, or None.
    """
    pulled: list[Message] = []

    def noted() -> Any:
        found = receive()
        if found is not None:
            pulled.append(found[0])
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


def main() -> None:
    """Be `flower-supernode`."""
    flower = supernode._pull_and_store_message
    supernode._pull_and_store_message = lambda **given: receive_whole(flower, **given)
    sys.argv[0] = PROGRAM
    flower_supernode()


if __name__ == "__main__":
    main()
