"""The count of what a run moved, which a restart goes on with."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedalign.federation.flower.carrier import Lacks
from fedalign.federation.ledger import Ledger, Tally
from fedalign.protocol import Moved
from tests.federation.test_transfer import public


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


@pytest.mark.parametrize("seed", range(5))
def test_a_tally_counts_what_would_be_sent(tmp_path: Path, seed: int) -> None:
    """Whole what a client never got or missed, else its difference, and nothing twice, as between machines."""
    chance, known = random.Random(seed), dict[str, Mapping[str, str]]()
    kinds = set[tuple[bool, bool]]()
    for freight in public("int8", 12):
        for stage in ("train", "evaluate"):
            asked = [client for client in "abcd" if chance.random() < 0.6]
            tally = Tally(tmp_path / "sent.json")  # as after a restart
            before = tally.of(freight.round).down
            tally.send(stage, freight.broadcast, asked)
            lacks = {client: freight.lacked(known.get(client, {})) for client in asked}
            now = {client: tally.of(freight.round).down[client] - before.get(client, 0) for client in asked}
            assert now == {client: freight.weighs(lacks[client]) for client in asked}
            kinds |= {(bool(one.whole), bool(one.differences)) for one in lacks.values()}
            known |= dict.fromkeys(asked, freight.digests)
    assert kinds == {(True, False), (False, True), (False, False)}
    tally.failed("a")
    tally.send("again", freight.broadcast, ["a"])
    assert tally.of(freight.round).down["a"] >= freight.weighs(Lacks(freight.groups))
