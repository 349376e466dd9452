"""FedAvg on the demo's model and data in ours, in Flower and in NVFLARE: seconds, CPU, memory, bytes, final loss.

Ten clients, five rounds, one thread a process. Ours runs `fedalign run demo` with FedAvg, in process and on Flower's
simulation. The peers run an ordinary loop (`peers_client.py`) on the same rows of tokens. The bare loop is that without
any framework, in one process. Models differ by the shuffle of rows alone: where final losses differ by more than
`--tolerance`, the comparison is void and the exit code 1.

Seconds of a round are from the first client's first step to the last client's last, over rounds; starting up is not in
them. CPU seconds are of all processes, starting up included. Memory is the largest sum of PSS at one moment. Bytes are
of the weights that travel, or would between machines.

It needs Linux, and an environment of its own with the package's extras `flower` and `simulation`, and NVFLARE:

    python -m venv peers
    peers/bin/pip install --constraint constraints.txt torch '.[flower,simulation]' nvflare
    peers/bin/python benchmarks/peers.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import peers_client
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.deal import split_among_clients
from fedalign.data.formats import load_examples
from fedalign.data.partition import hold_out
from fedalign.demo import model_folder
from fedalign.maths.hashing import derive_seed
from keeping import keep, keepable
from watching import machine

MARK = "FEDALIGN_PEERS_RUN"  # in the environment of all that a row starts, wherever it ends up


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    seconds: float  # a round
    cpu: float  # seconds of the whole run
    peak: int  # bytes, sum of PSS
    up: float  # bytes a round
    down: float
    loss: float


class Usage:
    """CPU seconds and the largest sum of PSS of all processes that carry a mark in their environment."""

    def __init__(self, mark: str, pause: float = 0.5) -> None:
        self.mark, self.pause = mark, pause
        self.peak = 0
        self._cpu: dict[tuple[int, float], float] = {}
        self._ours: dict[tuple[int, float], bool] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Usage:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._done.set()
        self._thread.join()

    @property
    def cpu(self) -> float:
        """Seconds, of processes that have ended too."""
        return sum(self._cpu.values())

    def _watch(self) -> None:
        while not self._done.wait(self.pause):
            self._look()

    def _look(self) -> None:
        together = 0
        for process in psutil.process_iter():
            try:
                key = (process.pid, process.create_time())
                if key not in self._ours:
                    self._ours[key] = process.environ().get(MARK) == self.mark
                if not self._ours[key]:
                    continue
                times = process.cpu_times()
                self._cpu[key] = times.user + times.system
                together += process.memory_full_info().pss
            except (psutil.Error, OSError):  # it has just ended, or is not ours to look at
                continue
        self.peak = max(self.peak, together)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=3000)
    parser.add_argument("--tolerance", type=float, default=0.1, help="difference of final losses, nats")
    parser.add_argument("--only", nargs="+", choices=sorted(ROWS), default=list(ROWS), help="rows of the table")
    keepable(parser)
    parser.add_argument("--role", choices=sorted(ROLES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        ROLES[args.role]()
        return
    disable_progress_bar()
    packages = ("torch", "transformers", *(p for p in ("flwr", "ray", "nvflare") if find_spec(p)))
    print(machine(*packages))
    print(f"{args.clients} clients, {args.rounds} rounds, {args.examples} examples, seed 0, one thread a process\n")
    out = Path(tempfile.mkdtemp(prefix="fedalign-peers-"))
    config = demo(args)
    prepare(config, args, out)
    print("| | s a round | CPU s | peak MB (sum of PSS) | MB up / down a round | final loss |")
    print("|:--|--:|--:|--:|--:|--:|", flush=True)
    rows = []
    for name in args.only:
        row = measured(name, config, args, out)
        rows.append(row)
        print(
            f"| {row.name} | {row.seconds:.1f} | {row.cpu:.0f} | {row.peak / 1e6:,.0f} | "
            f"{row.up / 1e6:.0f} / {row.down / 1e6:.0f} | {row.loss:.3f} |",
            flush=True,
        )
        keep(args, __file__, {"only": [name], "seed": 0, **asdict(row)}, *packages)
    shutil.rmtree(out)
    spread = max(row.loss for row in rows) - min(row.loss for row in rows)
    if spread > args.tolerance:
        print(f"\nvoid: final losses differ by {spread:.3f} nats, {args.tolerance} are allowed")
        sys.exit(1)


def demo(args: argparse.Namespace) -> Config:
    """The demo's configuration with FedAvg, clients not scored."""
    return load_config(
        "demo",
        {
            "run.rounds": args.rounds,
            "run.threads": 1,
            "data.max_train": args.examples,
            "clients.count": args.clients,
            "algorithm.name": "fedavg",
            "evaluation.clients": False,
            "evaluation.every": args.rounds,
            "tracking.loggers": [],
        },
    )


def prepare(config: Config, args: argparse.Namespace, out: Path) -> None:
    """Write the model, the settings and the rows of tokens that the peers train on: those that ours trains on."""
    shutil.copytree(model_folder(), out / "model")
    examples, parts = split_among_clients(config)
    encoder = Workbench.load(config).encoder
    seed = derive_seed(config.run.seed, "held out")
    for number, (name, indices) in enumerate(parts.items()):
        kept, _ = hold_out(indices, config.clients.held_out, seed, name)
        encoded = encoder.encode([examples[i] for i in kept])
        write(out / f"client-{number}.json", [[list(one.input_ids), list(one.labels)] for one in encoded])
    test = encoder.encode(load_examples(str(config.data.test or config.data.train), config.data, "test", 0))
    write(out / "test.json", [[list(one.input_ids), list(one.labels)] for one in test])
    training = config.training
    shared = {
        "clients": args.clients,
        "rounds": args.rounds,
        "learning_rate": training.learning_rate,
        "batch_examples": training.batch_examples,
        "max_grad_norm": training.max_grad_norm,
    }
    write(out / "settings.json", shared)


def write(file: Path, value: object) -> None:
    """Write JSON."""
    file.write_text(json.dumps(value))


def measured(name: str, config: Config, args: argparse.Namespace, out: Path) -> Row:
    """Run one row in processes of its own."""
    mark = hashlib.sha256(f"{name}/{time.time_ns()}".encode()).hexdigest()
    kind, workers = ROWS[name]
    environment = os.environ | {
        MARK: mark,
        peers_client.FOLDER: str(out),
        "WORKERS": str(workers),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }
    (out / "times.jsonl").unlink(missing_ok=True)
    run = out / "run"
    shutil.rmtree(run, ignore_errors=True)
    if kind == "ours":
        embedded = name.startswith("in process")
        settings = {
            "federation.engine": "in_process" if embedded else "simulation",
            "federation.min_sites": args.clients,
            "run.workers" if embedded else "federation.workers": workers,
        }
        command = [sys.executable, "-m", "fedalign", "run", str(out / "ours.toml"), "--out", str(run)]
        (out / "ours.toml").write_text(config.to_toml())
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    else:
        command = [sys.executable, __file__, "--role", kind]
    log = out / "log"
    with log.open("w") as file, Usage(mark) as usage:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=out, check=False)
    if done.returncode:
        sys.exit(f"{name}: exit {done.returncode}\n{log.read_text()[-4000:]}")
    if kind == "ours":
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rounds = [line for line in lines if "round_seconds" in line]
        seconds = sum(line["round_seconds"] for line in rounds) / len(rounds)
        up, down = (sum(line[key] for line in rounds) / len(rounds) for key in ("bytes_up", "bytes_down"))
        loss = loss_at(out, run / "model")
    else:
        times = [json.loads(line) for line in (out / "times.jsonl").read_text().splitlines()]
        seconds = (max(t["ended"] for t in times) - min(t["begun"] for t in times)) / args.rounds
        result = json.loads((out / "result.json").read_text())
        up = down = float(result["bytes"])
        loss = result["loss"]
    return Row(name, seconds, usage.cpu, usage.peak, up, down, loss)


def loss_at(out: Path, model: Path) -> float:
    """The final loss of a saved model, by the peers' own arithmetic."""
    os.environ[peers_client.FOLDER] = str(out)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    return peers_client.loss_of(loaded)


# -------------------------------------------------------------------------------------------------------------- peers


def bare() -> None:
    """The ordinary loop without any framework."""
    torch.set_num_threads(1)
    shared, model = peers_client.settings(), peers_client.Demo()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for round in range(shared["rounds"]):
        total, count = {name: torch.zeros_like(value) for name, value in state.items()}, 0
        for number in range(shared["clients"]):
            model.load_state_dict(state)
            rows = peers_client.train(model, f"client-{number}", round)
            for name, value in model.state_dict().items():
                total[name] += rows * value
            count += rows
        state = {name: value / count for name, value in total.items()}
    finish(model, state, 0)


def finish(model: torch.nn.Module, state: Any, nbytes: float) -> None:
    """Write down how good the final weights are, and how many bytes went each way in a round."""
    model.load_state_dict(state)
    result = {"loss": peers_client.loss_of(model), "bytes": nbytes}
    write(peers_client.folder() / "result.json", result)


def flower() -> None:
    """Flower's own FedAvg on its simulation engine."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # noqa: PLC0415 - of Flower's rows alone
    from flwr.clientapp import ClientApp  # noqa: PLC0415 - of Flower's rows alone
    from flwr.serverapp import Grid, ServerApp  # noqa: PLC0415 - of Flower's rows alone
    from flwr.serverapp.strategy import FedAvg  # noqa: PLC0415 - of Flower's rows alone
    from flwr.simulation import run_simulation  # noqa: PLC0415 - of Flower's rows alone

    shared = peers_client.settings()
    server, client = ServerApp(), ClientApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        model = peers_client.Demo()
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=shared["clients"],
            min_evaluate_nodes=0,
            min_available_nodes=shared["clients"],
        )
        result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=shared["rounds"])
        state = result.arrays.to_torch_state_dict()
        sent = sum(value.nbytes for value in state.values())
        finish(model, state, sent * shared["clients"])

    @client.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        model = peers_client.Demo()
        model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        name = f"client-{context.node_config['partition-id']}"
        rows = peers_client.train(model, name, int(str(message.content.config_records["config"]["server-round"])) - 1)
        metrics = MetricRecord({"num-examples": rows})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    cores = {"num_cpus": 1, "num_gpus": 0.0}
    backend: Any = {"init_args": {"num_cpus": int(os.environ["WORKERS"])}, "client_resources": cores}
    run_simulation(server, client, shared["clients"], backend_config=backend)


def nvflare() -> None:
    """NVFLARE's simulator with its FedAvg recipe."""
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe  # noqa: PLC0415 - of another environment
    from nvflare.recipe import SimEnv  # noqa: PLC0415 - of Flower's rows alone

    shared, workspace = peers_client.settings(), peers_client.folder() / "nvflare"
    shutil.rmtree(workspace, ignore_errors=True)
    recipe = FedAvgRecipe(
        name="peers",
        model={"class_path": "peers_client.Demo", "args": {}},
        min_clients=shared["clients"],
        num_rounds=shared["rounds"],
        train_script=peers_client.__file__,
    )
    threads = min(shared["clients"], int(os.environ["WORKERS"]))
    environment = SimEnv(num_clients=shared["clients"], num_threads=threads, workspace_root=str(workspace))
    recipe.execute(environment)
    saved = max(workspace.rglob("FL_global_model.pt"), key=lambda path: path.stat().st_mtime)
    state = torch.load(saved, weights_only=False)["model"]
    state = {name: torch.as_tensor(value) for name, value in state.items()}
    finish(peers_client.Demo(), state, sum(value.nbytes for value in state.values()) * shared["clients"])


ROLES = {"bare": bare, "flower": flower, "nvflare": nvflare}
ROWS = {  # name -> who runs it, and in how many processes at once
    "in process": ("ours", 1),
    "in process, 2 workers": ("ours", 2),
    "simulation, 1 worker": ("ours", 1),
    "simulation, 2 workers": ("ours", 2),
    "Flower's FedAvg, 1 actor": ("flower", 1),
    "Flower's FedAvg, 2 actors": ("flower", 2),
    "NVFLARE's simulator, 10 processes": ("nvflare", 10),
    "bare loop": ("bare", 1),
}

if __name__ == "__main__":
    main()
