"""Lines of JSON that a benchmark keeps when it is asked to: what was found, with which options, and on what machine."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from watching import machine

RESULTS = Path(__file__).parent / "results"
OWN = ("keep", "row", "role", "coordinate")  # options that say nothing about what was measured


def keepable(parser: argparse.ArgumentParser) -> None:
    """Add the option `--keep`."""
    parser.add_argument(
        "--keep",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="DIR",
        help="add what was found to a file of JSON lines, called as this script, in DIR; by default benchmarks/results",
    )


def keep(args: argparse.Namespace, script: str, found: Mapping[str, Any], *packages: str) -> None:
    """Add a line, where that was asked for.

    Args:
        args: all options of the script, its seed among them if it takes one.
        script: its `__file__`.
        found: the values; of a name that is an option's, too, this one counts.
        packages: whose versions it depends on.
    """
    if args.keep is None:
        return
    options = {name: value for name, value in vars(args).items() if name not in OWN}
    about = {
        "load": round(os.getloadavg()[0], 1),  # of the minute before
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(*packages),
    }
    args.keep.mkdir(parents=True, exist_ok=True)
    with (args.keep / f"{Path(script).stem}.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({**options, **found, **about}, default=str) + "\n")
