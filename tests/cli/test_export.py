"""`fedalign export` as a user meets it."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.server.test_run import Silent, start


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    """A LoRA run whose clients keep routers of their own."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    start(folder, settings, "tuning.kind=lora", "algorithm.gate=local", "run.rounds=1")
    return folder


def printed_code(text: str) -> str:
    """The two lines that load it, as they can be copied from the terminal."""
    (code,) = re.findall(r"^Load +(from .*)\n +(model = .*)$", text, re.MULTILINE)
    return "\n".join(code)


@pytest.mark.parametrize(("flags", "library"), [((), "peft"), (("--merge", "--dtype", "bfloat16"), "transformers")])
def test_it_says_where_the_model_is_and_how_to_load_it(
    fedalign: Command, run: Path, tmp_path: Path, flags: tuple[str, ...], library: str
) -> None:
    to = tmp_path / "out"
    code, text, errors = fedalign("export", run, "--to", to, *flags)
    assert code == 0, errors
    for word in ("fedalign_moe: exported", "round      1 of 1", "accuracy", str(to), "model card: README.md"):
        assert word in text
    assert "it/s" not in errors  # no progress bars of other libraries
    lines = printed_code(text)
    assert lines.startswith(f"from {library} import Auto")
    loaded: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own
        exec(lines, loaded)
    assert loaded["model"].num_parameters() > 10_000


def test_clients_are_counted(fedalign: Command, run: Path, tmp_path: Path) -> None:
    code, text, errors = fedalign("export", run, "--to", tmp_path / "out", "--clients")
    assert code == 0, errors
    assert "3 models in clients/" in text
    assert "are called after the clients" in text


def test_an_unfinished_run_is_said_to_be_one(fedalign: Command, settings: list[str], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", settings, watch=Silent(lambda *where: where == (2, "training", 1)))
    code, text, errors = fedalign("export", tmp_path / "run", "--to", tmp_path / "out")
    assert code == 0, errors
    assert "not finished: this is its model after round 1 of 3" in text
    code, text, errors = fedalign("export", tmp_path / "run", "--to", tmp_path / "best", "--best")
    assert code == 0, errors
    assert "not finished: this is its model after round" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dtype", "int8"), "--dtype = 'int8': unknown. Choose one of: bfloat16, float16, float32."),
        (("--base", "/nowhere"), "no such folder"),
    ],
)
def test_a_mistake_is_one_message(
    fedalign: Command, run: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    code, text, errors = fedalign("export", run, "--to", tmp_path / "out", *flags)
    assert code == 2
    assert not text.strip()
    message = errors[errors.index("Error: ") :]
    assert words in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_has_examples(fedalign: Command) -> None:
    code, text, _ = fedalign("export", "--help")
    assert code == 0
    for words in ("fedalign export runs/a --to models/a", "--merge", "--dtype", "--best", "--clients", "--base"):
        assert words in text
    assert "export" in fedalign("--help")[1]
