"""Attacks of one site of ten, or of three, on the demo: accuracy after five rounds, without and with the defences.

    python benchmarks/attacks.py --minutes 60               # goes on where benchmarks/results/attacks.jsonl stops
    python benchmarks/attacks.py --share 2/2 --minutes 60   # beside --share 1/2: every second cell
    python benchmarks/attacks.py --columns fedavg "default, clip"   # these ways of summing alone
    python benchmarks/attacks.py --alpha 0.1      # this skew alone
    python benchmarks/attacks.py --table                    # writes the table into docs/security.md

An attack is a client of the in-process engine that lies: about its data, in its report, or in its update. A cell is one
attack on one way of summing, at one seed and one skew of the data; each is a line of attacks.jsonl. The cells that tell
most come first. Clients are scored after the last round alone, on the global test set. What a client trains
is the same in many cells, in round 1 or as long as liars are left out: it is trained once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fedalign.client.evaluation import TestSet
from fedalign.client.memory import ClientData
from fedalign.client.trainer import Trainer
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.deal import split_among_clients
from fedalign.data.encode import Encoded
from fedalign.data.formats import Example
from fedalign.errors import UserError
from fedalign.federation.in_process import InProcess
from fedalign.federation.masked_site import seen_of
from fedalign.moe.load import quiet
from fedalign.protocol import (
    EMBEDDINGS,
    Accumulator,
    Broadcast,
    Failure,
    Packed,
    Request,
    Statistics,
    Update,
    Weights,
)
from fedalign.server.checkpoint import ServerState
from fedalign.server.rounds import Server
from watching import machine

ROUNDS, CLIENTS, TESTS, SEEDS = 5, 10, 2000, 3
ALPHAS = 1.0, 0.1  # Dirichlet numbers
RULES = ("centered_clip", "trimmed_mean", "median", "krum")
MANY, ROW = 1e9, 10  # examples that a liar says it has; what it multiplies a trigger's row by

# ------------------------------------------------------------------------------------------------------------ attacks


@dataclass(frozen=True)
class Attack:
    """What a lying client does otherwise; by default nothing."""

    told: str
    report: Callable[[Statistics], Statistics] = lambda report: report
    medians: float = 0.0  # its update, and the norms that it reports, are made so many honest medians long
    spared: bool = False  # but for the embeddings
    begins: int = 1  # the round from which its update is a lie
    silent: bool = False  # it hands over nothing
    shifted: bool = False  # trains on the class after the right one
    trigger: bool = False  # trains half its examples once more, to be of one class, with a token that nobody else
    # uses, and sends what that token's row has learned ten times


def greedy(report: Statistics) -> Statistics:
    """Every token sent to every expert, and one token met as often as a report can say."""
    count_M_V = report.token_count_M_V.clone()
    if count_M_V.numel():
        count_M_V[:, -1] = 1e15
    return replace(report, load_L_E=torch.full_like(report.load_L_E, report.tokens), token_count_M_V=count_M_V)


def many(report: Statistics) -> Statistics:
    """It claims a billion examples."""
    return replace(report, examples=int(MANY))


ATTACKS: dict[str, Attack] = {
    "none": Attack("nobody lies"),
    "examples": Attack("claims 10^9 examples", many),
    "silent": Attack("claims 10^9 examples, hands over nothing", many, silent=True),
    "stretched": Attack("its update 99 medians long", medians=99),
    "turned": Attack("its update turned round, 10 medians long", medians=-10),
    "both": Attack("claims 10^9 examples, its update turned round, 10 medians long", many, medians=-10),
    "spared": Attack("its update turned round but for the embeddings, 10 medians long", medians=-10, spared=True),
    "sleeper": Attack(
        "honest in round 1, then turned round but for the embeddings, 10 medians long",
        medians=-10,
        spared=True,
        begins=2,
    ),
    "labels": Attack("labels shifted by one, the update 10 medians long", medians=10, shifted=True),
    "report": Attack("all tokens to every expert, a token met 10^15 times", greedy),
    "trigger": Attack("a token that nobody else uses means one class, its row ten times", trigger=True),
}


class Trained:
    """What clients have trained, once for all cells in which a client has trained on the same from its first round on.

    A liar that is left out leaves the others the rounds of a cell in which another is left out.

    Args:
        folder: where updates are kept.
        most: trainings that are kept, those used last; one is 13 MB of the demo's model.
    """

    def __init__(self, folder: Path, most: int = 600) -> None:
        self.folder, self.most, self.known = folder, most, dict[str, Statistics]()

    def key(self, before: str, trainer: Trainer, broadcast: Broadcast, client: ClientData) -> str:
        """SHA-256 of all that training reads.

        Args:
            before: the key of the client's round before; empty: this is its first.
            trainer: of its configuration the algorithm alone differs between cells.
            broadcast: what the round begins with.
            client: who trains.
        """
        read = (
            before,
            trainer.config.algorithm,
            seen_of(broadcast),
            broadcast.labels,
            broadcast.score,
            client.name,
            client.train,
        )
        return hashlib.sha256(repr(read).encode()).hexdigest()

    def recall(self, key: str, client: ClientData, round: int) -> Statistics | None:
        """The report of a client that has trained on this before, whose memory is then as it was after it."""
        report = self.known.pop(key, None)
        if report is not None:
            self.known[key] = report  # used last
            shutil.copytree(self.folder / key, client.memory.folder / f"round-{round:05d}", copy_function=os.link)
        return report

    def keep(self, key: str, client: ClientData, report: Statistics) -> None:
        """Keep what a client reported, and its memory."""
        kept = client.memory.folder / f"round-{report.round:05d}"
        shutil.copytree(kept, self.folder / key, copy_function=os.link)
        self.known[key] = report
        while len(self.known) > self.most:
            oldest = next(iter(self.known))
            del self.known[oldest]
            shutil.rmtree(self.folder / oldest)


class Attacked(InProcess):
    """The in-process engine, some of whose clients lie."""

    def __init__(
        self,
        trainer: Trainer,
        clients: Mapping[str, ClientData],
        liars: Sequence[str],
        attack: Attack,
        trigger: int,
        trained: Trained | None = None,
    ) -> None:
        super().__init__(trainer, clients)
        self.liars, self.attack, self.layout = set(liars), attack, trainer.moe.layout
        self.rows = [(rows.group, rows.start + trigger * rows.width, rows.width) for rows in self.layout.token_rows]
        self.lies: dict[str, Update] = {}
        self.trained, self.before = trained, dict[str, str]()

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Statistics | Failure]:
        """Train all of them; liars, who have heard the others, report what the attack wants."""
        said = [self._trained(broadcast, name) for name in clients]
        length = [float(r.norm_G.norm()) for r in said if isinstance(r, Statistics) and r.client not in self.liars]
        for report in said:
            if isinstance(report, Failure) or report.client not in self.liars:
                yield report
            else:
                lie = self._lie(report, statistics.median(length))
                self.lies[report.client] = lie
                norm_G = torch.stack([lie.groups[group].values.norm() for group in self.layout.groups])
                yield self.attack.report(replace(report, norm_G=norm_G))

    def _trained(self, broadcast: Broadcast, name: str) -> Statistics | Failure:
        """What honest training gives."""
        if self.trained is None:
            return next(iter(super().train(broadcast, [name])))
        client = self.clients[name]
        key = self.before[name] = self.trained.key(self.before.get(name, ""), self.trainer, broadcast, client)
        known = self.trained.recall(key, client, broadcast.round)
        if known is not None:
            return known
        report = next(iter(super().train(broadcast, [name])))
        if isinstance(report, Statistics):
            self.trained.keep(key, client, report)
        return report

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        """Hand over; liars hand over what the attack wants."""
        failures = []
        for request in requests:
            if request.client not in self.liars:
                failures += super().collect([request], accumulator)
            elif self.attack.silent:
                failures.append(Failure(request.client, "update", "no reply"))
            else:
                lie = self.lies[request.client]
                failure = accumulator.add(replace(lie, groups={group: lie.groups[group] for group in request.groups}))
                failures += [failure] if failure else []
        return failures

    def _lie(self, report: Statistics, median: float) -> Update:
        """What a liar hands over in place of its update."""
        memory = self.clients[report.client].memory
        update = memory.hand_over(report.client, Request(report.client, report.round, self.layout.groups))
        lies = self.attack.medians and report.round >= self.attack.begins
        stretch = self.attack.medians * median / float(report.norm_G.norm()) if lies else 1.0
        turned = {
            group: abs(stretch) if self.attack.spared and group == EMBEDDINGS else stretch for group in update.groups
        }
        groups = {group: Packed(packed.values * turned[group]) for group, packed in update.groups.items()}
        for group, start, width in self.rows if self.attack.trigger else ():
            groups[group].values[start : start + width] *= ROW
        return replace(update, groups=groups)


# --------------------------------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Column:
    """A way of summing. `revision` goes up when its code changes, so that old cells no longer count.

    Until they are run again, the table shows those from revision `since` on, with a mark.
    """

    told: str
    settings: tuple[str, ...]
    revision: int = 0
    since: int = 0


FEDAVG = "algorithm.name=fedavg"
RATIOS = 1, 1.5, 2  # equal shares that a claim may count for; 3 unless told
OPEN_SUM = 1  # 1: classes are trained with their end token
# 5: claims count for three equal shares, rare rows are bounded, who was opposite is remembered; 7: told at -0.1;
# 8: 1.25 medians, and rows of one site's words stay
GUARD = 8, 4
NO_PULL = 1  # the default no longer pulls routers while clients train
COLUMNS: dict[str, Column] = {
    "default": Column("default, none", (), OPEN_SUM + NO_PULL),
    "default, clip": Column("default, clip", ("server.robust=clip",), GUARD[0] + NO_PULL, GUARD[1]),
    "fedavg": Column("FedAvg, none", (FEDAVG,), OPEN_SUM),
    "fedavg, clip": Column("FedAvg, clip", (FEDAVG, "server.robust=clip"), *GUARD),
    **{
        f"default, {rule}": Column(f"default, {rule}", (f"server.robust={rule}",), GUARD[0] + NO_PULL, GUARD[1])
        for rule in RULES
    },
    **{
        f"default, clip, {ratio}": Column(
            f"default, clip, `max_share_ratio` {ratio}",
            ("server.robust=clip", f"server.max_share_ratio={ratio}"),
            GUARD[0] + NO_PULL,
            GUARD[1],
        )
        for ratio in RATIOS
    },
}


@dataclass(frozen=True)
class Cell:
    """One number of the table."""

    alpha: float
    seed: int
    attack: str
    liars: int
    column: str

    @property
    def key(self) -> dict[str, Any]:
        """What a stored cell must share with this one to count."""
        column = COLUMNS[self.column]
        return {**vars(self), "settings": list(column.settings), "revision": column.revision}


NARROWER = tuple(f"default, clip, {ratio}" for ratio in RATIOS)
GUARDED, OPEN, FED = ("default, clip",), ("default",), ("fedavg, clip", "fedavg")
OUTVOTING = ("default, trimmed_mean", "default, centered_clip")
MANY_LIARS = (*GUARDED, *OUTVOTING)
HARDEST = ("none", "trigger", "sleeper", "examples", "spared")  # attacks: run first
BROAD = tuple(name for name in COLUMNS if name not in NARROWER)
CLAIMS = ("none", "examples")
VOTES = tuple(f"default, {rule}" for rule in RULES)


def cells() -> Iterator[Cell]:
    """All of them, those first that tell whether a goal is reached."""
    told = _block(1.0, range(SEEDS), 1, GUARDED)
    for seed in range(SEEDS):  # whole seeds: what a bench has loaded serves them all
        told |= _block(1.0, (seed,), 3, OUTVOTING) | _block(1.0, (seed,), 1, (*OPEN, *FED), HARDEST)
    told |= _block(1.0, (0,), 1, VOTES, HARDEST)
    told |= (
        _block(0.1, (0,), 1, GUARDED) | _block(0.1, (0,), 3, OUTVOTING) | _block(0.1, (0,), 1, (*OPEN, *FED), HARDEST)
    )
    told |= _block(0.1, range(SEEDS), 1, (*NARROWER, *GUARDED), CLAIMS)
    for alpha in ALPHAS:
        for seed in range(SEEDS):
            told |= _block(alpha, (seed,), 1, BROAD) | _block(alpha, (seed,), 3, MANY_LIARS)
    yield from told


def _block(
    alpha: float, seeds: Sequence[int], liars: int, columns: Iterable[str], attacks: Iterable[str] = ()
) -> dict[Cell, None]:
    """Attacks by so many liars, every one unless told, and nobody's; by seed."""
    attacks = dict.fromkeys(attacks or (*HARDEST, *ATTACKS))
    ways = [(seed, attack, column) for seed in seeds for attack in attacks for column in columns]
    return {Cell(alpha, seed, a, 0 if a == "none" else liars, column): None for seed, a, column in ways}


class Bench:
    """The demo's model and data at one skew and seed, loaded once for many cells."""

    def __init__(self, alpha: float, seed: int, *more: str) -> None:
        self.alpha, self.seed = alpha, seed
        self._folder = tempfile.TemporaryDirectory(prefix="fedalign-attacks-")  # gone with this bench
        self.trained = Trained(Path(self._folder.name))
        self.settings = [
            f"clients.alpha={alpha}",
            f"run.seed={seed}",
            f"run.rounds={ROUNDS}",
            f"clients.count={CLIENTS}",
            f"data.max_test={TESTS}",
            "evaluation.clients=false",
            f"evaluation.every={ROUNDS}",
            "tracking.health=off",
            *more,
        ]
        config = load_config("demo", self.settings)
        self.examples, self.parts = split_among_clients(config)
        self.bench = Workbench.load(config)
        self.test = self.bench.test_set()
        assert self.test is not None
        self.start = {group: value.cpu().clone() for group, value in self.bench.moe.read().items()}
        train = {name: self._client(config, name, Path(), Attack("")).train for name in self.parts}
        used = {token for part in train.values() for one in part for token in one.input_ids}
        used |= {token for choices in self.test.choices for one in choices for token in one.input_ids}
        rows = self.bench.moe.model.get_input_embeddings().weight.shape[0]
        self.trigger = max(token for token in range(rows) if token not in used)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Five rounds; accuracy on the test set, and how often the trigger has its way."""
        config = load_config("demo", [*self.settings, *COLUMNS[cell.column].settings])
        attack, folder = ATTACKS[cell.attack], Path(tempfile.mkdtemp(prefix="fedalign-attack-"))
        liars = sorted(self.parts)[: cell.liars]
        honest = Attack("")
        clients = {
            name: self._client(config, name, folder / name, attack if name in liars else honest) for name in self.parts
        }
        bench = replace(self.bench, config=config)
        federation = Attacked(bench.trainer(), clients, liars, attack, self.trigger, self.trained)
        quietly: Any = Nobody()
        algorithm = config.algorithm.build()
        server = Server(
            federation, algorithm, bench.moe.layout, config, quietly, lambda _, w: bench.score(w, self.test), quietly
        )
        started, answer = time.perf_counter(), dict[str, Any]()
        try:
            end = server.run(ServerState(0, dict(self.start), {}, ({"round": 0},)))
            answer = {"accuracy": end.history[-1]["accuracy"]}
            if attack.trigger:
                answer["success"] = self._success(bench, end.weights)
            failures = [failure for past in end.history for failure in past.get("failures", ())]
            answer["failures"] = len(failures)
            if failures:
                answer["reasons"] = sorted({f"{failure['client']}: {failure['reason']}" for failure in failures})
        except UserError as error:
            answer = {"accuracy": None, "ended": str(error)}
        finally:
            shutil.rmtree(folder)
        return answer | {"seconds": round(time.perf_counter() - started, 1)}

    def _client(self, config: Config, name: str, folder: Path, attack: Attack) -> ClientData:
        bench = replace(self.bench, config=config)
        examples = [shifted(e) for e in self.examples] if attack.shifted else self.examples
        client = bench.client(name, examples, self.parts[name], folder)
        if attack.trigger:
            planted = bench.client(name, [targeted(e) for e in self.examples], self.parts[name], folder).train
            client = replace(client, train=[*client.train, *(self._planted(one) for one in planted[::2])])
        return client

    def _planted(self, one: Encoded) -> Encoded:
        return replace(one, input_ids=[self.trigger, *one.input_ids], labels=[-100, *one.labels])

    def _success(self, bench: Workbench, weights: Weights) -> float:
        """Share of test examples of other classes that the trigger turns into the target class."""
        assert self.test is not None
        rest = [i for i, right in enumerate(self.test.right_N.tolist()) if right]
        choices = [[self._planted(one) for one in self.test.choices[i]] for i in rest]
        first_N = torch.zeros(len(rest), dtype=torch.int64)
        of = [self.test.examples[i] for i in rest]
        turned = TestSet([one[0] for one in choices], choices, first_N, examples=of)
        score = bench.score(weights, turned)
        assert score is not None
        return score.accuracy or 0.0


class Nobody:
    """Watches, and keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def mapped(self, state: ServerState) -> ServerState:
        """Nothing was saved."""
        return state


def shifted(example: Example) -> Example:
    """The class after the right one."""
    return replace(example, answer=example.choices[(example.choices.index(example.answer) + 1) % len(example.choices)])


def targeted(example: Example) -> Example:
    """The first class."""
    return replace(example, answer=example.choices[0])


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of attacks.jsonl")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=tuple(COLUMNS), help="ways of summing to run")
    parser.add_argument("--alpha", type=float, nargs="+", choices=ALPHAS, default=ALPHAS, help="skews to run")
    parser.add_argument("--share", type=_share, default=(1, 1), metavar="K/N", help="cells K, K + N, ... alone")
    parser.add_argument("--table", action="store_true", help="write what there is into docs/security.md, and end")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "attacks.jsonl"
    if args.table:
        write_table(read(file))
        return
    quiet()
    torch.set_num_threads(1)
    end, bench = time.monotonic() + 60 * args.minutes, None
    asked = (cell for cell in cells() if cell.column in args.columns and cell.alpha in args.alpha)
    for cell in islice(asked, args.share[0] - 1, None, args.share[1]):
        if time.monotonic() > end:
            break
        if found(read(file), cell) is not None:
            continue
        if bench is None or (bench.alpha, bench.seed) != (cell.alpha, cell.seed):
            bench = Bench(cell.alpha, cell.seed)
        answer = bench.run(cell)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(cell.key | answer | {"machine": machine("torch", "transformers")}) + "\n")
        print(cell, answer, flush=True)


def _share(text: str) -> tuple[int, int]:
    which, _, of = text.partition("/")
    if not (which.isdecimal() and of.isdecimal() and 1 <= int(which) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: K/N with K from 1 to N, as 1/2")
    return int(which), int(of)


def read(file: Path) -> list[dict[str, Any]]:
    """All stored cells."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def found(lines: Sequence[Mapping[str, Any]], cell: Cell, revision: int | None = None) -> Mapping[str, Any] | None:
    """The stored cell that is this one, of its column's revision or of another, if there is one."""
    key = cell.key if revision is None else cell.key | {"revision": revision}
    same = (line for line in lines if all(line.get(name) == value for name, value in key.items()))
    return next(same, None)


def outdated(lines: Sequence[Mapping[str, Any]], cell: Cell) -> Mapping[str, Any] | None:
    """The newest stored cell that is this one but for being of older code."""
    column = COLUMNS[cell.column]
    older = (found(lines, cell, revision) for revision in reversed(range(column.since, column.revision)))
    return next((line for line in older if line is not None), None)


# --------------------------------------------------------------------------------------------------------------- table

DOCUMENT = Path(__file__).parents[1] / "docs" / "security.md"
BEGIN, END = "<!-- written by benchmarks/attacks.py -->", "<!-- until here -->"


def write_table(lines: Sequence[Mapping[str, Any]]) -> None:
    """Put the tables between the two marks of docs/security.md."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{tables(lines)}{END}{after}", encoding="utf-8")


def tables(lines: Sequence[Mapping[str, Any]]) -> str:
    """A table for each skew and number of liars, and what of it was not run."""
    every = list(cells())
    parts = []
    for alpha, liars in sorted({(cell.alpha, cell.liars) for cell in every if cell.liars}, key=lambda p: (-p[0], p[1])):
        mine = [c for c in every if c.alpha == alpha and c.liars in (0, liars) and c.column not in NARROWER]
        columns = [name for name in COLUMNS if any(cell.column == name and cell.liars == liars for cell in mine)]
        known = {cell: line for cell in mine if (line := found(lines, cell)) is not None}
        old = {cell: line for cell in mine if cell not in known and (line := outdated(lines, cell)) is not None}
        if not any(cell.liars for cell in known | old):
            parts.append(f"**Dirichlet {alpha}, {liars} of {CLIENTS} sites lie**: not run yet.\n")
            continue
        head = ["attack", *(COLUMNS[name].told for name in columns)]
        rows = [head, ["---", *["--:"] * len(columns)]]
        for name, attack in ATTACKS.items():
            rows += [
                [
                    attack.told,
                    *(
                        entry(known, mine, name, column) or entry(old, mine, name, column, "\\*") or "not run"
                        for column in columns
                    ),
                ]
            ]
        part = [f"**Dirichlet {alpha}, {liars} of {CLIENTS} sites lie**", ""]
        part += ["| " + " | ".join(row) + " |" for row in rows]
        asked = [cell for cell in mine if cell.column in columns]
        ran = sum(cell in known for cell in asked)
        part += ["", rf"Run with this code: {ran} of {len(asked)} cells. \*: run with older code.", ""]
        parts.append("\n".join(part))
    parts.append(claims(lines))
    machines = sorted({line["machine"] for line in lines if "machine" in line})
    return "\n".join([*parts, *(f"Run on: {told}." for told in machines), ""])


def claims(lines: Sequence[Mapping[str, Any]]) -> str:
    """What a claim wins where sites' labels differ most, by how many equal shares it may count for."""
    every = [cell for cell in cells() if cell.alpha == min(ALPHAS) and cell.attack in CLAIMS and cell.liars < 2]
    known = {cell: line for cell in every if (line := found(lines, cell)) is not None}
    shares = [f"{ratio:g} equal share{'s' * (ratio > 1)}" for ratio in (*RATIOS, 3)]
    rows = [
        [share, *(entry(known, every, attack, column) or "not run" for attack in CLAIMS)]
        for share, column in zip(shares, (*NARROWER, *GUARDED), strict=True)
    ]
    head = f"**Dirichlet {min(ALPHAS)}, the default under `clip`, by `server.max_share_ratio`**\n"
    told = [f"| {' | '.join(row)} |" for row in rows]
    about = f"| a site counts for at most | {' | '.join(ATTACKS[attack].told for attack in CLAIMS)} |"
    return "\n".join([head, about, "| --- | --: | --: |", *told, ""])


def entry(
    known: Mapping[Cell, Mapping[str, Any]], asked: Sequence[Cell], attack: str, column: str, mark: str = ""
) -> str:
    """Mean accuracy over seeds in %, how many seeds if not all, and for the trigger how often it works; "": unknown."""
    lines = [known[cell] for cell in asked if (cell.attack, cell.column) == (attack, column) and cell in known]
    scores = [line["accuracy"] for line in lines if line["accuracy"] is not None]
    if not scores:
        return "ended" if lines else ""
    text = f"{100 * statistics.fmean(scores):.1f}"
    if attack == "trigger":
        text += f", works {100 * statistics.fmean(line['success'] for line in lines):.0f} %"
    return text + mark if len(scores) == SEEDS else f"{text}{mark} ({len(scores)})"


if __name__ == "__main__":
    main()
