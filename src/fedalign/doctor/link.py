"""Checks of what connects a site with the coordinator: keys, TLS, clocks, ports."""

from __future__ import annotations

import shlex
import stat
from pathlib import Path

from fedalign.config.site import SiteFolder
from fedalign.doctor.reach import Reached, is_free, reach
from fedalign.doctor.report import Examination
from fedalign.federation.flower.programs import is_loopback

CLOCK_SECONDS = 60
CERTIFICATE_DAYS = 14


def check_key(found: Examination, folder: SiteFolder) -> None:
    """The private key is there, its owner's alone, and the public one beside it is its other half."""
    link = folder.config.coordinator
    private = folder.path / link.key
    public = private.with_name(f"{private.name}.pub")
    if not private.is_file():
        found.add(
            "key",
            "warning" if is_loopback(link.superlink) else "failed",
            f"{private}: not there, and a SuperLink that checks its sites refuses one without",
            "Restore it, or make a site anew and have its key registered: fedalign site init NAME --data FILE",
        )
        return
    mode = stat.S_IMODE(private.stat().st_mode)
    if mode & 0o077:
        remedy = f"chmod 600 {shlex.quote(str(private))}"
        found.add(
            "key", "failed", f"{private}: mode {mode:04o}, must be 0600: others on this machine can use it", remedy
        )
        return
    try:
        half = public_half(private)
    except (OSError, ValueError) as error:
        found.add("key", "failed", f"{private}: {error}", "Have another pair registered by the coordinator.")
        return
    try:
        same = public.read_text(encoding="utf-8").split()[:2] == half
    except (OSError, UnicodeDecodeError):
        same = False
    found.add(
        "key",
        "ok" if same else "failed",
        f"{private}: mode {mode:04o}, {public.name} {'matches' if same else 'is not its public half'}",
        f"ssh-keygen -y -f {shlex.quote(str(private))} > {shlex.quote(str(public))}, and have that one registered.",
    )


def public_half(private: Path) -> list[str]:
    """Type and value of the public key, as they stand in its file.

    Raises:
        ValueError: It is no key that Flower could use; the message says why.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    except ImportError:
        raise ValueError("cannot be read without cryptography: pip install 'fedalign-moe[flower]'") from None
    try:
        key = serialization.load_ssh_private_key(private.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("not a private OpenSSH key without a password, which Flower asks for") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ValueError("not an elliptic-curve key, which Flower asks for")
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(*form).decode().split()[:2]


def check_superlink(found: Examination, address: str, certificates: Path | None, *, is_server: bool) -> None:
    """The SuperLink answers as itself, and its clock agrees; at the coordinator its port may also be free still."""
    if certificates is None and not is_loopback(address):
        found.add(
            "TLS",
            "failed",
            f"{address}: no root_certificates, and plaintext is for loopback alone",
            "Name the coordinator's ca.crt in root_certificates.",
        )
        return
    reached = reach(address, certificates)
    if reached.answers:
        _answered(found, address, reached)
    elif reached.connected:
        found.add("TLS", "failed", f"{address}: {reached.problem}")
    elif is_server and reached.refused and is_free(address):
        found.add("SuperLink", "ok", f"{address} is free: flower-superlink can be started there")
    else:
        remedy = (
            "Start it, or mend the address." if is_server else "Ask the coordinator whether it runs; check firewalls."
        )
        found.add("SuperLink", "failed", f"{address}: {reached.problem}", remedy)


def _answered(found: Examination, address: str, reached: Reached) -> None:
    days, ahead = reached.certificate_days, reached.clock_seconds
    found.add("SuperLink", "ok", f"{address} answers" + (", in the clear (loopback)" if days is None else ""))
    if days is not None:
        found.add(
            "TLS",
            "ok" if days > CERTIFICATE_DAYS else "warning",
            f"its certificate is good for {days:.0f} days (at least {CERTIFICATE_DAYS})",
            "Have the coordinator renew it.",
        )
    if ahead is not None:
        found.add(
            "clock",
            "ok" if abs(ahead) <= CLOCK_SECONDS else "warning",
            f"the SuperLink's differs by {ahead:+.0f} s (at most {CLOCK_SECONDS})",
            "Set both by a time server (NTP).",
        )
