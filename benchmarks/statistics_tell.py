"""How well the statistics of one site tell what it holds: its labels' shares, topics, language, a small subgroup.

    python benchmarks/statistics_tell.py --out runs/statistics-tell            # goes on where it stopped
    python benchmarks/statistics_tell.py --out runs/statistics-tell --table    # writes docs/what-statistics-tell.md

Sites are simulated: each draws a mix, and its rows by that mix. The attacker knows the model, and has rows of the same
kind but none of the site's: rows are cut into halves, sites of one half teach, sites of the other are told, and back.
Shares are told by ridge regression (R2, all classes together), presence by logistic regression (AUC). Penalties are
chosen among sites that teach. What is told is the mix that a site draws from, so that even one who had the site's own
labels errs: `labels` is that one, and what the statistics tell is to be read between chance (0, or 0.5) and it.

`forward`: the statistics of the first round at the start's weights, one forward pass a row, summed for any site;
without directions, norms and loss. `trained`: reports as they are sent, by sites that trained for a round; fewer sites.
`noise`: loads as `[privacy]` sends them, and nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from fedalign.algorithms import ALGORITHMS, make
from fedalign.client.noisy import longest_share, possible
from fedalign.client.workbench import Workbench
from fedalign.config.toml import load_config
from fedalign.data.batches import batches
from fedalign.data.formats import Example, load_examples
from fedalign.data.tokens import TokenCounts
from fedalign.demo import DEMO
from fedalign.errors import UserError
from fedalign.maths.rounding import pack
from fedalign.maths.sketch import Sketch
from fedalign.moe.probe import RoutingProbe, RoutingStatistics
from fedalign.protocol import Broadcast, Statistics
from watching import machine

PAGE = Path(__file__).parents[1] / "docs" / "what-statistics-tell.md"
BEGIN, END = "<!-- written by benchmarks/statistics_tell.py -->", "<!-- until here -->"
CLASSES, SUBGROUP = 8, 0.05  # at most so many classes; the subgroup's share of rows
LANGUAGES = ("en", "de", "fr", "es", "it", "pl")
NAMES = 4  # of a language's text
SECRETS = {
    "labels": "shares of labels",
    "subgroup": f"presence of {SUBGROUP:.0%} rows of one label",
    "language": "mix of languages",
    "topics": "mix of topics in one label",
}
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
THRESHOLDS = ((1, 1), (32, 4), (128, 16))  # min_tokens, min_examples; the second is the default
NOISES = (1.0, 30.0)  # of loads, in shares of an example; the second is the default of privacy.loads_noise
RESAMPLES = 200
ASKS = ("margins", "centroids", "directions", "tokens")  # that are features beside loads and mean routing


def asked() -> dict[tuple[str, ...], list[str]]:
    """Algorithms by what they ask for that tells anything: those that ask for the same are told alike.

    >>> asked()[()][:2]
    ['fedavg', 'fedmoe']
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for name in ALGORITHMS:
        asks = make(name, {}).asks
        if "data" not in asks:
            found.setdefault(tuple(ask for ask in ASKS if ask in asks), []).append(name)
    return dict(sorted(found.items(), key=lambda item: len(item[0])))


def without_directions(asks: Sequence[str]) -> tuple[str, ...]:
    """What of it a forward pass tells."""
    return tuple(ask for ask in asks if ask != "directions")


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Corpus:
    """Rows with a class each, which is what is secret."""

    examples: list[Example]
    class_N: Tensor
    classes: list[str]


def corpus(secret: str, examples: Sequence[Example], each: int, seed: int) -> Corpus:
    """The rows in which a secret is sought, at most `each` of a class.

    Raises:
        UserError: There are no two classes with enough rows.
    """
    if secret == "language":
        pairs = [(one, one.label) for one in names_by_language(seed)]
    elif secret == "topics":
        label, _ = Counter(one.label for one in examples).most_common(1)[0]
        pairs = [(one, one.client) for one in examples if one.label == label]
    else:
        pairs = [(one, one.label) for one in examples]
    common = [name for name, count in Counter(name for _, name in pairs).most_common(CLASSES) if name and count >= 16]
    if len(common) < 2:
        raise UserError(f"{secret}: {len(common)} classes of 16 rows and more in these data: needs two")
    random.Random(seed).shuffle(pairs)
    kept = [(one, k) for k, name in enumerate(common) for one in [o for o, n in pairs if n == name][:each]]
    return Corpus([one for one, _ in kept], torch.tensor([k for _, k in kept]), common)


def names_by_language(seed: int) -> list[Example]:
    """Names of languages, countries and currencies (Unicode's CLDR, in Babel), four to a text: the topic is the same.

    Raises:
        UserError: Babel is not installed.
    """
    if importlib.util.find_spec("babel") is None:
        raise UserError(
            'language: needs Babel, which is not installed. Install: pip install babel. Or leave out "language".'
        )
    from babel import Locale  # noqa: PLC0415 - of the extra dev

    found = []
    for language in LANGUAGES:
        locale = Locale(language)
        names = sorted({*locale.languages.values(), *locale.territories.values(), *locale.currencies.values()})
        random.Random(seed).shuffle(names)
        texts = [", ".join(names[i : i + NAMES]) for i in range(0, len(names) - NAMES + 1, NAMES)]
        found += [Example("", text, label=language) for text in texts]
    return found


# -------------------------------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class Sites:
    """Simulated sites: which rows each drew, the mix (or presence) that it drew by, and its own labels' shares."""

    row_S_N: Tensor  # indices of rows
    target_S_K: Tensor  # shares of the mix; of a subgroup its presence, K = 1
    label_S_K: Tensor  # shares among the rows that were drawn


def draw(secret: str, rows: Corpus, pool: Tensor, sites: int, size: int, seed: int) -> Sites:
    """Sites of `size` rows of a pool, mixes uniform; half of them with the subgroup, which is the rarest class."""
    torch.manual_seed(seed)
    classes = len(rows.classes)
    mix_S_K = torch.distributions.Dirichlet(torch.ones(classes)).sample((sites,))
    target_S_K = mix_S_K
    if secret == "subgroup":
        target_S_K = (torch.arange(sites) % 2 == 1).float().unsqueeze(1)
        mix_S_K[:, -1] = 0
        mix_S_K = normalize(mix_S_K, p=1, dim=1) * (1 - SUBGROUP * target_S_K)
        mix_S_K[:, -1:] = SUBGROUP * target_S_K
    drawn_S_N = mix_S_K.multinomial(size, replacement=True)
    of_class = [pool[rows.class_N[pool] == k] for k in range(classes)]
    row_S_N = torch.empty_like(drawn_S_N)
    for k, members in enumerate(of_class):
        place = drawn_S_N == k
        row_S_N[place] = members[torch.randint(len(members), (int(place.sum()),))]
    label_S_K = torch.nn.functional.one_hot(drawn_S_N, classes).float().mean(1)
    return Sites(row_S_N, target_S_K, label_S_K)


def quarters(rows: Corpus, seed: int) -> list[Tensor]:
    """Four parts of the rows, class by class: two of a half are the attacker's, to choose a penalty by the second."""
    generator = torch.Generator().manual_seed(seed)
    of_class = [(rows.class_N == k).nonzero()[:, 0] for k in range(len(rows.classes))]
    mixed = [members[torch.randperm(len(members), generator=generator)] for members in of_class]
    return [torch.cat([members.tensor_split(4)[part] for members in mixed]) for part in range(4)]


def sites_of_halves(secret: str, rows: Corpus, count: int, size: int, seed: int) -> tuple[Sites, Sites]:
    """Sites of the one half of the rows and of the other; the first `count` // 2 of each are of its first quarter."""
    drawn = [
        draw(secret, rows, part, count // 2, size, seed + 10 * i + size) for i, part in enumerate(quarters(rows, seed))
    ]
    halves = [
        Sites(*(torch.cat([getattr(one, f.name), getattr(two, f.name)]) for f in fields(Sites)))
        for one, two in (drawn[:2], drawn[2:])
    ]
    return halves[0], halves[1]


# --------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Sums:
    """What each row adds to a site's statistics."""

    tokens_N: Tensor
    prob_N_C: Tensor  # C: cells, experts of all layers
    load_N_C: Tensor
    margin_N_C: Tensor
    hidden_N_C_D: Tensor  # sketched; a sketch is linear
    count_N_V: Tensor  # of all token matrices
    cells: tuple[int, int]
    top_k_L: tuple[int, ...]


@torch.no_grad()
def sums(bench: Workbench, examples: Sequence[Example]) -> Sums:
    """One forward pass of each row at the start's weights."""
    moe, width = bench.moe, bench.config.statistics.centroid_width
    layout, hidden = moe.layout, moe.layers[0].hidden
    sketch = Sketch(width, bench.config.run.seed)
    project_H_D = torch.stack([sketch.project(row) for row in torch.eye(hidden)])
    kept: list[tuple[Tensor, ...]] = []
    moe.model.eval()
    with RoutingProbe(moe) as probe:
        for one in examples:
            statistics = RoutingStatistics(layout.layers, layout.experts, hidden)
            counts = TokenCounts(layout.token_rows)
            for batch in batches(bench.encoder.encode([one]), 1 << 30, 1):
                with probe.capture(*batch.masks()) as captured:
                    moe.model(**batch.inputs())
                statistics.update(captured)
                counts.update(batch)
            found = statistics.finish(1, 1)
            load_C = found.load_L_E.flatten()
            kept.append(
                (
                    torch.tensor(float(found.tokens)),
                    found.prob_L_E.flatten() * found.tokens,
                    load_C,
                    found.margin_L_E.flatten() * load_C,
                    found.centroid_L_E_H.flatten(0, 1) @ project_H_D * load_C.unsqueeze(1),
                    counts.finish(1).flatten(),
                )
            )
    tokens, prob, load, margin, centroid, count = (torch.stack(values) for values in zip(*kept, strict=True))
    cells = (layout.layers, layout.experts)
    return Sums(tokens, prob, load, margin, centroid, count, cells, layout.top_k_L)


def forward_features(seen: Sums, sites: Sites, min_tokens: int, min_examples: int) -> dict[str, Tensor]:
    """What sites would send of these sums, by what is asked for; "always" is loads and mean routing."""
    rows, size = len(seen.tokens_N), sites.row_S_N.shape[1]
    times_S_N = torch.zeros(len(sites.row_S_N), rows).scatter_add_(
        1, sites.row_S_N, torch.ones(len(sites.row_S_N), size)
    )
    tokens_S_1 = (times_S_N @ seen.tokens_N).unsqueeze(1)
    load_S_C = times_S_N @ seen.load_N_C
    held_S_C = (load_S_C >= min_tokens) & (times_S_N @ (seen.load_N_C > 0).float() >= min_examples)
    safe_S_C = load_S_C.clamp_min(1)
    centroid_S_C_D = torch.einsum("sn,ncd->scd", times_S_N, seen.hidden_N_C_D) / safe_S_C.unsqueeze(2)
    count_S_V = times_S_N @ seen.count_N_V * (times_S_N @ (seen.count_N_V > 0).float() >= min_examples)
    return {
        "always": torch.cat([times_S_N @ seen.prob_N_C / tokens_S_1, load_S_C * held_S_C / tokens_S_1], dim=1),
        "margins": times_S_N @ seen.margin_N_C / safe_S_C * held_S_C,
        "centroids": (centroid_S_C_D * held_S_C.unsqueeze(2)).flatten(1),
        "tokens": (count_S_V / tokens_S_1).sqrt(),
    }


def noisy_loads(seen: Sums, sites: Sites, noise: float, seed: int) -> Tensor:
    """Loads as `[privacy]` has them: of examples, each one's share clipped, with noise."""
    layers, experts = seen.cells
    most = longest_share(seen.top_k_L, layers)
    share_N_C = normalize(seen.load_N_C.unflatten(1, seen.cells), p=1, dim=2).flatten(1)
    share_N_C = share_N_C * (most / share_N_C.norm(dim=1, keepdim=True).clamp_min(most))
    total_S_C = share_N_C[sites.row_S_N].sum(1)
    drawn_S_C = torch.randn(total_S_C.shape, generator=torch.Generator().manual_seed(seed))
    size = sites.row_S_N.shape[1]
    told = [possible(one.view(layers, experts), size) for one in (total_S_C + noise * most * drawn_S_C)]
    return torch.stack(told).flatten(1) / size


def trained_features(bench: Workbench, rows: Corpus, sites: Sites) -> dict[str, Tensor]:
    """What sites send after a round of training, by what is asked for; "always" has the loss and updates' norms too."""
    trainer = bench.trainer()
    received = {group: pack(value.cpu().clone(), "float32", 0) for group, value in bench.moe.read().items()}
    reports: list[Statistics] = []
    for number, row_N in enumerate(sites.row_S_N.tolist()):
        with tempfile.TemporaryDirectory() as memory:
            client = bench.client(f"site-{number}", rows.examples, row_N, Path(memory))
            reports.append(trainer.train(client, Broadcast(1, received)))
    bench.moe.write({group: value.values for group, value in received.items()})

    def stacked(of: Callable[[Statistics], Tensor]) -> Tensor:
        return torch.stack([of(one).float().flatten() for one in reports])

    return {
        "always": torch.cat(
            [
                stacked(lambda one: one.prob_L_E),
                stacked(lambda one: one.load_L_E / max(1, one.tokens)),
                stacked(lambda one: one.norm_G.clamp_min(1e-12).log()),
                torch.tensor([[one.loss] for one in reports]),
            ],
            dim=1,
        ),
        "margins": stacked(lambda one: one.margin_L_E),
        "centroids": stacked(lambda one: one.centroid_L_E_D.float() * one.centroid_scale_L[:, None, None]),
        "directions": stacked(lambda one: one.update_L_E_S),
        "tokens": stacked(lambda one: (one.token_count_M_V / max(1, one.tokens)).sqrt()),
    }


# ----------------------------------------------------------------------------------------------------------- attackers


def scaled(blocks: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Blocks of features side by side, centred, each with a mean square length of one; by the sites that teach."""
    teach, told = [], []
    for known, unknown in blocks:
        mean = known.mean(0)
        spread = (known - mean).square().sum(1).mean().sqrt().clamp_min(1e-9)
        teach.append((known - mean) / spread)
        told.append((unknown - mean) / spread)
    return torch.cat(teach, dim=1).double(), torch.cat(told, dim=1).double()


@dataclass(frozen=True)
class Known:
    """Sites that teach and sites that are told, along the principal directions of the first: a fit needs no others."""

    teach_S_R: Tensor
    told_S_R: Tensor
    square_R: Tensor  # squared lengths of the directions among the sites that teach

    @classmethod
    def of(cls, teach: Tensor, told: Tensor) -> Known:
        """From features; of the Gram matrix, for there are more features than sites."""
        square, vector = torch.linalg.eigh(teach @ teach.T)
        kept = square > 1e-9 * square[-1].clamp_min(1e-300)
        square, vector = square[kept], vector[:, kept]
        return cls(vector * square.sqrt(), told @ (teach.T @ (vector / square.sqrt())), square)


def ridge(known: Known, target: Tensor, penalty: float) -> Tensor:
    """Ridge regression: shares of the sites that are told, [S, K].

    >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    >>> ridge(Known.of(x, torch.tensor([[2.0]], dtype=torch.float64)), x, 1e-9).round(decimals=3)
    tensor([[2.]], dtype=torch.float64)
    """
    mean = target.double().mean(0)
    pull = penalty * len(target)
    beta = known.teach_S_R.T @ (target.double() - mean) / (known.square_R + pull).unsqueeze(1)
    return known.told_S_R @ beta + mean


def logistic(known: Known, target: Tensor, penalty: float) -> Tensor:
    """Logits of logistic regression with a penalty on its weights' squares, [S, 1]."""
    weight = torch.zeros(known.teach_S_R.shape[1] + 1, 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = binary_cross_entropy_with_logits(known.teach_S_R @ weight[:-1] + weight[-1], target.double())
        total = loss + penalty * weight[:-1].square().sum()
        total.backward()
        return float(total.detach())

    optimiser.step(closure)
    return (known.told_S_R @ weight[:-1] + weight[-1]).detach()


def attacked(blocks: Sequence[tuple[Tensor, Tensor]], target: Tensor, presence: bool) -> Tensor:
    """What the attacker says of the sites that are told; its penalty is the best on half of those that teach."""
    fit = logistic if presence else ridge
    first = len(target) // 2  # of other rows than the second half: a penalty must serve rows that were not seen
    inner = Known.of(*scaled([(known[:first], known[first:]) for known, _ in blocks]))
    best = min(PENALTIES, key=lambda p: float(loss_of(fit(inner, target[:first], p), target[first:], presence)))
    return fit(Known.of(*scaled(blocks)), target, best)


def loss_of(said: Tensor, target: Tensor, presence: bool) -> Tensor:
    """What a penalty is chosen by."""
    if presence:
        return binary_cross_entropy_with_logits(said, target.double())
    return (said - target).square().mean()


def auc(score: Tensor, present: Tensor) -> float:
    """The chance that a site with the subgroup has the higher score than one without; ties count half.

    >>> auc(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([False, True, True]))
    1.0
    """
    ranks, many = torch.from_numpy(rankdata(score.numpy())), int(present.sum())
    few = len(present) - many
    return float(ranks[present].sum() - many * (many + 1) / 2) / max(1, many * few)


def explained(said: Tensor, target: Tensor, mean: Tensor) -> float:
    """R2 of all classes together, against one who says the mean of the sites that teach."""
    return 1 - float((said - target).square().sum() / (target - mean).square().sum())


def measured(folds: Sequence[tuple[Tensor, Tensor, Tensor]], presence: bool, seed: int) -> dict[str, float]:
    """The score and its 95 % interval, by drawing sites again; a fold is what was said, what is true, and its mean."""

    def score(picks: Sequence[Tensor]) -> float:
        each = [
            auc(said[pick][:, 0], target[pick][:, 0] > 0)
            if presence
            else explained(said[pick], target[pick].double(), mean.double())
            for (said, target, mean), pick in zip(folds, picks, strict=True)
        ]
        return sum(each) / len(each)

    generator = torch.Generator().manual_seed(seed)
    drawn = sorted(
        score([torch.randint(len(said), (len(said),), generator=generator) for said, _, _ in folds])
        for _ in range(RESAMPLES)
    )
    whole = score([torch.arange(len(said)) for said, _, _ in folds])
    return {"score": whole, "low": drawn[round(0.025 * RESAMPLES)], "high": drawn[round(0.975 * RESAMPLES) - 1]}


def told(
    features: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    sites: tuple[Sites, Sites],
    names: Sequence[str],
    presence: bool,
) -> dict[str, float]:
    """How well the features of these names tell, in two folds."""
    folds = []
    for here, there in ((0, 1), (1, 0)):
        blocks = [(features[here][name], features[there][name]) for name in names]
        target = sites[here].target_S_K
        folds.append((attacked(blocks, target, presence), sites[there].target_S_K, target.mean(0)))
    return measured(folds, presence, seed=0)


# ---------------------------------------------------------------------------------------------------------------- runs


def cells(
    secret: str, rows: Corpus, seen: Sums, bench: Workbench, args: argparse.Namespace
) -> Iterator[dict[str, object]]:
    """A line for each measure of one secret."""
    presence = secret == "subgroup"

    def line(how: str, size: int, view: str, score: Mapping[str, float], **more: object) -> dict[str, object]:
        return {"secret": secret, "how": how, "size": size, "view": view, **more, **score}

    for size in args.sizes:
        sites = sites_of_halves(secret, rows, args.sites, size, args.seed)
        own = tuple({"own": one.label_S_K} for one in sites)
        yield line("labels", size, "labels", told((own[0], own[1]), sites, ["own"], presence))
        for tokens, examples in THRESHOLDS:
            found = tuple(forward_features(seen, one, tokens, examples) for one in sites)
            for asks in dict.fromkeys(without_directions(asks) for asks in asked()):
                score = told((found[0], found[1]), sites, ["always", *asks], presence)
                yield line("forward", size, "+".join(asks), score, thresholds=[tokens, examples])
        for noise in NOISES:
            noisy = tuple({"loads": noisy_loads(seen, one, noise, args.seed + i)} for i, one in enumerate(sites))
            yield line("noise", size, "", told((noisy[0], noisy[1]), sites, ["loads"], presence), noise=noise)
    for size in args.trained_sizes:
        sites = sites_of_halves(secret, rows, args.trained_sites, size, args.seed)
        sent = tuple(trained_features(bench, rows, one) for one in sites)
        for asks in asked():
            yield line("trained", size, "+".join(asks), told((sent[0], sent[1]), sites, ["always", *asks], presence))


def settings(args: argparse.Namespace) -> dict[str, object]:
    """What lines must have been made by to be gone on with."""
    return {
        name: getattr(args, name)
        for name in ("data", "set", "seed", "each", "sites", "sizes", "trained_sites", "trained_sizes")
    }


def run(args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure what is not in lines.jsonl yet, secret by secret.

    Raises:
        UserError: The folder holds lines of other settings.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    about, file = args.out / "about.json", args.out / "lines.jsonl"
    if about.exists() and (there := json.loads(about.read_text())["settings"]) != settings(args):
        raise UserError(
            f"--out {str(args.out)!r}: holds lines of {there}, not of {settings(args)}. Choose another folder."
        )
    lines = [json.loads(one) for one in file.read_text().splitlines()] if file.exists() else []
    source = [] if args.data is None else [f"data.train={args.data}"]
    config = load_config(
        DEMO,
        [
            "data.max_train=0",
            "algorithm.name=fedalign_moe",
            "clients.held_out=0",
            "training.epochs=1",
            "run.threads=1",
            *source,
            *args.set,
        ],
    )
    bench = Workbench.load(config)
    examples = load_examples(config.data.train, config.data, "train", args.seed)
    about.write_text(json.dumps({"settings": settings(args), "machine": machine("torch", "transformers")}))
    summed: list[tuple[list[Example], Sums]] = []
    for secret in args.secrets:
        if any(one["secret"] == secret for one in lines):
            continue
        started = time.perf_counter()
        try:
            rows = corpus(secret, examples, args.each, args.seed)
        except UserError as error:
            print(f"not measured: {error}", flush=True)
            continue
        if rows.examples not in [of for of, _ in summed]:
            summed = [(rows.examples, sums(bench, rows.examples))]  # of the last rows alone: they take memory
        made = []
        for one in cells(secret, rows, summed[0][1], bench, args):
            made.append(one)
            print(json.dumps(one), flush=True)
        with file.open("a") as out:  # whole secrets alone
            out.writelines(json.dumps(one) + "\n" for one in made)
        lines += made
        print(f"{secret}: {time.perf_counter() - started:.0f} s", flush=True)
    return lines


# --------------------------------------------------------------------------------------------------------------- table


def shown(lines: Sequence[Mapping[str, object]], **wanted: object) -> str:
    """A measure with its interval, or that there is none."""
    for one in lines:
        if all(one.get(name) == value for name, value in wanted.items()):
            return f"{one['score']:.2f} ({one['low']:.2f} to {one['high']:.2f})"
    return "not run"


def table(lines: Sequence[Mapping[str, object]], about: Mapping[str, object]) -> str:
    """All measures: one table a secret, a row for each view and way, a column for each number of examples."""
    sizes = sorted({int(str(one["size"])) for one in lines})
    parts = []
    for secret, meaning in SECRETS.items():
        here = [one for one in lines if one["secret"] == secret]
        if not here:
            parts.append(f"**{meaning[0].upper()}{meaning[1:]}**: not run.\n")
            continue
        kind = "AUC, chance 0.5" if secret == "subgroup" else "R2, chance 0"
        rows: list[tuple[str, dict[str, object]]] = [("the site's own labels (ceiling)", {"how": "labels"})]
        for asks, names in asked().items():
            told_by = ", ".join(f"`{name}`" for name in names)
            view = "+".join(asks)
            of_forward: dict[str, object] = {
                "view": "+".join(without_directions(asks)),
                "thresholds": list(THRESHOLDS[1]),
            }
            rows += [(f"{told_by}: forward", {"how": "forward", **of_forward})]
            rows += [(f"{told_by}: trained", {"how": "trained", "view": view})]
        for pair in THRESHOLDS[::2]:
            for asks in ((), ("tokens",)):
                name = "loads and mean routing" + (" and token counts" if asks else "")
                wanted: dict[str, object] = {"how": "forward", "view": "+".join(asks), "thresholds": list(pair)}
                rows.append((f"{name}, `min_tokens` {pair[0]}, `min_examples` {pair[1]}", wanted))
        rows += [(f"loads alone, `[privacy]` noise {noise:g}", {"how": "noise", "noise": noise}) for noise in NOISES]
        head = f"**{meaning[0].upper()}{meaning[1:]}** ({kind})\n\n"
        head += f"| from | {' | '.join(f'{size} examples' for size in sizes)} |\n|---|{'--:|' * len(sizes)}\n"
        body = (
            f"| {name} | {' | '.join(shown(here, size=size, **wanted) for size in sizes)} |\n" for name, wanted in rows
        )
        parts.append(head + "".join(body))
    made = about["settings"]
    return "\n".join(parts) + f"\nRun on: {about['machine']}. Settings: `{json.dumps(made)}`.\n"


def write_table(args: argparse.Namespace) -> None:
    """Write the tables of a folder into the page.

    Raises:
        UserError: There is no run in the folder.
    """
    file = args.out / "lines.jsonl"
    if not file.exists():
        raise UserError(f"--out {str(args.out)!r}: no lines.jsonl there. Run it without --table first.")
    lines = [json.loads(one) for one in file.read_text().splitlines()]
    text = PAGE.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}\n{table(lines, json.loads((args.out / 'about.json').read_text()))}{after}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or write the page's tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/statistics-tell"))
    parser.add_argument("--data", help="a file or folder in place of the demo's texts; see docs/data.md")
    parser.add_argument("--set", nargs="*", default=[], help="settings of a configuration, such as data.kind=text")
    parser.add_argument("--secrets", nargs="+", choices=SECRETS, default=list(SECRETS))
    parser.add_argument("--each", type=int, default=240, help="rows of a class, at most")
    parser.add_argument("--sites", type=int, default=200, help="of each half")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--trained-sites", type=int, default=60, help="of each half, that train")
    parser.add_argument("--trained-sizes", type=int, nargs="*", default=[32])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="write the tables into docs/what-statistics-tell.md")
    args = parser.parse_args(arguments)
    try:
        write_table(args) if args.table else run(args)
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
