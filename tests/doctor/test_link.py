"""Keys and the connection as the doctor judges them."""

import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedalign.config.site import SiteConfig, SiteFolder
from fedalign.doctor.link import check_key, check_superlink
from fedalign.doctor.report import Check, Examination
from fedalign.federation.flower.keys import make_node_key
from tests.doctor.server import certify, serving


def site(folder: Path, superlink: str = "127.0.0.1:8000") -> SiteFolder:
    tables = {"name": "a", "data": {"train": "x.jsonl"}, "coordinator": {"superlink": superlink}}
    return SiteFolder(folder, SiteConfig.model_validate(tables))


def key_check(folder: SiteFolder) -> Check:
    found = Examination()
    check_key(found, folder)
    (check,) = found.checks
    return check


def superlink_checks(address: str, certificates: Path | None, is_server: bool = False) -> dict[str, Check]:
    found = Examination()
    check_superlink(found, address, certificates, is_server=is_server)
    return {check.name: check for check in found.checks}


def test_a_fresh_pair_of_keys_is_well(tmp_path: Path) -> None:
    make_node_key(tmp_path / "key")
    check = key_check(site(tmp_path))
    assert check.verdict == "ok", check
    assert "0600" in check.found


def test_a_key_that_others_can_read_fails(tmp_path: Path) -> None:
    make_node_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    check = key_check(site(tmp_path))
    assert check.verdict == "failed"
    assert "0640" in check.found
    assert check.remedy == f"chmod 600 {tmp_path / 'key'}"


@pytest.mark.parametrize("public", [None, "other"])
def test_the_public_half_must_match(tmp_path: Path, public: str | None) -> None:
    make_node_key(tmp_path / "key")
    (tmp_path / "key.pub").unlink()
    if public:
        make_node_key(tmp_path / public).rename(tmp_path / "key.pub")
    check = key_check(site(tmp_path))
    assert check.verdict == "failed"
    assert "key.pub is not its public half" in check.found


@pytest.mark.parametrize(("superlink", "verdict"), [("127.0.0.1:8000", "warning"), ("fl.example.org:8000", "failed")])
def test_without_a_key_only_loopback_works(tmp_path: Path, superlink: str, verdict: str) -> None:
    assert key_check(site(tmp_path, superlink)).verdict == verdict


def test_what_flower_could_not_use_fails(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("no key")
    assert "not a private OpenSSH key" in key_check(site(tmp_path)).found
    form = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    key.write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*form, serialization.NoEncryption()))
    assert "not an elliptic-curve key" in key_check(site(tmp_path)).found


def test_a_superlink_that_is_well(tmp_path: Path) -> None:
    ca, chain = certify(tmp_path / "tls")
    with serving(chain) as address:
        checks = superlink_checks(address, ca)
    assert {name: check.verdict for name, check in checks.items()} == dict.fromkeys(("SuperLink", "TLS", "clock"), "ok")


def test_what_will_soon_be_wrong_is_a_warning(tmp_path: Path) -> None:
    ca, chain = certify(tmp_path / "tls", valid=(-1, 7))
    with serving(chain, clock=-120) as address:
        checks = superlink_checks(address, ca)
    assert checks["TLS"].verdict == checks["clock"].verdict == "warning"
    assert re.search(r"by -12[01] s", checks["clock"].found)


def test_a_failed_handshake_fails(tmp_path: Path) -> None:
    ca, chain = certify(tmp_path / "tls", valid=(-30, -1))
    with serving(chain) as address:
        checks = superlink_checks(address, ca)
    assert checks["TLS"].verdict == "failed"
    assert "expired" in checks["TLS"].found


def test_plaintext_is_for_loopback_alone() -> None:
    check = superlink_checks("fl.example.org:8000", None)["TLS"]
    assert check.verdict == "failed"
    assert "root_certificates" in check.remedy
    with serving() as address:
        assert "in the clear" in superlink_checks(address, None)["SuperLink"].found


def test_a_silent_superlink_stops_a_site_and_not_the_coordinator() -> None:
    with serving() as address:
        pass
    assert superlink_checks(address, None)["SuperLink"].verdict == "failed"
    there = superlink_checks(address, None, is_server=True)["SuperLink"]
    assert there.verdict == "ok"
    assert "is free" in there.found
