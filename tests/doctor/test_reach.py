"""Connections on loopback: what is wrong with each is named."""

import socket
from pathlib import Path

import pytest

from fedalign.doctor.reach import is_free, reach
from tests.doctor.server import certify, serving


def test_a_server_with_a_good_certificate_is_reached(tmp_path: Path) -> None:
    ca, chain = certify(tmp_path / "tls", valid=(-1, 30))
    with serving(chain) as address:
        found = reach(address, ca)
    assert found.answers
    assert found.certificate_days == pytest.approx(30, abs=0.1)
    assert found.clock_seconds == pytest.approx(0, abs=2)


def test_plaintext_is_reached_and_its_clock_read() -> None:
    with serving(clock=3600) as address:
        found = reach(address, None)
    assert found.answers
    assert found.certificate_days is None
    assert found.clock_seconds == pytest.approx(3600, abs=2)


@pytest.mark.parametrize(
    ("host", "valid", "words"),
    [
        ("127.0.0.1", (-30, -1), "has expired"),
        ("127.0.0.1", (1, 30), "not valid yet"),
        ("127.0.0.2", (-1, 30), "not for 127.0.0.1"),
        ("fl.example.org", (-1, 30), "not for 127.0.0.1"),
    ],
)
def test_a_bad_certificate_is_named(tmp_path: Path, host: str, valid: tuple[float, float], words: str) -> None:
    ca, chain = certify(tmp_path / "tls", host, valid)
    with serving(chain) as address:
        found = reach(address, ca)
    assert found.connected
    assert not found.answers
    assert words in found.problem


@pytest.mark.parametrize("name", ["authority", "another"])
def test_a_strangers_certificate_is_named(tmp_path: Path, name: str) -> None:
    stranger, _ = certify(tmp_path / "stranger", authority=name)
    _, chain = certify(tmp_path / "tls")
    with serving(chain) as address:
        assert "not signed by root_certificates" in reach(address, stranger).problem


def test_tls_and_plaintext_do_not_mix(tmp_path: Path) -> None:
    ca, chain = certify(tmp_path / "tls")
    with serving() as address:
        assert "does not speak TLS" in reach(address, ca).problem
    with serving(chain) as address:
        assert "give root_certificates" in reach(address, None).problem


def test_certificates_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("no certificate")
    with serving() as address:
        assert "not readable as PEM" in reach(address, tmp_path / "ca.crt").problem
        assert "not readable as PEM" in reach(address, tmp_path / "none.crt").problem


def test_nobody_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.listen()
        assert not is_free(address)
    assert reach(address, None).refused
    assert is_free(address)
    assert "no machine of the name" in reach("no-such-host.invalid:8000", None).problem
