from __future__ import annotations

import os
from pathlib import Path

from fedalign.federation.flower.status import Beacon, Status, is_running, read_status
from fedalign.server.checkpoint import ServerState
from fedalign.server.results import RunFolder


def test_a_run_that_nobody_began_is_starting(tmp_path: Path) -> None:
    assert read_status(tmp_path) == Status("starting", 0, 0, "waiting for sites", 0, 1, "")


def test_what_a_beacon_says_can_be_read(tmp_path: Path) -> None:
    beacon = Beacon(tmp_path)
    beacon.begin()
    assert read_status(tmp_path) == Status("running", os.getpid())
    beacon.progress(3, "training", 2, 2)
    assert read_status(tmp_path) == Status("running", os.getpid(), 3, "training", 2, 2)
    beacon.completed(ServerState(3, {}, {}, ()), improved=True)
    assert read_status(tmp_path).stage == "training"
    beacon.fail("round 4: “nobody” is left")
    assert read_status(tmp_path) == Status("failed", os.getpid(), error="round 4: “nobody” is left")
    beacon.end()
    assert read_status(tmp_path) == Status("complete", os.getpid())
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_each_client_that_is_done_is_told_at_once(tmp_path: Path) -> None:
    beacon = Beacon(tmp_path)
    for done in range(4):
        beacon.progress(1, "training", done, 4)  # the fourth may take an hour longer than the others
        assert read_status(tmp_path) == Status("running", os.getpid(), 1, "training", done, 4)


def test_a_transfer_is_told_beside_the_stage_that_it_belongs_to(tmp_path: Path) -> None:
    beacon = Beacon(tmp_path)
    beacon.progress(2, "training", 1, 4)
    beacon.moving("down 64.0 MB of 128.0 MB, 8.0 MB/s, 0:08 left")
    told = read_status(tmp_path)
    assert (told.stage, told.done, told.transfer[:4]) == ("training", 1, "down")
    beacon.moving("")
    assert read_status(tmp_path) == Status("running", os.getpid(), 2, "training", 1, 4)


def test_a_run_is_going_on_while_a_coordinator_holds_it(tmp_path: Path) -> None:
    assert not is_running(tmp_path)
    with RunFolder(tmp_path).watched():
        assert not is_running(tmp_path)  # somebody looks on
    with RunFolder(tmp_path).worked():
        assert is_running(tmp_path)
    assert not is_running(tmp_path)
