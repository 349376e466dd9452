"""What is pushed is the exported folder, to nobody but its owner; what fails is one line, and the export is kept."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.export.hub import Hub, serving
from tests.server.test_run import start


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    start(folder, settings, "run.rounds=1")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub()) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        yield hub


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_private_repository_holds_the_exported_folder(fedalign: Command, run: Path, hub: Hub, tmp_path: Path) -> None:
    argv = ["export", str(run), "--to", str(tmp_path / "out"), "--push", "me/model"]
    code, out, errors = fedalign(*argv)
    assert code == 0, errors
    assert f"{hub.address}/me/model, private" in out
    assert hub.private == {"me/model": True}
    assert hub.repos["me/model"] == files(tmp_path / "out")
    assert not any(str(tmp_path.parent.parent).encode() in content for content in hub.repos["me/model"].values())

    code, out, errors = fedalign(*argv)
    assert (code, "me/model': is there already" in errors) == (2, True)
    hub.repos["me/model"]["old.safetensors"] = b"of before"
    code, out, errors = fedalign(*argv, "--overwrite", "--dtype", "bfloat16")
    assert code == 0, errors
    assert hub.repos["me/model"] == files(tmp_path / "out")
    hub.private["me/model"] = False
    code, out, errors = fedalign(*argv, "--overwrite")
    assert (code, "is public. Add --public" in errors) == (2, True)
    hub.private["me/model"] = True
    held = dict(hub.repos["me/model"])
    code, out, errors = fedalign(*argv, "--overwrite", "--public")  # which no push makes it
    assert (code, "is private. Leave --public out, or make it public" in errors) == (2, True)
    assert (hub.repos["me/model"], hub.private) == (held, {"me/model": True})


def test_all_may_read_what_is_said_to_be_public(fedalign: Command, run: Path, hub: Hub, tmp_path: Path) -> None:
    code, out, errors = fedalign("export", run, "--to", tmp_path / "out", "--push", "me/model", "--public")
    assert code == 0, errors
    assert (hub.private, ", public" in out) == ({"me/model": False}, True)


def wrong_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.token = "another"


def no_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")
    patch.setattr("fedalign.export.push.get_token", lambda: None)


def no_network(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def nothing(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    pass


@pytest.mark.parametrize(
    ("trouble", "argv", "said", "kept"),
    [
        (wrong_token, ["--push", "me/model"], "refused (401): Invalid user token", False),
        (no_token, ["--push", "me/model"], "there is no token. Log in with", False),
        (no_network, ["--push", "me/model"], "the Hub cannot be reached", False),
        (nothing, ["--push", "you/model"], "refused (403): You have no rights there. The export itself is whole", True),
        (nothing, ["--push", "you/model"], "Push it alone with: hf upload --private you/model '", True),
        (nothing, ["--push", "you/model", "--public"], "Push it alone with: hf upload you/model '", True),
        (nothing, ["--push", "model"], "must be OWNER/NAME", False),
        (nothing, ["--push", "me/.."], "--push 'me/..'", False),
        (nothing, ["--push", "me/model", "--clients"], "Not with --push", False),
        (nothing, ["--public"], "goes with --push", False),
    ],
)
def test_what_goes_wrong_is_one_line(
    fedalign: Command,
    run: Path,
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Callable[[Hub, pytest.MonkeyPatch], None],
    argv: list[str],
    said: str,
    kept: bool,
) -> None:
    trouble(hub, monkeypatch)
    code, _, errors = fedalign("export", run, "--to", tmp_path / "the export", *argv)
    assert (code, said in errors, "Traceback" in errors, len(errors.splitlines())) == (2, True, False, 1), errors
    assert (tmp_path / "the export").exists() == kept
    assert not hub.repos


def test_an_adapter_that_others_could_not_load_is_not_pushed(
    fedalign: Command, settings: list[str], hub: Hub, tmp_path: Path
) -> None:
    start(tmp_path / "run", settings, "tuning.kind=lora", "run.rounds=1")
    code, _, errors = fedalign("export", tmp_path / "run", "--to", tmp_path / "out", "--push", "me/model")
    assert (code, "names its base by a folder of this machine" in errors, hub.repos) == (2, True, {})
