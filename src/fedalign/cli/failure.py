"""The last resort: whatever else is raised becomes a line that says where its full report lies."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import tempfile
import traceback
from datetime import datetime
from importlib import metadata
from pathlib import Path

from fedalign import __version__
from fedalign.files import cache_folder, write_private

LIBRARIES = ("torch", "transformers", "peft", "datasets", "tokenizers", "flwr", "numpy")
SHORTEST = 8  # characters of a secret: what is shorter may stand anywhere
SECRET = re.compile("key|token|secret|password|passwd|credential", re.IGNORECASE)
GIVEN = re.compile(r"(?i)([\w.-]*(?:api_?key|token|secret|password|passwd)[\w.-]*\s*[=:]\s*)\S+")
ELSEWHERE = re.compile(r"(?<=://)[^/\s@]+(?=@)|\bhf_\w{8,}")


def written(error: BaseException) -> Path:
    """Where the report of an error was written; only its owner can read it, for it may quote data."""
    name = f"{datetime.now():%Y-%m-%d-%H%M%S}-{os.getpid()}.txt"
    content = report(error).encode("utf-8", "backslashreplace")
    path = cache_folder() / "failures" / name
    try:
        write_private(path, content)
    except OSError:
        path = Path(tempfile.mkdtemp(prefix="fedalign-")) / name
        write_private(path, content)
    return path


def report(error: BaseException) -> str:
    """Traceback, versions and command line, without what looks like a secret."""
    versions = [f"fedalign {__version__}", f"Python {platform.python_version()}", platform.platform()]
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    command = shlex.join(["fedalign", *sys.argv[1:]])
    return without_secrets("\n".join([command, "", *versions, "", *traceback.format_exception(error)]))


def without_secrets(text: str) -> str:
    """Values of environment variables and options that are called so, hub tokens, and users in addresses as ***."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= SHORTEST:
            text = text.replace(value, "***")
    return ELSEWHERE.sub("***", GIVEN.sub(r"\1***", text))
