"""`make demo-sites`, as a fresh clone runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedalign.federation.flower.three_sites import KIND, WRITTEN
from tests.foreign import check_foreign_files_are_kept
from tests.sites.conftest import PATIENCE, living

pytestmark = pytest.mark.sites

SITES = ("hospital-a", "hospital-b", "lab-c")


def test_the_demo_reports_bytes_and_accuracy_and_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "fedalign.federation.flower.three_sites", "--out", str(out), "--rounds", "1"],
        env={**os.environ, "HOME_OF_THE_TEST": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "TLS with a certificate of its own, node keys required" in done.stdout
    assert "Everything that was started has ended: yes" in done.stdout
    assert living(f"HOME_OF_THE_TEST={tmp_path}") == []
    assert "plaintext" not in done.stdout + done.stderr
    first, last = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert first["failures"] == last["failures"] == []
    for site in SITES:
        before, after = (f"{100 * line['client_accuracies'][site]:.1f} %" for line in (first, last))
        up, down = (f"{last[f'bytes_{way}_by_client'][site] / 1e6:.1f} MB" for way in ("up", "down"))
        assert re.search(rf"^{site} +{re.escape(f'{before} -> {after}')} +{up} +{down}$", done.stdout, re.MULTILINE)
        assert float(up.split()[0]) > 0.5
        assert (out / "sites" / site / "key").stat().st_mode & 0o077 == 0
    check_foreign_files_are_kept(out, KIND, WRITTEN)
