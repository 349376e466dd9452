"""The keys of a deployment: a site's own pair, and certificates under which a server is known."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from ipaddress import IPv4Address
from pathlib import Path
from typing import TYPE_CHECKING

from fedalign.errors import UserError
from fedalign.files import check_new, write_private, write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import PrivateFormat
    from cryptography.x509 import Certificate, CertificateBuilder


VALID_FOR = timedelta(days=365)


@dataclass(frozen=True)
class Certificates:
    """PEM files: what clients trust, and what the server shows and proves."""

    ca: Path
    certificate: Path
    key: Path


def make_node_key(path: Path) -> Path:
    """Make a site's ECDSA P-384 pair: the private key at `path`, the public one at `path`.pub, which is returned.

    Raises:
        UserError: One of the files is there already, or cryptography is not installed.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    public = path.with_name(f"{path.name}.pub")
    check_new("key", (path, public), "A site that lost its key is registered anew: use it, or choose another path.")
    key = ec.generate_private_key(ec.SECP384R1())
    _write_key(path, key, serialization.PrivateFormat.OpenSSH)
    text = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_text(public, f"{text.decode()}\n")
    return public


def make_certificates(folder: Path) -> Certificates:
    """Make a server certificate for localhost and 127.0.0.1, and the authority that signed it; replace older ones.

    The authority's private key is never written: it signs this one certificate.

    Raises:
        UserError: cryptography is not installed.
    """
    _need_cryptography()
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    curve = ec.SECP256R1()
    ca_key, key = ec.generate_private_key(curve), ec.generate_private_key(curve)
    ca = _about("fedalign loopback CA", "fedalign loopback CA", ca_key, authority=ca_key, is_authority=True)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))])
    server = (
        _about("localhost", "fedalign loopback CA", key, authority=ca_key, is_authority=False)
        .add_extension(names, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )

    def pem(certificate: Certificate) -> bytes:
        return certificate.public_bytes(serialization.Encoding.PEM)

    made = Certificates(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    _write_key(made.key, key, serialization.PrivateFormat.PKCS8)
    made.ca.write_bytes(pem(ca.sign(ca_key, hashes.SHA256())))
    made.certificate.write_bytes(pem(server.sign(ca_key, hashes.SHA256())))
    return made


def _about(
    subject: str,
    issuer: str,
    key: EllipticCurvePrivateKey,
    *,
    authority: EllipticCurvePrivateKey,
    is_authority: bool,
) -> CertificateBuilder:
    """Everything that strict verifiers ask of either kind of certificate."""
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks differ
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
    )


def _write_key(path: Path, key: EllipticCurvePrivateKey, form: PrivateFormat) -> None:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption

    try:
        write_private(path, key.private_bytes(Encoding.PEM, form, NoEncryption()))
    except OSError as error:
        raise UserError(
            f"key {str(path)!r}: cannot be written ({error.strerror}). Choose a path in a folder of yours."
        ) from None


def _need_cryptography() -> None:
    if find_spec("cryptography") is None:
        raise UserError(
            "cryptography: not installed, and keys are made with it. Run: pip install 'fedalign-moe[flower]'"
        )
