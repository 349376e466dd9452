"""Memory and time of a client's step by kind of tuning, on the upcycled SmolLM2-135M-Instruct.

    OMP_NUM_THREADS=1 python benchmarks/tuning_cost.py           # 8 minutes on one core
    python benchmarks/tuning_cost.py --only lora,full --device cuda

Each kind has a fresh process, one after another, with the same examples in the same batches: 16 chains of 128 random
tokens, of which the last 64 are answers, 4 a step. A client trains on them twice, by the code that `fedalign run`
uses, and keeps its update on disk; the second time is timed, with the routing penalty on. Memory is that of the whole
process at its peak (Linux's VmHWM; on a GPU what torch had allocated): model, received weights, gradients, optimizer,
activations and update. Where there is a GPU, its table follows.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from base_model import add_recipe, make, recipe_of
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.workbench import Workbench
from fedalign.config.toml import load_config
from fedalign.data.encode import IGNORED, Encoded
from fedalign.errors import UserError
from fedalign.maths.rounding import pack
from fedalign.moe.load import quiet
from fedalign.protocol import Broadcast

KINDS: dict[str, tuple[str, ...]] = {
    "full": ("tuning.kind=full",),
    "moe": ("tuning.kind=moe",),
    "experts": ("tuning.kind=experts",),
    "router": ("tuning.kind=router",),
    "lora": ("tuning.kind=lora",),
    "lora, attention only": ("tuning.kind=lora", 'tuning.targets=["attention"]'),
    "lora, checkpointing": ("tuning.kind=lora", "tuning.gradient_checkpointing=true"),
    "lora, bfloat16 base": ("tuning.kind=lora", "tuning.dtype=bfloat16", "training.precision=bfloat16"),
}
EXAMPLES, TOKENS, ANSWER, BATCH = 16, 128, 64, 4
HEADER = f"{'kind':22}{'trained':>13}{'loaded MiB':>12}{'peak MiB':>10}{'s/step':>8}{'CPU s/step':>12}{'update MB':>11}"


def main() -> None:
    """Measure each kind in a process of its own, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2-moe"), help="made if it is not there")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, by commas; 'lora' is all that begin so")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="without it: the CPU, then the GPU if there is one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", choices=list(KINDS), help=argparse.SUPPRESS)
    add_recipe(parser)
    arguments = parser.parse_args()
    quiet()
    if arguments.measure:
        print(json.dumps(measured(arguments)))
        return
    if not (arguments.model / "config.json").exists():
        make(arguments.model, recipe_of(arguments))
    print(
        f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {version('peft')}, seed {arguments.seed}; "
        f"{EXAMPLES // BATCH} steps of {BATCH} x {TOKENS} tokens"
    )
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    wanted = tuple(name.strip() for name in arguments.only.split(","))
    for device in [arguments.device] if arguments.device else there:
        print(f"\n{torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}\n{HEADER}")
        for kind in KINDS:
            if kind.startswith(wanted):
                print(f"{kind:22}{line(kind, device, arguments)}", flush=True)


def line(kind: str, device: str, arguments: argparse.Namespace) -> str:
    """What one process measured."""
    options = ["--model", str(arguments.model), "--threads", str(arguments.threads), "--seed", str(arguments.seed)]
    command = [sys.executable, __file__, "--measure", kind, "--device", device, *options]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        return f"  {process.stderr.strip().splitlines()[-1]}"
    found = json.loads(process.stdout.splitlines()[-1])
    return (
        f"{found['trained']:>13,}{found['loaded']:>12,.0f}{found['peak']:>10,.0f}{found['seconds']:>8.2f}"
        f"{found['cpu_seconds']:>12.2f}{found['update']:>11.1f}"
    )


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one client twice in this process."""
    device = arguments.device
    overrides = [f'model.path="{arguments.model}"', f"run.device={device}", f"run.threads={arguments.threads}"]
    overrides += [f"run.seed={arguments.seed}", f"training.batch_examples={BATCH}", *KINDS[arguments.measure]]
    try:
        trainer = Workbench.load(load_config(None, overrides)).trainer()
    except UserError as error:
        raise SystemExit(str(error)) from None
    moe = trainer.moe
    loaded = peak(device)
    weights = {group: pack(value.cpu(), "float32", seed=0) for group, value in moe.read().items()}
    uniform_L_E = torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)
    with tempfile.TemporaryDirectory() as folder:
        data = examples(int(moe.model.config.vocab_size), arguments.seed)
        client = ClientData("client", data, None, ClientMemory(Path(folder)))
        trainer.train(client, Broadcast(1, weights, {}))
        busy = time.process_time()
        report = trainer.train(client, Broadcast(2, weights, {"target_L_E": uniform_L_E}))
        busy = time.process_time() - busy
    steps = report.steps
    return {
        "trained": sum(moe.layout.sizes.values()),
        "loaded": loaded,
        "peak": peak(device),
        "seconds": report.metrics["train_seconds"] / steps,
        "cpu_seconds": busy / steps,
        "update": sum(packed.nbytes for packed in weights.values()) / 1e6,
    }


def examples(vocabulary: int, seed: int) -> list[Encoded]:
    """The same random chains for every kind."""
    generator = torch.Generator().manual_seed(seed)
    ids_N_S = torch.randint(20, vocabulary, (EXAMPLES, TOKENS), generator=generator).tolist()
    return [Encoded(ids, [IGNORED] * (TOKENS - ANSWER) + ids[-ANSWER:], n) for n, ids in enumerate(ids_N_S)]


def peak(device: str) -> float:
    """The most memory used so far, MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if (status := Path("/proc/self/status")).exists():  # ru_maxrss begins with that of the process which started this
        fields = dict(row.split(":", 1) for row in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Darwin" else 1024)


if __name__ == "__main__":
    main()
