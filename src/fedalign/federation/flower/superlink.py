"""Flower's SuperLink, mended: who finds its database locked waits for a minute. It takes `flower-superlink`'s options.

Flower's own lets SQLite wait for 5 s, and then fails at what it was asked (HTTP 500). On a slow or busy disk one large
message can take longer. Of what comes meanwhile, its own SuperExec ends for good: no run is started any more until the
SuperLink is.
"""

from __future__ import annotations

import sys

from flwr.supercore import sql_mixin
from flwr.superlink.cli import flower_superlink

PROGRAM = "flower-superlink"
LOCK_SECONDS = 60


def main() -> None:
    """Be `flower-superlink`."""
    waits = ("busy_timeout", str(1000 * LOCK_SECONDS))
    names = vars(sql_mixin)
    names["SQLITE_PRAGMAS"] = (*(pragma for pragma in names["SQLITE_PRAGMAS"] if pragma[0] != waits[0]), waits)
    sys.argv[0] = PROGRAM
    flower_superlink()


if __name__ == "__main__":
    main()
