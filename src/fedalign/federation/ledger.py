"""Bytes of weights and updates that a run moved, round by round, on disk: what was moved before a restart counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedalign.federation.transfer import digest
from fedalign.files import whole_lines, write_text
from fedalign.protocol import Broadcast, Moved, ParameterGroup, Update


class Ledger:
    """A line for each movement, of the rounds that are not long over.

    Args:
        file: one JSON list a line: round, "down" or "up", client, bytes.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rounds: dict[int, Moved] = {}
        for line in whole_lines(file):
            self._add(*json.loads(line))

    def count(self, round: int, way: Literal["down", "up"], client: str, nbytes: int) -> None:
        """Note what has moved."""
        if not nbytes and client in getattr(self._rounds.get(round, Moved()), way):
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if round not in self._rounds:
            self._forget_before(round - 1)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps([round, way, client, nbytes]) + "\n")
        self._add(round, way, client, nbytes)

    def of(self, round: int) -> Moved:
        """All that a round has moved."""
        return self._rounds.get(round, Moved())

    def _add(self, round: int, way: str, client: str, nbytes: int) -> None:
        by_client = getattr(self._rounds.setdefault(round, Moved()), way)
        by_client[client] = by_client.get(client, 0) + nbytes

    def _forget_before(self, round: int) -> None:
        old = [number for number in self._rounds if number < round]
        for number in old:
            del self._rounds[number]
        if old:
            write_text(
                self.file,
                "".join(
                    json.dumps([number, way, client, nbytes]) + "\n"
                    for number, moved in self._rounds.items()
                    for way in ("down", "up")
                    for client, nbytes in getattr(moved, way).items()
                ),
            )


class Tally:
    """A count of all that would have travelled, had clients been elsewhere.

    A group goes to each of them once, until it has changed; then its difference, if they hold what that is added to.

    It is kept on disk, so that a round done again after a restart counts as it did.

    Args:
        file: JSON.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._up: dict[int, dict[str, int]] = {}
        self._asked: set[tuple[int, str, ParameterGroup]] = set()
        about = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self._digests: dict[str, str] = about.get("digests", {})  # of the last broadcast, by group
        self._changed: dict[str, int] = about.get("changed", {})  # the number of the broadcast in which a group did
        self._before: dict[str, int] = about.get("before", {})  # the same of the time before
        self._last: dict[str, int] = about.get("last", {})  # that a client got
        self._number: int = about.get("number", 0)  # of the last broadcast
        self._down: dict[str, dict[str, int]] = about.get("down", {})  # "round stage" -> bytes, by client

    def send(self, stage: str, broadcast: Broadcast, clients: Sequence[str]) -> None:
        """Count a broadcast; one that was counted before a restart is not counted again."""
        key = f"{broadcast.round} {stage}"
        if key in self._down:
            return
        self._number += 1
        for group, packed in broadcast.weights.items():
            if self._digests.get(str(group)) != (found := digest(packed)):
                if str(group) in self._changed:
                    self._before[str(group)] = self._changed[str(group)]
                self._digests[str(group)], self._changed[str(group)] = found, self._number
        state = sum(tensor.nbytes for tensor in broadcast.state.values())
        self._down = dict(list(self._down.items())[-3:]) | {
            key: {client: state + self._lacks(broadcast, self._last.get(client, 0)) for client in clients}
        }
        self._last |= dict.fromkeys(clients, self._number)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        about = {"digests": self._digests, "changed": self._changed, "before": self._before, "last": self._last}
        write_text(self.file, json.dumps(about | {"number": self._number, "down": self._down}))

    def _lacks(self, broadcast: Broadcast, last: int) -> int:
        """Bytes of the groups that have changed since a client got a broadcast; 0: it has got none."""
        changed = [group for group in broadcast.weights if self._changed[str(group)] > last]
        differ = [g for g in changed if g in broadcast.differences and 0 < self._before.get(str(g), 0) <= last]
        return sum(broadcast.weights[g].nbytes for g in changed) - sum(
            broadcast.weights[g].nbytes - broadcast.differences[g].nbytes for g in differ
        )

    def failed(self, client: str) -> None:
        """It gets all groups again: nobody knows what it holds."""
        self._last.pop(client, None)

    def fetch(self, update: Update) -> None:
        """Count an update; groups that came before are not counted again."""
        by_client = self._up.setdefault(update.round, {})
        for group, packed in update.groups.items():
            if (key := (update.round, update.client, group)) not in self._asked:
                self._asked.add(key)
                by_client[update.client] = by_client.get(update.client, 0) + packed.nbytes
        self._asked = {key for key in self._asked if key[0] >= update.round - 1}

    def of(self, round: int) -> Moved:
        """All that a round has moved."""
        down: dict[str, int] = {}
        for key, by_client in self._down.items():
            if int(key.split()[0]) == round:
                for client, nbytes in by_client.items():
                    down[client] = down.get(client, 0) + nbytes
        return Moved(down, dict(self._up.get(round, {})))
