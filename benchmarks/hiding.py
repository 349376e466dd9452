"""What masks and noise hide: three attacks on one site of the demo, on what a coordinator sees with each setting.

    python benchmarks/hiding.py                  # goes on where benchmarks/results/hiding.jsonl stops
    python benchmarks/hiding.py --table          # writes the table into docs/noise.md

**Attacks.** The attacker has the weights that the round began with, and all examples of the site but one.

- *tokens*: which tokens stand in the site's texts, by the length of the embeddings' rows. AUC: how often one that does
  ranks before one that stands in other sites' texts alone; 50 % is a guess.
- *label*: which of two labels one example has. The attacker trains in both worlds, and takes the one whose update lies
  nearer to what it sees, along the line between them. Share of right answers; 50 % is a guess.
- *there*: whether one example is there at all, which holds a word that no other has: likewise, of that word's row.

**Views.** Nothing of the site, but the mean of other sites' updates; the site's update as it is sent; its masked
message, read as an update; the sum over 3 or 10 sites, off which the attacker takes that mean; the sum over 3, where
the two others help. A sum is that of floats: a masked sum differs from it by rounding alone, which tests hold. Each
update is one step of SGD with all examples, the most that an attacker can wish for. With noise, (epsilon, 1e-5) of one
round bounds *there* by e^epsilon / (1 + e^epsilon), where a coin was tossed for it. *label* changes an example, which
is two steps of that. Coins are balanced: each world is true for half of the targets, in an order that is drawn, so that
one answer to all is right on half of them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from unittest import mock

import torch
from scipy.stats import rankdata
from torch import Tensor

from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.noisy import PrivateFit
from fedalign.client.spent import Privacy, PrivacyLedger
from fedalign.client.trainer import Trainer
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.data.encode import Encoded
from fedalign.data.formats import Example, load_examples
from fedalign.federation.masked_site import MaskedSite, Terms
from fedalign.federation.masks import Masks, Once, public_key
from fedalign.maths.fixed_point import MOST_CLIENTS
from fedalign.maths.rounding import pack, unpack
from fedalign.moe.load import quiet
from fedalign.protocol import (
    EMBEDDINGS,
    LOSS,
    Broadcast,
    ParameterGroup,
    Request,
    Shares,
    Statistics,
    Totals,
)
from watching import machine

REVISION = 2  # goes up when what a line means changes
EXAMPLES, OTHERS = 24, 20  # of a site; sites beside it, half of them to learn from
SITE, PEERS = "site-0", ("site-1", "site-2")
SETTINGS = [
    "algorithm.name=fedavg",
    "evaluation.clients=false",
    "training.optimizer=sgd",
    f"training.batch_examples={100 * EXAMPLES}",
    "training.batch_tokens=1000000",
    "training.epochs=1",
    "run.rounds=1",
]
ATTACKS = ("tokens", "label", "there")
NOTHING, ALONE, MESSAGE, FEW, MANY, HELPED = (
    "other sites' updates alone",
    "its update",
    "its masked message",
    "sum over 3 sites",
    "sum over 10 sites",
    "sum over 3 sites, the two others help",
)
Found = dict[str, dict[str, list[float]]]  # view -> attack -> of each target


@dataclass
class Lab:
    """A model, and sites that train one step on it.

    Args:
        folder: where sites keep what they keep.
        epsilon: of one round; None: no noise.
        settings: of `--set`, beside those of this script.
        base: the configuration that they are added to; None: all defaults.
    """

    folder: Path
    epsilon: float | None = None
    settings: Sequence[str] = ()
    base: str | None = "demo"
    made: int = 0  # updates

    def __post_init__(self) -> None:
        """Load the model and all examples."""
        noise = [] if self.epsilon is None else [f"privacy.epsilon={self.epsilon}", "privacy.seed=0"]
        self.config: Config = load_config(self.base, [*SETTINGS, *self.settings, *noise])
        self.bench = Workbench.load(self.config)
        self.layout = self.bench.moe.layout
        self.trainer: Trainer = self.bench.trainer()
        self.start = {group: pack(value, "float32", 0) for group, value in self.bench.moe.read().items()}
        self.examples = load_examples(self.config.data.train, self.config.data, "train", 0)
        encoded = self.encode(self.examples)
        self.used = {token for one in encoded for token in one.input_ids}
        rows = self.bench.moe.model.get_input_embeddings().weight.shape[0]
        self.free = max(token for token in range(rows) if token not in self.used)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """As the model reads them."""
        return list(self.bench.encoder.encode(examples))

    def update(self, examples: Sequence[Encoded], *, noise: bool = True) -> tuple[Tensor, Statistics]:
        """All values of a site's update, one after another, and its report; each call has noise of its own."""
        self.made += 1
        name = f"site-{self.made}"
        memory = ClientMemory(self.folder / name)
        privacy = None
        if self.epsilon is not None:
            privacy = Privacy(self.config, PrivacyLedger(memory.folder), "here", memory.folder, name)
        every = [replace(one, example=number) for number, one in enumerate(examples)]
        with mock.patch.object(PrivateFit, "_add_noise", PrivateFit._add_noise if noise else lambda *_: None):
            report = self.trainer.train(
                ClientData(name, every, None, memory, privacy=privacy), Broadcast(1, self.start)
            )
        groups = [group for group in self.layout.groups if self.layout.sizes[group]]
        sent = memory.hand_over(name, Request(name, 1, tuple(groups))).groups
        return torch.cat([unpack(sent[group]) for group in groups]), report

    def split(self, flat: Tensor) -> dict[ParameterGroup, Tensor]:
        """By group."""
        sizes = {group: self.layout.sizes[group] for group in self.layout.groups if self.layout.sizes[group]}
        return dict(zip(sizes, flat.split(list(sizes.values())), strict=True))

    def row(self, token: int) -> slice:
        """Where a token's row of the embeddings lies in an update."""
        (rows,) = [rows for rows in self.layout.token_rows if rows.group == EMBEDDINGS]
        groups = self.layout.groups
        before = sum(self.layout.sizes[group] for group in groups[: groups.index(EMBEDDINGS)])
        start = before + rows.start + token * rows.width
        return slice(start, start + rows.width)

    def message(self, flat: Tensor, report: Statistics, keys: random.Random) -> Tensor:
        """The numbers that a site sends in place of its update, masked among three."""
        private = {name: keys.randbytes(32) for name in (SITE, *PEERS)}
        once = Once(SITE, "hiding", 3, MOST_CLIENTS)
        masks = Masks(SITE, once.run, private[SITE], 3)
        masks.meet({name: public_key(private[name]) for name in PEERS})
        terms = Terms(self.layout, Shares(), 3, {LOSS} if self.epsilon is None else set(), seed=0, settings="")
        site = Held(SITE, ClientMemory(self.folder), terms, masks, once)
        site.update = self.split(flat)
        site.count(report, "broadcast", (SITE, *PEERS))
        totals = Totals(1, (SITE, *PEERS), dict(site.counts))
        read = dict[str, Tensor]()
        for told in site.conceal(totals, totals.among, list(site.update)):
            read |= told.residues
        return torch.cat([read[str(group)].float() for group in site.update])


class Held(MaskedSite):
    """A site whose update lies in memory."""

    update: dict[ParameterGroup, Tensor]

    def _update(self, round: int) -> dict[ParameterGroup, Tensor]:
        return self.update


@dataclass(frozen=True)
class Target:
    """A site, and the one example of it that the attacker does not know."""

    known: list[Encoded]
    one: Encoded  # as it is
    other: Encoded  # with another label
    word: Encoded  # with a word that no other has


def target(lab: Lab, chosen: Sequence[Example], draw: random.Random) -> Target:
    """Of a site's examples the first is the one."""
    one, *known = chosen
    wrong = draw.choice([choice for choice in one.choices if choice != one.answer])
    first, other = (lab.encode([example])[0] for example in (one, replace(one, answer=wrong)))
    word = replace(first, input_ids=[lab.free, *first.input_ids], labels=[-100, *first.labels])
    return Target(lab.encode(known), first, other, word)


def attacked(lab: Lab, targets: int, others: int = OTHERS, each: int = EXAMPLES) -> Found:
    """All attacks on all views.

    Args:
        lab: the model.
        targets: sites that are attacked, one after another.
        others: sites beside them, half of which the attacker knows.
        each: examples of a site.
    """
    draw = random.Random(0)
    pool = lab.examples.copy()
    draw.shuffle(pool)
    sites = [lab.encode(pool[start : start + each]) for start in range(0, others * each, each)]
    updates = [lab.update(site)[0] for site in sites]
    usual = torch.stack(updates[others // 2 :]).mean(0)  # known to the attacker
    beside = range(others // 2)
    found: Found = defaultdict(lambda: defaultdict(list))
    coins = {attack: [number % 2 for number in range(targets)] for attack in ATTACKS[1:]}
    for tossed in coins.values():
        draw.shuffle(tossed)
    for number in range(targets):
        one = target(lab, draw.sample(pool[others * each :], each), draw)
        worlds = {
            "label": ([one.one, *one.known], [one.other, *one.known]),
            "there": ([one.word, *one.known], one.known),
        }
        for attack, pair in worlds.items():
            shadows = [lab.update(world, noise=False)[0] for world in pair]
            truth = coins[attack][number]
            own, report = lab.update(pair[truth])
            peers = draw.sample(beside, min(9, len(beside)))
            for view, (seen, weight) in views(lab, own, report, [updates[n] for n in peers], usual, draw).items():
                between, middle = shadows[0] - shadows[1], weight * (shadows[0] + shadows[1]) / 2
                part = lab.row(lab.free) if attack == "there" else slice(None)
                guess = 0 if float((seen - middle)[part].double() @ between[part].double()) > 0 else 1
                found[view][attack].append(float(guess == truth))
                if attack == "label":
                    there = {token for encoded in pair[truth] for token in encoded.input_ids}
                    found[view]["tokens"].append(ranked(lab, seen, there))
    return {view: dict(by) for view, by in found.items()}


def views(
    lab: Lab, own: Tensor, report: Statistics, others: Sequence[Tensor], usual: Tensor, draw: random.Random
) -> dict[str, tuple[Tensor, float]]:
    """What is seen of a site's update, others' part of it taken off as well as can be, and its weight in it."""
    seen = {NOTHING: (usual, 0.0), ALONE: (own, 1.0), MESSAGE: (lab.message(own, report, draw), 1.0)}
    for view, beside in ((FEW, others[:2]), (MANY, others)):
        weight = 1 / (1 + len(beside))
        seen[view] = weight * (own + sum(beside)) - (1 - weight) * usual, weight
    seen[HELPED] = own / 3, 1 / 3  # what they know is taken off whole
    return seen


def ranked(lab: Lab, seen: Tensor, there: set[int]) -> float:
    """AUC of the lengths of embeddings' rows: of tokens that are there before those of other sites alone."""
    tokens = sorted(lab.used)
    rank = rankdata([float(seen[lab.row(token)].norm()) for token in tokens])
    right = [place for place, token in zip(rank, tokens, strict=True) if token in there]
    wrong = len(tokens) - len(right)
    return float((sum(right) - len(right) * (len(right) + 1) / 2) / (len(right) * wrong))


# --------------------------------------------------------------------------------------------------------------- table

RESULTS = Path(__file__).parent / "results" / "hiding.jsonl"
DOCUMENT = Path(__file__).parents[1] / "docs" / "noise.md"
BEGIN, END = "<!-- written by benchmarks/hiding.py -->", "<!-- until here -->"


def read() -> list[dict[str, object]]:
    """All stored lines of this revision."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    return [line for line in map(json.loads, lines) if line["revision"] == REVISION]


def table(lines: Sequence[Mapping[str, object]]) -> str:
    """A row for each view with and without noise: the share of right answers in %, and its standard error."""
    rows = ["| the attacker sees | noise | tokens | label | there |", "| --- | --- | --: | --: | --: |"]
    for line in lines:
        noise = "none" if line["epsilon"] is None else f"epsilon {line['epsilon']:g}"
        blind = dict.fromkeys(ATTACKS[1:], "a guess") if line["view"] == NOTHING else {}
        rows.append(f"| {line['view']} | {noise} | {' | '.join(str({**line, **blind}[one]) for one in ATTACKS)} |")
    told = {f"{line['targets']} targets, sites of {EXAMPLES} examples. Run on: {line['machine']}." for line in lines}
    return "\n".join([*rows, "", *sorted(told), ""])


def shown(of: Sequence[float]) -> str:
    """Mean and standard error in %.

    >>> shown([1.0, 0.0, 1.0, 0.0])
    '50 ± 25'
    """
    mean = fmean(of)
    error = math.sqrt(fmean((one - mean) ** 2 for one in of) / len(of))
    return f"{100 * mean:.0f} ± {100 * error:.0f}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=40)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[2.0], help="beside no noise")
    parser.add_argument("--table", action="store_true", help="write what there is into docs/noise.md, and end")
    args = parser.parse_args()
    if args.table:
        text = DOCUMENT.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        made = table(read())
        DOCUMENT.write_text(f"{before}{BEGIN}\n{made}{END}{rest.partition(END)[2]}", encoding="utf-8")
        return
    quiet()
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    for epsilon in (None, *args.epsilons):
        about = {"epsilon": epsilon, "targets": args.targets, "revision": REVISION}
        if any(line.items() >= about.items() for line in read()):
            continue
        with tempfile.TemporaryDirectory(prefix="fedalign-hiding-") as folder:
            found = attacked(Lab(Path(folder), epsilon), args.targets)
        about["machine"] = machine("torch", "transformers", "cryptography")
        with RESULTS.open("a", encoding="utf-8") as file:
            for view, by in found.items():
                told = {attack: shown(by[attack]) for attack in ATTACKS}
                file.write(json.dumps({"view": view, **told, **about}) + "\n")
                print(view, epsilon, told, flush=True)


if __name__ == "__main__":
    main()
