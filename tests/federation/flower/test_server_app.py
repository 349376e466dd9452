"""The coordinator's process gives memory back."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FREED = """
from pathlib import Path
from fedalign.federation.flower.server_app import return_what_is_freed

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

return_what_is_freed()
once = b"x" * (31 << 20)  # freed, it tells glibc to keep blocks of that size
del once
before, small, large = anonymous(), [], []
for _ in range(20):
    large.append(b"x" * (5 << 20))
    small.append(b"x" * 100_000)
del large
print(anonymous() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps what is freed")
def test_what_is_freed_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10_000  # kB, where all was 100,000
