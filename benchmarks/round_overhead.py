"""What a round costs beside training: a deployment on loopback, cold and warm, against the in-process engine.

Three sites hold a handful of short examples and a tiny model, so that training takes next to nothing, and what is left
of a round is overhead: the messages to each site. What it is made of is measured beside it: a bare Flower round trip to
an empty ClientApp (wait for the SuperNode's next look, which comes every 3 s, and the start of a process), the imports
that our ClientApp adds for an update and for training, and loading the model. A warm site is one under `fedalign site
serve`; a round of warm sites should take no longer than two bare messages and 3 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import tomli_w

from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.flower.launch import APP
from fedalign.federation.flower.loopback import Loopback
from keeping import keep, keepable
from watching import machine

SITES = ("a", "b", "c")
EMPTY_SERVER = """
    import json, time
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.serverapp import ServerApp
    app = ServerApp()

    @app.main()
    def main(grid, context):
        while len(list(grid.get_node_ids())) < context.run_config["sites"]:
            time.sleep(0.2)
        seconds = []
        for _ in range(context.run_config["times"]):
            started = time.perf_counter()
            messages = [Message(RecordDict({"x": ConfigRecord({})}), n, "train") for n in grid.get_node_ids()]
            waiting = set(grid.push_messages(messages))
            while waiting:
                waiting -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(list(waiting))}
                time.sleep(0.1)
            seconds.append(time.perf_counter() - started)
        with open(context.run_config["out"], "w") as file:
            json.dump(seconds, file)
"""
EMPTY_CLIENT = """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    app = ClientApp()

    @app.train()
    def train(message, context):
        return Message(RecordDict({"x": ConfigRecord({})}), reply_to=message)
"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    keepable(parser)
    args = parser.parse_args()
    print(machine("torch", "transformers", "flwr"))
    print(f"{len(SITES)} sites, {args.rounds} rounds, TLS and node keys, all on this machine\n")
    with tempfile.TemporaryDirectory(prefix="fedalign-overhead-") as name:
        folder = Path(name)
        config = prepare(folder, args.rounds)
        rows = [("round, in process", run(config, folder / "in-process", "federation.engine=in_process"))]
        with Loopback(folder / "flower") as loopback:
            loopback.start_superlink()
            for site in SITES:
                loopback.register(site, make_node_key(folder / site / "key"))
            rows += deployed(loopback, folder, config, args.rounds)
    rows += pieces(folder)
    for what, seconds in rows:
        print(f"{what:<58} {seconds:7.2f} s")
    keep(args, __file__, {"seed": 0, "seconds": dict(rows)}, "torch", "transformers", "flwr")


def prepare(folder: Path, rounds: int) -> Path:
    """Data of three sites, and a configuration that both engines take."""
    for site in SITES:
        (folder / site).mkdir()
        rows = [{"text": f"{site} writes number {i}", "label": "odd" if i % 2 else "even"} for i in range(8)]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        limits = {"threads": 1, "seed": 0, "min_train": 1, "min_held_out": 1}
        settings = {"name": site, "data": {"train": str(folder / "data" / f"{site}.jsonl")}, "limits": limits}
        (folder / site / "site.toml").write_text(tomli_w.dumps(settings))
    config = {
        "run": {"rounds": rounds, "threads": 1},
        "data": {"kind": "classification", "train": str(folder / "data"), "labels": ["even", "odd"]},
        "clients": {"partition": "files", "min_examples": 1},
        "tracking": {"loggers": []},
        "federation": {"engine": "flower", "min_sites": len(SITES)},
    }
    (folder / "federation.toml").write_text(tomli_w.dumps(config))
    return folder / "federation.toml"


def run(config: Path, out: Path, *overrides: str) -> float:
    """Median seconds of a round."""
    settings = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "fedalign", "run", str(config), "--out", str(out), *settings]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(line["round_seconds"] for line in lines if "round_seconds" in line)
    return float(seconds[len(seconds) // 2])


def deployed(loopback: Loopback, folder: Path, config: Path, rounds: int) -> list[tuple[str, float]]:
    """Rounds of a deployment, cold and warm, and a bare round trip."""
    assert loopback.certificates is not None
    reach = (f"federation.superlink={loopback.address}", f"federation.root_certificates={loopback.certificates.ca}")
    link = {"superlink": loopback.address, "root_certificates": str(loopback.certificates.ca)}
    for site in SITES:
        with (folder / site / "site.toml").open("a") as file:
            file.write(tomli_w.dumps({"coordinator": link}))
        loopback.start_supernode(site, {"site": str(folder / site / "site.toml")}, key=folder / site / "key")
    rows = [("bare Flower: one message to each site and back, no app", bare(loopback, folder, rounds))]
    rows.append(("round, deployment, cold sites", run(config, folder / "cold", *reach)))
    for site in SITES:
        loopback.terminate(site)
    with contextlib.ExitStack() as ending:
        for site in SITES:
            ending.enter_context(served(folder / site))
        loopback.wait(lambda: all(connected(folder / site) for site in SITES), "the sites to be ready")
        rows.append(("round, deployment, warm sites", run(config, folder / "warm", *reach)))
    return rows


@contextlib.contextmanager
def served(site: Path) -> Iterator[None]:
    """A site on duty."""
    with (site / "served.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedalign", "site", "serve", str(site)], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def connected(site: Path) -> bool:
    """Whether its trainer is ready and its SuperNode is known to the SuperLink."""
    return (site / "trainer.json").exists() and "SuperNode ID" in (site / "served.log").read_text()


def bare(loopback: Loopback, folder: Path, times: int) -> float:
    """Median seconds of a message to all sites at once and back, with apps that do nothing."""
    app = folder / "empty-app"
    (app / "empty").mkdir(parents=True)
    (app / "empty" / "__init__.py").touch()
    (app / "empty" / "server.py").write_text(textwrap.dedent(EMPTY_SERVER))
    (app / "empty" / "client.py").write_text(textwrap.dedent(EMPTY_CLIENT))
    about = APP.read_text().replace("fedalign.federation.flower.server_app", "empty.server")
    about = about.replace("fedalign.federation.flower.client_app", "empty.client")
    about += f"sites = {len(SITES)}\ntimes = {times}\n"
    (app / "pyproject.toml").write_text(about)
    out = folder / "bare.json"
    done = loopback.flwr("run", str(app), "loopback", "--run-config", f'out="{out}"')
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 60 * times
    while not (out.exists() and out.read_text()):
        assert time.monotonic() < deadline, loopback.log("superlink")
        time.sleep(0.5)
    seconds = sorted(json.loads(out.read_text()))
    return float(seconds[len(seconds) // 2])


def pieces(folder: Path) -> list[tuple[str, float]]:
    """What our ClientApp adds in each new process, one process at a time; medians of three."""
    flower = fresh("import flwr.app, flwr.clientapp")
    update = fresh("import fedalign.federation.flower.client_app")
    train = fresh("import fedalign.federation.flower.client_app, fedalign.client.open")
    load = measured(
        "import time\nfrom fedalign.config.run import Config\nfrom fedalign.client.workbench import Workbench\n"
        "started = time.perf_counter()\nWorkbench.load(Config())\nprint(time.perf_counter() - started)"
    )
    return [
        ("a process: Python and Flower's imports", flower),
        ("and ours for an update (torch, no transformers)", update - flower),
        ("and ours for training and evaluating (transformers)", train - update),
        ("and loading the demo's 2.0M-parameter model", load),
    ]


def fresh(code: str) -> float:
    """Seconds of a new process that runs `code`."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[1]


def measured(code: str) -> float:
    """Seconds that a new process measured and printed."""
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        seconds.append(float(done.stdout.split()[-1]))
    return sorted(seconds)[1]


if __name__ == "__main__":
    main()
