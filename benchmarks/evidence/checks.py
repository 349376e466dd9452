"""What only a GPU shows: `real.py --checks`. Each check is a function; one that fails does not stop the others.

    numerics  a client's round, whole and by LoRA: in float32 against the CPU, under bfloat16 autocast against float32
    qlora     the same round on a base in 4 bits against LoRA, the memory it takes; then a run, resumed
    fsdp      the same round with FSDP2 in one process against the model as it is
    runs      `fedalign run` by tuning, algorithm, privacy and wire, resumed for another round, there and on the CPU
    sites     three sites behind Flower (`make demo-sites`), each with its trainer on the device
    step      tokens/s of the client step against a plain loop, and a profile; it wants the machine to itself
    sum       GB/s of the server's sum
    cost      memory and time by kind of tuning: benchmarks/tuning_cost.py; it wants the real model

Updates are compared as ‖a - b‖ / ‖b‖ over all that is trained, after SGD steps: AdamW's first steps are signs, and turn
rounding into differences. FSDP2 needs torch 2.13 for experts that a process did not use. With one process there is
nobody to sum gradients with, so on older torch the check puts an empty function in that place, and says so.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.trainer import Trainer
from fedalign.config.toml import load_config
from fedalign.data.docstrings import LIBRARIES
from fedalign.data.encode import IGNORED, Encoded
from fedalign.files import write_text
from fedalign.maths.rounding import pack, unpack
from fedalign.moe.load import pick_device, quiet
from fedalign.moe.model import MoEModel, load_model
from fedalign.protocol import Broadcast, ParameterGroup, Request
from fedalign.server.results import versions

BENCHMARKS = Path(__file__).resolve().parents[1]
LACKING = "set_reduce_scatter_unused_params"  # of FSDP2, before torch 2.13
EXAMPLES, BATCH = 24, 8  # of a round that is compared: three steps
SMALL_RUN = (
    *("data.max_train=240", "data.max_test=120", "clients.count=3", "clients.partition=iid", "run.threads=1"),
    *("tracking.loggers=[]", "tracking.health=off", "clients.held_out=0.0", "evaluation.clients=false"),
)
NOISE = ("algorithm.name=by_use", "algorithm.vocabulary=average", "privacy.noise_multiplier=0.5", "privacy.seed=0")
MASKED = ("algorithm.name=by_use", "privacy.masked=true", "server.max_norm_ratio=0")
SIDE_BY_SIDE = 4  # runs at a time; they wait for the launching of kernels, not for the device

Found = dict[str, Any]
Findings = Iterator[tuple[str, Any]]  # as they are made


@dataclass(frozen=True)
class Place:
    """What checks run on, and where they leave what they need for a while."""

    model: str
    device: str
    folder: Path

    @property
    def gpu(self) -> bool:
        """Whether it is one."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Round:
    """A client's round."""

    start: Mapping[ParameterGroup, Tensor]
    update: Mapping[ParameterGroup, Tensor]
    loss: float
    step_seconds: float
    peak_mib: float

    @property
    def line(self) -> Found:
        """In numbers."""
        return {"loss": self.loss, "ms_a_step": 1000 * self.step_seconds, "peak_gpu_mib": self.peak_mib}


def run(names: str, model: str, device: str, folder: Path) -> None:
    """Make the checks, print them, and keep them in FOLDER as a file each.

    Raises:
        SystemExit: Some of them failed.
    """
    quiet()
    place = Place(model, pick_device(device), folder)
    asked = list(CHECKS) if names == "all" else names.split(",")
    if unknown := [name for name in asked if name not in CHECKS]:
        raise SystemExit(f"--checks {unknown[0]}: unknown. Choose some of: {', '.join(CHECKS)}.")
    folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(about(place)))
    failed: list[str] = []
    for name in asked:
        began = time.perf_counter()
        found: dict[str, Any] = {}
        print(f"{name}:", flush=True)
        try:
            for key, value in CHECKS[name](place):
                found[key] = value
                keep(folder / f"{name}.json", place, began, found)
                print(f"  {key}: {value}", flush=True)
        except Exception as error:  # whatever a device brings up is what is looked for
            traceback.print_exc()
            found["failed"] = f"{type(error).__name__}: {error}"
            keep(folder / f"{name}.json", place, began, found)
            failed.append(name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def keep(file: Path, place: Place, began: float, found: Mapping[str, Any]) -> None:
    """What a check has found so far: one that is cut off leaves that."""
    seconds = time.perf_counter() - began
    lines = {"about": about(place), "model": place.model, "seconds": seconds, "found": found}
    write_text(file, json.dumps(lines, indent=1) + "\n")


def about(place: Place) -> Found:
    """Machine and versions."""
    found: Found = {"device": place.device, "cpu": platform.processor() or platform.machine(), **versions()}
    if place.gpu:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        found |= {"gpu": torch.cuda.get_device_name(), "capability": capability, "cuda": torch.version.cuda}
    return found


# --------------------------------------------------------------------------------------------------- one client's round


def loaded(place: Place, device: str, *settings: str) -> MoEModel:
    """The model, to be tuned as these settings say."""
    tuning = load_config(None, settings).tuning
    moe = load_model(place.model, device=device, tuning=tuning)
    if tuning.gradient_checkpointing:
        moe.checkpoint_activations()
    return moe


def chains(vocabulary: int) -> list[Encoded]:
    """Examples of 10 to 60 random tokens; the last is the answer."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(EXAMPLES):
        length = int(torch.randint(10, 61, (1,), generator=generator))
        tokens = torch.randint(20, vocabulary, (length,), generator=generator).tolist()
        made.append(Encoded(tokens, [IGNORED] * (length - 1) + tokens[-1:], index))
    return made


def one_round(moe: MoEModel, *settings: str) -> Round:
    """Three steps of SGD with the routing penalty on, by the code that runs use; the second time is timed."""
    more = ("algorithm.name=fedalign_paper", "training.optimizer=sgd", "training.learning_rate=0.1")
    config = load_config(None, [f"training.batch_examples={BATCH}", "statistics.min_tokens=2", *more, *settings])
    target_L_E = torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)
    start = {group: value.cpu() for group, value in moe.read().items()}
    weights = {group: pack(value, "float32", 0) for group, value in start.items()}
    gpu = moe.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        client = ClientData("c", chains(int(moe.model.config.vocab_size)), None, ClientMemory(Path(folder)))
        trainer = Trainer(moe, None, config.algorithm.build(), config)
        for number in (1, 2):
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            report = trainer.train(client, Broadcast(number, weights, {"target_L_E": target_L_E}))
        told = client.memory.hand_over("c", Request("c", 2, moe.layout.groups)).groups
        update = {group: unpack(packed) for group, packed in told.items()}
    peak = torch.cuda.max_memory_allocated() / 2**20 if gpu else 0.0
    return Round(start, update, report.loss, report.metrics["train_seconds"] / report.steps, peak)


def difference(a: Mapping[ParameterGroup, Tensor], b: Mapping[ParameterGroup, Tensor]) -> float:
    """‖a - b‖ / ‖b‖."""
    mine, theirs = (torch.cat([part[group].double() for group in b]) for part in (a, b))
    return float((mine - theirs).norm() / theirs.norm().clamp_min(1e-30))


def compared(mine: Round, other: Round) -> Found:
    """A round, and how far it is from another."""
    found = {"start": difference(mine.start, other.start), "update": difference(mine.update, other.update)}
    return mine.line | {f"{key}_difference": value for key, value in found.items()}


def numerics(place: Place) -> Findings:
    """Float32 there and here, then autocast and a base in bfloat16."""
    exact, rounded = "training.precision=float32", "training.precision=bfloat16"
    for kind in ("full", "lora"):
        tuning = f"tuning.kind={kind}"
        here = one_round(loaded(place, "cpu", tuning), exact)
        yield f"{kind}, CPU, float32", here.line
        moe = loaded(place, place.device, tuning)
        there = one_round(moe, exact)
        yield f"{kind}, device, float32, to the CPU", compared(there, here)
        moe.write(there.start)
        yield f"{kind}, device, autocast, to float32", compared(one_round(moe, rounded), there)
        narrow = one_round(loaded(place, place.device, tuning, "tuning.dtype=bfloat16"), rounded)
        yield f"{kind}, device, base and autocast in bfloat16, to float32", compared(narrow, there)


def qlora(place: Place) -> Findings:
    """A base in 4 bits; then a whole run on it."""
    precise = "training.precision=bfloat16"
    wide = one_round(loaded(place, place.device, "tuning.kind=lora", "tuning.dtype=bfloat16"), precise)
    yield "lora, bfloat16 base", wide.line
    moe = loaded(place, place.device, "tuning.kind=qlora")
    yield "saved", str(moe.saved)
    yield "qlora, to lora", compared(one_round(moe, precise), wide)
    if place.gpu:  # elsewhere runs refuse it
        yield "run", small_run(place, "qlora", "tuning.kind=qlora")


def fsdp(place: Place) -> Findings:
    """FSDP2 in a group of one process."""
    if not hasattr(FSDPModule, LACKING):
        setattr(FSDPModule, LACKING, lambda module, wanted: None)
        yield "an empty function stands in for", LACKING
    exact = "training.precision=float32"
    whole = one_round(loaded(place, place.device, "tuning.kind=full"), exact)
    yield "whole", whole.line
    with tempfile.TemporaryDirectory() as folder:
        group = f"file://{folder}/group"
        dist.init_process_group("nccl" if place.gpu else "gloo", init_method=group, rank=0, world_size=1)
        try:
            moe = loaded(place, "cpu", "tuning.kind=full").shard(torch.device(place.device))
            yield "sharded", moe.sharded
            yield "FSDP2, to the whole", compared(one_round(moe, exact), whole)
            moe.save(Path(folder) / "model")
            again = MoEModel.load(Path(folder) / "model").read()
            yield "saved model differs by", difference(again, {g: value.cpu() for g, value in moe.read().items()})
        finally:
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- whole programs


def small_run(place: Place, name: str, *settings: str) -> Found:
    """Two rounds, then a third after a new start; the scores of each."""
    folder = place.folder / "runs" / name.replace(" ", "-")
    sets = [f'model.path="{place.model}"', f"run.device={place.device}", *SMALL_RUN, *settings]
    command = [sys.executable, "-m", "fedalign", "run"]
    said(*command, "demo", *(word for one in sets for word in ("--set", one)), "--set", "run.rounds=2", *_out(folder))
    said(*command, "--resume", str(folder), "--set", "run.rounds=3")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    return {
        "accuracy": [line.get("accuracy") for line in lines],
        "loss": [line.get("loss_nats") for line in lines],
        "round_seconds": [line.get("round_seconds") for line in lines[1:]],
    }


def _out(folder: Path) -> tuple[str, ...]:
    return ("--out", str(folder), "--overwrite")


def said(*command: str) -> str:
    """What a program prints.

    Raises:
        RuntimeError: It failed.
    """
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {process.stderr.strip()[-1500:]}")
    return process.stdout


def runs(place: Place) -> Findings:
    """Kinds of runs on the device, each in float32 beside the CPU, four at a time; then what rounds there alone."""
    own = place.folder / "site-experts"
    sites = ",".join(f"client-{number:02}" for number in range(3))
    upcycle = [sys.executable, "-m", "fedalign", "upcycle", place.model, "--site-experts", sites, "--out", str(own)]
    said(*upcycle, "--overwrite")
    loss = f"data.labels={json.dumps([*LIBRARIES])}", "training.loss=label_shift"
    same = {
        "full": (),
        "full, paper": ("algorithm.name=fedalign_paper",),
        "full, scaffold": ("algorithm.name=scaffold",),
        "full, pfl_moe": ("algorithm.name=pfl_moe",),
        "full, fedprox": ("algorithm.name=fedprox",),
        "full, label_shift": loss,
        "full, masked": MASKED,
        "full, int4": ("wire.dtype=int4",),
        "full, trimmed mean": ("server.robust=trimmed_mean",),
        "lora": ("tuning.kind=lora",),
        "lora, exact": ("tuning.kind=lora", "tuning.average=exact"),
        "lora, freeze_a": ("tuning.kind=lora", "tuning.average=freeze_a"),
        "full, noise": NOISE,
        "lora, noise": ("tuning.kind=lora", *NOISE),
        "masks and noise": (*MASKED, *NOISE),
        "site_experts": ("algorithm.name=site_experts", f'model.path="{own}"'),
        "full, checkpointing": ("tuning.gradient_checkpointing=true",),
    }
    rounded = {
        "full, autocast": (),
        "lora, bfloat16 base": ("tuning.kind=lora", "tuning.dtype=bfloat16"),
    }
    jobs = {(name, device): settings for name, settings in same.items() for device in (place.device, "cpu")}
    jobs = {key: ("training.precision=float32", *settings) for key, settings in jobs.items()}
    jobs |= {(name, place.device): settings for name, settings in rounded.items()}

    def made(key: tuple[str, str]) -> Found:
        name, device = key
        try:
            return small_run(Place(place.model, device, place.folder), f"{name} {device}", *jobs[key])
        except RuntimeError as error:
            return {"failed": str(error).rpartition(": Error: ")[2]}

    failed = []
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        found = {key: pool.submit(made, key) for key in jobs}
        for name in [*same, *rounded]:
            here, *there = (found[key].result() for key in found if key[0] == name)
            failed += [name for line in (here, *there) if "failed" in line]
            if there and "failed" in there[0]:
                here["cpu_failed"] = there[0]["failed"]
            elif there and "failed" not in here:
                pairs = zip(here["loss"], there[0]["loss"], strict=True)
                here["largest_difference_of_loss"] = max(abs(a - b) for a, b in pairs)
            yield name, here
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(found)} runs failed: {', '.join(failed)}")


def sites(place: Place) -> Findings:
    """Sites with trainers that stay, on the device; the sites fork, which a process that has used CUDA must not."""
    command = [sys.executable, "-m", "fedalign.federation.flower.three_sites", "--out", str(place.folder / "sites")]
    yield "table", said(*command, "--rounds", "2")[-1500:]
    logs = (place.folder / "sites").rglob("*.log")
    lines = {line.strip() for log in logs for line in log.read_text("utf-8", "replace").splitlines()}
    yield "where their models are", sorted(line for line in lines if "the model is on" in line)


def step(place: Place) -> Findings:
    """benchmarks/client_step.py: plain loop and client step, by LoRA and whole."""
    for kind, dtype in (("lora", "bfloat16"), ("full", "float32")):
        command = [sys.executable, str(BENCHMARKS / "client_step.py"), "--model", place.model, "--threads", "1"]
        command += ["--device", place.device, "--repeats", "3", "--set", f"tuning.kind={kind}"]
        command += ["--set", f"tuning.dtype={dtype}", "--profile", str(place.folder / f"profile-{kind}-{dtype}.txt")]
        yield f"{kind}, base in {dtype}", said(*command)


def server_sum(place: Place) -> Findings:
    """benchmarks/server_sum.py: on the CPU, where the server is."""
    size = "500" if place.gpu else "100"
    yield "table", said(sys.executable, str(BENCHMARKS / "server_sum.py"), "--clients", "10", "--megabytes", size)


def cost(place: Place) -> Findings:
    """benchmarks/tuning_cost.py on the device."""
    command = [sys.executable, str(BENCHMARKS / "tuning_cost.py"), "--model", place.model]
    yield "table", said(*command, "--device", "cuda" if place.gpu else "cpu")


CHECKS: Mapping[str, Callable[[Place], Findings]] = {
    "numerics": numerics,
    "qlora": qlora,
    "fsdp": fsdp,
    "runs": runs,
    "sites": sites,
    "step": step,
    "sum": server_sum,
    "cost": cost,
}
