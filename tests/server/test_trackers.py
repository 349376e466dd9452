"""Trackers: each through its real library, offline; a resumed run goes on in the same curve."""

from __future__ import annotations

import json
import logging
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any, cast, get_args

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedalign.config.run import TrackingConfig
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.files import take
from fedalign.server import trackers
from fedalign.server.checkpoint import ServerState
from fedalign.server.results import WRITTEN, Recorder, RunFolder
from fedalign.server.trackers import TRACKERS, Follower, TrackedRun, open_trackers, require_trackers
from tests.foreign import check_foreign_files_are_kept

SETTINGS = {"run.seed": 3, "algorithm.name": "fedavg"}


def tracked(folder: Path, resumed_after: int = 0) -> TrackedRun:
    folder.mkdir(exist_ok=True)
    return TrackedRun(folder, SETTINGS, resumed_after)


def log(name: str, run: TrackedRun, rounds: range, factor: float = 1.0) -> None:
    (tracker,) = open_trackers([name], run)
    tracker.follow([line(number, factor) for number in rounds])
    tracker.close()


def line(round: int, factor: float = 1.0) -> dict[str, Any]:
    """Of metrics.jsonl."""
    return {"round": round, "accuracy": factor * round, "client_accuracies": {"site (1)": 0.5}, "clients": ["a"]}


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")


def mlflow_client() -> Any:
    """Once the environment says where; importing the library reads it."""
    return import_module("mlflow.tracking").MlflowClient()


def test_loggers_are_a_list_of_names() -> None:
    assert load_config(None).tracking.loggers == ("tensorboard",)
    assert load_config(None, ["tracking.loggers=[]"]).tracking.loggers == ()
    chosen = load_config(None, ['tracking.loggers=["mlflow", "wandb"]'])
    assert chosen.tracking.loggers == ("mlflow", "wandb")
    assert get_args(get_args(TrackingConfig.model_fields["loggers"].annotation)[0]) == tuple(TRACKERS)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ('tracking.loggers=["tensorbord"]', "tracking.loggers = 'tensorbord': unknown. Choose one of: mlflow, "),
        ('tracking.loggers=["wandb", "wandb"]', "'wandb' is given twice"),
        ("tracking.loggers=wandb", 'tracking.loggers = "wandb": input should be a valid tuple'),
    ],
)
def test_wrong_loggers_are_refused(override: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert told in str(error.value)


@pytest.mark.parametrize("name", sorted(set(TRACKERS) - {"tensorboard"}))
def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    require_trackers(["tensorboard"])
    with pytest.raises(UserError, match=rf"pip install 'fedalign-moe\[{name}\]'"):
        require_trackers(["tensorboard", name])


def test_tensorboard_drops_what_a_cut_off_run_logged(tmp_path: Path) -> None:
    log("tensorboard", tracked(tmp_path), range(4))
    log("tensorboard", tracked(tmp_path, resumed_after=1), range(2, 4), factor=10)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("accuracy")] == [(0, 0), (1, 1), (2, 20), (3, 30)]


def test_tensorboard_gets_what_a_kill_kept_from_it(tmp_path: Path) -> None:
    log("tensorboard", tracked(tmp_path), range(3))  # then rounds 3 and 4 are complete, and killed before it is told
    log("tensorboard", tracked(tmp_path, resumed_after=4), range(6))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("accuracy")] == [(n, n) for n in range(6)]


def test_a_resumed_run_tells_at_once_what_a_kill_kept_back(tmp_path: Path) -> None:
    state = ServerState(1, {}, {}, (line(0), line(1)))  # its checkpoint was the last that was written
    recorder = Recorder(RunFolder(tmp_path), load_config(None), cast("Any", None), state)
    recorder._trackers[0].close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("accuracy")] == [0, 1]


def test_a_tracker_that_joins_a_resumed_run_gets_all_of_it(tmp_path: Path) -> None:
    log("tensorboard", tracked(tmp_path, resumed_after=2), range(4))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("accuracy")] == [0, 1, 2, 3]


@pytest.mark.usefixtures("mlflow_store")
def test_a_run_that_was_tracked_by_an_older_version_goes_on(tmp_path: Path) -> None:
    run = tracked(tmp_path / "run-a")
    log("mlflow", run, range(2))
    (run.folder / "trackers.json").write_text(json.dumps({"mlflow": run.kept_id("mlflow")}))
    log("mlflow", tracked(run.folder, resumed_after=1), range(3))
    history = mlflow_client().get_metric_history(run.kept_id("mlflow"), "accuracy")
    assert [metric.step for metric in history] == [0, 1, 2]


@pytest.mark.usefixtures("mlflow_store")
def test_a_server_that_comes_back_gets_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tracked(tmp_path / "run-a")
    (tracker,) = open_trackers(["mlflow"], run)
    history = [line(number) for number in range(4)]
    tracker.follow(history[:1])
    with monkeypatch.context() as away, caplog.at_level(logging.WARNING, "fedalign.server.trackers"):
        away.setattr(tracker.tracker, "log", lambda *_: 1 / 0)
        tracker.follow(history[:2])
        tracker.follow(history[:3])
    said = [record.getMessage().split(":")[0] for record in caplog.records]
    assert said == ["mlflow did not take round 1", "mlflow did not take round 2"]
    assert run.taken("mlflow") == 0
    tracker.follow(history)
    tracker.close()
    taken = mlflow_client().get_metric_history(run.kept_id("mlflow"), "accuracy")
    assert [(metric.step, metric.value) for metric in taken] == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_rounds_that_are_never_taken_hold_up_no_later_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls, taken = list[int](), list[int]()

    class Picky:
        def log(self, round: int, scalars: Any) -> None:
            calls.append(round)
            if round in (1, 2, 4):
                raise ValueError("NaN")
            taken.append(round)

        def close(self) -> None:
            pass

    run = tracked(tmp_path)
    follower = Follower("picky", Picky(), run)
    with caplog.at_level(logging.WARNING, "fedalign.server.trackers"):
        for last in range(7):
            follower.follow([line(number) for number in range(last + 1)])
    assert taken == [0, 3, 5, 6]
    assert run.taken("picky") == 0  # as the run was resumed after round 0
    assert json.loads((tmp_path / "trackers.json").read_text())["picky"]["taken"] == 6
    assert [record.getMessage() for record in caplog.records] == [
        f"picky did not take round {number}: NaN" for number in (1, 2, 4)
    ]
    assert len(calls) <= 7 + 2 * 3 + 2


def test_a_lost_server_is_asked_twice_a_round_and_gets_all_in_order(tmp_path: Path) -> None:
    calls, lost = list[int](), [True]

    class Lost:
        def log(self, round: int, scalars: Any) -> None:
            calls.append(round)
            if lost[0]:
                raise ConnectionError

        def close(self) -> None:
            pass

    follower = Follower("lost", Lost(), tracked(tmp_path))
    for last in range(5):
        follower.follow([line(number) for number in range(last + 1)])
    assert calls == [0, 0, 1, 0, 2, 0, 3, 0, 4]
    lost[0] = False
    calls.clear()
    follower.follow([line(number) for number in range(6)])
    assert calls == [0, 1, 2, 3, 4, 5]


@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_keeps_one_run_over_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run-a"
    log("mlflow", tracked(folder), range(2))
    log("mlflow", tracked(folder, resumed_after=1), range(2, 4))
    client = mlflow_client()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run-a", "FINISHED")
    assert run.data.params == {"run.seed": "3", "algorithm.name": "fedavg"}
    history = client.get_metric_history(run.info.run_id, "accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert run.data.metrics["client_accuracies/site _1_"] == 0.5


@pytest.mark.usefixtures("mlflow_store")
def test_mlflow_takes_more_numbers_than_one_call(tmp_path: Path) -> None:
    run = tracked(tmp_path / "many")
    (tracker,) = open_trackers(["mlflow"], run)
    tracker.follow([{"round": 1, "client_accuracies": {str(number): number for number in range(1001)}}])
    tracker.close()
    found = mlflow_client().get_run(run.kept_id("mlflow")).data.metrics
    assert len(found) == 1001


@pytest.mark.usefixtures("mlflow_store")
def test_a_server_that_is_lost_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tracker,) = open_trackers(["mlflow"], tracked(tmp_path / "run"))
    shutil.rmtree(tmp_path / "mlruns")
    with caplog.at_level(logging.WARNING, "fedalign.server.trackers"):
        tracker.follow([line(1), line(2)])
        tracker.close()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "mlflow did not take round 1",
        "mlflow did not take round 2",
        "mlflow did not take its end",
    ]


def test_an_mlflow_server_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="Check MLFLOW_TRACKING_URI"):
        open_trackers(["mlflow"], tracked(tmp_path))


def test_wandb_offline_keeps_one_id_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    take(tmp_path / "run-a", "run", WRITTEN)
    run = tracked(tmp_path / "run-a")
    log("wandb", run, range(2))
    kept = run.kept_id("wandb")
    log("wandb", tracked(run.folder, resumed_after=1), range(2, 4))
    assert run.kept_id("wandb") == kept
    files = list(run.folder.glob(f"wandb/offline-run-*/run-{kept}.wandb"))
    assert files
    written = b"".join(path.read_bytes() for path in files)
    assert b"accuracy" in written
    assert b"algorithm.name" in written
    files[0].with_name(f"{files[0].name}.syncstate").touch()  # as online
    check_foreign_files_are_kept(run.folder, "run", WRITTEN)


def test_wandb_without_a_login_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="WANDB_MODE=offline"):
        open_trackers(["wandb"], tracked(tmp_path))


def test_damaged_ids_are_told(tmp_path: Path) -> None:
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(UserError, match=r"trackers\.json.*damaged"):
        tracked(tmp_path).kept_id("mlflow")
