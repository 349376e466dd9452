"""An invitation: the one file that a coordinator sends to a new site. Nothing in it is secret.

Whoever can change it on its way can put another coordinator in the place of the one that was meant: both sides show the
certificates' fingerprints, to be compared by another way.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import ssl
from importlib import metadata
from pathlib import Path
from typing import Annotated

import tomli_w
from pydantic import AfterValidator, Field

from fedalign.config.run import Address, FederationConfig, Section
from fedalign.config.site import SiteName
from fedalign.config.toml import checked, read_tables
from fedalign.errors import UserError
from fedalign.federation.flower.programs import check_plaintext
from fedalign.files import check_new, folder_name, write_text
from fedalign.protocol import PROTOCOL

LARGEST = 1 << 18  # bytes; a house's whole chain of authorities has less
PEM = re.compile(r"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----\n?")
HEAD = """\
# An invitation for {name} to take part in a federation. Nothing in this file is secret. At the site:
#
#   pip install 'fedalign-moe[flower]'            version {version}, as the coordinator has
#   fedalign site init --invite {file} --data YOUR_FILE
#   send the key.pub that this makes to whom this file came from, and compare the fingerprint by telephone
#   fedalign doctor --site {folder}
#   fedalign site serve {folder}

"""


def _certificates(text: str) -> str:
    """The certificates alone, whatever else a file holds."""
    found = "".join(f"{pem.rstrip()}\n" for pem in PEM.findall(text.replace("\r\n", "\n")))
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found)
    except (OSError, ValueError):  # OSError: also what ssl raises
        raise ValueError("holds no certificate in PEM form.") from None
    return found


class Invitation(Section):
    """The facts that a new site has to know of its coordinator."""

    name: SiteName = Field(description="what the coordinator calls the site")
    protocol: int
    superlink: Address
    certificates: Annotated[str, AfterValidator(_certificates)] | None = None  # PEM; None: plaintext, on loopback

    @property
    def fingerprints(self) -> list[str]:
        """SHA-256 of each certificate, as `openssl x509 -fingerprint -sha256` writes it."""
        digests = (
            hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).digest() for pem in PEM.findall(self.certificates or "")
        )
        return [digest.hex(":").upper() for digest in digests]


def invite(name: str, link: FederationConfig, file: Path | None = None) -> tuple[Invitation, Path]:
    """Write an invitation; the file is invite-NAME.toml, if no other is named.

    Raises:
        UserError: There is such a file, the name is none, or the coordinator's certificates cannot be read.
    """
    file = file or Path(f"invite-{folder_name(name)}.toml")
    check_plaintext(link.superlink, link.root_certificates, insecure_anywhere=False)
    pem = None if link.root_certificates is None else _read(Path(link.root_certificates))
    about = {"name": name, "protocol": PROTOCOL, "superlink": link.superlink, "certificates": pem}
    invitation = checked(Invitation, about, "invitation: ")
    check_new("invitation", [file], "Give another file with --to.")
    folder = shlex.quote(folder_name(name))
    head = HEAD.format(name=name, version=metadata.version("fedalign-moe"), file=shlex.quote(file.name), folder=folder)
    write_text(file, head + tomli_w.dumps(invitation.model_dump(exclude_none=True), multiline_strings=True))
    return invitation, file


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"root_certificates = {str(file)!r}: cannot be read ({error.strerror}).") from None


def read_invitation(file: Path) -> Invitation:
    """The invitation that a coordinator has sent.

    Raises:
        UserError: It is no invitation, or one of another version.
    """
    if file.is_file() and file.stat().st_size > LARGEST:
        raise UserError(f"--invite {str(file)!r}: larger than {LARGEST >> 10} KiB, which no invitation is.")
    tables = read_tables(file, "--invite")
    if tables.get("protocol", PROTOCOL) != PROTOCOL:
        raise UserError(
            f"--invite {str(file)!r}: protocol = {tables['protocol']!r:.40}, this is {PROTOCOL}: install the "
            "coordinator's version of fedalign-moe, which the file's first lines name."
        )
    return checked(Invitation, tables, f"--invite {str(file)!r}: ")
