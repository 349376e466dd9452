"""Keys and certificates, and a real Flower deployment: who gets in, what can be killed, and that nothing stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedalign.errors import UserError
from fedalign.federation.flower.keys import make_certificates, make_node_key
from fedalign.federation.flower.loopback import Loopback, node_config_text
from fedalign.federation.flower.programs import free_port

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "waiting"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "fedalign"
[tool.flwr.app.components]
serverapp = "waiting:server"
clientapp = "waiting:client"
[tool.flwr.app.config]
"""

APP = """
import time
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()

@server.main()
def main(grid, context):
    while not list(grid.get_node_ids()):
        time.sleep(0.2)
    messages = [Message(RecordDict(), node, "train") for node in grid.get_node_ids()]
    list(grid.send_and_receive(messages))

@client.train()
def train(message, context):
    print("site:", context.node_config["site"], "number:", context.node_config["number"] + 1)
    time.sleep(600)
"""


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def alive(pid: int) -> bool:
    listing = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(listing.stdout.strip()) and not listing.stdout.startswith("Z")


def test_a_node_key_is_a_p384_pair_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "ward-a"
    public = make_node_key(path)
    assert public == tmp_path / "keys" / "ward-a.pub"
    private = serialization.load_ssh_private_key(path.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert serialization.load_ssh_public_key(public.read_bytes()) == private.public_key()
    assert mode(path) == 0o600


@pytest.mark.parametrize("there", ["ward-a", "ward-a.pub"])
def test_a_node_key_is_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("precious")
    with pytest.raises(UserError, match="is there already"):
        make_node_key(tmp_path / "ward-a")
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "precious"


def test_a_key_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make_node_key(tmp_path / "file" / "ward-a")


def test_without_cryptography_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for make in (make_node_key, make_certificates):
        with pytest.raises(UserError, match=r"pip install 'fedalign-moe\[flower\]'"):
            make(tmp_path / "any")


def test_without_flower_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with Loopback(tmp_path) as deployment, pytest.raises(UserError, match=r"fedalign-moe\[flower\]"):
        deployment.start_superlink()


def served(context: ssl.SSLContext) -> Iterator[int]:
    """One TLS handshake on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def shake() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):  # the client, which the test looks at, may refuse
                context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=shake)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_strict_clients_trust_the_certificate_under_both_names(tmp_path: Path, name: str) -> None:
    made = make_certificates(tmp_path)
    assert mode(made.key) == 0o600
    assert "PRIVATE" not in made.ca.read_text() + made.certificate.read_text()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.certificate, made.key)
    client = ssl.create_default_context(cafile=str(made.ca))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    for port in served(server):
        with socket.create_connection(("127.0.0.1", port)) as raw, client.wrap_socket(raw, server_hostname=name) as tls:
            assert tls.version() == "TLSv1.3"


def test_an_authority_made_elsewhere_is_not_trusted(tmp_path: Path) -> None:
    made, other = make_certificates(tmp_path / "made"), make_certificates(tmp_path / "other")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(made.certificate, made.key)
    client = ssl.create_default_context(cafile=str(other.ca))
    for port in served(server):
        with (
            socket.create_connection(("127.0.0.1", port)) as raw,
            pytest.raises(ssl.SSLCertVerificationError),
        ):
            client.wrap_socket(raw, server_hostname="localhost")


def test_certificates_made_again_replace_the_old_ones(tmp_path: Path) -> None:
    key = make_certificates(tmp_path).key.read_bytes()
    made = make_certificates(tmp_path)
    assert made.key.read_bytes() != key
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(made.certificate, made.key)  # the two belong together


def test_flower_reads_node_config_as_it_was_given() -> None:
    given: dict[str, str | int] = {
        "site": r'/srv/a "b" \ = ward\3 é/site.toml',
        "ends": "in \\",
        "number": 7,
        "line": "one\ntwo",
    }
    script = (
        "import sys, json; from flwr.common.config import parse_config_args;"
        "print(json.dumps(parse_config_args([sys.argv[1]])))"
    )
    command = [sys.executable, "-c", script, node_config_text(given)]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == given


def test_a_free_port_is_free_and_not_taken() -> None:
    port = free_port(set(range(20_000, 31_999)) - {20_500})
    assert port in {20_500, 31_999}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))


def test_names_that_are_not_a_sites(tmp_path: Path) -> None:
    with Loopback(tmp_path) as deployment:
        for name in ("superlink", "../ward", ""):
            with pytest.raises(UserError, match=r"Choose another|not a name"):
                deployment.start_supernode(name, {}, None)
        with pytest.raises(UserError, match="unknown"):
            deployment.kill("ward-a")


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_sigterm_leaves_the_block_unless_the_caller_handles_it(tmp_path: Path, before: signal.Handlers) -> None:
    found = signal.signal(signal.SIGTERM, before)
    try:
        with Loopback(tmp_path):
            assert (signal.getsignal(signal.SIGTERM) is before) == (before is signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, found)


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Loopback]:
    with Loopback(tmp_path / "a folder") as running:
        running.start_superlink()
        yield running
    assert running.leftovers() == []


def online(deployment: Loopback) -> list[int]:
    return [int(node["node-id"]) for node in deployment.nodes() if node["status"] == "online"]


@pytest.mark.sites
def test_only_registered_sites_under_tls_get_in(deployment: Loopback) -> None:
    keys = deployment.folder / "keys"
    node = deployment.register("ward-a", make_node_key(keys / "ward-a"))
    make_node_key(keys / "unregistered")
    with pytest.raises(UserError, match="already in use"):
        deployment.register("ward-b", keys / "ward-a.pub")

    deployment.start_supernode("unregistered", {}, keys / "unregistered")
    deployment.start_supernode("keyless", {}, None)
    deployment.start_supernode("plaintext", {}, None, insecure=True)
    deployment.start_supernode("plaintext-key", {}, keys / "ward-a", insecure=True)
    refused = {
        "unregistered": "Failed to activate SuperNode",
        "keyless": "All SuperNodes must be registered",
        "plaintext": "Connection attempt failed",
        "plaintext-key": "TLS is not enabled",
    }
    for name, said in refused.items():
        deployment.wait(lambda name=name, said=said: said in deployment.log(name), f"{name} to be refused")  # type: ignore[misc] # mypy infers no lambda with defaults
        assert "SuperNode ID" not in deployment.log(name)
    assert online(deployment) == []

    deployment.start_supernode("ward-a", {}, keys / "ward-a")
    deployment.wait(lambda: f"SuperNode ID: {node}" in deployment.log("ward-a"), "ward-a to get in", needs="ward-a")
    assert online(deployment) == [node]
    assert all(name in " ".join(deployment.leftovers()) for name in ("superlink", "plaintext", "ward-a"))


@pytest.mark.sites
def test_a_killed_superlink_comes_back_with_its_sites(deployment: Loopback) -> None:
    keys = deployment.folder / "keys"
    node = deployment.register("ward-a", make_node_key(keys / "ward-a"))
    pids = deployment.processes("superlink")
    assert len(pids) == 2  # flower-superlink, and its flower-superexec in a session of its own
    assert len({os.getsid(pid) for pid in pids}) == 2
    deployment.kill("superlink")
    assert not any(map(alive, pids))
    assert deployment.processes("superlink") == []
    deployment.start_superlink()
    with pytest.raises(UserError, match="runs already"):
        deployment.start_superlink()
    deployment.start_supernode("ward-a", {}, keys / "ward-a")
    said = f"SuperNode ID: {node}"
    deployment.wait(lambda: said in deployment.log("ward-a"), "ward-a to get in", needs="ward-a")

    deployment.terminate("ward-a")
    assert deployment.processes("ward-a") == []
    assert "SuperNode terminated gracefully" in deployment.log("ward-a")
    deployment.start_supernode("ward-a", {}, keys / "ward-a")
    deployment.wait(lambda: deployment.log("ward-a").count(said) == 2, "ward-a to return", needs="ward-a")


@pytest.mark.sites
def test_what_a_program_that_died_alone_has_left_is_ended_before_it_starts_anew(deployment: Loopback) -> None:
    parent, child = deployment.processes("superlink")
    os.kill(child, signal.SIGSTOP)  # else it ends by itself soon after its parent
    os.kill(parent, signal.SIGKILL)
    deployment.wait(lambda: deployment.processes("superlink") == [child], "the parent to be gone")
    deployment.start_superlink()
    assert not alive(child)


@pytest.mark.sites
def test_apps_are_killed_alone_and_end_with_the_rest(deployment: Loopback) -> None:
    keys = deployment.folder / "keys"
    deployment.register("ward-a", make_node_key(keys / "ward-a"))
    deployment.start_supernode("ward-a", {"site": "/srv/ward a/site.toml", "number": 41}, keys / "ward-a")
    deployment.wait(lambda: online(deployment) != [], "ward-a to get in", needs="ward-a")
    assert deployment.kill_app("ward-a") is False
    idle = set(deployment.processes("ward-a"))

    app = deployment.folder / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "waiting.py").write_text(APP)
    started = deployment.flwr("run", ".", "loopback", cwd=app)
    assert started.returncode == 0, started.stdout + started.stderr
    said = "site: /srv/ward a/site.toml number: 42"
    deployment.wait(lambda: said in deployment.log("ward-a"), "the ClientApp to start", needs="ward-a")

    client = set(deployment.processes("ward-a")) - idle
    assert client
    assert deployment.kill_app("ward-a") is True
    deployment.wait(lambda: not any(map(alive, client)), "the ClientApp to be gone", seconds=5)
    assert idle <= set(deployment.processes("ward-a"))

    assert len(deployment.processes("superlink")) == 3
    assert deployment.kill_app("superlink") is True
    deployment.wait(lambda: len(deployment.processes("superlink")) == 2, "the ServerApp to be gone", seconds=5)


@pytest.mark.sites
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_when_the_program_is_interrupted(tmp_path: Path, how: signal.Signals) -> None:
    script = f"""
import sys, time
from pathlib import Path
from fedalign.federation.flower.loopback import Loopback
with Loopback(Path({str(tmp_path)!r}), tls=False, authenticate=False) as deployment:
    deployment.start_superlink()
    deployment.start_supernode("ward-a", {{}}, None)
    deployment.wait(lambda: "SuperNode ID" in deployment.log("ward-a"), "ward-a to get in", needs="ward-a")
    print(*deployment.processes("superlink"), *deployment.processes("ward-a"), flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) >= 3
        assert all(map(alive, pids))
        process.send_signal(how)
        process.wait(timeout=40)
    assert process.returncode == (128 + how if how is signal.SIGTERM else -how)
    deadline = time.monotonic() + 1
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


@pytest.mark.sites
def test_nothing_stays_when_the_body_raises_and_a_program_ignores_sigterm(tmp_path: Path) -> None:
    deployment = Loopback(tmp_path)

    def body() -> None:
        with deployment:
            deployment.start_superlink()
            os.kill(deployment.processes("superlink")[0], signal.SIGSTOP)  # a stopped process handles no SIGTERM
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert deployment.leftovers() == []
    shutil.rmtree(tmp_path)  # no process writes there any more


@pytest.mark.sites
def test_a_superlink_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with Loopback(tmp_path) as deployment:
        assert deployment.certificates
        deployment.certificates.key.write_text("no key")
        with pytest.raises(UserError, match=r"(?s)ended while waiting.*ends with:\n."):
            deployment.start_superlink()
