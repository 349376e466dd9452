"""A few of the kills and full disks of `tests.kills`; all of them: `make test-kills`."""

import subprocess
import sys
from pathlib import Path


def test_what_kills_and_full_disks_leave_is_made_whole_again() -> None:
    command = [sys.executable, "-m", "tests.kills", "--random", "4", "--operations", "5", "--full", "2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 attempts" in done.stdout
    assert "What they left was whole in all" in done.stdout
