"""Tables of experts as the page gets them: what is sent, what is left out, and that it fits."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedalign.config.toml import load_config
from fedalign.report import write_report
from fedalign.report.health import MISSING, budget_text, health
from fedalign.report.material import read_material
from fedalign.server.health import DamagedError, read_round
from tests.report.made import Shape, make_comparison, make_health, make_run


def unpack(text: str, *shape: int) -> Any:
    return np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(shape)


def write(folder: Path, number: int, clients: list[str], prob: Any, **more: Any) -> None:
    prob = np.array(prob, dtype=np.float32)
    tensors = {
        "prob_C_L_E": prob,
        "load_C_L_E": 100 * prob,
        "gate_weight_C_L_E": prob,
        "expert_weight_C_L_E": prob,
        "shared_weight_C": np.ones(len(clients), dtype=np.float32),
    } | more
    save_file(tensors, folder / f"round-{number:05d}.safetensors", {"clients": json.dumps(clients)})


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A run of two rounds without health files."""
    made = make_run(tmp_path / "run", load_config(None, ["run.rounds=2"]), Shape(rounds=2))
    for path in (made / "health").iterdir():
        path.unlink()
    return made


def test_bytes_stand_for_values_and_absent_clients(bare: Path) -> None:
    write(bare / "health", 1, ["b"], [[[0.5, 0.25, 0.0, 0.0005]]])
    write(bare / "health", 2, ["a", "b"], [[[0.1, 0.1, 0.1, 0.1]], [[0.0, 0.0, 0.0, 0.5]]])
    (run,) = health(read_material([bare])).runs
    assert (run["clients"], run["rounds"], run["layers"], run["experts"]) == (["a", "b"], [1, 2], [0], 4)
    assert run["prob"]["largest"] == [0.5]
    prob_R_L_C_E = unpack(run["prob"]["bytes"], 2, 1, 2, 4)
    assert prob_R_L_C_E[0, 0].tolist() == [[MISSING] * 4, [254, 127, 0, 1]]  # what is not zero never becomes zero
    assert prob_R_L_C_E[1, 0].tolist() == [[51] * 4, [0, 0, 0, 254]]
    assert run["similarity"] is None


def test_load_is_relative_to_an_even_share(bare: Path) -> None:
    write(bare / "health", 1, ["a"], [[[0.0, 0.25, 0.25, 0.5], [0.25, 0.25, 0.25, 0.25]]])
    (run,) = health(read_material([bare])).runs
    load_R_L_E = unpack(run["load"], 1, 2, 4)
    assert load_R_L_E[0].tolist() == [[0, 128, 128, 153], [128] * 4]  # 1 is in the middle, 2 is an octave of five
    assert run["balance"] == [[1, 1, 0]]


def test_dead_and_overloaded_experts_are_counted(bare: Path) -> None:
    write(bare / "health", 1, ["a"], [[[0.01, 0.01, 0.23, 0.75]]])
    (run,) = health(read_material([bare])).runs
    assert run["balance"] == [[1, 2, 1]]


def test_similarity_is_the_upper_triangle(bare: Path) -> None:
    table = np.array([[[[1, 0.5, np.nan], [0.5, 1, -1], [np.nan, -1, 1]]]], dtype=np.float32)
    write(bare / "health", 1, ["a", "b", "c"], np.full((3, 1, 1), 0.5), similarity_L_E_C_C=table)
    (run,) = health(read_material([bare])).runs
    assert unpack(run["similarity"], 3).tolist() == [190, MISSING, 0]


def test_the_first_finished_seed_stands_for_an_algorithm(tmp_path: Path) -> None:
    for seed, rounds in ((0, 1), (1, 2), (2, 2)):
        config = load_config(None, ["run.rounds=2", f"run.seed={seed}"])
        make_run(tmp_path / str(seed), config, Shape(rounds=2), rounds=rounds)
    (run,) = health(read_material([tmp_path / str(seed) for seed in range(3)])).runs
    assert run["seed"] == 1


def test_rounds_then_layers_are_thinned_to_the_budget(tmp_path: Path) -> None:
    shape = Shape(rounds=9, layers=4)
    made = make_run(tmp_path / "run", load_config(None, ["run.rounds=9"]), shape)
    material = read_material([made])
    assert health(material).runs[0]["rounds"] == list(range(1, 10))
    cell = 6 * 3 + 1 + 15  # six clients: three tables, load, pairs
    (few,) = health(material, budget=cell * 8 * 4 * 3).runs
    assert (few["rounds"], few["layers"]) == ([1, 5, 9], [0, 1, 2, 3])
    (fewer,) = health(material, budget=cell * 8 * 2 * 2).runs
    assert (fewer["rounds"], fewer["layers"]) == ([1, 9], [0, 3])
    assert "3 of 9 rounds" in budget_text([few])
    assert "2 of 4 layers" in budget_text([fewer])


def test_a_large_comparison_stays_below_five_megabytes(tmp_path: Path) -> None:
    shape = Shape(clients=tuple(f"client-{i:02d}" for i in range(10)), rounds=25, layers=16, experts=64)
    made = make_comparison(tmp_path / "c", "fedavg,fedprox,fedmoe,flame,fedalign_moe", seeds=[0, 1], shape=shape)
    write_report([made], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 5_000_000


@pytest.mark.parametrize(
    ("replaced", "told"),
    [
        ({"prob_C_L_E": None}, "prob_C_L_E is missing"),
        ({"load_C_L_E": np.ones((6, 2, 7), dtype=np.float32)}, "load_C_L_E is missing or has a wrong shape"),
        ({"gate_weight_C_L_E": np.full((6, 2, 8), np.nan, dtype=np.float16)}, "gate_weight_C_L_E is not finite"),
        ({"similarity_L_E_C_C": np.ones((2, 8, 6, 5), dtype=np.float16)}, "similarity_L_E_C_C has a wrong shape"),
    ],
)
def test_a_damaged_file_is_left_out_and_told(tmp_path: Path, replaced: dict[str, Any], told: str) -> None:
    made = make_run(tmp_path / "run", load_config(None, ["run.rounds=4"]))
    damaged = made / "health" / "round-00002.safetensors"
    make_health(damaged, 2, Shape(), **replaced)
    with pytest.raises(DamagedError, match=told):
        read_round(damaged)
    found = health(read_material([made]))
    assert found.runs[0]["rounds"] == [1, 3, 4]
    assert told in found.problems[0]


def test_a_cut_off_file_is_told(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run", load_config(None, ["run.rounds=4"]))
    path = made / "health" / "round-00004.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert health(read_material([made])).runs[0]["rounds"] == [1, 2, 3]
