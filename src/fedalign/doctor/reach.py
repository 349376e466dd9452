"""Whether a SuperLink can be reached: TCP, TLS, and its clock, with the standard library alone."""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from fedalign.config.run import split_address

PATIENCE = 5.0  # seconds for each step
EXPIRED, NOT_YET = 10, 9  # OpenSSL's verification codes
STRANGER = (7, 18, 19, 20, 21)  # signed by nobody or another, be it of the same name, than root_certificates hold
OTHER_NAME = (62, 64)  # not for this host name, not for this IP address


@dataclass(frozen=True)
class Reached:
    """How far a connection came."""

    connected: bool = False
    refused: bool = False  # the machine answers, and nobody listens there
    problem: str = ""  # of TCP, TLS or HTTP: what is wrong and what to do
    certificate_days: float | None = None  # until the certificate expires; None without TLS
    clock_seconds: float | None = None  # how far its clock is ahead of ours; None: it did not say

    @property
    def answers(self) -> bool:
        """Whether it can be talked to."""
        return self.connected and not self.problem


def reach(address: str, root_certificates: Path | None) -> Reached:
    """Connect, shake hands if certificates are given, and ask for the time."""
    host, port = split_address(address)
    try:
        connection = socket.create_connection((host, port), timeout=PATIENCE)
    except ConnectionRefusedError:
        return Reached(refused=True, problem="nobody listens there")
    except socket.gaierror:
        return Reached(problem=f"no machine of the name {host!r} is known here")
    except (TimeoutError, OSError) as error:
        return Reached(problem=f"cannot be reached: {error.strerror or 'no answer'}")
    if root_certificates is None:
        with connection:
            return _asked_for_time(connection, host, None)
    try:
        context = ssl.create_default_context(cafile=str(root_certificates))
    except (OSError, ssl.SSLError) as error:
        connection.close()
        return Reached(True, problem=f"root_certificates = {str(root_certificates)!r}: not readable as PEM ({error})")
    with connection:
        try:
            secured = context.wrap_socket(connection, server_hostname=host)
        except (OSError, ssl.SSLError) as error:
            return Reached(True, problem=_handshake_problem(error, host))
        with secured:
            return _asked_for_time(secured, host, _days_left(secured))


def is_free(address: str) -> bool:
    """Whether this machine could listen there."""
    host, port = split_address(address)
    with suppress(OSError):
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            return True
    return False


def _handshake_problem(error: Exception, host: str) -> str:
    if not isinstance(error, ssl.SSLCertVerificationError):
        speaks = "it does not speak TLS" if isinstance(error, ssl.SSLError | ConnectionError) else str(error)
        return f"no TLS handshake: {speaks}. Start the SuperLink with --ssl-certfile, --ssl-keyfile, --ssl-ca-certfile"
    if error.verify_code == EXPIRED:
        return "its certificate has expired (or this clock is wrong): the coordinator must renew it"
    if error.verify_code == NOT_YET:
        return "its certificate is not valid yet: is this machine's clock right?"
    if error.verify_code in OTHER_NAME:
        return f"its certificate is not for {host}: use a name that it holds, or have {host} added to it"
    if error.verify_code in STRANGER:
        return "its certificate is not signed by root_certificates: get the coordinator's ca.crt, safely"
    return f"its certificate is refused: {error.verify_message}"


def _days_left(secured: ssl.SSLSocket) -> float:
    certificate = secured.getpeercert() or {}
    return (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86400


def _asked_for_time(connection: socket.socket, host: str, days: float | None) -> Reached:
    """Ask over HTTP, which the SuperLink speaks on the same port; one that says no time is reached all the same."""
    connection.settimeout(PATIENCE)
    try:
        before = time.time()
        connection.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        date = response.getheader("Date")
        now = (before + time.time()) / 2
        ahead = parsedate_to_datetime(date).timestamp() - now if date else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        if days is None and isinstance(error, ConnectionError | http.client.HTTPException):
            return Reached(True, problem="it does not answer in the clear; if it speaks TLS, give root_certificates")
        return Reached(True, certificate_days=days)
    return Reached(True, certificate_days=days, clock_seconds=ahead)
