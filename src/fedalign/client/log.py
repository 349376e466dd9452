"""A site's own record of what it answered: one line of JSON for each message, written before the answer leaves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from fedalign.files import LOCK, append_private, locked


@dataclass(frozen=True)
class Entry:
    """One answer, or one thing that the site did by itself."""

    run: str  # the run's key
    verb: str  # what was asked for: hello, start, train, update, evaluate, finish; or what the site did: withdraw
    round: int | None = None
    refused: str = ""  # the reason that left in place of an answer
    fields: tuple[str, ...] = ()  # of the message that left
    bytes: int = 0  # of it
    examples: int | None = None  # that it is about, as far as it says
    counted: bool = False  # against the site's limits: a failure tells something as well
    scored: bool = False  # training that counts as an evaluation, too: what was received was scored before
    when: str = ""  # UTC, to the second


class SiteLog:
    """The lines of a file to which lines are only ever added."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "log.jsonl"

    def entries(self) -> Iterator[Entry]:
        """All lines, oldest first.

        Raises:
            ValueError: One is no line of ours; the message says which.
        """
        with contextlib.suppress(FileNotFoundError), self.file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    about = json.loads(line)
                    yield Entry(**about | {"fields": tuple(about["fields"])})
                except (ValueError, TypeError, KeyError):
                    raise ValueError(number) from None

    def counted(self, verb: str) -> list[str]:
        """The runs for which such a message was answered, once for each answer; failures are answers, too."""
        return [
            entry.run
            for entry in self.entries()
            if entry.counted and (entry.verb == verb or (entry.scored and verb == "evaluate"))
        ]

    def append(self, entry: Entry) -> None:
        """Add a line, and return when the disk has it."""
        append_private(self.file, [asdict(entry)])

    def held(self) -> AbstractContextManager[object]:
        """Meanwhile no other process holds the log.

        Raises:
            UserError: Another does, for longer than an answer takes to be written down.
        """
        return locked(self.file.with_name(f".{self.file.name}{LOCK}"), "an answer", patience=60)
