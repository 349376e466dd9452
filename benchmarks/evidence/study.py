"""Make the runs of a study: each part of it is one call of `fedalign compare`, kept and gone on with.

    python benchmarks/evidence/study.py defaults --seeds 3 --only tasks            # after data.py and start.py
    python benchmarks/evidence/study.py --list                                  # all studies, their parts and runs

    short      a first look at three regimes: few examples, few steps
    drift      more examples and local steps between averages, at two learning rates: where clients really part
    confirm    what drift found, asked again: seeds not used before, every test row, the rate chosen on validation data
    beyond     token rows and load weights, every line at the learning rate that suits it
    routers    which half of the router side costs most where labels differ
    defaults   use alone (by_use) against the paper's method and FedAvg: more seeds, regimes, kinds, few bytes
    pretrained a real model, upcycled SmolLM2, for very few steps
    candidates ideas that are not part of the package, see candidates/
    ablation   the paper's five steps under label skew; for tasks see `confirm`
    choices    what merges.py cannot say of the paper's gaps: forms of the pull, momentum of its target, SGD
    losses     IID data, two clients, many clients of which a tenth is asked, tiny clients
    shift      losses corrected for labels that clients share unevenly: label_shift, FedLC, FedRS
    rounds     more rounds, to count those until FedMoE's final accuracy
    today      what `fedalign run` does by default, over 25 rounds of one local epoch as in the paper

Results are in OUT/STUDY/PART: those of `compare`, and about.json. The learning rate of a part is that of three which
scores best for FedAvg after the last round on a validation part, with a seed that is used for nothing else; all
algorithms of the part use it. Measured runs keep their numbers and lose their models.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from measure import measure, prune
from rich.console import Console

from fedalign.compare.comparison import Comparison
from fedalign.compare.folder import ComparisonFolder
from fedalign.compare.plan import Choice, ablation, cells, make_design, parse_algorithms, parse_seeds
from fedalign.config.toml import load_config
from fedalign.files import write_text
from fedalign.moe.load import quiet
from fedalign.server.results import RunFolder, read_history, versions
from fedalign.server.scores import merit

MAIN = ("fedavg", "fedprox", "fedmoe", "fedalign_paper")
OURS = "by_use"
RATE = "training.learning_rate"
RATES = ("3e-4", "1e-3", "1e-4")
RATED = "fedavg"
RATE_SEED = "1000,"
FIRST = ("label_skew", "tasks", "domain")

COMMON = (
    "run.rounds=10",
    "run.device=cpu",
    "run.threads=1",
    "data.kind=classification",
    "data.max_train=600",
    "data.max_test=400",
    "clients.count=10",
    "clients.min_examples=5",
    "training.batch_examples=4",
    "tracking.loggers=[]",
    "tracking.health=full",  # measure.py looks at every line's similarities
)
CHOICES = ("data.kind=multiple_choice", "evaluation.every=5", "data.max_test=200", "evaluation.clients=false")
REGIMES: Mapping[str, tuple[str, ...]] = {  # folder of the data, and what is set
    "label_skew": ("label_skew", "clients.partition=dirichlet", "clients.alpha=0.1"),
    "label_skew_0.5": ("label_skew", "clients.partition=dirichlet", "clients.alpha=0.5"),
    "label_skew_1.0": ("label_skew", "clients.partition=dirichlet", "clients.alpha=1.0"),
    "iid": ("label_skew", "clients.partition=iid"),
    "domain": ("domain", "clients.partition=natural", "data.max_train=800"),
    "tasks": ("tasks", "clients.partition=natural"),
    "subjects": ("subjects", "clients.partition=natural", *CHOICES),
    "activities": ("activities", "clients.partition=natural", *CHOICES),
}


@dataclass(frozen=True)
class Part:
    """One comparison of a study."""

    name: str
    regime: str
    algorithms: tuple[str, ...]  # as on the command line; "ablation" for the paper's rows
    kind: str = "full"
    epochs: int = 1
    settings: tuple[str, ...] = ()
    rate: str | None = None  # None: that which suits FedAvg; "each": every line has its own
    rates: tuple[str, ...] = RATES  # to choose from

    @property
    def choices(self) -> list[Choice]:
        """Lines of its tables."""
        return ablation() if self.algorithms == ("ablation",) else parse_algorithms(self.algorithms)


def short() -> Iterator[Part]:
    """A first look."""
    few = ("run.rounds=6", "training.batch_examples=8")
    for regime in FIRST:
        yield Part(f"{regime}-full-1", regime, MAIN, settings=few)


LONG = ("run.rounds=5", "training.batch_examples=8", "data.max_train=2000", "evaluation.clients=false")
FULL_TEST = (*LONG, "data.max_test=2000")
TOPICS = 'data.labels=["world", "sports", "business", "technology"]'
QUESTIONS = (*LONG, "data.max_train=1000", "data.max_test=300", "evaluation.every=1")  # four texts each


def drift() -> Iterator[Part]:
    """50 local steps a round; not tuned, since what suits FedAvg may be just what keeps clients from drifting."""
    lines = ("fedavg", "fedalign_paper", "fedalign_paper:experts=average")
    pulls = ("reg_strength=0.0", "overlap=relative", "adaptive_strength=false", "granularity=batch:form=bregman")
    every = (*lines, *(f"fedalign_paper:{pull}" for pull in pulls))
    yield Part("label_skew-full-2-3e-4", "label_skew", every, "full", 2, LONG, rate="3e-4")
    yield Part("tasks-full-2-3e-4", "tasks", (*lines, f"fedalign_paper:{pulls[1]}"), "full", 2, LONG, rate="3e-4")
    yield Part("label_skew-full-2-1e-4", "label_skew", lines, "full", 2, LONG, rate="1e-4")


DEFAULT = "fedalign_moe"
PULLED = f"{DEFAULT}:reg_strength=0.1"  # the default of before
EXPERT_SIDE = "fedalign_paper:gate=average:reg_strength=0.0"  # routers as under FedAvg
ROWS_ALONE = f"{OURS}:experts=average"  # FedAvg but for token rows
LETTER = "granularity=token:form=kl:size_weighted=false"  # how the paper's router side was measured, to the letter
ALIGNED = f"{OURS}:gate=rows:reg_strength=0.1:{LETTER}"  # that, ours of the rest


def confirm() -> Iterator[Part]:
    """Written before its first run: baselines, the paper's ablation, each side alone; then token rows, few bytes."""
    plain = "fedalign_paper:experts=average:adaptive_strength=false"
    lines = (
        *("fedavg", "fedalign_paper", EXPERT_SIDE, "fedalign_paper:experts=average"),
        *(plain, f"{plain}:gate_weights=uniform"),
        *("fedprox", "fedmoe"),
    )
    small = tuple(f"fedalign_paper:min_agreement=0.8:wire.dtype={dtype}" for dtype in ("bfloat16", "int8"))
    yield Part("tasks", "tasks", (*lines, ROWS_ALONE, OURS, *small), "full", 2, FULL_TEST)


def beyond() -> Iterator[Part]:
    """What merging the same updates found (merges.py), over whole runs, each line with its own learning rate.

    Later lines have the rate that FedAvg chose: experts alone, with token rows, and with a pull that cannot be fled.
    """
    each = ("fedavg", "fedalign_paper", ROWS_ALONE, ALIGNED, "fedalign_paper:vocabulary=tokens")
    later = (EXPERT_SIDE, OURS, f"{ALIGNED}:overlap=relative")
    late = tuple(f"{line}:{RATE}=3e-4" for line in later)
    yield Part("label_skew", "label_skew", (*each, *late), "full", 2, FULL_TEST, rate="each")


def routers() -> Iterator[Part]:
    """Which half of the router side costs most under label skew: rows by consistency, or the pull while training."""
    sized = LETTER.replace("false", "true")
    ways = (f"reg_strength=0.1:{LETTER}", *(f"gate=rows:{how}" for how in (LETTER, sized)))
    lines = ("fedavg", OURS, ALIGNED, *(f"{OURS}:{way}" for way in (*ways, f"gate=rows:reg_strength=0.1:{sized}")))
    yield Part("label_skew", "label_skew", lines, "full", 2, FULL_TEST, rate="3e-4")


def defaults() -> Iterator[Part]:
    """Use alone, against the paper's method: more seeds, and regimes that chose nothing.

    Lines at a rate of their own choice, then some at the rate that FedAvg chose.
    """
    pair = ("fedalign_paper", OURS)
    each = ("fedavg", *pair)
    late = tuple(f"{line}:{RATE}=3e-4" for line in ("fedmoe", OURS))
    yield Part("label_skew", "label_skew", (*each, *late), "full", 2, FULL_TEST, rate="each")
    late = tuple(f"{line}:{RATE}=1e-3" for line in ("fedmoe", OURS, ALIGNED))
    yield Part("tasks", "tasks", (*each, *late), "full", 2, FULL_TEST, rate="each")
    for alpha in ("0.5", "1.0"):
        yield Part(f"label_skew_{alpha}", f"label_skew_{alpha}", each, "full", 2, FULL_TEST, rate="3e-4")
    lines = (*each, *(f"{line}:{RATE}=1e-3" for line in ("fedmoe", OURS, ROWS_ALONE)))
    yield Part("domain", "domain", lines, "full", 2, FULL_TEST, rate="each")
    for kind in ("moe", "experts"):
        yield Part(f"tasks-{kind}", "tasks", each, kind, 2, FULL_TEST, rate="1e-3")
    yield Part("tasks-4 epochs", "tasks", each, "full", 4, FULL_TEST, rate="1e-3")
    for regime in ("subjects", "activities"):
        yield Part(regime, regime, each, "full", 2, QUESTIONS, rate="3e-4")
    for regime, rate in (("label_skew", "3e-4"), ("tasks", "1e-3")):
        lines = ("fedavg", OURS, f"{OURS}:wire.dtype=int8")
        yield Part(f"{regime}-bytes", regime, lines, "full", 2, FULL_TEST, rate=rate)


def pretrained() -> Iterator[Part]:
    """A real model at the size that two cores can do: `base_model.py` first, then `--start runs/smollm2-moe`."""
    sizes = ("clients.count=5", "data.max_train=240", "data.max_test=200", "run.rounds=4", "training.batch_examples=8")
    lines = ("fedavg", OURS, "fedalign_paper")
    yield Part("label_skew", "label_skew", lines, "full", 1, (*sizes, "evaluation.clients=false"), rate="3e-4")


def candidates() -> Iterator[Part]:
    """What candidates/ holds: `pip install benchmarks/evidence/candidates` first."""
    yield Part("tasks", "tasks", ("fedalign_paper", "align_by_layer"), "full", 2, FULL_TEST, rate="1e-3")
    halving, long = f"{PULLED}:vocabulary_half_life=5", (*FULL_TEST, "run.rounds=25")
    yield Part("tasks-mixed rows", "tasks", ("align_mixed_rows:mixed=0.3", halving), "full", 1, long, rate="1e-3")
    yield Part("domain", "domain", (halving,), "full", 1, long, rate="1e-3")
    yield Part("label_skew", "label_skew", (halving,), "full", 1, (*long, TOPICS), rate="3e-4")


def ablations() -> Iterator[Part]:
    """The paper's table; that of tasks is in `confirm`."""
    yield Part("label_skew", "label_skew", ("ablation",), "full", 2, FULL_TEST, rate="3e-4")


PULLS = ("overlap=relative", "granularity=batch:form=bregman", "target_momentum=0.5")


def alternatives() -> Iterator[Part]:
    """One option of the paper's method changed at a time, where merges.py cannot say; then SGD on the clients."""
    lines = ("fedavg", "fedalign_paper", *(f"fedalign_paper:{pull}" for pull in PULLS))
    yield Part("tasks", "tasks", lines, "full", 2, FULL_TEST, rate="1e-3")
    sgd = Part("tasks-sgd", "tasks", ("fedavg", "fedalign_paper", OURS), "full", 2)
    yield replace(sgd, settings=(*FULL_TEST, "training.optimizer=sgd"), rates=("1", "3e-1", "1e-1"))


def losses() -> Iterator[Part]:
    """Where aligning may harm. One learning rate for all: there is too little data to choose by."""
    lines = ("fedavg", "fedalign_paper", OURS)
    few = ("clients.min_examples=2", "clients.held_out=0.0", "evaluation.clients=false")
    every = ("training.batch_examples=8", "data.max_test=1000")
    yield Part("iid", "iid", lines, settings=every, rate="3e-4")
    yield Part("two clients", "label_skew", lines, settings=("clients.count=2", *every), rate="3e-4")
    yield Part("tiny clients", "iid", lines, settings=("data.max_train=80", *few, *every), rate="3e-4")
    for count in (50, 100):
        sizes = (f"clients.count={count}", "clients.sample=0.1", f"data.max_train={20 * count}", "clients.alpha=0.5")
        settings = (*sizes, *few, *every, "run.rounds=20", "evaluation.every=2")
        yield Part(f"{count} clients", "label_skew", lines, settings=settings, rate="3e-4")


def rounds() -> Iterator[Part]:
    """Speed."""
    for regime in ("domain", "tasks"):
        yield Part(regime, regime, ("fedavg", "fedmoe", OURS), "full", 2, (*FULL_TEST, "run.rounds=12"), rate="1e-3")


def shift() -> Iterator[Part]:
    """Losses that know how labels are shared out, under FedAvg; then label_shift under others, and under LoRA."""
    own = tuple(f"fedavg:training.loss={loss}" for loss in ("label_shift", "fedlc", "fedrs"))
    others = tuple(line + loss for line in (OURS, DEFAULT) for loss in ("", ":training.loss=label_shift"))
    settings = (*LONG, "data.max_test=1000", TOPICS)
    yield Part("label_skew", "label_skew", ("fedavg", *own, *others), "full", 1, settings, rate="5e-4")
    yield Part("label_skew-lora", "label_skew", ("fedavg", *own), "lora", 1, settings, rate="1e-3")


def today() -> Iterator[Part]:
    """The default and what it is measured against; then pooled training, which says whether a regime counts.

    Rates are those that FedAvg had in `defaults` under label skew and with tasks, and in `rounds` with domains.
    """
    lines = ("fedavg", "fedmoe", OURS, DEFAULT, PULLED)
    parts = tuple(f"{PULLED}:{other}" for other in ("experts=load", "gate=average", "vocabulary=average"))
    corrected = tuple(f"{line}:training.loss=label_shift" for line in ("fedavg", DEFAULT))
    rates = {"label_skew": "3e-4", "tasks": "1e-3", "domain": "1e-3"}
    settings = (*FULL_TEST, "run.rounds=25")
    for regime, rate in rates.items():
        if regime == "label_skew":
            yield Part(regime, regime, (*lines, *parts, *corrected), "full", 1, (*settings, TOPICS), rate=rate)
        else:
            yield Part(regime, regime, lines, "full", 1, settings, rate=rate)
    for regime, rate in rates.items():
        yield Part(f"{regime}-pooled", regime, ("centralised",), "full", 1, settings, rate=rate)


STUDIES = {
    "short": short,
    "drift": drift,
    "confirm": confirm,
    "beyond": beyond,
    "routers": routers,
    "defaults": defaults,
    "pretrained": pretrained,
    "candidates": candidates,
    "ablation": ablations,
    "choices": alternatives,
    "losses": losses,
    "rounds": rounds,
    "shift": shift,
    "today": today,
}


def overrides(part: Part, data: Path, start: str) -> list[str]:
    """The configuration that all runs of a part have in common; later settings win."""
    folder, *own = REGIMES[part.regime]
    return [
        *COMMON,
        f'model.path="{start}"',
        f'data.train="{data / folder / "train.jsonl"}"',
        f'data.test="{data / folder / "test.jsonl"}"',
        *own,
        f"tuning.kind={part.kind}",
        f"training.epochs={part.epochs}",
        *part.settings,
    ]


@dataclass(frozen=True)
class Place:
    """Where things are, and how many runs go side by side."""

    out: Path
    data: Path
    start: str
    jobs: int

    def run(self, folder: Path, part: Part, seeds: str, settings: Sequence[str]) -> ComparisonFolder:
        """One comparison, as far as it is not there yet. Lines and seeds that are there stay part of it.

        Raises:
            SystemExit: Some of its runs failed.
        """
        base = load_config(None, [*overrides(part, self.data, self.start), *settings])
        known = ComparisonFolder(folder)
        before = known.read() if known.design.exists() else None
        choices, asked = [*part.choices], parse_seeds(seeds)
        if before is not None:
            choices += [choice for choice in before.choices if choice not in choices]
            asked = (*before.seeds, *(seed for seed in asked if seed not in before.seeds))
        design = make_design(base, choices, {}, asked, tune=False)
        comparison = Comparison(design, ComparisonFolder(folder), self.jobs, Console(), print)
        outcome = comparison.run()
        if outcome.failed:
            raise SystemExit(f"{folder}: {outcome.failed}")
        return comparison.folder

    def rates(self, part: Part, lines: Sequence[str]) -> dict[str, str]:
        """The learning rate that suits each line best here, chosen once for all studies."""
        name = "-".join([part.regime, part.kind, str(part.epochs), *(s.partition("=")[2] for s in part.settings)])
        tried = tuple(f"{line}:{RATE}={rate}" for line in lines for rate in part.rates)
        look = ("evaluation.part=validation", "data.validation=0.5", "evaluation.clients=false")
        twice = 2 * load_config(None, overrides(part, self.data, self.start)).data.max_train
        trial = replace(part, name=name, algorithms=tried)
        folder = self.run(self.out / "rates" / name, trial, RATE_SEED, [*look, f"data.max_train={twice}"])
        scored = {cell.choice.label: folder.run(cell, "runs") for cell in cells(folder.read())}
        score = {label: merit(read_history(run)[-1], "accuracy") for label, run in scored.items()}
        for run in scored.values():
            prune(run.path)
        return {line: max(part.rates, key=lambda rate: score[f"{line}:{RATE}={rate}"] or -1e9) for line in lines}

    def fitted(self, part: Part) -> Part:
        """The part with its learning rate, or with one for each of its lines that has none yet."""
        if part.rate == "each":
            chosen = self.rates(part, [line for line in part.algorithms if RATE not in line])
            lines = [line if RATE in line else f"{line}:{RATE}={chosen[line]}" for line in part.algorithms]
            return replace(part, algorithms=tuple(dict.fromkeys(lines)), rate=chosen[part.algorithms[0]])
        return part if part.rate else replace(part, rate=self.rates(part, [RATED])[RATED])

    def make(self, study: str, part: Part, seeds: str) -> None:
        """Runs, measures, and what is to be known about them."""
        started = time.perf_counter()
        folder = self.out / study / part.name.replace(" ", "_")
        part = self.fitted(part)
        settings = [f"training.learning_rate={part.rate}"]
        made = self.run(folder, part, seeds, settings)
        for summary in sorted(folder.glob("runs/**/summary.json")):
            measure(summary.parent)
            prune(summary.parent)
        for summary in folder.glob("tune/**/summary.json"):
            prune(summary.parent)
        seconds = sum(
            json.loads(RunFolder(made.run(cell, "runs").path).summary.read_text(encoding="utf-8"))["seconds"]
            for cell in cells(made.read())
            if made.run(cell, "runs").summary.exists()
        )
        about = {
            "part": asdict(part) | {"choices": [choice.label for choice in part.choices]},
            "learning_rate": part.rate,
            "start": self.start,
            "machine": f"{platform.processor() or platform.machine()}, {platform.system()}, one thread a run",
            "versions": versions(),
            "run_seconds": seconds,
        }
        write_text(folder / "about.json", json.dumps(about, indent=1) + "\n")
        print(
            f"{study}/{part.name}: {seconds:.0f} s of rounds, {time.perf_counter() - started:.0f} s this time",
            flush=True,
        )


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=STUDIES)
    parser.add_argument("--seeds", default="5", help="how many, or which, as for `fedalign compare`")
    parser.add_argument("--only", default="*", help="parts of this name, or pattern: tasks, label_skew*")
    parser.add_argument("--lines", nargs="+", help="of these parts, these lines alone, as fedavg:training.loss=fedlc")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--data", type=Path, default=Path("runs/evidence/data"), help="what data.py wrote")
    parser.add_argument("--start", default="runs/evidence/start", help='a model folder, or "demo"')
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="tell what there is, and stop")
    args = parser.parse_args()
    if args.list:
        for study, make in STUDIES.items():
            for part in make():
                print(f"{study:11}{part.name:24}{len(part.choices):3} lines, {part.epochs} epochs")
        return
    if args.study is None:
        parser.error(f"which study? Choose one of: {', '.join(STUDIES)}")
    quiet()
    torch.set_num_threads(1)
    place = Place(args.out, args.data, args.start, args.jobs)
    for part in STUDIES[args.study]():
        if not fnmatch(part.name, args.only):
            continue
        if strange := set(args.lines or ()) - {*part.algorithms}:
            parser.error(f"--lines {min(strange)}: {part.name} has {', '.join(part.algorithms)}")
        lines = tuple(line for line in part.algorithms if line in (args.lines or part.algorithms))
        place.make(args.study, replace(part, algorithms=lines), args.seeds)


if __name__ == "__main__":
    main()
