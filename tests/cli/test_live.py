import io
import sys
from types import SimpleNamespace

import pytest

from fedalign.cli import live
from fedalign.cli.live import COLUMNS, LiveTable, row
from fedalign.cli.terminal import console
from fedalign.protocol import Metrics
from fedalign.server.checkpoint import ServerState
from fedalign.units import clock, percent, size

HISTORY: tuple[Metrics, ...] = (
    {"round": 0, "accuracy": 0.125, "client_accuracy_worst": 0.0, "loss_nats": 2.5, "bytes_up": 0},
    {
        "round": 1,
        "accuracy": 0.5,
        "client_accuracy_worst": 0.25,
        "loss_nats": 1.5,
        "routing_divergence_nats": 0.0123,
        "bytes_up": 1_500_000,
        "failures": [{"client": "site [b]", "stage": "train", "reason": "its loss is nan at step 3"}],
    },
)


def show(terminal: bool) -> str:
    stream = io.StringIO()
    shown = console(file=stream, force_terminal=terminal, width=120, color_system=None)
    with LiveTable(shown, rounds=3) as table:
        table.progress(0, "evaluating", 0, 1)
        table.completed(ServerState(0, {}, {}, HISTORY[:1]), improved=True)
        table.progress(1, "training", 1, 2)
        table.completed(ServerState(1, {}, {}, HISTORY), improved=True)
    return stream.getvalue()


def test_a_terminal_sees_a_table_that_stays() -> None:
    text = show(terminal=True)
    last = text[text.rindex("round") :]
    assert "50.0 %" in last
    assert "1.5 MB" in last
    assert "site [b], train: its loss is nan at step 3" in text
    assert all(name in text for name in COLUMNS)


def test_a_file_gets_a_line_a_round() -> None:
    lines = show(terminal=False).splitlines()
    assert lines.pop(0) == "accuracy and loss: global test set"
    assert lines[0].startswith("round 0 | accuracy 12.5 % | worst client 0.0 %")
    assert lines[1].startswith("round 1 | accuracy 50.0 % | worst client 25.0 % | loss 1.500")
    assert lines[2] == "round 1: site [b], train: its loss is nan at step 3"
    assert "\x1b" not in "".join(lines)


def test_rows_add_up_what_was_sent_and_fall_back_to_clients() -> None:
    assert row(HISTORY, 1, "0:10") == ("1", "50.0 %", "25.0 %", "1.500", "0.0123", "1.5 MB", "0:10")
    no_test_set = ({"round": 0, "client_accuracy_weighted": 0.25, "client_loss_mean_nats": 2.0},)
    assert row(no_test_set, 0, "...")[:4] == ("0", "25.0 %", "-", "2.000")


def test_time_left_is_of_the_round_at_work_though_its_line_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: now[0]))
    table = LiveTable(console(quiet=True), rounds=4)

    def line(number: int) -> str:
        table.completed(ServerState(number, {}, {}, tuple({"round": n} for n in range(number + 1))), improved=False)
        return table.time_left()

    table.progress(1, "training", 0, 1)
    now[0] += 50
    assert line(0) == "..."  # it comes when round 1 has trained
    now[0] += 10
    table.progress(2, "training", 0, 1)  # a round takes a minute
    now[0] += 50
    assert line(1) == clock(3 * 60 - 50)
    now[0] += 10
    table.progress(3, "training", 0, 1)
    now[0] += 60
    assert line(2) == line(3) == clock(60)  # nothing scores it in the next round: its line comes at its end
    table.progress(4, "training", 0, 1)
    now[0] += 70
    assert line(4) == "0:00"


def test_units() -> None:
    assert size(2.5e9) == "2.5 GB"
    assert size(3e12) == "3.0 TB"
    assert clock(59.6) == "1:00"
    assert percent(1.0) == "100.0 %"


def test_a_notebook_sees_one_output_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def display(shown: object, display_id: bool = False) -> object:
        seen.append(shown._repr_mimebundle_([], [])["text/html"])  # type: ignore[attr-defined] # as IPython asks
        return SimpleNamespace(update=display)

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    shown = console(force_jupyter=True)
    with LiveTable(shown, rounds=3) as table:
        table.progress(0, "evaluating", 0, 1)
        table.completed(ServerState(1, {}, {}, HISTORY[:1]), improved=True)
        table.progress(1, "training", 1, 2)
    assert "before round 1: evaluating" in seen[1]
    assert "12.5 %" in seen[2]
    assert "12.5 %" in seen[-1]
    assert "evaluating" not in seen[-1]  # the bar is gone


def test_a_quiet_console_sees_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with LiveTable(console(quiet=True, force_terminal=True), rounds=3) as table:
        table.completed(ServerState(1, {}, {}, HISTORY), improved=True)
        print("still heard")
    assert capfd.readouterr().out == "still heard\n"


def test_a_summary_says_which_way_is_better_and_of_how_many_rows() -> None:
    from fedalign.cli.run import _best, _by_client, _from_to  # noqa: PLC0415 - of this test alone
    from fedalign.units import percent  # noqa: PLC0415 - the same

    assert _best({"best_round": 2, "best_by": "accuracy", "best_accuracy": 0.5, "best_loss": 1.0}) == (
        "highest accuracy, 50.0 %, in round 2"
    )
    assert _best({"best_round": 2, "best_by": "loss", "best_accuracy": 0.5, "best_loss": 1.0}) == (
        "lowest loss, 1.000, in round 2"
    )
    assert _best({"best_round": 0, "best_by": "loss", "best_accuracy": None, "best_loss": 1.0}) == (
        "lowest loss, 1.000, at the start: no round was better"
    )
    assert _best({"best_round": None, "best_by": None, "best_accuracy": None, "best_loss": None}) == ""
    assert _by_client({"a": 1.0, "b": 0.25}, {"a": 1, "b": 4}) == "a 100.0 % of 1, b 25.0 % of 4"
    assert _from_to(None, None, percent) == ""
    assert _from_to(0.1, 0.2, percent) == "10.0 % -> 20.0 %"


def test_the_table_says_what_accuracy_is_of() -> None:
    table = LiveTable(console(width=120), rounds=1)
    table.history = ({"round": 0, "accuracy": 0.5, "loss_nats": 1.0, "test_examples": 1234}, {"round": 1})
    with table.console.capture() as shown:
        table.console.print(table)
    assert "accuracy and loss: global test set, n = 1,234" in shown.get()
