"""A large model through a deployment on loopback: seconds, MB/s, and the peak memory of each process.

One site trains a Mixture-of-Experts model of `--megabytes` float32 parameters on a few short examples, one round with
FedAvg's plan. Then Flower's own FedAvg strategy moves arrays of the same sizes through the same SuperLink and
SuperNode: down, up, averaged. Ours sends the weights down twice in this round, which is the first and the last (to be
trained, and to be scored), and the update up once, in pieces; bytes are counted as they travel. The start of the run,
in which the site sends its weights once, is not in the round. The site's model is in a trainer of its own, as
`fedalign site serve` starts it. Without `--database` the SuperLink keeps everything in memory. With it, on a slow disk,
SQLite locks up under gigabytes in one message, as FedAvg's are: its ClientApp ends with an error.

Memory is told twice: resident, and the anonymous part of it. Pages of files are the kernel's to take back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import tomli_w
from transformers import OlmoeConfig, OlmoeForCausalLM

from fedalign.demo import model_folder
from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.flower.launch import APP
from fedalign.federation.flower.loopback import Loopback
from fedalign.federation.flower.programs import executable, free_port
from keeping import keep, keepable
from watching import PeakMemory, descendants_of_this, machine

PACKAGES = ("torch", "transformers", "flwr")
SERVER = """
    import json, time
    import numpy as np
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    app = ServerApp()

    @app.main()
    def main(grid, context):
        sizes = json.load(open(context.run_config["sizes"]))
        rng = np.random.default_rng(0)
        arrays = ArrayRecord([rng.standard_normal(size, dtype=np.float32) for size in sizes])
        while not list(grid.get_node_ids()):
            time.sleep(0.2)
        started = time.perf_counter()
        strategy = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0,
            min_train_nodes=1, min_evaluate_nodes=0, min_available_nodes=1,
        )
        strategy.start(grid, arrays, num_rounds=1)
        with open(context.run_config["out"], "w") as file:
            json.dump(time.perf_counter() - started, file)
"""
CLIENT = """
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    app = ClientApp()

    @app.train()
    def train(message, context):
        arrays = [array.numpy() + 1 for array in message.content["arrays"].values()]
        answer = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})})
        return Message(answer, reply_to=message)
"""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000, help="of trainable float32 parameters, at least")
    parser.add_argument("--piece-mb", type=float, default=256.0, help="ours: wire.piece_mb")
    parser.add_argument("--database", action="store_true", help="the SuperLink keeps its messages in SQLite")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "int8"])
    keepable(parser)
    args = parser.parse_args()
    print(machine(*PACKAGES))
    with tempfile.TemporaryDirectory(prefix="fedalign-payload-") as name:
        folder = Path(name)
        sizes = make_model(folder / "model", args.megabytes)
        (folder / "sizes.json").write_text(json.dumps(sizes))
        print(f"{sum(sizes) * 4 / 1e6:.0f} MB of float32 parameters in {len(sizes)} tensors, one site\n", flush=True)
        with Loopback(folder / "flower", database=args.database) as loopback:
            loopback.start_superlink()
            site = make_site(folder, loopback)
            loopback.register("site", make_node_key(site / "key"))
            served = subprocess.Popen(
                [sys.executable, "-m", "fedalign", "site", "serve", str(site)], stdout=subprocess.DEVNULL
            )
            try:
                keep(args, __file__, ours(loopback, folder, args.dtype, args.piece_mb), *PACKAGES)
            finally:
                served.terminate()
                served.wait()
            loopback.register("other", make_node_key(folder / "other"))
            plain = subprocess.Popen(plain_supernode(loopback, folder / "other"), env=loopback.environment)
            try:
                keep(args, __file__, theirs(loopback, folder, sum(sizes) * 4), *PACKAGES)
            finally:
                plain.terminate()
                plain.wait()


def plain_supernode(loopback: Loopback, key: Path) -> list[str]:
    """Flower's own, which knows nothing of ours."""
    assert loopback.certificates is not None
    program = executable("flower-supernode", loopback.environment)
    command = [program, "--superlink", loopback.address, "--root-certificates", str(loopback.certificates.ca)]
    return [*command, "--auth-supernode-private-key", str(key), "--port", str(free_port())]


def make_model(folder: Path, megabytes: int) -> list[int]:
    """An OLMoE of random weights with the demo's tokenizer; the sizes of its tensors."""
    shutil.copytree(model_folder(), folder)
    (folder / "model.safetensors").unlink()
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    experts, layers, hidden = 16, 4, 512
    width = (megabytes * 1_000_000 // 4 - 2 * vocabulary * hidden) // (experts * layers * hidden * 3)
    width += 64 - width % 64
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_experts=experts,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = OlmoeForCausalLM(config)
    model.save_pretrained(folder)
    return [parameter.numel() for parameter in model.parameters()]


def make_site(folder: Path, loopback: Loopback) -> Path:
    """A site with a dozen short examples."""
    assert loopback.certificates is not None
    site = folder / "site"
    site.mkdir()
    lines = [json.dumps({"text": f"number {i}", "label": "odd" if i % 2 else "even"}) for i in range(12)]
    (site / "data.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "name": "site",
        "data": {"train": "data.jsonl"},
        "model": {"path": str(folder / "model")},
        "limits": {"min_train": 1, "min_held_out": 1},
        "coordinator": {"superlink": loopback.address, "root_certificates": str(loopback.certificates.ca)},
    }
    (site / "site.toml").write_text(tomli_w.dumps(settings))
    return site


def ours(loopback: Loopback, folder: Path, dtype: str, piece_mb: float) -> dict[str, Any]:
    """One round of FedAlign-MoE's engine."""
    assert loopback.certificates is not None
    config = {
        "run": {"rounds": 1},
        "model": {"path": str(folder / "model")},
        "data": {"kind": "classification", "labels": ["even", "odd"]},
        "training": {"optimizer": "sgd", "learning_rate": 1e-3},
        "algorithm": {"name": "fedavg"},
        "wire": {"dtype": dtype, "piece_mb": piece_mb},
        "tracking": {"loggers": []},
        "federation": {
            "engine": "flower",
            "superlink": loopback.address,
            "root_certificates": str(loopback.certificates.ca),
            "min_sites": 1,
        },
    }
    (folder / "federation.toml").write_text(tomli_w.dumps(config))
    started = time.perf_counter()
    with PeakMemory(descendants_of_this) as peak:
        subprocess.run(
            [sys.executable, "-m", "fedalign", "run", str(folder / "federation.toml"), "--out", str(folder / "run")],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    seconds = time.perf_counter() - started
    _, first = (json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines())
    moved = first["bytes_up"] + first["bytes_down"]
    print(
        f"fedalign, {dtype}: round {first['round_seconds']:.0f} s, of which the site's training "
        f"{first['client_train_seconds']:.0f} s; {moved / 1e6:.0f} MB moved in the round "
        f"({moved / 1e6 / (first['round_seconds'] - first['client_train_seconds']):.0f} MB/s beside training); "
        f"whole run with hello, start and both models saved {seconds:.0f} s"
    )
    show(peak)
    return {
        "engine": "fedalign",
        "seed": 0,
        "round_seconds": first["round_seconds"],
        "train_seconds": first["client_train_seconds"],
        "whole_seconds": seconds,
        "bytes": moved,
        **peaks(peak),
    }


def theirs(loopback: Loopback, folder: Path, nbytes: int) -> dict[str, Any]:
    """One round of Flower's FedAvg on arrays of the same sizes."""
    app = folder / "fedavg-app"
    (app / "fedavg_app").mkdir(parents=True)
    (app / "fedavg_app" / "__init__.py").touch()
    (app / "fedavg_app" / "server.py").write_text(textwrap.dedent(SERVER))
    (app / "fedavg_app" / "client.py").write_text(textwrap.dedent(CLIENT))
    about = APP.read_text().replace("fedalign.federation.flower.server_app", "fedavg_app.server")
    about = about.replace("fedalign.federation.flower.client_app", "fedavg_app.client") + 'sizes = ""\n'
    (app / "pyproject.toml").write_text(about)
    out = folder / "fedavg.json"
    with PeakMemory(descendants_of_this) as peak:
        done = loopback.flwr("run", str(app), "loopback", "-c", f'out="{out}" sizes="{folder / "sizes.json"}"')
        assert done.returncode == 0, done.stdout + done.stderr
        looked = time.monotonic()
        while not (out.exists() and out.read_text()):
            time.sleep(0.5)
            if time.monotonic() < looked + 60:  # to ask takes a core for seconds
                continue
            looked = time.monotonic()
            (run,) = json.loads(loopback.flwr("list", "loopback", "--limit", "1", "--format", "json").stdout)["runs"]
            if run["status"].startswith("finished") and not out.exists():
                print(f"\nFlower's FedAvg, float32: {run['status']}, and its round was not")
                return {"engine": "Flower's FedAvg", "ended": run["status"], **peaks(peak)}
    seconds = json.loads(out.read_text())
    print(
        f"\nFlower's FedAvg, float32: round {seconds:.0f} s; {2 * nbytes / 1e6:.0f} MB moved "
        f"({2 * nbytes / 1e6 / seconds:.0f} MB/s)"
    )
    show(peak)
    return {"engine": "Flower's FedAvg", "round_seconds": seconds, "bytes": 2 * nbytes, **peaks(peak)}


def peaks(peak: PeakMemory) -> dict[str, Any]:
    """Peak memory by role, in bytes, for a kept line."""
    return {"peak": peak.by_role, "peak_anonymous": peak.anonymous_by_role}


def show(peak: PeakMemory) -> None:
    """Peak memory by role."""
    for role, resident in sorted(peak.by_role.items()):
        print(f"  {role:<32} {resident / 2**20:8.0f} MiB, anonymous {peak.anonymous_by_role[role] / 2**20:8.0f}")


if __name__ == "__main__":
    main()
