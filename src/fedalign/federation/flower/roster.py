"""Who is registered at a SuperLink, under which name, and who of them is connected: a program that prints JSON.

`flwr supernode list` asks the same, and tells neither names nor keys.
"""

from __future__ import annotations

import json
import sys
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import serialization
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control import ControlHttpClient

from fedalign.units import shown


@dataclass(frozen=True)
class Registered:
    """A key that the SuperLink knows."""

    node: int
    name: str  # that the key was registered with; "" without one
    status: str  # as Flower calls it: registered, online, offline or unregistered
    since: str  # of that status, UTC; "" before it was first online
    key: str  # fingerprint of the public key, as `ssh-keygen -l` writes it


def registered(address: str, root_certificates: Path | None) -> Sequence[Registered]:
    """All keys that a SuperLink knows, in the order in which they were registered.

    Raises:
        OSError, ValueError, httpx.HTTPError: The SuperLink cannot be reached, or refuses.
    """
    pem = root_certificates.read_bytes() if root_certificates else None
    client = ControlHttpClient.from_server_address(address, pem is None, pem, interceptors=[])
    try:
        found = client.ListNodes(ListNodesRequest()).nodes_info
    finally:
        client.close()
    return [
        Registered(
            node.node_id,
            shown(node.name) if node.HasField("name") else "",
            node.status,
            {
                "online": node.last_activated_at,
                "offline": node.last_deactivated_at,
                "unregistered": node.unregistered_at,
            }.get(node.status, node.registered_at)[:19],
            _fingerprint(node.public_key),
        )
        for node in sorted(found, key=lambda node: node.registered_at)
    ]


def _fingerprint(pem: bytes) -> str:
    """Of a key in PEM form; of no key, where sites have none, none."""
    if not pem:
        return ""
    key = serialization.load_pem_public_key(pem)
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return f"SHA256:{b64encode(sha256(b64decode(line.split()[1])).digest()).decode().rstrip('=')}"


def main(address: str, root_certificates: str | None = None) -> None:
    """Print what `programs.registered` reads."""
    try:
        nodes = registered(address, Path(root_certificates) if root_certificates else None)
    except (OSError, ValueError, httpx.HTTPError) as error:
        sys.exit(shown(str(error)))
    print(json.dumps({"success": True, "nodes": [asdict(node) for node in nodes]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
