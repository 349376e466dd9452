"""Whole runs on a tiny model: what they leave behind, and that nothing is lost when they break off."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalign.client.memory import ClientData
from fedalign.client.trainer import Trainer
from fedalign.compare import comparison as comparing
from fedalign.compare.schedule import Slot, Task, Watcher
from fedalign.config.toml import load_config
from fedalign.doctor.estimate import estimate
from fedalign.errors import TrainingFailedError, UserError
from fedalign.export.write import find_snapshot
from fedalign.federation.in_process import Prepared, prepare
from fedalign.files import MARK
from fedalign.maths import heap
from fedalign.maths.heap import _mapped
from fedalign.protocol import Broadcast, Statistics, Weights
from fedalign.report import write_report
from fedalign.report.findings import facts
from fedalign.report.material import read_material
from fedalign.server.checkpoint import Checkpoints, ServerState
from fedalign.server.results import ROUND, WRITTEN, Recorder, RunFolder, _described, read_history, saved_round
from fedalign.server.rounds import Server
from fedalign.server.run import execute, identity, resumed_config
from tests.conftest import Command
from tests.foreign import check_foreign_files_are_kept
from tests.server.test_checkpoint import flip

SUMMARY = {
    "algorithm",
    "seed",
    "rounds",
    "initial_accuracy",
    "final_accuracy",
    "best_accuracy",
    "final_loss",
    "client_accuracies",
    "bytes_up",
    "bytes_down",
    "seconds",
    "versions",
}


class Silent:
    """An observer that may pull the plug: `stop` is asked at every sign of life."""

    def __init__(self, stop: Callable[[int, str, int], bool] = lambda *_: False) -> None:
        self.stop = stop

    def progress(self, round: int, stage: str, done: int, total: int) -> None:
        if self.stop(round, stage, done):
            raise KeyboardInterrupt

    def planned(self, round: int, reports: object, plan: object, layout: object) -> None:
        pass

    def completed(self, state: ServerState, improved: bool) -> None:
        if self.stop(state.round, "completed", 1):
            raise KeyboardInterrupt


def start(out: Path, settings: list[str], *more: str, watch: Silent | None = None) -> dict[str, Any]:
    config = load_config(None, [*settings, *more])
    folder = RunFolder(out)
    folder.check_free(overwrite=False)
    prepared = prepare(config, folder.clients)
    folder.begin(config)
    return execute(prepared, folder, watch or Silent())


def resume(out: Path, *overrides: str) -> dict[str, Any]:
    folder = RunFolder(out)
    return execute(prepare(resumed_config(out, overrides), folder.clients), folder, Silent())


def in_this_process(tasks: Sequence[Task], slots: Sequence[Slot], watch: Watcher, held: Sequence[int] = ()) -> None:
    """What a comparison's `run_all` does, without a process for each run: importing torch takes longer than these."""
    for task in tasks:
        if task.state == "waiting":
            if not task.folder.config.exists():
                task.folder.begin(task.cell.config)
            execute(prepare(task.cell.config, task.folder.clients), task.folder, Silent())
            task.state, task.history = "finished", read_history(task.folder)
            watch.ended(task)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("seconds")} for line in lines]


def model_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    start(out, settings)
    return out


def test_a_run_leaves_what_it_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.toml", "metrics.jsonl", "summary.json", "checkpoint", "model", "best", "clients"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    held = json.loads((finished / "clients.json").read_text())
    assert sum(sum(client["labels"].values()) for client in held.values()) == 90  # the 120 texts without every fourth
    assert all(0 < client["examples"] < sum(client["labels"].values()) for client in held.values())
    assert len(list((finished / "health").iterdir())) == 3
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    lines = metrics(finished)
    assert [line["round"] for line in lines] == [0, 1, 2, 3]
    assert summary["rounds"] == 3
    assert summary["final_accuracy"] == lines[-1]["accuracy"] > summary["initial_accuracy"]
    assert summary["best_accuracy"] == max(line["accuracy"] for line in lines)
    assert summary["bytes_up"] == sum(line["bytes_up"] for line in lines)
    assert set(summary["client_accuracies"]) == {"client-00", "client-01", "client-02"}
    assert not list(finished.rglob("update.safetensors"))  # kept updates are freed at the end
    assert {path.name for path in finished.rglob(".*")} == {MARK}  # and nothing temporary stays
    check_foreign_files_are_kept(finished, "run", WRITTEN)  # and all of it is known as the run's


@pytest.mark.parametrize(
    "more",
    [
        ["algorithm.name=fedavg", "tuning.kind=lora", "training.keep_optimizer=true"],
        ["algorithm.name=fedavg", "evaluation.clients=false", "privacy.noise_multiplier=1.0"],
        ["algorithm.name=by_use", "privacy.masked=true", "server.max_norm_ratio=0"],
        ["algorithm.name=centralised"],
        ["wire.dtype=int8"],
    ],
    ids=lambda more: " ".join(more)[:40],
)
def test_runs_of_every_kind_can_be_replaced(settings: list[str], tmp_path: Path, more: list[str]) -> None:
    start(tmp_path / "run", [*settings, "training.epochs=1", "run.rounds=1"], *more)
    check_foreign_files_are_kept(tmp_path / "run", "run", WRITTEN)


@pytest.mark.parametrize("kind", ["model", "best"])
def test_plain_transformers_loads_the_result_and_scores_the_same(finished: Path, kind: str, texts: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished / kind).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / kind)
    rows = [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]
    labels = sorted({row["label"] for row in rows})
    right = 0
    for row in rows:
        prompt = tokenizer(f"{row['text']}\nLabel:", add_special_tokens=False)["input_ids"]
        scores = []
        for label in labels:
            answer = tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
        right += labels[scores.index(max(scores))] == row["label"]
    summary = json.loads((finished / "summary.json").read_text())
    assert right / len(rows) == summary["final_accuracy" if kind == "model" else "best_accuracy"]


@pytest.mark.parametrize(
    ("round", "stage", "done"),
    [
        (0, "completed", 1),
        (1, "training", 2),
        (2, "summing", 1),
        (2, "evaluating", 0),
        (2, "completed", 1),
        (3, "evaluating", 2),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_bytes(
    finished: Path, settings: list[str], tmp_path: Path, round: int, stage: str, done: int
) -> None:
    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        start(out, settings, watch=Silent(lambda *where: where == (round, stage, done)))
    assert not (out / "summary.json").exists()
    resume(out)
    assert metrics(out) == metrics(finished)
    for kind in ("model", "best"):
        assert model_bytes(out / kind) == model_bytes(finished / kind)


@pytest.mark.parametrize("round", [0, 1, 3])
def test_a_kill_between_keeping_scores_and_telling_them_loses_neither_line_nor_best(
    finished: Path, settings: list[str], tmp_path: Path, round: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(self: Recorder, state: ServerState, improved: bool) -> None:
        if state.round == round:
            raise KeyboardInterrupt
        told(self, state, improved)

    told = Recorder.completed
    monkeypatch.setattr(Recorder, "completed", cut_off)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "broken", settings)
    monkeypatch.undo()
    assert len(metrics(tmp_path / "broken")) == round
    resume(tmp_path / "broken")
    assert metrics(tmp_path / "broken") == metrics(finished)
    for kind in ("model", "best"):
        assert model_bytes(tmp_path / "broken" / kind) == model_bytes(finished / kind)


@pytest.mark.parametrize(
    "choice",
    [
        (),
        ("wire.dtype=int8",),
        ("algorithm.name=scaffold", "training.optimizer=sgd"),
        ("algorithm.name=fedavg", "server.optimizer=adam", "server.learning_rate=0.01"),
        ("algorithm.name=fedavg", "server.robust=centered_clip"),
        ("algorithm.name=fedavg", "server.robust=median"),
    ],
)
def test_a_model_in_mapped_files_is_the_model_in_memory(
    settings: list[str], tmp_path: Path, choice: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def mapped(folder: Path, nbytes: int) -> memoryview:
        made.append(nbytes)
        return _mapped(folder, nbytes)

    monkeypatch.setattr(heap, "_mapped", mapped)
    start(tmp_path / "memory", settings, "run.rounds=2", *choice)
    assert not made
    start(tmp_path / "files", settings, "run.rounds=2", "server.memory_gb=0", *choice)
    assert made
    assert metrics(tmp_path / "files") == metrics(tmp_path / "memory")
    assert model_bytes(tmp_path / "files" / "model") == model_bytes(tmp_path / "memory" / "model")
    assert {path.name for path in (tmp_path / "files").rglob(".*")} == {MARK}


@pytest.mark.parametrize(
    "choice",
    [
        ("algorithm.name=scaffold", "training.optimizer=sgd"),
        ("algorithm.name=fc_moe",),
        ("algorithm.name=pfl_moe",),
        ("algorithm.name=local",),
        ("algorithm.name=centralised",),
        ("algorithm.gate=local",),
        ("algorithm.name=fedalign_paper", "algorithm.vocabulary=tokens", "wire.dtype=int8"),
        ("algorithm.name=fedavg", "server.optimizer=adam", "server.learning_rate=0.01"),
    ],
)
def test_what_algorithms_and_servers_keep_survives_an_interruption(
    settings: list[str], tmp_path: Path, choice: tuple[str, ...]
) -> None:
    start(tmp_path / "whole", settings, *choice)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "broken", settings, *choice, watch=Silent(lambda *where: where == (3, "training", 1)))
    resume(tmp_path / "broken")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
    assert model_bytes(tmp_path / "broken" / "model") == model_bytes(tmp_path / "whole" / "model")


@pytest.mark.parametrize(
    "choice",
    [
        ("algorithm.name=fedavg",),
        ("algorithm.name=fc_moe",),
        ("algorithm.name=pfl_moe",),
        ("algorithm.name=local",),
        ("algorithm.gate=local", "wire.dtype=int8"),
        ("clients.sample=0.7", "evaluation.everyone=1"),
    ],
)
def test_rounds_score_the_same_as_each_would_by_itself(
    settings: list[str], tmp_path: Path, choice: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "together", settings, *choice)
    monkeypatch.setattr(Server, "_alone", lambda *_: True)
    start(tmp_path / "alone", settings, *choice)
    assert sent_only_to_train(tmp_path / "together") == sent_only_to_train(tmp_path / "alone")
    for kind in ("model", "best"):
        assert model_bytes(tmp_path / "together" / kind).keys() == model_bytes(tmp_path / "alone" / kind).keys()
    assert (
        model_bytes(tmp_path / "together" / "model")["model.safetensors"]
        == (model_bytes(tmp_path / "alone" / "model")["model.safetensors"])
    )


def sent_only_to_train(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what went down: what is scored by itself is sent once more."""
    return [{k: v for k, v in line.items() if not k.startswith("bytes_down")} for line in metrics(out)]


def test_a_killed_process_resumes_to_the_same_bytes(finished: Path, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "fedalign", "run", os.devnull, "--out", str(out)]
    for setting in settings:
        command += ["--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "round-00001").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_after = len(metrics(out))
    resume(out)
    assert killed_after <= len(metrics(out))
    assert metrics(out) == metrics(finished)
    assert model_bytes(out / "model") == model_bytes(finished / "model")


@pytest.mark.parametrize("cut", ["before", "between", "damaged", "never said"])
def test_best_is_made_whole_again(
    finished: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    out, best = tmp_path / "run", json.loads((finished / "summary.json").read_text())["best_round"]
    save = Recorder._save

    def cut_off(self: Recorder, weights: Weights, place: Path, line: dict[str, Any]) -> None:
        if (place.name, line["round"]) == ("best", best):
            raise KeyboardInterrupt
        save(self, weights, place, line)

    monkeypatch.setattr(Recorder, "_save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        start(out, settings)
    monkeypatch.undo()
    assert saved_round(out / "best") == _described(metrics(out)[0])
    with pytest.raises(UserError, match=rf"best': holds round 0; asked for is round {best}\. .*--resume"):
        find_snapshot(out, best=True)
    if cut == "between":
        (out / "best").rename(out / ".best.old")
    elif cut == "damaged":
        flip(out / "best" / "model.safetensors")
    elif cut == "never said":
        (out / "best" / ROUND).unlink()
    resume(out)
    assert metrics(out) == metrics(finished)
    for kind in ("model", "best"):
        assert model_bytes(out / kind) == model_bytes(finished / kind)
    assert {path.name for path in out.rglob(".*")} == {MARK}
    assert find_snapshot(out, best=True).round == best


def rescored(out: Path, best: int) -> None:
    """As if the loss had been lowest after this round."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["loss_nats"] = 1.0 + abs(line["round"] - best)
    (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def test_a_resumed_run_goes_by_another_measure_if_its_best_model_is_kept(finished: Path, tmp_path: Path) -> None:
    out, by_loss = tmp_path / "run", "evaluation.best=loss"
    shutil.copytree(finished, out)
    (lost,) = {0, 1} - {json.loads((out / "summary.json").read_text())["best_round"]}
    rescored(out, lost)
    told = (
        rf'evaluation.best = "loss": the lowest loss is of round {lost}, whose model is no longer kept \(checkpoints: 2'
    )
    with pytest.raises(UserError, match=told):
        resumed_config(out, [by_loss])
    assert resumed_config(out, []).evaluation.best == "accuracy"
    shutil.copy(finished / "metrics.jsonl", out)
    lines = metrics(out)
    lowest = min(lines, key=lambda line: line["loss_nats"])["round"]
    assert lowest != saved_round(out / "best")["round"]  # type: ignore[index] # it says so, or this fails
    summary = resume(out, by_loss)
    assert (summary["best_by"], summary["best_round"]) == ("loss", lowest)
    assert find_snapshot(out, best=True).round == lowest  # of the config that was kept


def test_a_run_of_before_this_choice_goes_on(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    config = (out / "config.toml").read_text()
    (out / "config.toml").write_text(config.replace('best = "accuracy"\n', ""))
    assert resume(out)["best_by"] == "accuracy"
    assert (out / "config.toml").read_text() == config
    for kind in ("model", "best"):
        assert model_bytes(out / kind) == model_bytes(finished / kind)


@pytest.mark.parametrize(
    ("algorithm", "before"),
    [
        ("fedalign_moe:reg_strength=0.1", "46f05abe94b12ab3"),
        ("fedalign_paper", "e4a1fc9945a63c86"),
        ("by_use", "9ebd4e4d32ed3614"),
        ("fedavg", "fc78faad92cf67ff"),
        ("site_experts", "44d02b0a92cbe018"),
    ],
)
def test_a_key_that_is_new_leaves_old_runs_their_checkpoints(algorithm: str, before: str) -> None:
    """Digests that are in checkpoints by now. Whoever adds a key names it in `RESUMABLE` or `SINCE`."""
    name, *option = algorithm.split(":")
    settings = [f"algorithm.{setting}" for setting in (f"name={name}", *option)]
    assert identity(load_config(None, settings), "")["configuration"] == before
    other = load_config(None, ["algorithm.vocabulary_half_life=5.0", "algorithm.name=by_use"])
    assert identity(other, "")["configuration"] != before


def test_best_that_cannot_be_made_again_is_told(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    flip(out / "best" / "model.safetensors")
    best = json.loads((out / "summary.json").read_text())["best_round"]
    assert not (out / "checkpoint" / f"round-{best:05d}").exists()
    history = [line for line in read_history(RunFolder(out)) if line["round"] <= best]
    recorder = Recorder(RunFolder(out), load_config(out / "config.toml"), None, ServerState(3, {}, {}, tuple(history)))  # type: ignore[arg-type] # it saves nothing
    recorder.mend_best(history, Checkpoints(out / "checkpoint", {}).weights_after)
    assert (
        f"best: is damaged (model.safetensors is not what was written). The best round so far is {best}" in caplog.text
    )
    with pytest.raises(UserError, match="best': is damaged"):
        find_snapshot(out, best=True)


def test_a_damaged_checkpoint_costs_a_round_and_nothing_else(
    finished: Path, settings: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(out, settings, watch=Silent(lambda *where: where == (3, "training", 1)))
    flip(out / "checkpoint" / "round-00002" / "weights.safetensors")
    resume(out)
    assert metrics(out) == metrics(finished)
    for kind in ("model", "best"):
        assert model_bytes(out / kind) == model_bytes(finished / kind)


FOES = (
    "clients.count=6",
    "clients.alpha=0.05",
    "clients.min_examples=2",
    "training.learning_rate=3e-2",
)  # of each other


@pytest.mark.parametrize("choice", [(), ("algorithm.name=fc_moe", *FOES), ("algorithm.name=scaffold",)])
def test_a_finished_run_can_go_on_for_more_rounds(settings: list[str], tmp_path: Path, choice: tuple[str, ...]) -> None:
    start(tmp_path / "short", settings, *choice, "run.rounds=1")
    resume(tmp_path / "short", "run.rounds=2")
    assert RunFolder(tmp_path / "short").read_config("").run.rounds == 2  # and a report knows
    start(tmp_path / "long", settings, *choice, "run.rounds=2")
    assert sent_only_to_train(tmp_path / "short") == sent_only_to_train(tmp_path / "long")


def test_a_resumed_run_keeps_its_configuration(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a resumed run keeps its configuration"):
        resumed_config(finished, ["training.epochs=5"])
    with pytest.raises(UserError, match="holds no run"):
        resumed_config(tmp_path, [])


def test_whoever_holds_all_labels_has_nothing_to_correct(settings: list[str], tmp_path: Path) -> None:
    choice = ["algorithm.name=centralised", 'data.labels=["animals","food","weather"]', "run.rounds=1"]
    start(tmp_path / "shifted", settings, *choice, "training.loss=label_shift", "statistics.min_examples=9")
    start(tmp_path / "plain", settings, *choice)
    assert metrics(tmp_path / "shifted") == metrics(tmp_path / "plain")
    held = json.loads((tmp_path / "plain" / "clients.json").read_text())
    assert metrics(tmp_path / "plain")[1]["train_examples"] == sum(client["examples"] for client in held.values())
    assert not list(tmp_path.rglob("update.safetensors"))  # as of every client that trained


def test_a_checkpoint_of_another_configuration_is_refused(
    settings: list[str], tmp_path: Path, fedalign: Command
) -> None:
    out = tmp_path / "run"
    start(out, settings, "run.rounds=1")
    text = (out / "config.toml").read_text().replace("epochs = 2", "epochs = 1").replace("rounds = 1", "rounds = 2")
    (out / "config.toml").write_text(text)
    code, _, told = fedalign("run", "--resume", str(out), "--set", "run.rounds=3")
    assert code == 2
    assert "made with another configuration" in told
    assert "the version of fedalign that began it" in told
    assert (out / "config.toml").read_text() == text  # nothing was begun


def test_a_checkpoint_of_other_data_is_refused(settings: list[str], tmp_path: Path, texts: Path, olmoe: Path) -> None:
    data = tmp_path / "train.jsonl"
    every = (texts / "train.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(every))
    start(tmp_path / "run", settings, f"data.train={data}", "run.rounds=1")
    data.write_text("".join(every[:-5]))
    with pytest.raises(UserError, match="another data"):
        resume(tmp_path / "run", "run.rounds=2")


ODD = ("../up", "a/b", ".", "sent.json")  # the last is a file's, beside the folders of clients


def test_odd_client_names_stay_inside_the_run(settings: list[str], tmp_path: Path) -> None:
    rows = [{"text": f"word {i}", "label": "ab"[i % 2], "client": ODD[i % 4]} for i in range(60)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = [f"data.train={data}", f"data.test={data}", "clients.partition=natural", "run.rounds=1"]
    summary = start(tmp_path / "runs" / "odd", settings, *more)
    assert set(summary["client_accuracies"]) == set(ODD)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "runs"}
    kept = (tmp_path / "runs" / "odd" / "clients").iterdir()
    assert len([path for path in kept if path.is_dir()]) == len(ODD)


def test_a_client_whose_examples_are_all_dropped_is_named(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"client 'client-00': all of its examples are longer than 4 tokens"):
        start(tmp_path / "run", settings, "data.max_length=4", "data.too_long=drop")


@pytest.mark.parametrize("algorithm", ["fedavg", "fedprox"])
def test_other_algorithms_run_too(settings: list[str], tmp_path: Path, algorithm: str) -> None:
    summary = start(tmp_path / algorithm, settings, f"algorithm.name={algorithm}")
    assert summary["algorithm"] == algorithm
    assert summary["final_loss"] < summary["initial_loss"]


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.5), ("int8", 0.2539)])
def test_wire_precision_saves_bytes_and_still_learns(
    settings: list[str], tmp_path: Path, dtype: str, share: float
) -> None:
    summary = start(tmp_path / dtype, settings, f"wire.dtype={dtype}", "algorithm.name=fedavg")
    lines = metrics(tmp_path / dtype)
    moe = prepare(load_config(None, settings), tmp_path / "c").bench.moe
    exact = 3 * 4 * sum(moe.layout.sizes.values())
    assert (lines[1]["bytes_up"] - lines[1]["bytes_up_statistics"]) / exact == pytest.approx(share, rel=0.01)
    assert summary["final_loss"] < summary["initial_loss"]


def test_only_groups_with_weight_travel(settings: list[str], tmp_path: Path) -> None:
    start(tmp_path / "run", settings, "algorithm.name=fedalign_paper", "run.rounds=1")
    assert 0.3 < metrics(tmp_path / "run")[1]["uploaded_share"] < 1.0


def test_sampled_clients_take_turns(settings: list[str], tmp_path: Path) -> None:
    start(tmp_path / "run", settings, "clients.sample=0.34", "run.rounds=6")
    asked = [line["clients"] for line in metrics(tmp_path / "run")[1:]]
    assert all(len(clients) == 1 for clients in asked)
    assert len({clients[0] for clients in asked}) > 1


def test_a_report_of_a_round_that_some_scored_counts_all_clients(settings: list[str], tmp_path: Path) -> None:
    def during_round_3(round: int, stage: str, done: int) -> bool:
        return (round, stage, done) == (3, "training", 1)

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(run, settings, "clients.sample=0.34", "clients.held_out=0.2", watch=Silent(during_round_3))
    assert [len(line["client_accuracies"]) for line in metrics(run)] == [3, 1]
    told = dict(facts(read_material([run])))
    assert told["clients"].startswith("3, ")
    assert told["scored on"] == "30 rows of the global test set"  # no mean of clients is told


def test_a_client_that_breaks_is_left_out_and_named(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Trainer.train

    def breaks(self: Trainer, client: ClientData, broadcast: Broadcast) -> Statistics:
        if client.name == "client-01":
            raise TrainingFailedError("its loss is nan at step 1")
        return train(self, client, broadcast)

    monkeypatch.setattr(Trainer, "train", breaks)
    summary = start(tmp_path / "run", settings, "run.rounds=1")
    (failure,) = summary["failures"]
    assert failure == {"client": "client-01", "stage": "train", "reason": "its loss is nan at step 1", "round": 1}
    assert metrics(tmp_path / "run")[1]["clients"] == ["client-00", "client-02"]


def test_training_that_explodes_everywhere_stops_clearly(settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"0 of 3 clients can be used.*loss is|0 of 3 clients.*not finite"):
        start(tmp_path / "run", settings, "training.learning_rate=1e30")
    assert (tmp_path / "run" / "checkpoint" / "round-00000").exists()


def test_token_rows_make_another_model_from_the_same_training(settings: list[str], tmp_path: Path) -> None:
    alike = ("run.rounds=1", "algorithm.gate=average", "algorithm.experts=average")
    for name, chosen in (("rows", "tokens"), ("whole", "average")):
        start(tmp_path / name, settings, *alike, f"algorithm.vocabulary={chosen}")
    rows, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("rows", "whole"))
    changed = {name for name in rows if not torch.equal(rows[name], whole[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    before, after = metrics(tmp_path / "whole")[-1], metrics(tmp_path / "rows")[-1]
    vocabulary = len(rows["model.embed_tokens.weight"])
    clients = len(after["bytes_up_by_client"])
    assert after["bytes_up"] - before["bytes_up"] == 2 * 4 * vocabulary * clients  # the counts


def test_no_test_set_means_the_clients_own(settings: list[str], tmp_path: Path) -> None:
    without = [setting for setting in settings if not setting.startswith("data.test=")]
    summary = start(tmp_path / "run", without, "run.rounds=1")
    assert summary["accuracy_of"].startswith("clients' held-out")
    assert summary["final_accuracy"] == metrics(tmp_path / "run")[-1]["client_accuracy_weighted"]


def test_each_file_can_be_a_client(olmoe: Path, texts: Path, tmp_path: Path, settings: list[str]) -> None:
    every = (texts / "train.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "sites"
    folder.mkdir()
    (folder / "ward.jsonl").write_text("".join(every[:50]))
    (folder / "lab.jsonl").write_text("".join(every[50:]))
    summary = start(tmp_path / "run", settings, f"data.train={folder}", "clients.partition=files", "run.rounds=1")
    assert set(summary["client_accuracies"]) == {"lab", "ward"}


def test_language_modelling_and_generation_are_scored(settings: list[str], tmp_path: Path, texts: Path) -> None:
    summary = start(tmp_path / "text", settings, "data.kind=text", "clients.partition=iid", "run.rounds=1")
    assert summary["final_accuracy"] is None
    assert metrics(tmp_path / "text")[-1]["perplexity"] < metrics(tmp_path / "text")[0]["perplexity"]
    columns = ["data.kind=instruction", "data.columns.prompt=text", "data.columns.response=label"]
    more = ["clients.partition=iid", "evaluation.generate=true", "evaluation.max_new_tokens=4", "run.rounds=2"]
    summary = start(tmp_path / "instruction", settings, *columns, *more, "training.epochs=6")
    assert summary["final_accuracy"] > summary["initial_accuracy"] == 0.0


def test_an_encoder_decoder_model_runs(settings: list[str], tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    switch = model_folder("switch_transformers")
    summary = start(tmp_path / "run", settings, f"model.path={switch}", "run.rounds=1")
    assert summary["final_loss"] < summary["initial_loss"]


def test_the_estimate_agrees_with_the_run(finished: Path, settings: list[str], tmp_path: Path) -> None:
    prepared: Prepared = prepare(load_config(None, settings), tmp_path)
    before = {group: value.clone() for group, value in prepared.bench.moe.read().items()}
    expected = estimate(prepared)
    assert all(torch.equal(before[group], value) for group, value in prepared.bench.moe.read().items())
    line = metrics(finished)[1]
    assert expected.bytes_statistics_a_client == pytest.approx(line["bytes_up_statistics"] / 3, rel=0.01)
    assert line["bytes_up"] <= expected.bytes_up[1]
    assert line["bytes_down"] == expected.bytes_down[1]
    assert expected.memory > 4 * 4 * expected.trained
    assert expected.seconds_a_round > 0
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- answers.json


def answers(out: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((out / "answers.json").read_text())
    return kept


def test_start_and_end_are_kept_row_by_row_and_class_by_class(finished: Path, texts: Path) -> None:
    kept, lines = answers(finished), metrics(finished)
    assert list(kept) == ["0", "2", "3"]
    test = [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]
    for number, told in kept.items():
        assert told["examples"] == len(test) == lines[int(number)]["test_examples"]
        right = sum(row.get(name, 0) for name, row in told["confusion"].items())
        assert right / len(test) == lines[int(number)]["accuracy"]
        for name, row in told["confusion"].items():
            assert sum(row.values()) == sum(one["label"] == name for one in test)
        assert len(told["answered"]) == 10
        assert {row["expected"] for row in told["answered"]} == {"animals", "weather", "food"}  # not the first alone
        assert all(row["right"] == (row["given"] == row["expected"]) for row in told["answered"])
    asked = [[(row["prompt"], row["expected"]) for row in told["answered"]] for told in kept.values()]
    assert asked[0] == asked[1] == asked[2]
    assert asked[0][0] == (f"{test[0]['text']}\nLabel:", test[0]["label"])


def test_no_kill_parts_a_round_from_its_answers(finished: Path, settings: list[str], tmp_path: Path) -> None:
    for at in ((0, "completed", 1), (3, "training", 0), (3, "evaluating", 0), (3, "completed", 1)):
        out = tmp_path / "-".join(map(str, at))
        with pytest.raises(KeyboardInterrupt):
            start(out, settings, watch=Silent(lambda *where, at=at: where == at))
        assert set(answers(out)) >= {"0", *(str(line["round"]) for line in metrics(out)[-1:])}
        resume(out)
        assert answers(out) == answers(finished)


def test_answers_that_are_not_there_are_made_at_the_end(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for content in (None, "{", "[]"):  # of an older version, or damaged
        out = tmp_path / f"run-{content}"
        shutil.copytree(finished, out)
        (out / "answers.json").unlink()
        if content is not None:
            (out / "answers.json").write_text(content)
        resume(out)
        assert answers(out) == {"3": answers(finished)["3"]}
    assert caplog.text.count("answers.json: damaged") == 2


def test_rows_can_be_left_out(settings: list[str], tmp_path: Path) -> None:
    start(tmp_path / "run", settings, "evaluation.answers=0", "run.rounds=1")
    assert [told["answered"] for told in answers(tmp_path / "run").values()] == [[], []]
    assert "the dog" not in (tmp_path / "run" / "answers.json").read_text()


def test_free_text_is_answered_at_the_start_and_at_the_end_alone(
    settings: list[str], texts: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]
    lines = [json.dumps({"prompt": row["text"] * 90, "response": row["label"]}) + "\n" for row in rows]
    (tmp_path / "asked.jsonl").write_text("".join(lines))
    data = [f"data.{part}={tmp_path / 'asked.jsonl'}" for part in ("train", "test")]
    more = ["data.kind=instruction", "clients.partition=iid", "data.too_long=truncate", "evaluation.max_new_tokens=3"]
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(out, settings, *data, *more, watch=Silent(lambda *where: where == (3, "training", 0)))
    assert {number: len(told["answered"]) for number, told in answers(out).items()} == {"0": 10, "1": 0, "2": 0}
    resume(out)
    kept = answers(out)
    assert {number: len(told["answered"]) for number, told in kept.items()} == {"0": 10, "2": 0, "3": 10}
    assert "confusion" not in kept["3"]
    assert " characters left out] " in kept["3"]["answered"][0]["prompt"]
    assert all(row["right"] is None for row in kept["3"]["answered"])  # nothing was scored by them


def test_without_a_test_set_of_its_own_no_row_is_kept(settings: list[str], tmp_path: Path) -> None:
    own = [setting for setting in settings if not setting.startswith("data.test")]
    start(tmp_path / "run", own, "run.rounds=1")
    assert not (tmp_path / "run" / "answers.json").exists()


def test_a_run_without_patience_left_says_so_and_can_go_on(
    fedalign: Command, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "run_all", in_this_process)
    flat = ["training.learning_rate=1e-9", "run.rounds=3"]  # too small a step to change an answer
    start(tmp_path / "all", settings, *flat)
    given = [word for setting in (*settings, *flat, "run.patience=1") for word in ("--set", setting)]
    (tmp_path / "run.toml").write_text("")
    run = tmp_path / "run"
    code, out, errors = fedalign("run", str(tmp_path / "run.toml"), *given, "--out", str(run))
    assert code == 0, errors
    told = "run.patience = 1: the highest accuracy is of round 0, rounds scored since: 1"
    assert f"round 1 is the last: {told}" in out
    assert json.loads((run / "summary.json").read_text())["stopped"] == told
    assert find_snapshot(run, best=False).round == 1
    (material,) = read_material([run]).runs
    assert (material.finished, material.stopped) == (True, told)
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"ended early, round 1 of 3: {told}" in page
    assert "After 1 round, seed 0." in page
    assert "After 3 rounds" not in page
    assert dict(facts(read_material([run])))["rounds"] == "1 of 3"
    (line,) = [line for line in out.splitlines() if line.startswith("Compare ")]
    assert line.endswith(" --set run.patience=0")
    words = [*shlex.split(line)[2:], "--set", "run.rounds=1", "--seeds", "1", "--out", str(tmp_path / "compared")]
    code, _, errors = fedalign(*words)
    assert code == 0, errors
    code, out, errors = fedalign("run", "--resume", str(run))
    assert code == 0, errors
    assert f"{told}. To go on: fedalign run --resume {run} --set run.patience=0" in out
    code, out, errors = fedalign("run", "--resume", str(run), "--set", "run.patience=0")
    assert code == 0, errors
    assert json.loads((run / "summary.json").read_text())["stopped"] is None
    stopped, whole = sent_only_to_train(run), sent_only_to_train(tmp_path / "all")
    assert stopped[1].pop("stopped") == told
    assert stopped == whole
    assert model_bytes(run / "model") == model_bytes(tmp_path / "all" / "model")
