"""The command line: what a user sees, and what bad input gets: one message, exit code 2, nothing written."""

import errno
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalign import __version__, files
from fedalign.cli.main import app
from fedalign.cli.run import asked
from fedalign.client.memory import ClientData
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.errors import within
from fedalign.export import write
from fedalign.federation import in_process
from fedalign.files import LOCK, WATCH, held_by, locked
from fedalign.moe.load import hardware
from fedalign.moe.model import load_model
from fedalign.protocol import Broadcast, Statistics
from fedalign.server.results import RunFolder
from tests.conftest import Command, rows, write_jsonl
from tests.moe.tiny import build


def sets(settings: list[str], *more: str) -> list[str]:
    """An empty configuration and all that is set."""
    return [os.devnull, *(word for setting in (*settings, *more) for word in ("--set", setting))]


def test_help_has_examples(fedalign: Command) -> None:
    code, out, _ = fedalign("run", "--help")
    assert code == 0
    assert "fedalign run my.toml --out runs/a" in out
    assert "--resume" in out
    assert "fedalign inspect allenai" in fedalign("inspect", "--help")[1]
    assert fedalign("--version")[1].strip() == __version__


def test_a_run_tells_how_it_goes_and_where_the_results_lie(
    fedalign: Command, settings: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code, text, errors = fedalign("run", "--out", str(out), *sets(settings))
    assert code == 0, errors
    assert "3 clients with" in text
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert f"top-2), on {device}: {hardware(device)}" in " ".join(text.split())
    assert [line.split("|")[0].strip() for line in text.splitlines() if line.startswith("round ")] == [
        f"round {number}" for number in range(4)
    ]
    refused(fedalign("run"), "no configuration", "demo")
    for word in ("accuracy", "worst client", "routing divergence", "sent up", "time left", str(out)):
        assert word in text
    assert "it/s" not in errors  # no progress bars of other libraries
    code, text, _ = fedalign("run", "--resume", str(out), "--set", "run.rounds=4")
    assert code == 0
    assert json.loads((out / "summary.json").read_text())["rounds"] == 4


def test_a_dry_run_writes_nothing(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, text, _ = fedalign("run", "--dry-run", "--out", str(out), *sets(settings))
    assert code == 0
    for word in ("parameters", "sent down", "sent up", "memory", "time a round", "nothing was trained"):
        assert word in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("olmoe", ["olmoe, found by table", "4 a layer, top-2, softmax", "mlp.gate", "2 MoE, 0 dense"]),
        ("deepseek_v3", ["sigmoid", "shared_experts", "e_score_correction_bias", "2 MoE, 1 dense"]),
        ("minimax", ["autodetected"]),
    ],
)
def test_inspect(fedalign: Command, tmp_path: Path, family: str, words: list[str]) -> None:
    build(family).save_pretrained(tmp_path)
    code, text, _ = fedalign("inspect", str(tmp_path))
    assert code == 0
    flowing = " ".join(text.split())
    for word in words:
        assert word in flowing


def test_inspect_says_whose_expert_is_whose(fedalign: Command, tmp_path: Path) -> None:
    build("olmoe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert not {"owners", "trained by"} & {*re.findall("owners|trained by", fedalign("inspect", str(tmp_path))[1])}
    (tmp_path / "config.json").write_text(json.dumps(config | {"site_experts": {"hospital-a": [2], "bank": [0, 3]}}))
    code, text, _ = fedalign("inspect", str(tmp_path))
    assert code == 0
    told = "owners hospital-a 2; bank 0, 3; public: the other 1 trained by what sites share: unknown"
    assert told in " ".join(text.split())
    for record, told in (([], "no run"), (["unknown", "by_use"], "unknown, by_use")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"shared_trained_by": record}))
        assert f"trained by what sites share: {told}" in " ".join(fedalign("inspect", str(tmp_path))[1].split())
    (tmp_path / "config.json").write_text(json.dumps(config | {"site_experts": {"hospital-a": [4]}}))
    refused(fedalign("inspect", str(tmp_path)), "site_experts.hospital-a: 4: no such expert")


def test_inspect_says_what_adapters_would_leave_out_and_all_that_is_to_be_known(
    fedalign: Command, tmp_path: Path
) -> None:
    build("deepseek_v32").save_pretrained(tmp_path)
    code, text, _ = fedalign("inspect", str(tmp_path))
    assert code == 0
    flowing = " ".join(text.split())
    moe = load_model(str(tmp_path))
    assert moe.not_adaptable()
    assert moe.notes
    for told in (*moe.not_adaptable(), *moe.notes):
        for word in told.split():  # the table breaks lines within them
            assert word[:20] in flowing
    assert "not for LoRA" in flowing


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, errors = result
    assert code == 2, errors
    assert "Traceback" not in errors
    assert errors.startswith("Error: ")
    for word in words:
        assert re.search(word, errors), errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("algorithm.name=fedalgin", ["fedalgin", "fedavg, fedmoe, fedprox", "Did you mean 'fedalign_moe'"]),
        ("algorithm.lambda=1", ["lambda", "reg_strength"]),
        ("training.leraning_rate=1", ["training.leraning_rate", "training.learning_rate"]),
        ("data.kind=poem", ["poem", "multiple_choice"]),
        ("clients.alpha=0", ["clients.alpha = 0", "greater than 0"]),
        ("clients.count=500", ["clients.count", "500", "90"]),
        ("clients.min_examples=80", ["clients.min_examples", "80"]),
        ("data.columns.label=topic", ["topic", "text, label, owner"]),
        ("clients.partition=natural", ["client", "data.columns.client"]),
        ("data.max_length=4096", ["data.max_length = 4096", "128"]),
        ("data.max_length=6", ["tokens", "6", "truncate"]),
        ("data.train=none.jsonl", ["none.jsonl", "no such file"]),
        ("model.path=./none", ["none", "no such folder"]),
        ("run.device=abacus", ["abacus", "cpu"]),
        ("model.weights_hash=5f0c", ["model.weights_hash = '5f0c'", "have '[0-9a-f]{64}'"]),
    ],
)
def test_bad_input(fedalign: Command, settings: list[str], tmp_path: Path, change: str, words: list[str]) -> None:
    out = tmp_path / "run"
    refused(fedalign("run", "--out", str(out), *sets(settings, change)), *words)
    assert not out.exists()


def test_out_at_home(fedalign: Command, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert fedalign("run", "--out=~/run", *sets(settings, "run.rounds=1"))[0] == 0
    assert (tmp_path / "home" / "run" / "summary.json").exists()
    assert fedalign("run", "--resume=~/run", "--set", "run.rounds=2")[0] == 0
    assert fedalign("export", "~/run", "--to=~/model")[0] == 0
    assert fedalign("report", "~/run", "--out=~/report.html")[0] == 0
    assert fedalign("site", "init", "a", "--data", settings[1].partition("=")[2], "--dir=~/site")[0] == 0
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["model", "report.html", "run", "site"]
    assert not (tmp_path / "~").exists()


def test_bad_data(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    refused(fedalign("run", *out, *sets(settings, f"data.train={empty}")), "empty")
    strange = write_jsonl(tmp_path / "strange.jsonl", [{"text": "the moon", "label": "astronomy"}])
    refused(fedalign("run", *out, *sets(settings, f"data.test={strange}")), "astronomy", "animals")
    few = [row | {"owner": "lonely" if i == 0 else row["owner"]} for i, row in enumerate(rows())]
    lonely = write_jsonl(tmp_path / "lonely.jsonl", few)
    owners = ["clients.partition=natural", "data.columns.client=owner", "clients.min_examples=1"]
    refused(fedalign("run", *out, *sets(settings, f"data.train={lonely}", *owners)), "lonely", "clients.held_out")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {}, ["llama", "dense"]),
        ("olmoe", {"num_experts_per_tok": 5}, ["top-k = 5", "4"]),
    ],
)
def test_bad_models(
    fedalign: Command,
    settings: list[str],
    tmp_path: Path,
    model_folder: Callable[..., Path],
    family: str,
    changes: dict[str, int],
    words: list[str],
) -> None:
    folder = model_folder(family, **changes)
    refused(fedalign("inspect", str(folder)), *words)
    refused(fedalign("run", "--out", str(tmp_path / "run"), *sets(settings, f"model.path={folder}")), *words)
    assert not (tmp_path / "run").exists()


def test_nllb_moe_is_refused_with_the_reason(fedalign: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nllb-moe", "architectures": ["NllbMoeModel"]}))
    refused(fedalign("inspect", str(tmp_path)), "nllb", "broken")


def test_nothing_is_overwritten_unasked(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = sets(settings, "run.rounds=1")
    assert fedalign("run", "--out", str(out), *short)[0] == 0
    before = (out / "summary.json").read_bytes()
    refused(fedalign("run", "--out", str(out), *short), "already holds a run", "--resume", "--overwrite")
    refused(fedalign("run", "--out", str(out), "--overwrite", *sets(settings, "clients.count=500")), "500")
    assert (out / "summary.json").read_bytes() == before
    assert fedalign("run", "--out", str(out), "--overwrite", *short)[0] == 0
    (tmp_path / "letters").mkdir()
    model = (out / "model" / "model.safetensors").read_bytes()
    for begun in (out, out / "model"):  # what it would begin with is in the run that it would replace
        on = ("--overwrite", *short, "--set", f"model.path={begun}")
        refused(fedalign("run", "--out", str(out), *on), "model.path =", "lies in it, and would be lost")
    assert (out / "model" / "model.safetensors").read_bytes() == model
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    refused(fedalign("run", "--out", str(tmp_path / "letters"), "--overwrite", *short), "holds no run")
    refused(fedalign("run", "--out", str(tmp_path / "letters" / "dear.txt"), *short), "is a file")


@pytest.mark.parametrize("place", ["project/thesis.tex", "run/thesis.tex", "run/model/thesis.tex"])
def test_overwrite_removes_only_what_a_run_wrote(
    fedalign: Command, settings: list[str], tmp_path: Path, place: str
) -> None:
    thesis = tmp_path / place
    out = tmp_path / thesis.relative_to(tmp_path).parts[0]
    command = ("run", "--out", str(out), *sets(settings, "run.rounds=1"))
    if out.name == "run":
        assert fedalign(*command)[0] == 0
    thesis.parent.mkdir(exist_ok=True)
    (out / "config.toml").touch()  # a project may have one of its own
    thesis.write_text("years of work")
    word = str(thesis.relative_to(out)) if out.name == "run" else "holds no run"
    refused(fedalign(*command, "--overwrite"), word)
    assert thesis.read_text() == "years of work"
    thesis.unlink()
    assert (fedalign(*command, "--overwrite")[0] == 0) == (out.name == "run")


def test_resume_with_another_model_is_refused(
    fedalign: Command, settings: list[str], tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    out = tmp_path / "run"
    assert fedalign("run", "--out", str(out), *sets(settings, "run.rounds=1"))[0] == 0
    config = out / "config.toml"
    other = model_folder("mixtral")
    config.write_text(re.sub(r'path = ".*"', f'path = "{other}"', config.read_text()))
    refused(fedalign("run", "--resume", str(out), "--set", "run.rounds=2"), "another model")
    refused(fedalign("run", "--resume", str(tmp_path / "none")), "holds no run")
    refused(fedalign("run", "--resume", str(out), "--overwrite"), "--resume")
    refused(fedalign("run", "--resume", str(out), "--set", "training.epochs=9"), "training.epochs=9", "run.rounds")


@pytest.mark.parametrize("is_over", [True, False])
def test_a_run_does_not_become_shorter(
    fedalign: Command, settings: list[str], tmp_path: Path, *, is_over: bool
) -> None:
    out = tmp_path / "run"
    assert fedalign("run", "--out", str(out), *sets(settings, "run.rounds=2"))[0] == 0
    if not is_over:  # killed before it wrote how it ended
        (out / "summary.json").unlink()
    before = (out / "config.toml").read_bytes()
    refused(fedalign("run", "--resume", str(out), "--set", "run.rounds=1"), "run.rounds = 1", "has 2 complete rounds")
    assert (out / "config.toml").read_bytes() == before


def test_an_exploding_run_stops_clearly(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    result = fedalign("run", "--out", str(tmp_path / "run"), *sets(settings, "training.learning_rate=1e30"))
    refused(result, "round 1: 0 of 3 clients", "client-00, client-01, client-02: ", "learning_rate")


# ------------------------------------------------------------------------------- two processes, signals, full disks


@pytest.fixture(scope="module")
def made(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one round, which no test may change."""
    out = tmp_path_factory.mktemp("made") / "run"
    app(["run", "--out", str(out), *sets(settings, "run.rounds=1")], standalone_mode=False)
    return out


@pytest.fixture
def begun(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.mark.parametrize("engine", ["in_process", "simulation", "flower"])
@pytest.mark.parametrize("name", [WATCH, LOCK])
def test_a_second_run_is_refused_by_pid_and_host(
    fedalign: Command, settings: list[str], begun: Path, engine: str, name: str
) -> None:
    config = begun / "config.toml"
    config.write_text(config.read_text().replace('engine = "in_process"', f'engine = "{engine}"'))
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file() and path.name != name}
    by = rf"a run is at work there \(process {os.getpid()} on {re.escape(socket.gethostname())}\)"
    with locked(begun / name, "a run"):
        anew = [*sets(settings, f"federation.engine={engine}"), "--out", str(begun), "--overwrite"]
        refused(fedalign("run", *anew), by, "Wait for it, end it, or give another folder")
        refused(fedalign("run", "--out", str(begun), *sets(settings)), by)
        if name == WATCH or engine == "in_process":
            refused(fedalign("run", "--resume", str(begun)), by)
        else:  # a coordinator that goes on alone is watched again
            asked(None, [], None, begun, overwrite=False)
        refused(fedalign("export", str(begun), "--to", str(begun.parent / "out")), by)
    assert {path: path.read_bytes() for path in before} == before


def test_who_loads_longer_does_not_replace_what_came_meanwhile(
    fedalign: Command, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, load = tmp_path / "run", in_process.prepare
    config = load_config(None, settings)

    def slowly(*arguments: Any) -> Any:
        RunFolder(out).begin(config)  # another process is faster
        return load(*arguments)

    monkeypatch.setattr(in_process, "prepare", slowly)
    refused(fedalign("run", "--out", str(out), *sets(settings, "run.rounds=9")), "already holds a run")
    assert "rounds = 3" in (out / "config.toml").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_line_and_its_own_code(
    fedalign: Command, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    out, train = tmp_path / "run", Trainer.train

    def asked_to_end(self: Trainer, client: ClientData, broadcast: Broadcast) -> Statistics:
        if broadcast.round == 2:
            signal.raise_signal(number)
        return train(self, client, broadcast)

    monkeypatch.setattr(Trainer, "train", asked_to_end)
    found, text, errors = fedalign("run", "--out", str(out), *sets(settings))
    assert found == code, errors
    said = "Interrupted" if number == signal.SIGINT else f"Ended by {signal.Signals(number).name}"
    assert f"{said}. Complete rounds are kept; go on with: fedalign run --resume {out}" in text
    assert "Traceback" not in errors
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # as it was
    monkeypatch.undo()
    assert held_by(out / LOCK) is None
    assert RunFolder(out).checkpoint.joinpath("round-00001").exists()


def test_a_signal_ends_an_export_too(fedalign: Command, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "write_card", lambda *_: signal.raise_signal(signal.SIGTERM))
    code, _, errors = fedalign("export", str(begun), "--to", str(begun.parent / "out"))
    assert (code, errors.splitlines()[-1]) == (
        143,
        "Ended by SIGTERM. What was complete is kept; give the command again.",
    )
    assert [path.name for path in begun.parent.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_made_is_one_line(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(fedalign("run", "--out", str(tmp_path / "file" / "run"), *sets(settings)), "file.*Not a directory")


@pytest.mark.parametrize("error", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_nothing_is_one_line(
    fedalign: Command, settings: list[str], begun: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def cannot(file: Path) -> None:
        raise OSError(error, os.strerror(error), str(file))

    monkeypatch.setattr(files, "_flush", cannot)
    told = re.escape(os.strerror(error))
    kept = f"{told}. Complete rounds are kept; once it can be written to, go on with: fedalign run --resume {begun}$"
    more = ("--set", "run.rounds=2")
    refused(fedalign("run", "--resume", str(begun), *more), kept)
    refused(fedalign("run", "--out", str(begun.parent / "new"), *sets(settings)), f"{told}. Nothing was begun.$")
    refused(fedalign("export", str(begun), "--to", str(begun.parent / "out")), f"cannot be written: .*{told}")
    refused(fedalign("report", str(begun)), f"{told}. What was complete is kept")
    monkeypatch.undo()
    assert fedalign("run", "--resume", str(begun), *more)[0] == 0


def test_whatever_else_is_raised_is_one_line_and_a_report(
    fedalign: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        with within("`plan` of mine"):
            raise RuntimeError(
                "something\nbroke at https://ann:pass1234@host with hf_abcdefghijk and my-very-own-secret"
            )

    monkeypatch.setattr("fedalign.config.toml.load_config", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "my-very-own-secret")
    code, _, errors = fedalign("run", "demo", "--set", "model.token=tell-nobody", "--set", "run.seed=7")
    assert code == 3
    assert len(errors.splitlines()) == 1
    assert errors.startswith("Error: `plan` of mine: RuntimeError: something broke at ")
    [file] = (tmp_path / "fedalign" / "failures").iterdir()
    assert errors.rstrip().endswith(f"The full report: {file}")
    assert file.stat().st_mode & 0o077 == 0
    report = file.read_text()
    for part in ("fedalign run demo", "run.seed=7", "Traceback", "in broken", f"fedalign {__version__}", "torch "):
        assert part in report
    for secret in ("tell-nobody", "ann:pass1234", "hf_abcdefghijk", "my-very-own-secret"):
        assert secret not in report
        assert secret not in errors
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, _, errors = fedalign("run", "demo")
    assert code == 3
    assert Path(errors.rstrip().rpartition(" ")[2]).read_text().startswith("fedalign run demo\n")


def test_ctrl_c_anywhere_is_130(fedalign: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedalign.config.toml.load_config", interrupted)
    assert fedalign("run", "demo")[0] == 130


def test_an_extended_run_is_told_and_kept_as_it_is(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert fedalign("run", "--out", str(out), *sets(settings, "run.rounds=1"))[0] == 0
    code, text, _ = fedalign("run", "--resume", str(out))
    assert code == 0
    assert f"All 1 rounds are complete. For more: fedalign run --resume {out} --set run.rounds=2" in text
    code, text, _ = fedalign("run", "--resume", str(out), "--set", "run.rounds=2")
    assert code == 0
    assert "complete. For more" not in text
    assert RunFolder(out).read_config("test").run.rounds == 2
    assert json.loads((out / "summary.json").read_text())["rounds"] == 2
