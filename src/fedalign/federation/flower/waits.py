"""Flower's waits: for the parts of a message, made shorter; for a SuperLink that fails, made longer.

A message of Flower is there before its parts are: whoever receives it asks for each of these, 5 MB large. If one is not
there yet, Flower (1.41) asks again after 1 s, then 2, 4, 8 and 10. So at each of three stations between
coordinator and site a piece lay until the wait was over: up to as long again as it took to come.

A process that does not say that it lives is taken for dead. Flower's sender of heartbeats goes on where the SuperLink
is away, but ends where it fails at one (HTTP 500), as one does whose database is locked: the run ends a minute later.
"""

from __future__ import annotations

from flwr.supercore.constant import PULL_BACKOFF_CAP, PULL_INITIAL_BACKOFF, PULL_MAX_TRIES_PER_OBJECT
from flwr.supercore.heartbeat import HeartbeatFailure, HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects
from httpx import HTTPStatusError, codes

OFTEN = 20  # times as often: after 0.05 s first, after 0.5 s at last


def shorten() -> None:
    """Have this process ask `OFTEN` times as often for what is not there yet, and as long in all."""
    for receive in (pull_objects, pull_and_inflate_object_from_tree):
        receive.__kwdefaults__ = {
            **(receive.__kwdefaults__ or {}),
            "initial_backoff": PULL_INITIAL_BACKOFF / OFTEN,
            "backoff_cap": PULL_BACKOFF_CAP / OFTEN,
            "max_tries_per_object": PULL_MAX_TRIES_PER_OBJECT * OFTEN,
        }


def outlast_failures() -> None:
    """Have this process send a heartbeat again at which the SuperLink failed, as one that did not reach it."""
    HeartbeatSender._heartbeat = _heartbeat  # type: ignore[assignment] # Flower starts the sender before our app is there


_flower = HeartbeatSender._heartbeat


def _heartbeat(sender: HeartbeatSender) -> None:
    try:
        _flower(sender)
    except HTTPStatusError as error:
        if error.response.status_code != codes.INTERNAL_SERVER_ERROR:
            raise
        raise HeartbeatFailure from error
