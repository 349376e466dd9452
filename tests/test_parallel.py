"""One client on several GPUs: two processes of torchrun, or two devices of one process, come to what one comes to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fedalign import parallel
from fedalign.cli.main import app, main
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.trainer import Trainer
from fedalign.data.batches import batches
from fedalign.data.encode import IGNORED
from fedalign.errors import UserError
from fedalign.moe.load import pick_device
from fedalign.moe.model import MoEModel
from tests.client.test_trainer import broadcast, examples, settings, uniform
from tests.moe.tiny import build
from tests.server.test_run import metrics, model_bytes
from tests.shared_by_two import one_client

ROOT = Path(__file__).parent.parent
PATIENCE = 120  # seconds for two processes on one slow core
ROUNDS: dict[str, tuple[str, ...]] = {
    "olmoe": ("training.max_grad_norm=0.1",),
    "olmoe, moe": ("tuning.kind=moe", "tuning.gradient_checkpointing=true"),
    "olmoe, drift": ("algorithm.name=fedprox", "training.accumulate=2", "training.optimizer=adamw"),
    "switch_transformers": ("clients.limits.c.max_experts=2",),
    "olmoe, shift": ("algorithm.name=scaffold", "run.rounds=2"),  # which changes gradients in the second
    "deepseek_v3": ("tuning.kind=router",),
    "gpt_oss, bfloat16": ("tuning.dtype=bfloat16",),
}
AS_EXACT = 2e-4
TOLERANCE = {"gpt_oss, bfloat16": 0.1}  # each process rounds its gradients to 8 bits before they are added


@dataclass(frozen=True)
class Shared:
    """What two processes left, and one process beside them."""

    two: Path
    one: Path
    printed: str


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Shared:
    """Made once, by whichever of pytest's own processes comes first."""
    several = "PYTEST_XDIST_WORKER" in os.environ
    place = tmp_path_factory.getbasetemp().parent / "parallel" if several else tmp_path_factory.mktemp("parallel")
    with FileLock(f"{place}.lock"):
        printed = place / "printed.txt"
        if not printed.exists():
            place.mkdir(exist_ok=True)
            printed.write_text(_make_shared(place, settings), encoding="utf-8")
        return Shared(place / "two", place / "one", printed.read_text(encoding="utf-8"))


def _make_shared(place: Path, settings: list[str]) -> str:
    """What the two processes print."""
    two, one = place / "two", place / "one"
    sets = [word for value in (*settings, "training.keep_optimizer=true") for word in ("--set", value)]
    run = ["run", os.devnull, *sets, "--set", "run.rounds=2", "--out"]
    resumed = str(two / "resumed")
    jobs = {
        "rounds": [[name.split(",")[0], str(two / name), *more] for name, more in ROUNDS.items()],
        "commands": [
            [*run, str(two / "whole")],
            [*run, resumed, "--set", "run.rounds=1"],
            ["run", "--resume", resumed, "--set", "run.rounds=2"],
        ],
    }
    (place / "jobs.json").write_text(json.dumps(jobs))
    printed = _in_two_processes("-m", "tests.shared_by_two", str(place / "jobs.json"))
    for name, more in ROUNDS.items():
        one_client(name.split(",")[0], one / name, *more)
    app([*run, str(one / "whole")], standalone_mode=False)
    return printed


def _in_two_processes(*program: str) -> str:
    """What they print. They are given loopback alone, and none of them is left over."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    loopback = {"GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | loopback | {"COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()  # which torchrun passes on; a kill would leave the two behind
        printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed
    return printed


def difference(a: Tensor, b: Tensor) -> float:
    """Relative to the size of the whole."""
    return float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-6))


@pytest.mark.parametrize("name", ROUNDS)
def test_two_processes_train_as_one(shared: Shared, name: str) -> None:
    mine, theirs = (load_file(place / name / "round.safetensors") for place in (shared.one, shared.two))
    assert mine.keys() == theirs.keys()
    assert max(float(value.norm()) for key, value in mine.items() if key.startswith("moved gate")) > 1e-4
    for key, value in mine.items():
        assert difference(theirs[key], value) < TOLERANCE.get(name, AS_EXACT), key
    about = json.loads((shared.one / name / "0.json").read_text())
    first, second = (json.loads((shared.two / name / f"{rank}.json").read_text()) for rank in range(2))
    assert first["loss"] == second["loss"] == pytest.approx(about["loss"], rel=TOLERANCE.get(name, AS_EXACT) / 100)
    assert first["hash"] == second["hash"]
    assert 0.45 < first["share"] < 0.55
    assert first["share"] + second["share"] == pytest.approx(about["share"]) == 1


def test_scaffold_shifts_the_second_round_alone(shared: Shared, tmp_path: Path) -> None:
    without = load_file(one_client("olmoe", tmp_path, "algorithm.name=fedavg", "run.rounds=2") / "round.safetensors")
    shifted = load_file(shared.two / "olmoe, shift" / "round.safetensors")
    assert difference(shifted["moved shared 1"], without["moved shared 1"]) < AS_EXACT
    assert difference(shifted["moved shared 2"], without["moved shared 2"]) > 0.1


@pytest.mark.parametrize("name", ROUNDS)
def test_two_processes_save_one_ordinary_model(shared: Shared, name: str) -> None:
    mine, theirs = (model_bytes(place / name / "model") for place in (shared.one, shared.two))
    assert mine.keys() == theirs.keys()
    assert {file for file in mine if mine[file] != theirs[file]} <= {"model.safetensors"}
    a, b = (load_file(place / name / "model" / "model.safetensors") for place in (shared.one, shared.two))
    assert {key: value.dtype for key, value in a.items()} == {key: value.dtype for key, value in b.items()}


def test_a_run_of_two_processes_is_that_of_one(shared: Shared) -> None:
    one, two = metrics(shared.one / "whole"), metrics(shared.two / "whole")
    assert [line["round"] for line in two] == [0, 1, 2]
    for mine, theirs in zip(one, two, strict=True):
        assert theirs.keys() == mine.keys()
        for name, value in mine.items():
            assert theirs[name] == (value if isinstance(value, list) else pytest.approx(value, rel=1e-5)), name
    summaries = [json.loads((place / "whole" / "summary.json").read_text()) for place in (shared.one, shared.two)]
    assert [summary["checked"][:24] for summary in summaries] == ["names, shapes and values"] * 2
    a, b = (load_file(place / "whole" / "model" / "model.safetensors") for place in (shared.one, shared.two))
    for name, value in a.items():
        assert difference(b[name], value) < 1e-3, name


def test_everything_is_written_and_said_once(shared: Shared) -> None:
    def files(out: Path) -> list[str]:
        return sorted(str(path.relative_to(out)).split(".tfevents")[0] for path in out.rglob("*") if path.is_file())

    assert files(shared.two / "whole") == files(shared.one / "whole")
    said = shared.printed.splitlines()
    assert sum(line.startswith("round 0 |") for line in said) == 2  # of the whole run and of that which is resumed
    assert sum(line.startswith("round 2 |") for line in said) == 2
    assert shared.printed.count("Results") == 3
    assert "Traceback" not in shared.printed


def test_a_resumed_run_gives_the_same_bytes(shared: Shared) -> None:
    resumed, whole = shared.two / "resumed", shared.two / "whole"
    told = [
        [{k: v for k, v in line.items() if "bytes_down" not in k} for line in metrics(out)] for out in (resumed, whole)
    ]
    assert told[0] == told[1]  # weights were sent to be scored when the run ended, and not again to be trained on
    assert sum(line["bytes_down"] for line in metrics(resumed)) == sum(line["bytes_down"] for line in metrics(whole))
    kept = [model_bytes(out / "model") for out in (resumed, whole)]
    assert {name for name in kept[0].keys() | kept[1].keys() if kept[0].get(name) != kept[1].get(name)} == {
        "round.json",  # which names the bytes, too
        "SHA256SUMS",
    }


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], settings: list[str], tmp_path: Path
) -> Callable[..., str]:
    """What a process of torchrun says when it refuses; nothing is joined and nothing written."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    def run(*values: str, more: tuple[str, ...] = (), command: str = "run") -> str:
        sets = [word for value in (*settings, *values) for word in ("--set", value)]
        out = [] if more else ["--out", str(tmp_path / "run")]
        monkeypatch.setattr("sys.argv", ["fedalign", command, os.devnull, *out, *sets, *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert not (tmp_path / "run").exists()
        assert not torch.distributed.is_initialized()
        said = " ".join(capfd.readouterr().err.split())
        assert said.startswith("Error: ")
        return said

    return run


def test_what_cannot_be_shared_is_refused(refused: Callable[..., str]) -> None:
    for kind in ("lora", "qlora"):
        said = refused(f"tuning.kind={kind}")
        assert f'tuning.kind = "{kind}": torchrun does not shard adapters' in said
        assert "full, moe, experts, router" in said
    assert 'algorithm.name = "pfl_moe": needs a second model' in refused("algorithm.name=pfl_moe")
    assert 'choose "in_process"' in refused("federation.engine=flower")
    assert "run.workers = 2: torchrun's processes train one client together" in refused("run.workers=2")
    assert "--dry-run: not in 2 processes" in refused(more=("--dry-run",))
    assert "fedalign compare: torchrun is for `fedalign run` alone" in refused(command="compare")


def test_machines_and_devices_that_do_not_suit_are_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Choose one of: auto, cpu, cuda." in refused("run.device=cuda:0")
    assert "Choose one of: auto, cpu, cuda." in refused("run.device=split")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "torchrun --nproc-per-node 2: there are 1 GPUs" in refused("run.device=cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert "2 processes, 1 of them on this machine. Use one machine" in refused()


def test_models_and_releases_that_cannot_be_sharded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="whose routers return no logits"):
        MoEModel.wrap(build("deepseek").to(torch.bfloat16)).shard(torch.device("cpu"))
    monkeypatch.delattr(FSDPModule, "set_reduce_scatter_unused_params")
    with pytest.raises(UserError, match=r"Install torch 2\.13 or newer"):
        MoEModel.wrap(build("olmoe")).shard(torch.device("cpu"))


def test_a_share_of_a_batch_without_rows_counts_for_nothing() -> None:
    batch = next(batches(examples(3, seq2seq=True), 1000, 3, seed=None))
    assert batch.share(range(3)) is batch
    two = batch.share(range(1, 3))
    assert two.rows == batch.rows[1:]
    assert torch.equal(two.labels_B_S, batch.labels_B_S[1:])
    none = batch.share(range(3, 3))
    assert none.examples == 1
    assert bool((none.labels_B_S == IGNORED).all())
    assert all(not mask.any() for mask in none.masks() if mask is not None)
    assert all(bool(mask.any()) for mask in two.masks() if mask is not None)


def test_split_wants_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, choices in ((0, "auto, cpu"), (1, "auto, cpu, cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(UserError, match=rf"needs two GPUs or more, this machine has {count}.*: {choices}\."):
            pick_device("split")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("split") == "split"


@pytest.mark.parametrize("setting", ["tuning.kind=qlora", "algorithm.name=pfl_moe"])
def test_what_cannot_be_split_is_refused(
    setting: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], settings: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    sets = [word for value in (*settings, "run.device=split", setting) for word in ("--set", value)]
    monkeypatch.setattr("sys.argv", ["fedalign", "run", os.devnull, "--dry-run", *sets])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert 'Error: run.device = "split": ' in capfd.readouterr().err


def _two_gpus(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """Have accelerate believe that there are two, with so much memory free on the second and less on the first."""
    room = {0: nbytes * 2 // 3, 1: nbytes, "cpu": 10**9}
    monkeypatch.setattr("accelerate.utils.get_balanced_memory", lambda *_, **__: room)
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda asked: asked)


@pytest.mark.parametrize("family", ["olmoe", "deepseek", "switch_transformers"])
def test_a_layer_stays_whole_where_a_model_is_split(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, int]] = []
    model = build(family)
    _two_gpus(monkeypatch, 4 * sum(p.numel() for p in model.parameters()))
    monkeypatch.setattr("accelerate.dispatch_model", lambda model, places, **_: asked.append(places))
    moe = MoEModel.wrap(model).split()
    places = asked[0]
    assert set(places.values()) == {0, 1}
    assert moe.layers
    for name, _ in model.named_parameters():
        assert sum(f"{name}.".startswith(f"{place}.") for place in places) == 1, name
    assert not [place for place in places if re.search(r"\.\d+\.", place)]  # no part of a layer has a place of its own


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _two_gpus(monkeypatch, 10_000)
    with pytest.raises(UserError, match="does not fit on the GPUs"):
        MoEModel.wrap(build("olmoe")).split()


def _all_experts(self: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every expert on every token, in operations that torch's lazy backend has."""
    chosen_T_K_E = index.unsqueeze(-1) == torch.arange(self.num_experts, device=hidden.device)
    weight_T_E = (chosen_T_K_E.to(hidden.dtype) * weights.unsqueeze(-1)).sum(1)
    both = torch.matmul(hidden.unsqueeze(0), self.gate_up_proj.transpose(1, 2))
    half = both.shape[-1] // 2
    inner = self.act_fn(both[..., :half]) * both[..., half:]
    return (torch.matmul(inner, self.down_proj.transpose(1, 2)) * weight_T_E.T.unsqueeze(-1)).sum(0)


@cache
def _start_lazy_backend() -> None:
    from torch._lazy import ts_backend  # noqa: PLC0415 - private, and of use here alone

    ts_backend.init()


@pytest.fixture
def lazy(monkeypatch: pytest.MonkeyPatch) -> str:
    """A second device without a GPU: torch's lazy backend, whose tensors do not mix with those of the CPU."""
    _start_lazy_backend()
    enabled, autocast = torch.is_autocast_enabled, torch.autocast

    def no_autocast(device_type: str, **options: Any) -> AbstractContextManager[Any]:
        return nullcontext() if device_type == "lazy" else autocast(device_type, **options)

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "lazy" and enabled(kind))
    monkeypatch.setattr(torch, "autocast", no_autocast)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "all", _all_experts)
    return "lazy:0"


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_model_on_two_devices_trains_as_on_one(tuning: str, lazy: str, tmp_path: Path) -> None:
    more = ("training.optimizer=sgd", "training.balance_coefficient=0.01", f"tuning.kind={tuning}")
    after, reports = [], []
    for split in (False, True):
        config = settings("training.learning_rate=1e-1", *more)
        moe = MoEModel.wrap(build("olmoe"), config.tuning)
        moe.model.config._experts_implementation = "all"
        if split:
            second = dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), lazy)
            moe = moe.split(dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu") | second)
            assert [str(device) for device in moe.devices] == ["cpu", lazy]
            assert str(moe.home) == str(moe.device) == "cpu"
        step = Trainer(moe, None, config.algorithm.build(), config)
        data = ClientData("c", examples(8), None, ClientMemory(tmp_path / str(split)))
        start = {group: value.clone() for group, value in moe.read().items()}
        reports.append(step.train(data, broadcast(moe, target_L_E=uniform(moe))))
        after.append({group: value - start[group] for group, value in moe.read().items()})
    one, two = reports
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    for name in ("prob_L_E", "load_L_E", "margin_L_E", "centroid_L_E_D", "norm_G"):
        assert difference(getattr(two, name), getattr(one, name)) < AS_EXACT, name
    assert max(float(value.norm()) for value in after[0].values()) > 1e-3
    for group, value in after[0].items():
        assert difference(after[1][group], value) < AS_EXACT, str(group)


def test_an_optimizer_s_state_goes_where_its_parameter_is() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    assert parallel.like(torch.arange(3.0), parameter).device == parameter.device
    assert parallel.whole(parameter) is parameter
    assert not parallel.is_sharded(parameter)
