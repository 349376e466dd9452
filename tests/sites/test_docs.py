"""docs/many-sites.md, word for word: who follows it on two machines does what this does on one.

Changed in its blocks: the address, and where the SuperLink listens, which are this machine's. What one party sends the
other, as the page says, is copied.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedalign.config.site import SiteFolder
from fedalign.federation.flower.loopback import Loopback
from fedalign.federation.flower.programs import HOST, register_command
from tests.conftest import rows, write_jsonl
from tests.sites.conftest import PATIENCE, Run

pytestmark = pytest.mark.sites

PAGE = (Path(__file__).parents[2] / "docs" / "many-sites.md").read_text(encoding="utf-8")
PART = re.compile(r"^## (?P<heading>[^\n]*)\n|^```(?P<kind>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL)
PARTIES = {"Coordinator": "coordinator", "Each site": "site"}
STAYS = {"flower.superlink": "superlink", "fedalign site serve": "site"}
SENT = {  # before a step
    "2.": (("coordinator/invite-hospital-a.toml", "site"), ("coordinator/federation.toml", "site")),
    "3.": (("site/hospital-a/key.pub", "coordinator/hospital-a.pub"),),
}
CLASSES = ("benign", "malignant", "unclear")


@dataclass(frozen=True)
class Step:
    """A block to be typed, or a file to be written."""

    number: str
    party: str
    text: str
    is_file: bool


def steps() -> Iterator[Step]:
    """What the numbered sections have done, in order."""
    number = party = ""
    for part in PART.finditer(PAGE):
        if part["heading"]:
            found = re.match(r"(\d\.) ([^:]+):", part["heading"])
            number, party = (found[1], PARTIES[found[2]]) if found else ("", "")
        elif party and (part["kind"] == "sh" or part["text"].startswith("# ")):
            yield Step(number, party, part["text"], part["kind"] == "toml")


def test_the_page_is_followed_word_for_word(tmp_path: Path) -> None:
    with Loopback(tmp_path, tls=False) as loopback:
        del loopback.environment["FLWR_HOME"]  # as who reads the page has it
        loopback.environment["HOME"] = str(tmp_path)
        said = follow(loopback, tmp_path)
        assert_strict(loopback.port, tmp_path / "coordinator" / "ca.crt")
        connected = json.loads(typed("fedalign sites federation.toml --json", tmp_path / "coordinator", loopback))
    assert loopback.leftovers() == []
    run = Run(tmp_path / "coordinator" / "runs" / "ours")
    assert run.rounds == [0, 1]
    assert run.lines[1]["clients"] == ["hospital-a"]
    assert run.summary["failures"] == []
    assert [(site["name"], site["status"]) for site in connected] == [("hospital-a", "online")]
    site = tmp_path / "site" / "hospital-a"
    fingerprint = subprocess.run(
        ["ssh-keygen", "-l", "-f", site / "key.pub"], capture_output=True, text=True, check=True
    )
    assert connected[0]["key"] == fingerprint.stdout.split()[1]
    (shown,) = {line.strip() for line in said["invite"].splitlines() if re.fullmatch(r" +([0-9A-F]{2}:){31}..", line)}
    assert shown in said["init"]  # who compares them by telephone hears the same
    assert (site / "ca.crt").read_text() == (tmp_path / "coordinator" / "ca.crt").read_text()
    assert register_command("hospital-a") in PAGE
    assert register_command("hospital-a") in said["invite"]
    assert register_command("hospital-a") in said["init"]
    assert_supernode(site, loopback.address)


def follow(loopback: Loopback, folder: Path) -> dict[str, str]:
    """Do all of it; what `site invite` and `site init` said."""
    for party in PARTIES.values():
        (folder / party).mkdir()
    texts = [{"note": row["text"], "code": CLASSES[i % 3]} for i, row in enumerate(rows()[:80])]
    write_jsonl(folder / "site" / "notes.jsonl", texts)
    done, said = set[str](), dict[str, str]()
    for step in steps():
        if step.number not in done:
            done.add(step.number)
            for source, to in SENT.get(step.number, ()):
                shutil.copy(folder / source, folder / to)
        text, place = here(step.text, loopback), folder / step.party
        stays = next((name for words, name in STAYS.items() if words in text), None)
        if step.is_file:
            name = text.splitlines()[0].removeprefix("# ")
            (place / name).write_text(text, encoding="utf-8")
        elif stays:
            loopback._start(stays, ["bash", "-ec", f"cd {shlex.quote(str(place))}\n{text}"])
            loopback.wait(lambda stays=stays: is_ready(loopback, stays), f"{stays} to be ready", needs=stays)  # type: ignore[misc] # mypy infers no lambda with defaults
        else:
            output = typed(text, place, loopback)
            said |= {word: output for word in ("invite", "init") if f"fedalign site {word} " in text}
    assert done == {"1.", "2.", "3.", "4.", "5."}
    return said


def here(text: str, loopback: Loopback) -> str:
    """The only words that are not the page's."""
    text = text.replace("fl.example.org:8000", loopback.address)
    return text.replace("--host 0.0.0.0 --port 8000", f"--host {HOST} --port {loopback.port}")


def typed(text: str, place: Path, loopback: Loopback) -> str:
    """What a block prints, which must not fail."""
    done = subprocess.run(
        ["bash", "-ec", text],
        cwd=place,
        env={**loopback.environment, "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
    return done.stdout


def is_ready(loopback: Loopback, name: str) -> bool:
    """Whether the SuperLink listens, or the site says that it is there."""
    if name == "site":
        return f"hospital-a is ready for {loopback.address}" in loopback.log(name)
    with suppress(OSError), socket.create_connection((HOST, loopback.port), timeout=1):
        return True
    return False


def assert_strict(port: int, ca: Path) -> None:
    """The certificates of the page are good enough for verifiers that are strict, as Python's is from 3.13 on."""
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    for name in ("localhost", "fl.example.org"):
        with socket.create_connection((HOST, port)) as plain, context.wrap_socket(plain, server_hostname=name):
            pass


def assert_supernode(site: Path, address: str) -> None:
    """Flower's own command on the page is the one that `site serve` gives."""
    (block,) = [part["text"] for part in PART.finditer(PAGE) if (part["text"] or "").startswith("flower-supernode")]
    place, written = site.parent, shlex.split(block.replace("\\\n", ""))
    words = [str(place / word) if word.startswith("hospital-a/") else word for word in written]
    words = [word.replace("$PWD", str(place)).replace("fl.example.org:8000", address) for word in words]
    assert words == SiteFolder.load(site).supernode_command()
