"""A user's mistake, told in one line: the value, the rule and the choices."""

from __future__ import annotations

import contextlib
import difflib
import signal
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Something the user can mend. The command line prints the message and exits with code 2, no traceback."""


@contextlib.contextmanager
def within(place: str) -> Iterator[None]:
    """A fault that is raised meanwhile, and that nobody has told in a line of its own, says in which place it was."""
    try:
        yield
    except (UserError, TrainingFailedError):
        raise
    except Exception as error:
        error.add_note(place)
        raise


class Stopped(BaseException):
    """A signal has asked this process to end.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number  # what a shell calls it
        self.lost_terminal = number == signal.SIGHUP  # nobody asked for an end


class TrainingFailedError(Exception):
    """A client has nothing usable to report this round; the message says why and quotes none of its data."""


class DataError(Exception):
    """A client's data cannot be used; the message may quote it and stays at home."""


class ModelError(Exception):
    """A client's own model cannot be loaded; the message may name its folders and stays at home."""


def unknown(what: str, value: object, choices: Iterable[str]) -> UserError:
    """An error for a value outside a closed set.

    >>> print(unknown("algorithm.name", "fedalgin", ["fedavg", "fedalign_moe"]))
    algorithm.name = 'fedalgin': unknown. Choose one of: fedalign_moe, fedavg. Did you mean 'fedalign_moe'?
    """
    names = sorted(choices)
    likeness = {name: _likeness(str(value), name) for name in names}
    best = max(names, key=likeness.__getitem__, default="")
    hint = f" Did you mean {best!r}?" if likeness.get(best, 0) > 0.6 else ""
    return UserError(f"{what} = {value!r}: unknown. Choose one of: {', '.join(names)}.{hint}")


def _likeness(value: str, name: str) -> float:
    """In [0, 1]; a good beginning of a longer name counts as much as the whole of it."""
    return max(difflib.SequenceMatcher(None, value, part).ratio() for part in (name, name[: len(value)]))
