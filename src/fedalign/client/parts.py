"""Which rows a site trains on and which it is scored on: drawn once, by its own seed, for the whole life of its data.

A coordinator that could move the line between the two, or have a run train on one example more, would read that
example off the difference. So the parts are drawn from the rows before anything of a run is known, and are kept. New
rows are trained on, once there are enough of them. In an order drawn once, a run trains on all of them, or on a
beginning whose length doubles: what two runs train on is the same or differs by many examples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedalign.config.run import Columns, choice_columns
from fedalign.data.partition import hold_out
from fedalign.data.sources import Row, is_missing
from fedalign.errors import UserError
from fedalign.files import write_private
from fedalign.maths.hashing import derive_seed

TOO_FEW = (
    "it holds fewer examples than it takes part with (limits.min_train and limits.min_held_out in its site.toml); how "
    "many they are stays there"
)
FIRST = ("text", "label", "prompt", "response", "messages", "tools", "question", "choices", "answer")  # roles of a key
LATER = ("input", "system", "history")  # roles of a key, too, where parts.json names them
log = logging.getLogger("fedalign")


@dataclass(frozen=True)
class Least:
    """Sizes below which nothing leaves."""

    train: int
    held_out: int


@dataclass(frozen=True)
class Parts:
    """Keys of rows, as `row_keys` makes them."""

    share: float  # that was asked for when they were drawn
    held_out: tuple[str, ...]
    train: tuple[str, ...]  # in the order of the draw
    roles: tuple[str, ...] = LATER  # of which keys are made beside the first ones; as at the draw, for good

    @classmethod
    def of(cls, file: Path, keys: Sequence[str], share: float, seed: int, name: str, least: Least) -> Parts:
        """The parts of a site's rows: those that the file knows, or drawn now if it knows none of these rows.

        Raises:
            UserError: There are too few rows; the message does not say how many.
        """
        if file.exists():
            about = json.loads(file.read_text(encoding="utf-8"))
            known = cls(float(about["share"]), tuple(about["held_out"]), tuple(about["train"]), roles_of(file))
            if not {*known.held_out, *known.train}.isdisjoint(keys):
                if share != known.share:
                    log.warning("limits.held_out was %s when %s was drawn, and stays so", known.share, file)
                return known._grown(keys, seed, least)
            log.warning("%s: none of its rows is in the data any more: what is held out is drawn anew", file)
        return replace(cls._draw(keys, share, seed, name, least), roles=roles_of(file))

    @classmethod
    def _draw(cls, keys: Sequence[str], share: float, seed: int, name: str, least: Least) -> Parts:
        count = len(keys)
        fraction = max(share, least.held_out / count) if share and count else 0.0
        if count - round(fraction * count) < least.train:
            raise UserError(TOO_FEW)
        kept, held = hold_out(range(count), fraction, derive_seed(seed, "held out"), name)
        return cls(share, tuple(keys[i] for i in held), _shuffled([keys[i] for i in kept], seed))

    def _grown(self, keys: Sequence[str], seed: int, least: Least) -> Parts:
        """With the rows that have come since, unless they are so few that each would stand out."""
        known = {*self.held_out, *self.train}
        new = [key for key in keys if key not in known]
        if 0 < len(new) < least.train:
            log.warning("%d new rows wait until there are %d of them (limits.min_train)", len(new), least.train)
        return self if len(new) < least.train else replace(self, train=self.train + _shuffled(new, seed))

    def save(self, file: Path) -> None:
        """Keep them."""
        write_private(file, json.dumps(asdict(self)).encode())

    def trained(self, asked: int, least: int) -> frozenset[str]:
        """The rows that a run trains on which asked for `asked` at most; 0: for all.

        >>> parts = Parts(0.1, (), tuple("abcdefghij"))
        >>> [len(parts.trained(asked, least=2)) for asked in (0, 2, 3, 5, 7, 9, 10, 11)]
        [10, 2, 2, 4, 4, 8, 10, 10]
        """
        every = len(self.train)
        if not 0 < asked < every:
            return frozenset(self.train)
        sizes = [least << doubled for doubled in range(asked.bit_length())]
        fitting = [size for size in sizes if size <= asked and every - size >= least]
        return frozenset(self.train[: fitting[-1]] if fitting else self.train)


def roles_of(file: Path) -> tuple[str, ...]:
    """The later roles that the keys in a file are made of: none in one of before there were such."""
    return tuple(json.loads(file.read_text(encoding="utf-8")).get("roles", ())) if file.exists() else LATER


def row_keys(rows: Iterable[Row], columns: Columns, seed: int, roles: Iterable[str] = LATER) -> list[str]:
    """A key for each row, of what can be read of it; it tells nothing to who does not know the seed.

    Later roles and a column for each choice count where a row has them: other keys are as they were before.
    """
    first = sorted({getattr(columns, role) for role in FIRST})
    later = {*(getattr(columns, role) for role in roles), *choice_columns(columns.choices)} - {*first}
    secret, seen, keys = str(seed).encode(), Counter[str](), list[str]()
    for row in rows:
        more = {column: row.values[column] for column in later if not is_missing(row.values.get(column))}
        read = [*(row.values.get(column) for column in first), *([more] if more else [])]
        content = json.dumps(read, sort_keys=True, default=str)
        number, seen[content] = seen[content], seen[content] + 1  # of rows that are alike each is one of its own
        keys.append(hashlib.blake2b(f"{number} {content}".encode(), key=secret, digest_size=16).hexdigest())
    return keys


def _shuffled(keys: list[str], seed: int) -> tuple[str, ...]:
    random.Random(derive_seed(seed, "train", len(keys))).shuffle(keys)
    return tuple(keys)
