"""A warm site: one process that keeps the model loaded, and answers the short-lived processes that Flower starts.

They meet on a local socket. Where it is and its secret (an HMAC challenge in both directions, see
`multiprocessing.connection`) stand in a file that only the site's user can read. Without that process, or if it dies,
each message loads the model anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import torch

from fedalign.messages import DTYPES, Parcel
from fedalign.service import Service
from fedalign.site import SiteFolder

log = logging.getLogger("fedalign")

MeetingPoint = tuple[str, bytes]  # address, secret


def ask(folder: SiteFolder, config: str, run: str, verb: str, parcel: Parcel) -> Parcel | None:
    """The warm trainer's answer, or None where there is none."""
    try:
        about = json.loads(meeting_file(folder).read_text(encoding="utf-8"))
        with Client(about["address"], authkey=bytes.fromhex(about["secret"])) as connection:
            connection.send_bytes(json.dumps({"config": config, "run": run, "verb": verb}).encode())
            send(connection, parcel)
            return receive(connection)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError) as error:
        log.warning("no warm trainer (%s): loading the model for this message", type(error).__name__)
        return None


def serve(folder: SiteFolder, open_service: Callable[[str, str], Service], ready: Callable[[], None]) -> None:
    """Answer one connection after another until interrupted.

    Args:
        folder: the site.
        open_service: makes the service of a configuration (as TOML) and a run's key; one is kept at a time.
        ready: called when the socket is open.
    """
    secret = secrets.token_bytes(32)
    file = meeting_file(folder)
    current: tuple[tuple[str, str], Service] | None = None
    with Listener(authkey=secret) as listener:
        _write_private(file, json.dumps({"address": listener.address, "secret": secret.hex(), "pid": os.getpid()}))
        ready()
        try:
            while True:
                with contextlib.suppress(OSError, EOFError, ValueError), _accept(listener) as connection:
                    about = json.loads(connection.recv_bytes())
                    key = (str(about["config"]), str(about["run"]))
                    if current is None or current[0] != key:
                        current = None  # the old model goes before the new one comes
                        current = (key, open_service(*key))
                    send(connection, current[1].answer(str(about["verb"]), receive(connection)))
        finally:
            file.unlink(missing_ok=True)


def meeting_file(folder: SiteFolder) -> Path:
    """Where a site's warm trainer says how to reach it."""
    return folder.path / "trainer.json"


def send(connection: Connection, parcel: Parcel) -> None:
    """Write a parcel to a connection, piece by piece."""
    index = {
        name: [str(pieces[0].dtype).removeprefix("torch."), [piece.nbytes for piece in pieces]]
        for name, pieces in parcel.arrays.items()
    }
    connection.send_bytes(json.dumps({"head": parcel.head, "arrays": index}).encode())
    for pieces in parcel.arrays.values():
        for piece in pieces:
            if piece.nbytes:
                connection.send_bytes(piece.contiguous().view(torch.uint8).numpy().data)


def receive(connection: Connection) -> Parcel:
    """The inverse of `send`."""
    about = json.loads(connection.recv_bytes())
    arrays = {}
    for name, (dtype, sizes) in about["arrays"].items():
        flat = torch.empty(sum(sizes) // DTYPES[dtype].itemsize, dtype=DTYPES[dtype])
        start, buffer = 0, flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")
        for size in sizes:
            if size:
                start += connection.recv_bytes_into(buffer, start)
        arrays[name] = (flat,)
    return Parcel(about["head"], arrays)


def _accept(listener: Listener) -> Connection:
    return listener.accept()


def _write_private(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as target:
        target.write(text)
    new.replace(file)
