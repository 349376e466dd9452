"""An invitation, from the coordinator that writes it to the site that is made of it."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedalign.config.run import FederationConfig
from fedalign.config.site import SiteFolder
from fedalign.errors import UserError
from fedalign.federation.flower.invitation import LARGEST, Invitation, invite, read_invitation
from fedalign.federation.flower.keys import make_certificates
from fedalign.protocol import PROTOCOL
from tests.conftest import Command

ADDRESS = "fl.example.org:8000"


@pytest.fixture
def link(tmp_path: Path) -> FederationConfig:
    """A coordinator whose ca.crt holds, by mistake, a private key as well."""
    made = make_certificates(tmp_path)
    file = tmp_path / "all.pem"
    file.write_bytes(made.key.read_bytes() + b"chain of our house\r\n" + made.ca.read_bytes())
    return FederationConfig(superlink=ADDRESS, root_certificates=str(file))


@pytest.fixture
def invitation(link: FederationConfig, tmp_path: Path) -> Path:
    return invite("ward 3", link, tmp_path / "invited.toml")[1]


def changed(file: Path, **values: Any) -> Path:
    file.write_text(tomli_w.dumps(tomllib.loads(file.read_text()) | values))
    return file


def test_it_tells_the_certificates_and_nothing_secret(invitation: Path, tmp_path: Path) -> None:
    text = invitation.read_text()
    assert "PRIVATE" not in text
    assert "chain of our house" not in text
    assert "fedalign site init --invite invited.toml" in text
    read = read_invitation(invitation)
    ca = tmp_path / "ca.crt"
    assert read == Invitation(name="ward 3", protocol=PROTOCOL, superlink=ADDRESS, certificates=ca.read_text())
    told = subprocess.run(
        ["openssl", "x509", "-in", ca, "-noout", "-fingerprint", "-sha256"], capture_output=True, text=True, check=True
    )
    assert [told.stdout.strip().partition("=")[2]] == read.fingerprints


def test_a_site_is_made_of_it(fedalign: Command, invitation: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    made = ["site", "init", "--invite", invitation, "--data", texts / "train.jsonl", "--dir", folder]
    code, said, errors = fedalign(*made)
    assert code == 0, errors
    assert read_invitation(invitation).fingerprints[0] in said
    site = SiteFolder.load(folder)
    assert (site.config.name, site.config.coordinator.superlink) == ("ward 3", ADDRESS)
    assert site.config.coordinator.root_certificates == "ca.crt"  # in the folder, which can be moved
    assert Path(site.resolve("ca.crt")).read_text() == (tmp_path / "ca.crt").read_text()
    code, _, errors = fedalign(*made)
    assert code == 2
    assert "there already" in errors


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"protocol": PROTOCOL + 1},
            f"protocol = {PROTOCOL + 1}, this is {PROTOCOL}: install the coordinator's version",
        ),
        ({"certificates": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"}, "holds no certificate"),
        ({"certificates": ""}, "holds no certificate"),
        ({"superlink": "nowhere"}, "superlink"),
        ({"name": "a\x1b[2J"}, "must be 1 to 64 printable characters"),
        ({"command": "rm"}, "command"),
    ],
)
def test_what_is_none_is_told_in_a_line(
    fedalign: Command, invitation: Path, texts: Path, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    folder = tmp_path / "site"
    code, _, errors = fedalign(
        "site", "init", "--invite", changed(invitation, **values), "--data", texts / "train.jsonl", "--dir", folder
    )
    assert code == 2
    assert told in errors
    assert len(errors.strip().splitlines()) == 1
    assert not folder.exists()


def test_one_that_is_too_large_is_not_read(invitation: Path) -> None:
    with invitation.open("ab") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(UserError, match="larger than 256 KiB"):
        read_invitation(invitation)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["north"], "the invitation is for 'ward 3'"),
        (["--superlink", "127.0.0.1:1"], "Leave out --superlink and --root-certificates"),
    ],
)
def test_nothing_contradicts_it(fedalign: Command, invitation: Path, texts: Path, more: list[str], told: str) -> None:
    code, _, errors = fedalign("site", "init", *more, "--invite", invitation, "--data", texts / "train.jsonl")
    assert code == 2
    assert told in errors


def test_a_site_has_a_name(fedalign: Command, texts: Path) -> None:
    code, _, errors = fedalign("site", "init", "--data", texts / "train.jsonl")
    assert code == 2
    assert "no name" in errors


def test_nothing_is_overwritten_or_sent_in_the_clear(link: FederationConfig, invitation: Path) -> None:
    before = invitation.read_text()
    with pytest.raises(UserError, match="there already"):
        invite("north", link, invitation)
    assert invitation.read_text() == before
    with pytest.raises(UserError, match="would travel in the clear"):
        invite("north", FederationConfig(superlink=ADDRESS), invitation.with_name("north.toml"))
    with pytest.raises(UserError, match="printable"):
        invite("", link, invitation.with_name("nobody.toml"))
    assert {path.name for path in invitation.parent.glob("*.toml")} == {invitation.name}
