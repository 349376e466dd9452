"""The `flwr-clientapp` that Flower's SuperExec finds at a served site: it hands the task to the process that is ready.

Where that process is not there, or does not take the task, this one becomes Flower's own program. Nothing is imported
but what starts in milliseconds: this file is run alone, by `python -IS`.
"""

import contextlib
import json
import os
import socket
import sys

SECONDS = 20.0  # Flower gives a ClientApp 30 to report
TAKEN = b"taken"


def main(place: str, program: str, *arguments: str) -> None:
    """Hand the arguments over at the socket `place`, or become `program`."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(SECONDS)
        connection.connect(place)
        connection.sendall(json.dumps(arguments).encode())
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(len(TAKEN)) == TAKEN:
            return
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main(*sys.argv[1:])
