"""`make demo-sites`: a whole deployment on this machine, from stock Flower programs, ended when it is done.

Certificates, one SuperLink with TLS and node authentication, three SuperNodes with keys of their own, `fedalign run` as
a coordinator would call it, and what each site sent.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import tomli_w

from fedalign.config.run import ClientsConfig, DataConfig
from fedalign.data.formats import load_examples
from fedalign.data.partition import partition
from fedalign.demo import DEMO
from fedalign.errors import UserError
from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.flower.loopback import Loopback
from fedalign.files import LOCK, check_free, take
from fedalign.server.results import OF_A_CLIENT, OF_FLOWER
from fedalign.server.results import WRITTEN as OF_RUN
from fedalign.units import percent, size

SITES = ("hospital-a", "hospital-b", "lab-c")
CONFIG = DEMO.with_name("sites.toml")
EXAMPLES = 1200
KIND = "demo of sites"
WRITTEN = {
    KIND: (
        *("federation.toml", "run/", "flower/state.db", "flower/state.db-wal", "flower/state.db-shm"),
        *(f"flower/{name}.log" for name in ("superlink", *SITES)),
        *(f"flower/certificates/{name}" for name in ("ca.crt", "server.crt", "server.key")),
        *(f"flower/flwr/{name}" for name in OF_FLOWER),
        *(
            f"sites/{site}/{name}"
            for site in SITES
            for name in (
                *("key", "key.pub", "site.toml", "data.jsonl", "parts.json", "log.jsonl", f".log.jsonl{LOCK}"),
                *("readings.json", f".readings{LOCK}"),
                *("trainer.json", "runs/*/withdrawn", *(f"runs/*/{kept}" for kept in OF_A_CLIENT)),
            )
        ),
    ),
    **OF_RUN,
}


def main() -> None:
    """Entry point of `python -m fedalign.federation.flower.three_sites`."""
    parser = argparse.ArgumentParser(prog="python -m fedalign.federation.flower.three_sites", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-sites"), help="replaced if it is there")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    try:
        sys.exit(demo(options.out.absolute(), options.rounds))
    except UserError as error:
        sys.exit(f"Error: {error}")


def demo(out: Path, rounds: int) -> int:
    """Set up, run, end; the exit status of `fedalign run`."""
    check_free(out, KIND, overwrite=True, written=WRITTEN)
    take(out, KIND, WRITTEN)
    classes = deal_data(out / "sites")
    with Loopback(out / "flower") as loopback:
        assert loopback.certificates is not None
        say(f"SuperLink on {loopback.address}, TLS with a certificate of its own, node keys required")
        loopback.start_superlink()
        for site in SITES:
            folder = out / "sites" / site
            loopback.register(site, make_node_key(folder / "key"))
            loopback.start_supernode(site, {"site": str(folder / "site.toml")}, key=folder / "key")
            say(f"SuperNode of {site}, registered by its key")
        config = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
        config["run"]["rounds"] = rounds
        config["data"]["labels"] = classes
        config["federation"] |= {"superlink": loopback.address, "root_certificates": str(loopback.certificates.ca)}
        (out / "federation.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        command = ["run", str(out / "federation.toml"), "--out", str(out / "run")]
        say(f"fedalign {' '.join(command)}\n")
        status = subprocess.run(
            [sys.executable, "-m", "fedalign", *command], env=loopback.environment, check=False
        ).returncode
    if status == 0:
        report(out / "run")
    left = loopback.leftovers()
    say(f"\nEverything that was started has ended: {'yes' if not left else 'NO: ' + '; '.join(left)}")
    return status or bool(left)


def deal_data(folder: Path) -> list[str]:
    """Give each site its part of the embedded docstrings as a file; the names of all classes."""
    data = DataConfig(train="docstrings", max_train=EXAMPLES)
    examples = load_examples(data.train, data, "train", seed=0)
    parts = partition(examples, ClientsConfig(count=len(SITES), alpha=0.5), seed=0)
    for site, indices in zip(SITES, parts.values(), strict=True):
        (folder / site).mkdir(parents=True)
        rows = [{"text": examples[i].prompt.removesuffix("\nLabel:"), "label": examples[i].label} for i in indices]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / site / "data.jsonl").write_text(lines, encoding="utf-8")
        limits = {"threads": 1, "held_out": 0.2, "seed": 0}
        settings: dict[str, object] = {"name": site, "data": {"train": "data.jsonl"}, "limits": limits}
        settings["consent"] = {"token_counts": True, "embeddings": True}  # the texts of this demo are public
        (folder / site / "site.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
        most = ", ".join(f"{label} {count}" for label, count in Counter(r["label"] for r in rows).most_common(3))
        say(f"{site}: {len(rows)} examples ({most}, ...)")
    return sorted({example.label for example in examples})


def report(run: Path) -> None:
    """Bytes that each site sent and got, and how well the model does there."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    say(f"\n{'site':<12}{'accuracy':>22}{'sent up':>12}{'sent down':>12}   (rounds 1 to {len(lines) - 1})")
    for site in SITES:
        first, last = (percent(line["client_accuracies"][site]) for line in (lines[0], lines[-1]))
        up, down = (
            size(sum(line.get(f"bytes_{way}_by_client", {}).get(site, 0) for line in lines)) for way in ("up", "down")
        )
        say(f"{site:<12}{first + ' -> ' + last:>22}{up:>12}{down:>12}")


def say(text: str) -> None:
    """To the terminal, at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
