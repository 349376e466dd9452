"""`fedalign site init` and `fedalign doctor` as a person sees them."""

import json
import re
import shlex
import socket
import tomllib
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest

from fedalign.cli import doctor as doctor_cli
from fedalign.cli.terminal import out
from fedalign.doctor.what_leaves import NEVER, REFUSED, ROWS
from fedalign.federation.flower import programs
from fedalign.federation.flower.keys import make_certificates
from fedalign.federation.flower.roster import Registered
from tests.conftest import SUBJECTS, Command
from tests.doctor.server import serving


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not broken."""
    monkeypatch.setattr(out, "_width", 120)


@pytest.fixture
def federation(tmp_path: Path, olmoe: Path) -> Path:
    """The coordinator's configuration."""
    file = tmp_path / "federation.toml"
    file.write_text(
        f'model.path = "{olmoe}"\n'
        'data.labels = ["animals", "weather", "food"]\n'
        "[federation]\n"
        'engine = "flower"\n'
        'superlink = "127.0.0.1:1"\n'
    )
    return file


def secrets_of(texts: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (texts / "train.jsonl").read_text().splitlines()]


def test_init_says_what_to_send_and_what_to_run(fedalign: Command, texts: Path, tmp_path: Path) -> None:
    folder, certificates = tmp_path / "a site", make_certificates(tmp_path).ca
    link = ["--superlink", "fl.example.org:8000", "--root-certificates", certificates]
    code, text, errors = fedalign(
        "site", "init", "ward 3", "--data", texts / "train.jsonl", "--dir", folder, *link, "--column", "text=text"
    )
    assert code == 0, errors
    lines = [line.strip() for line in text.splitlines()]
    assert (folder / "key.pub").read_text().strip() in lines
    assert "flwr supernode register ward%203.pub ours --name 'ward 3'" in lines
    assert f"fedalign doctor --site '{folder}'" in lines
    assert "a coordinator can have these read, no others: text, label" in text
    command = shlex.split(next(line for line in lines if line.startswith("flower-supernode")))
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--root-certificates"] == str(certificates)
    assert options["--auth-supernode-private-key"] == str(folder / "key")
    assert options["--superlink"] == "fl.example.org:8000"
    assert tomllib.loads(options["--node-config"]) == {"site": str(folder / "site.toml")}
    assert (folder / "key").read_text() not in text
    assert not any(secret in text for secret in secrets_of(texts))
    assert "embeddings and head stay frozen here" in " ".join(text.split())
    written = tomllib.loads((folder / "site.toml").read_text())
    assert written.get("consent", {}) == {"token_counts": False, "embeddings": False}


def test_init_never_proposes_plaintext_over_a_network(fedalign: Command, texts: Path, tmp_path: Path) -> None:
    where = ["--data", texts / "train.jsonl", "--dir", tmp_path / "a"]
    _, text, _ = fedalign("site", "init", "a", *where, "--superlink", "fl.example.org:8000")
    assert "--insecure" not in text
    assert "ca.crt" in text


def test_init_refuses_in_one_line(fedalign: Command, texts: Path, tmp_path: Path) -> None:
    again = ["site", "init", "a", "--data", texts / "train.jsonl", "--dir", tmp_path / "a"]
    assert fedalign(*again)[0] == 0
    code, _, errors = fedalign(*again)
    assert code == 2
    assert errors.startswith("Error: site 'a': ")
    assert "there already" in errors


def test_doctor_on_a_site(fedalign: Command, federation: Path, texts: Path, olmoe: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "a", ["--data", texts / "train.jsonl", "--model", olmoe]
    with serving() as address:
        fedalign("site", "init", "a", *data, "--dir", folder, "--superlink", address)
        code, text, errors = fedalign("doctor", "--site", folder, federation)
        assert code == 0, text + errors
        assert " ".join(REFUSED.split()) in " ".join(text.split())
        assert text.rstrip().endswith("Ready.")
        assert re.search(r'model\.weights_hash = "[0-9a-f]{64}"\n', text)
        assert "failed" not in text
        (folder / "key").chmod(0o644)
        code, text, errors = fedalign("doctor", federation, "--site", folder / "site.toml")
    assert code == 1, errors
    assert "mode 0644, must be 0600" in " ".join(text.split())
    assert f"chmod 600 {folder / 'key'}" in "".join(line.strip() for line in text.splitlines())
    assert "Not ready: 1 failed, 0 warnings." in text


def test_doctor_shows_the_data_on_a_terminal_alone(
    fedalign: Command, federation: Path, texts: Path, olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fedalign("site", "init", "a", "--data", texts / "train.jsonl", "--model", olmoe, "--dir", tmp_path / "a")
    told = [secrets_of(texts)[0], "animals 30"]
    _, text, _ = fedalign("doctor", "--site", tmp_path / "a", federation)
    assert not any(words in text for words in told)
    assert "shown on a terminal only" in text
    screen = StringIO()
    monkeypatch.setattr(out, "_file", screen)
    monkeypatch.setattr(out, "_force_terminal", True)
    monkeypatch.setattr(out, "no_color", True)
    fedalign("doctor", "--site", tmp_path / "a", federation)
    assert all(words in screen.getvalue() for words in told)
    assert "do not pass it on" in screen.getvalue()


def test_doctor_looks_at_a_configuration_that_is_changed(fedalign: Command, federation: Path) -> None:
    """Not all of them need a file of their own."""
    shown = [fedalign("doctor", federation, "--what-leaves", *more)[1] for more in ((), ("--set", "wire.dtype=int8"))]
    assert shown[0] != shown[1]
    code, _, errors = fedalign("doctor", federation, "--set", "wire.dtype=int7")
    assert code == 2
    assert "int7" in errors
    code, _, errors = fedalign("doctor", "--set", "wire.dtype=int8")
    assert code == 2
    assert (
        errors
        == "Error: --set wire.dtype=int8: changes a key of a configuration, and none is given: name CONFIG.toml too.\n"
    )


def test_a_long_example_is_cut(capfd: pytest.CaptureFixture[str]) -> None:
    doctor_cli._print_preview([("x" * 5000, False), (" yes", True)])
    text = capfd.readouterr().out
    assert "[...]" in text
    assert text.count("x") < 1000
    assert "yes" in text


def test_doctor_on_the_coordinator(fedalign: Command, federation: Path) -> None:
    template = federation.read_text()
    with socket.socket() as taken:  # by somebody who does not answer
        taken.bind(("127.0.0.1", 0))
        federation.write_text(template.replace("127.0.0.1:1", f"127.0.0.1:{taken.getsockname()[1]}"))
        code, text, _ = fedalign("doctor", federation)
    assert code == 1
    assert "nobody listens there" in text
    assert "at least 2 sites" in text
    with serving() as address:
        federation.write_text(template.replace("127.0.0.1:1", address))
        code, text, _ = fedalign("doctor", federation)
    assert code == 0, text
    assert "weights" not in text


def test_what_leaves(fedalign: Command, federation: Path, texts: Path, tmp_path: Path) -> None:
    data = ["--data", texts / "train.jsonl"]
    fedalign(
        "site",
        "init",
        "a",
        *data,
        "--model",
        tomllib.loads(federation.read_text())["model"]["path"],
        "--dir",
        tmp_path / "a",
    )
    fedalign("site", "init", "b", *data, "--dir", tmp_path / "b")
    for where in ([federation], ["--site", tmp_path / "a", federation]):
        code, text, errors = fedalign("doctor", *where, "--what-leaves")
        assert code == 0, errors
        for words in ("Hello: once", "Statistics: each round", "prob_L_E", "float32 [2, 4]", "norm_G", "reason"):
            assert words in text
        flowing = " ".join(text.split())
        assert "fewer than 32 tokens or 4 examples" in flowing
        assert NEVER in flowing
        told = REFUSED if "--site" in where else f"If the site consents: {ROWS}"
        assert told in flowing
        assert not any(subject in text for texts in SUBJECTS.values() for subject in texts)
    code, _, errors = fedalign("doctor", "--site", tmp_path / "b", "--what-leaves")
    assert code == 2
    assert "no model" in errors
    pooled = ("--set", "algorithm.name=centralised", "--set", "federation.engine=in_process")
    code, _, errors = fedalign("doctor", federation, *pooled, "--what-leaves")
    assert code == 2
    assert "no site could take part" in " ".join(errors.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "nothing to look at"), (["none.toml"], "none.toml"), (["--site", "none"], "fedalign site init")],
)
def test_usage_errors_are_exit_code_2(fedalign: Command, arguments: list[str], words: str) -> None:
    code, _, errors = fedalign("doctor", *arguments)
    assert code == 2
    assert errors.startswith("Error: ")
    assert words in errors


def test_help_has_examples(fedalign: Command) -> None:
    assert "fedalign site init hospital-a --data" in fedalign("site", "init", "--help")[1]
    assert "fedalign doctor federation.toml" in fedalign("doctor", "--help")[1]


def test_sites_names_who_is_connected(fedalign: Command, federation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Registered(1, "ward 3", "online", "2026-01-31T10:00:00", "SHA256:abc"),
        Registered(2, "", "registered", "2026-01-31T09:00:00", "SHA256:def"),
        Registered(3, "north", "unregistered", "2026-01-30T08:00:00", "SHA256:ghi"),
    ]
    monkeypatch.setattr(programs, "registered", lambda *_: [asdict(site) for site in found])
    code, text, errors = fedalign("sites", federation)
    assert code == 0, errors
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    assert ["ward 3", "connected", "2026-01-31T10:00:00", "SHA256:abc", "1"] in rows
    assert ["(no name)", "never connected", "2026-01-31T09:00:00", "SHA256:def", "2"] in rows
    assert ["north", "revoked", "2026-01-30T08:00:00", "SHA256:ghi", "3"] in rows
    assert "1 of 2 connected; federation.min_sites = 2." in text
    assert json.loads(fedalign("sites", federation, "--json")[1]) == [asdict(site) for site in found]


def test_sites_says_in_a_line_that_nobody_answers(fedalign: Command, federation: Path) -> None:
    code, _, errors = fedalign("sites", federation)  # port 1
    assert code == 2
    assert re.fullmatch(r"Error: SuperLink 127.0.0.1:1: the list failed: .*refused. Is it running there\?\n", errors)
