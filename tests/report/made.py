"""Run folders as runs leave them, with made-up numbers that fit together: what reports are tested on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fedalign.compare.folder import ComparisonFolder
from fedalign.compare.plan import ablation, cells, make_design, parse_algorithms
from fedalign.config.run import Config
from fedalign.config.toml import load_config

LABELS = ("business", "science", "sport", "world")
TESTED = 400  # rows of the global test set


@dataclass(frozen=True)
class Shape:
    """How large the made runs are."""

    clients: Sequence[str] = tuple(f"client-{i:02d}" for i in range(6))
    rounds: int = 4
    layers: int = 2
    experts: int = 8


def make_comparison(
    folder: Path,
    algorithms: str | None = "fedavg,fedprox,fedalign_moe",
    seeds: Sequence[int] = (0, 1, 2),
    shape: Shape | None = None,
    grid: Mapping[str, Sequence[str]] | None = None,
) -> Path:
    """A finished comparison; without `algorithms`, an ablation."""
    shape = shape or Shape()
    base = load_config(None, [f"run.rounds={shape.rounds}", f"clients.count={len(shape.clients)}"])
    choices = ablation() if algorithms is None else parse_algorithms([algorithms])
    design = make_design(base, choices, grid or {}, seeds, tune=False)
    comparison = ComparisonFolder(folder)
    folder.mkdir(parents=True)
    comparison.design.write_text(design.to_toml())
    labels = [choice.label for choice in choices]
    for cell in cells(design):
        make_run(comparison.run(cell, "runs").path, cell.config, shape, skill=labels.index(cell.choice.label))
    return folder


def make_run(
    folder: Path, config: Config, shape: Shape | None = None, *, skill: int = 0, rounds: int | None = None
) -> Path:
    """One run, `rounds` of which are complete (all: it is finished)."""
    shape = shape or Shape()
    rounds = shape.rounds if rounds is None else rounds
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml())
    random = np.random.default_rng([config.run.seed, 7])
    ease_C = random.normal(0, 0.06, len(shape.clients))
    history = [_line(number, shape, ease_C, skill, random) for number in range(rounds + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    kept = {line["round"]: make_answers(line["accuracy"]) for line in (history[0], *history[1:][-2:])}
    (folder / "answers.json").write_text(json.dumps(kept))
    if rounds >= config.run.rounds:
        versions = {"python": "3.12.1", "fedalign-moe": "0.1.0", "torch": "2.13.0"}
        (folder / "summary.json").write_text(json.dumps({"versions": versions}))
    counts = random.dirichlet([0.4] * len(LABELS), len(shape.clients)) * random.integers(
        60, 400, (len(shape.clients), 1)
    )
    held = {
        name: {"examples": int(row.round().sum()), "labels": dict(zip(LABELS, map(int, row.round()), strict=True))}
        for name, row in zip(shape.clients, counts, strict=True)
    }
    (folder / "clients.json").write_text(json.dumps(held))
    (folder / "health").mkdir()
    for number in range(1, rounds + 1):
        make_health(folder / "health" / f"round-{number:05d}.safetensors", number, shape, config.run.seed)
    return folder


def make_answers(accuracy: float, rows: int = 10) -> dict[str, Any]:
    """What a run keeps of one round: what is wrong is taken for the class that follows, whose rows are fewer."""
    sizes = {"business": 160, "science": 120, "sport": 80, "world": 40}
    wrong = TESTED - round(accuracy * TESTED)
    confusion = {}
    for i, (name, size) in enumerate(sizes.items()):
        missed = min(wrong, size)
        wrong -= missed
        confusion[name] = {name: size - missed, LABELS[(i + 1) % 4]: missed}
    answered = [
        {"prompt": f"text {i}\nLabel:", "expected": LABELS[i % 4], "given": "sport", "right": i % 4 == 2}
        for i in range(rows)
    ]
    return {"examples": TESTED, "answered": answered, "confusion": confusion}


def _line(number: int, shape: Shape, ease_C: Any, skill: int, random: Any) -> dict[str, Any]:
    level = 0.3 + (0.3 + 0.03 * skill) * (1 - np.exp(-number / 3))
    scored = {
        name: float(np.clip(level + ease + random.normal(0, 0.015), 0, 1))
        for name, ease in zip(shape.clients, ease_C, strict=True)
    }
    losses = {name: 2.0 - 1.5 * score for name, score in scored.items()}
    values = list(scored.values())
    line: dict[str, Any] = {
        "round": number,
        "accuracy": round(TESTED * float(np.clip(level + random.normal(0, 0.01), 0, 1))) / TESTED,
        "test_examples": TESTED,
        "loss_nats": 2.0 - 1.5 * level,
        "client_accuracies": scored,
        "client_accuracy_mean": float(np.mean(values)),
        "client_accuracy_weighted": float(np.mean(values)),
        "client_accuracy_worst": min(values),
        "client_accuracy_spread": float(np.std(values)),
        "client_losses_nats": losses,
        "client_loss_mean_nats": float(np.mean(list(losses.values()))),
        "bytes_up": 0,
        "failures": [],
    }
    if number:
        line |= {
            "bytes_up": int(6e6 * (1 - 0.1 * skill)),
            "train_loss_nats": 2.0 - 1.6 * level,
            "routing_divergence_nats": 0.3 * float(np.exp(-number * (0.1 + 0.05 * skill))),
            "uploaded_share": 1 - 0.1 * skill,
        }
    return line


def make_health(path: Path, number: int, shape: Shape, seed: int = 0, **replaced: Any) -> None:
    """The file of one round; `replaced` tensors make it another, or a damaged one."""
    random = np.random.default_rng([seed, 11])  # the same preferences in every round
    count = len(shape.clients)
    taste = random.normal(0, 1, (count, shape.layers, shape.experts)) * (0.5 + 1 / number)
    taste[:, 0, 0] -= 12  # an expert that nobody uses
    taste[:, -1, 1] += 2.5  # and one that everybody does
    prob = np.exp(taste) / np.exp(taste).sum(-1, keepdims=True)
    load = np.floor(2000 * prob)
    held = load >= 32
    weight = np.where(held, load, 0)
    weight = weight / np.maximum(weight.sum(0, keepdims=True), 1)
    vector = random.normal(0, 1, (count, shape.layers, shape.experts, 3)) + 1.0
    vector /= np.linalg.norm(vector, axis=-1, keepdims=True)
    similarity = np.einsum("alek,blek->leab", vector, vector)
    both = np.einsum("ale,ble->leab", held, held)
    tensors = {
        "prob_C_L_E": prob.astype(np.float16),
        "load_C_L_E": load.astype(np.float32),
        "gate_weight_C_L_E": np.full_like(prob, 1 / count).astype(np.float16),
        "expert_weight_C_L_E": weight.astype(np.float16),
        "shared_weight_C": np.full(count, 1 / count, dtype=np.float32),
        "similarity_L_E_C_C": np.where(both, similarity, np.nan).astype(np.float16),
    } | replaced
    clients = json.dumps(list(shape.clients))
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"clients": clients})
