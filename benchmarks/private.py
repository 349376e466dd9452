"""The price of noise: accuracy at epsilon 2, 8 and without noise, tuned whole and by LoRA; and an audit of the claim.

    python benchmarks/private.py --minutes 30               # goes on where benchmarks/results/private.jsonl stops
    python benchmarks/private.py --data DIR --model BASE --rounds 15 --rates 1e-2 2e-3    # of data of one's own
    python benchmarks/private.py --audit                    # canaries in one client's update, epsilon 1 and 2
    python benchmarks/private.py --table                    # writes the tables into docs/noise.md

**Accuracy.** FedAvg on the demo's model and texts: ten clients, Dirichlet 1.0, five rounds, each example seen once a
round. With or without noise the settings are the same, among them learning rates that nobody tuned. DIR has train.jsonl
and test.jsonl; a client is what the column `client` says, as `benchmarks/evidence/data.py` writes CLINC150 by domain,
and a label a class; BASE is the model, such as the one that `benchmarks/evidence/start.py` makes. Each cell is one run,
a line of private.jsonl; seed 0 of all comes first. Its processor time is that of the run's process and of those that it
starts, of all rounds, loading and tests included; runs from before this was kept have none.

**Audit in one run** (Steinke et al. 2023, arXiv 2305.08924): who sees the update guesses which of 240 canaries were
trained on. Each is a text of one token that no other text has, so that token's row is its own: the easiest thing to
find. Of those about which the attacker is surest, a guess may be right no more often than e^ε / (1 + e^ε). They lie
among 200 texts of the demo, in steps that take every example, or a sample of a quarter, which the claim counts on.
Without noise the same attack must refute the claim.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from scipy.stats import binom
from torch import Tensor

import fedalign
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.noisy import PrivateFit
from fedalign.client.spent import Privacy, PrivacyLedger
from fedalign.client.trainer import Trainer
from fedalign.client.workbench import Workbench
from fedalign.config.toml import load_config
from fedalign.data.encode import Encoded
from fedalign.data.formats import load_examples
from fedalign.maths.rounding import pack, unpack
from fedalign.moe.load import quiet
from fedalign.protocol import EMBEDDINGS, Broadcast, Request
from watching import machine

# ------------------------------------------------------------------------------------------------------------ accuracy

REVISION = 2  # goes up when what a cell means changes
SEEDS = 3
KINDS = ("lora", "full")
EPSILONS = (None, 8.0, 2.0)
SETTINGS = [
    "algorithm.name=fedavg",
    "clients.alpha=1.0",
    "clients.held_out=0",  # with noise none is: all cells train on the same rows
    "training.batch_examples=64",
    "evaluation.clients=false",
    "tracking.health=off",
    "run.check=false",
]


@dataclass(frozen=True)
class Study:
    """What all cells of a table's row have in common; by default, that of the demo."""

    data: str = "demo"  # or the name of a folder
    model: str = "demo"
    rounds: int = 5
    kind: str = KINDS[0]
    learning_rate: float = 2e-3

    def cells(self) -> Iterator[Cell]:
        """All of them, a seed after another."""
        for seed in range(SEEDS):
            for epsilon in EPSILONS:
                yield Cell(self, epsilon, seed)


@dataclass(frozen=True)
class Cell:
    """One run."""

    study: Study
    epsilon: float | None
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What a stored cell must share with this one to count."""
        return {**asdict(self.study), "epsilon": self.epsilon, "seed": self.seed, "revision": REVISION}


def study_of(line: Mapping[str, Any]) -> Study:
    """That a stored cell belongs to."""
    return Study(**{field.name: line[field.name] for field in fields(Study)})


def cells(studies: Sequence[Study]) -> list[Cell]:
    """Those of all, a seed after another."""
    return sorted((cell for study in studies for cell in study.cells()), key=lambda cell: cell.seed)


def settings(cell: Cell, data: Path | None, model: Path | None) -> list[str]:
    """Of the run, for `--set`."""
    noise = [] if cell.epsilon is None else [f"privacy.epsilon={cell.epsilon}", "privacy.seed=0"]
    own = [] if model is None else [f"model.path={model}"]
    if data is not None:
        own += [f"data.train={data / 'train.jsonl'}", f"data.test={data / 'test.jsonl'}", "clients.partition=natural"]
    study = cell.study
    more = [f"tuning.kind={study.kind}", f"training.learning_rate={study.learning_rate}", f"run.seed={cell.seed}"]
    return [*SETTINGS, f"run.rounds={study.rounds}", f"evaluation.every={study.rounds}", *own, *more, *noise]


def run(cell: Cell, data: Path | None, model: Path | None) -> dict[str, Any]:
    """A whole run: accuracy before and after, and what it cost."""
    started, worked = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory(prefix="fedalign-private-") as folder:
        made = fedalign.run("demo", overrides=settings(cell, data, model), out=Path(folder) / "run", progress=False)
        first, last = made.history[0], made.history[-1]
    found = {"before": first["accuracy"], "accuracy": last["accuracy"], "rows": last["test_examples"]}
    if cell.epsilon is not None:
        found["spent"] = max(last["privacy_epsilons"].values())
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": processor_seconds() - worked}
    return found | {name: round(value, 1) for name, value in spent.items()}


def processor_seconds() -> float:
    """Of this process and of its children that have ended, since they began."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


# --------------------------------------------------------------------------------------------------------------- audit

CANARIES, OTHERS, DELTA = 240, 200, 1e-5
WHOLE, SAMPLED = 1000, 80  # examples a step: all of them, the most that an attacker can wish for; about a quarter
CONFIDENCE = 0.95
GUESSES = (20, 40, 80)  # of each kind
AUDITED = [
    "algorithm.name=fedavg",
    "evaluation.clients=false",
    "training.optimizer=sgd",
    "training.epochs=2",
    "privacy.seed=0",
    "run.rounds=1",
]


@dataclass(frozen=True)
class Canaries:
    """Texts of one token each, half of which are trained on."""

    tokens: Sequence[int]
    answer: Sequence[int]  # of all of them

    @property
    def every(self) -> list[Encoded]:
        """All of them, each an example by itself."""
        silent = [-100] * (4 - len(self.answer))
        return [Encoded([token] * 4, [*silent, *self.answer], -1 - n) for n, token in enumerate(self.tokens)]

    @property
    def trained(self) -> set[int]:
        """A fair coin for each."""
        return {number for number in range(len(self.tokens)) if random.Random(number).random() < 0.5}


def least_epsilon(right: int, guesses: int, delta: float = DELTA) -> float:
    """The largest epsilon that so many right guesses refute."""
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        chance = float(binom.sf(right - 1, guesses, 1 / (1 + math.exp(-middle))))
        low, high = (middle, high) if chance + 2 * CANARIES * delta <= 1 - CONFIDENCE else (low, middle)
    return low


def audited(trainer: Trainer, canaries: Canaries, others: Sequence[Encoded], folder: Path) -> tuple[float, float]:
    """Train on half of the canaries among others: the epsilon that is claimed, and the one that is refuted at least."""
    every, trained = canaries.every, canaries.trained
    privacy = Privacy(trainer.config, PrivacyLedger(folder), "here", folder, "c")
    among = [*others, *(every[number] for number in sorted(trained))]
    client = ClientData("c", among, None, ClientMemory(folder), privacy=privacy)
    own = [own_gradient(trainer, one) for one in every]
    start = {group: pack(value, "float32", 0) for group, value in trainer.moe.read().items()}
    report = trainer.train(client, Broadcast(1, start))
    update = client.memory.hand_over("c", Request("c", 1, (EMBEDDINGS,))).groups[EMBEDDINGS]
    moved_V_H = unpack(update).view(-1, len(own[0]))
    score = [-float(moved_V_H[token] @ own[n] / own[n].norm()) for n, token in enumerate(canaries.tokens)]
    order = sorted(range(len(every)), key=score.__getitem__)
    best = 0.0
    for guesses in GUESSES:
        right = sum(number in trained for number in order[-guesses:])
        right += sum(number not in trained for number in order[:guesses])
        best = max(best, least_epsilon(right, 2 * guesses))
    return report.metrics["privacy_epsilon"], best


def own_gradient(trainer: Trainer, canary: Encoded) -> Tensor:
    """Of a canary's loss, at its own token's row."""
    model, answer = trainer.moe.model, [token for token in canary.labels if token != -100]
    table = model.get_input_embeddings().weight
    model.eval()
    logits = model(input_ids=torch.tensor([canary.input_ids])).logits[0, -1 - len(answer) : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    gradient: Tensor = torch.autograd.grad(loss, table)[0][canary.input_ids[0]]
    return gradient


def audit_of_demo(epsilon: float, noise: bool, batch: int) -> dict[str, Any]:
    """The audit among texts of the demo, with so many examples a step."""
    settings = [*AUDITED, f"training.batch_examples={batch}", f"privacy.epsilon={epsilon}"]
    bench = Workbench.load(load_config("demo", settings))
    examples = load_examples(bench.config.data.train, bench.config.data, "train", 0)
    texts = bench.encoder.encode(examples)
    used = {token for one in texts for token in one.input_ids}
    rows = bench.moe.model.get_input_embeddings().weight.shape[0]
    free = [token for token in range(rows) if token not in used][:CANARIES]
    if len(free) < CANARIES:
        raise SystemExit(f"{len(free)} tokens that no text of the demo has, and {CANARIES} canaries need one each")
    answer = [token for token in texts[0].labels if token != -100][:2]
    with tempfile.TemporaryDirectory(prefix="fedalign-audit-") as folder, noise_on(noise):
        claimed, found = audited(bench.trainer(), Canaries(free, answer), texts[:OTHERS], Path(folder))
    told = {"audit": epsilon, "noise": noise, "batch": batch}
    return {**told, "claimed": claimed, "refuted": found, "revision": REVISION}


def noise_on(wanted: bool) -> Any:
    """With or without the noise of each step, for the attack that must succeed."""
    return mock.patch.object(PrivateFit, "_add_noise", PrivateFit._add_noise if wanted else lambda *_: None)


# --------------------------------------------------------------------------------------------------------------- table

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parents[1] / "docs" / "noise.md"
BEGIN, END = "<!-- written by benchmarks/private.py -->", "<!-- until here -->"


def read(file: Path) -> list[dict[str, Any]]:
    """All stored lines; the first do not name what was the demo's then."""
    then = {"model": "demo", "rounds": 5, "batch": WHOLE}
    return [then | json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def found(lines: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The stored line with this key, if there is one."""
    return next((line for line in lines if all(line.get(name) == value for name, value in key.items())), None)


def write_table(lines: Sequence[Mapping[str, Any]]) -> None:
    """Put the tables between the two marks of docs/noise.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{tables(lines)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy and processor time by data, way of tuning and epsilon; audits; what was not run; the machine."""
    default = [Study(kind=kind) for kind in KINDS]
    studies = dict.fromkeys([*default, *(study_of(line) for line in lines if "data" in line)])
    head = "| data | model | rounds | tuned | rate |"
    rows = [f"{head} before | no noise | epsilon 8 | epsilon 2 |", f"| --- | --- | --: | --- {'| --: ' * 5}|"]
    times = ["", f"{head} processor seconds, no noise | epsilon 8 | epsilon 2 |", rows[1].removesuffix(" --: |")]
    missing = 0
    for study in studies:
        kept = [(cell, found(lines, cell.key)) for cell in study.cells()]
        missing += sum(line is None for _, line in kept)
        before = [line["before"] for _, line in kept if line]
        mine = [[line["accuracy"] for c, line in kept if line and c.epsilon == e] for e in EPSILONS]
        spent = [[line.get("cpu_seconds") for c, line in kept if line and c.epsilon == e] for e in EPSILONS]
        named = f"| {study.data} | {study.model} | {study.rounds} | {study.kind} | {study.learning_rate:g} |"
        rows.append(f"{named} {' | '.join(percent(column) for column in [before[:1], *mine])} |")
        times.append(f"{named} {' | '.join(map(processor, spent))} |")
    rows += times
    audits = [line for line in lines if "audit" in line and line["revision"] == REVISION]
    for line in audits:
        said = "refutes it" if line["refuted"] > line["claimed"] else "does not refute it"
        rows += [""] if line is audits[0] else []
        rows.append(
            f"- Audit at epsilon {line['audit']:g}, noise {'on' if line['noise'] else 'off'}, "
            f"{'every example in' if line['batch'] == WHOLE else 'a quarter of the examples in'} a step: claimed "
            f"{line['claimed']:.2f}, refuted up to {line['refuted']:.2f}, which {said}."
        )
    machines = sorted({line["machine"] for line in lines if "machine" in line})
    told = [f"Not run: {missing} of {len(studies) * len(EPSILONS) * SEEDS} runs.", ""] if missing else []
    return "\n".join([*rows, "", *told, *(f"Run on: {one}." for one in machines), ""])


def percent(scores: Sequence[float]) -> str:
    """Mean in %, and how many seeds if not all.

    >>> percent([0.5]), percent([])
    ('50.0 (1)', 'not run')
    """
    if not scores:
        return "not run"
    return f"{100 * statistics.fmean(scores):.1f}" + (f" ({len(scores)})" if len(scores) < SEEDS else "")


def processor(seconds: Sequence[float | None]) -> str:
    """Mean processor seconds of the runs that kept them, and how many these are if not all seeds.

    >>> processor([10.0, None]), processor([None]), processor([])
    ('10 (1)', 'not kept', 'not run')
    """
    kept = [one for one in seconds if one is not None]
    if not kept:
        return "not kept" if seconds else "not run"
    return f"{statistics.fmean(kept):,.0f}" + (f" ({len(kept)})" if len(kept) < SEEDS else "")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of private.jsonl")
    parser.add_argument("--minutes", type=float, default=30, help="after which no further run is begun")
    parser.add_argument("--data", type=Path, metavar="DIR", help="in place of the demo's texts")
    parser.add_argument("--model", type=Path, metavar="BASE", help="in place of the demo's model")
    parser.add_argument("--rounds", type=int, default=5, help="of each run")
    parser.add_argument("--rates", type=float, nargs=2, default=(2e-3, 2e-3), metavar=("LORA", "FULL"))
    parser.add_argument("--audit", action="store_true", help="the audit, in place of accuracy")
    parser.add_argument("--table", action="store_true", help="write what there is into docs/noise.md, and end")
    args = parser.parse_args()
    file, end = args.out / "private.jsonl", time.monotonic() + 60 * args.minutes
    if args.table:
        write_table(read(file))
        return
    quiet()
    torch.set_num_threads(1)

    def keep(line: Mapping[str, Any]) -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({**line, "machine": machine("torch", "transformers", "dp-accounting")}) + "\n")
        print(line, flush=True)

    if args.audit:
        for epsilon, noise, batch in product((1.0, 2.0), (True, False), (WHOLE, SAMPLED)):
            if found(read(file), {"audit": epsilon, "noise": noise, "batch": batch, "revision": REVISION}) is None:
                keep(audit_of_demo(epsilon, noise, batch))
        return
    data, model = (folder.name if folder else "demo" for folder in (args.data, args.model))
    for cell in cells([Study(data, model, args.rounds, *each) for each in zip(KINDS, args.rates, strict=True)]):
        if time.monotonic() > end:
            break
        if found(read(file), cell.key) is None:
            keep(cell.key | run(cell, args.data, args.model))


if __name__ == "__main__":
    main()
