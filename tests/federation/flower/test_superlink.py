"""The SuperLink waits for its database for longer than Flower's own."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from flwr.supercore import sql_mixin

from fedalign.federation.flower import superlink


def waits(database: Path) -> int:
    """Milliseconds for which a connection as Flower makes it waits for a lock."""
    with closing(sqlite3.connect(database)) as connection:
        sql_mixin._set_sqlite_pragmas(connection, None)
        (milliseconds,) = connection.execute("PRAGMA busy_timeout").fetchone()
    return int(milliseconds)


def test_a_call_waits_for_the_database_for_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "state.db"
    assert waits(database) == 5000  # else Flower has changed, and what is said of it is wrong
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", vars(sql_mixin)["SQLITE_PRAGMAS"])  # put back afterwards
    monkeypatch.setattr("sys.argv", ["none"])
    seen: list[int] = []
    monkeypatch.setattr(superlink, "flower_superlink", lambda: seen.append(waits(database)))
    superlink.main()
    assert seen == [1000 * superlink.LOCK_SECONDS]
