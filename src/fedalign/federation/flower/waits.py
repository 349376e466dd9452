"""Flower's waits for the parts of a message, made shorter.

A message of Flower is there before its parts are: whoever receives it asks for each of these, 5 MB large. If one is not
there yet, Flower (1.41) asks again after 1 s, then 2, 4, 8 and 10. So at each of three stations between
coordinator and site a piece lay until the wait was over: up to as long again as it took to come.
"""

from __future__ import annotations

from flwr.supercore.constant import PULL_BACKOFF_CAP, PULL_INITIAL_BACKOFF, PULL_MAX_TRIES_PER_OBJECT
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, pull_objects

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
