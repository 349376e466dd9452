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
from multiprocessing import ProcessError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from fedalign.config.site import FILE, SiteFolder
from fedalign.federation.messages import MessageError, Parcel, from_wire, to_wire
from fedalign.federation.service import Service
from fedalign.files import for_its_owner, write_private

log = logging.getLogger("fedalign")


def ask(folder: SiteFolder, config: str, run: str, verb: str, parcel: Parcel, *, scores: bool = True) -> Parcel | None:
    """The warm trainer's answer, or None where there is none; arguments as of `Service.answer`."""
    file = meeting_file(folder)
    if not file.exists():
        return None
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        asked = {"config": config, "run": run, "verb": verb, "scores": scores}
        with Client(about["address"], authkey=bytes.fromhex(about["secret"])) as connection:
            connection.send_bytes(json.dumps(asked).encode())
            send(connection, parcel)
            return receive(connection)
    except (OSError, EOFError, ValueError, KeyError, TypeError, ProcessError, MessageError) as error:
        log.warning("no warm trainer (%s): loading the model for this message", type(error).__name__)
        return None


def serve(folder: SiteFolder, open_service: Callable[[str, str], Service], ready: Callable[[], None]) -> None:
    """Answer one connection after another until interrupted.

    Args:
        folder: the site.
        open_service: makes the service of a configuration (as TOML) and a run's key; one is kept at a time, until
            another is asked for, or site.toml says anything else.
        ready: called when the socket is open.
    """
    secret = secrets.token_bytes(32)
    file = meeting_file(folder)
    current: tuple[tuple[str, str, bytes], Service] | None = None
    with Listener(authkey=secret) as listener:
        where = json.dumps({"address": listener.address, "secret": secret.hex(), "pid": os.getpid()})
        try:
            write_private(file, where.encode())
            ready()
            while True:
                try:
                    with listener.accept() as connection:
                        about = json.loads(connection.recv_bytes())
                        config, run = str(about["config"]), str(about["run"])
                        key = (config, run, (folder.path / FILE).read_bytes())  # consent and limits may have changed
                        if current is None or current[0] != key:
                            if current is not None:
                                current[1].close()  # the old model goes before the new one comes
                                current = None
                            current = (key, open_service(config, run))
                        with for_its_owner():
                            answer = current[1].answer(
                                str(about["verb"]), receive(connection), scores=about["scores"] is True
                            )
                        send(connection, answer)
                except Exception as error:  # whoever it was went away or does not know the secret: on to the next
                    log.warning("a message came to nothing: %s", type(error).__name__)
        finally:
            with contextlib.suppress(FileNotFoundError):
                if file.read_text(encoding="utf-8") == where:  # and not that of another trainer
                    file.unlink()


def meeting_file(folder: SiteFolder) -> Path:
    """Where a site's warm trainer says how to reach it."""
    return folder.path / "trainer.json"


def send(connection: Connection, parcel: Parcel) -> None:
    """Write a parcel to a connection, piece by piece."""
    text, arrays = to_wire(parcel)
    index = {name: [dtype, [piece.nbytes for piece in pieces]] for name, (dtype, pieces) in arrays.items()}
    connection.send_bytes(json.dumps({"head": text.decode(), "arrays": index}).encode())
    for _, pieces in arrays.values():
        for piece in filter(len, pieces):
            connection.send_bytes(piece)


def receive(connection: Connection) -> Parcel:
    """The inverse of `send`."""
    about = json.loads(connection.recv_bytes())
    arrays = {}
    for name, (dtype, sizes) in about["arrays"].items():
        start, data = 0, bytearray(sum(sizes))
        for _ in filter(None, sizes):
            start += connection.recv_bytes_into(data, start)
        arrays[name] = (dtype, data)
    return from_wire(about["head"], arrays)
