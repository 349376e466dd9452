"""A user's mistake, told in one line: the value, the rule and the choices."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend. The command line prints the message and exits with code 2, no traceback."""


def unknown(what: str, value: object, choices: Iterable[str]) -> UserError:
    """An error for a value outside a closed set.

    >>> print(unknown("algorithm.name", "fedalgin", ["fedavg", "fedalign_moe"]))
    algorithm.name = 'fedalgin': unknown. Choose one of: fedavg, fedalign_moe. Did you mean 'fedalign_moe'?
    """
    names = sorted(choices)
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"{what} = {value!r}: unknown. Choose one of: {', '.join(names)}.{hint}")
