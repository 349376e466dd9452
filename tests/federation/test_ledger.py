"""The count of what a run moved, which a restart goes on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedalign.federation.ledger import Ledger
from fedalign.protocol import Moved


def test_a_kill_while_old_rounds_are_forgotten_loses_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "moved.jsonl"
    ledger = Ledger(file)
    for number in (1, 2):
        ledger.count(number, "down", "ward", 10 * number)
        ledger.count(number, "up", "ward", number)
    write = Path.write_text

    def killed(path: Path, text: str, **how: Any) -> int:
        write(path, text[:5], **how)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger.count(3, "down", "ward", 30)
    again = Ledger(file)
    assert again.of(2) == Moved({"ward": 20}, {"ward": 2})
    again.count(3, "down", "ward", 30)
    again = Ledger(file)
    assert (again.of(1), again.of(3)) == (Moved(), Moved({"ward": 30}, {}))
