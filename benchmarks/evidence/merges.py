"""From the same updates, which plan makes the better model? Each choice of the aggregation against its alternatives.

    python benchmarks/evidence/merges.py tasks --seeds 10,11,12,13,14

Clients train as under FedAvg. In every round each alternative plans from the same statistics, sums the same updates,
and its model is scored on the test set; then FedAvg's goes on. So all alternatives share what training costs and most
of its noise. What they would do to each other over several rounds is not in it, nor is the regulariser, which changes
the training itself: for those see `study.py`.

Some alternatives weigh rows of tokens one by one, or go on from the plan's sum with what no weights can say. Both are
made from a pass of each client's trained model over its own data (`passes.py`). What a client would send of that pass
is not in `uploaded_share`.

Results are in OUT/merges/REGIME/seed-N.json.

    python benchmarks/evidence/merges.py tasks --seeds 10,11,12 --rounds 5 --follow "token rows + Gram everywhere"

What wins a round may be asked over whole runs, if it is no option of the package yet: each round goes on from that
alternative's model, all test rows score it, and results are in OUT/followed/REGIME/LABEL/seed-N.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from calibration import RIDGE, Tokens, calibrate
from candidates.fedalign_candidates import Projected
from passes import Passed, regression_mean, walk
from study import REGIMES, Part, overrides
from torch import Tensor

from fedalign.algorithms import make
from fedalign.algorithms.by_use import ByUse
from fedalign.algorithms.fedavg import column_shares
from fedalign.client.forward import answer_logits
from fedalign.client.statistics import centroid_sketches, update_sketches
from fedalign.compare.plan import parse_seeds
from fedalign.config.toml import load_config
from fedalign.data.batches import batches
from fedalign.federation.in_process import Prepared, prepare
from fedalign.files import write_text
from fedalign.maths.average import StreamingSum
from fedalign.maths.hashing import derive_seed
from fedalign.maths.heap import Heap
from fedalign.maths.rounding import pack, unpack
from fedalign.moe.load import quiet
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import RoutingProbe, RoutingStatistics
from fedalign.protocol import (
    WHOLE,
    Algorithm,
    Broadcast,
    Plan,
    Reports,
    Request,
    State,
    Statistics,
    Update,
    Weights,
    WireDtype,
)

CANDIDATES: Mapping[str, Callable[..., Algorithm]] = {"align_projected": Projected}
OFF_DIAGONAL = 0.9  # what RegMean keeps of its Gram matrices off the diagonal
SETTINGS = ("training.batch_examples=8", "data.max_train=2000", "data.max_test=600", "evaluation.clients=false")
ASKING = ("algorithm.name=fedalign_paper", "algorithm.reg_strength=0.0")  # trains as FedAvg, and reports for all plans
EVERY_TEST_ROW = "data.max_test=2000"


@dataclass(frozen=True)
class Round:
    """What all alternatives of a round have in common."""

    prepared: Prepared
    start: Weights
    standard: Sequence[Statistics]
    updates: Mapping[str, Weights]

    def given(self, reports: Sequence[Statistics]) -> Reports:
        """As a plan sees them."""
        return Reports(reports, self.prepared.layout, len(self.standard))

    @cached_property
    def share_C(self) -> Tensor:
        """n_c / Σ n."""
        return self.given(self.standard).share_C

    def sketched(self, width: int) -> list[Statistics]:
        """The statistics with update sketches of another width."""
        seed, found = self.prepared.config.run.seed, []
        for report in self.standard:
            update = self.updates[report.client]
            unit_L_E_S = update_sketches(self.prepared.layout, update, self.start, width, seed)
            found.append(replace(report, update_L_E_S=(unit_L_E_S * report.held_L_E.unsqueeze(-1)).half()))
        return found

    @property
    def exact(self) -> list[Statistics]:
        """The statistics with the updates themselves in place of their sketches."""
        cells = (self.prepared.layout.layers, self.prepared.layout.experts, -1)
        experts = [group for group in self.prepared.layout.groups if group.kind == "expert"]
        return [
            replace(report, update_L_E_S=torch.stack([self.updates[report.client][g] for g in experts]).view(cells))
            for report in self.standard
        ]

    @cached_property
    def fresh(self) -> list[Statistics]:
        """Statistics of a pass of each client's trained model over its data, instead of its last epoch's passes."""
        config, moe = self.prepared.config, self.prepared.bench.moe
        found = []
        for report in self.standard:
            self._write_trained(report.client)
            moe.model.eval()
            passed = RoutingStatistics(len(moe.layers), moe.experts, moe.hidden)
            with RoutingProbe(moe) as probe, torch.no_grad():
                for batch in batches(self.prepared.clients[report.client].train, config.training.batch_tokens, 64):
                    with probe.capture(*batch.masks()) as captured:
                        answer_logits(moe, batch)
                    passed.update(captured)
            routing = passed.finish(config.statistics.min_tokens, config.statistics.min_examples)
            centroid_L_E_D, scale_L = centroid_sketches(
                routing.centroid_L_E_H, config.statistics.centroid_width, config.run.seed
            )
            found.append(
                replace(
                    report,
                    prob_L_E=routing.prob_L_E,
                    load_L_E=routing.load_L_E,
                    margin_L_E=routing.margin_L_E,
                    centroid_L_E_D=centroid_L_E_D,
                    centroid_scale_L=scale_L,
                )
            )
        return found

    @cached_property
    def passed(self) -> dict[str, Passed]:
        """What a pass of each client's trained model over its own data tells beyond that."""
        config, found = self.prepared.config, {}
        for report in self.standard:
            self._write_trained(report.client)
            examples = self.prepared.clients[report.client].train
            seed = derive_seed(config.run.seed, report.round, report.client, "pass")
            found[report.client] = walk(self.prepared.bench.moe, examples, config.training.batch_tokens, seed)
        return found

    @cached_property
    def examples(self) -> dict[str, int]:
        """n_c."""
        return {report.client: report.examples for report in self.standard}

    def _write_trained(self, client: str) -> None:
        update = self.updates[client]
        self.prepared.bench.moe.write({group: value + update[group] for group, value in self.start.items()})


Step = Callable[[Round, Weights], None]  # changes in place the model that the plan made


@dataclass(frozen=True)
class Alternative:
    """One way of making a model from the updates of a round."""

    label: str
    algorithm: str
    options: Mapping[str, Any] = field(default_factory=dict)
    reports: Callable[[Round], Sequence[Statistics]] = lambda seen: seen.standard
    centre: bool = True  # router rows, if the plan says so
    wire: WireDtype = "float32"
    as_long_as: str = ""  # the experts' change is brought to the length that it has in this earlier alternative
    about: str = ""
    weigh: Callable[[Round, Plan], Plan] = lambda seen, plan: plan  # the algorithm's, changed
    steps: Sequence[Step] = ()

    @property
    def made(self) -> Algorithm:
        """The algorithm; candidates need not be installed for this."""
        candidate = CANDIDATES.get(self.algorithm)
        return candidate(**self.options) if candidate else make(self.algorithm, self.options)

    def plan(self, seen: Round, state: State) -> Plan:
        """The algorithm's, weighed."""
        plan = self.weigh(seen, self.made.plan(seen.given(self.reports(seen)), state))
        return replace(plan, centred=plan.centred and self.centre)

    def merged(self, seen: Round, plan: Plan) -> Weights:
        """The model that the plan, then the steps make of the round's updates."""
        updates, layout = seen.updates, seen.prepared.layout
        norms = {c: torch.stack([update[group].norm() for group in layout.groups]) for c, update in updates.items()}
        total = StreamingSum(layout, plan, norms, self.wire)
        for request in plan.requests(seen.standard[0].round, layout):
            client = request.client
            sent = {g: pack(updates[client][g], self.wire, derive_seed(client, g)) for g in request.groups}
            if refused := total.add(Update(client, request.round, sent)):
                raise SystemExit(f"{self.label}: {refused}")
        found = total.result({group: value.clone() for group, value in seen.start.items()})
        for step in self.steps:
            step(seen, found)
        return found


def squared_load(seen: Round, plan: Plan) -> Plan:
    """Experts weighted by n_c · (share of the client's load)²."""
    layout = seen.prepared.layout
    load_C_L_E = torch.stack([report.load_L_E for report in seen.standard])
    share_C_L_E = load_C_L_E / load_C_L_E.sum(-1, keepdim=True).clamp_min(1)
    shared_C, gate_C_L_E, _ = layout.split(plan.weight_C_G)
    expert_C_L_E = column_shares(seen.share_C[:, None, None] * share_C_L_E.square())
    return replace(plan, weight_C_G=layout.table(shared_C, gate_C_L_E, expert_C_L_E))


def no_gates(seen: Round, plan: Plan) -> Plan:
    """Routers stay as they were received."""
    shared_C, gate_C_L_E, expert_C_L_E = seen.prepared.layout.split(plan.weight_C_G)
    weight_C_G = seen.prepared.layout.table(shared_C, torch.zeros_like(gate_C_L_E), expert_C_L_E)
    return replace(plan, weight_C_G=weight_C_G)


def experts_by_gram(seen: Round, merged: Weights, off_diagonal: float = OFF_DIAGONAL) -> None:
    """RegMean of each expert's two matrices over the clients that hold it; held by nobody, it stays as merged."""
    moe = seen.prepared.bench.moe
    for group in (group for group in merged if group.kind == "expert"):
        cell = group.layer, group.expert
        module = moe.model.get_submodule(moe.layers[group.layer].experts)
        shape_up, shape_down = module.gate_up_proj.shape[1:], module.down_proj.shape[1:]
        held = [r.client for r in seen.standard if r.held_L_E[cell] and seen.passed[r.client].load_L_E[cell]]
        if not held:
            continue
        weight = [seen.examples[client] / seen.passed[client].tokens for client in held]
        share = [w * float(seen.passed[client].load_L_E[cell]) for w, client in zip(weight, held, strict=True)]
        both, cut = [seen.updates[client][group] for client in held], shape_up.numel()
        gram_in = [w * seen.passed[client].expert_in_L_E_H_H[cell] for w, client in zip(weight, held, strict=True)]
        gram_mid = [w * seen.passed[client].expert_mid_L_E_I_I[cell] for w, client in zip(weight, held, strict=True)]
        up = regression_mean(gram_in, [values[:cut].view(shape_up) for values in both], share, off_diagonal)
        down = regression_mean(gram_mid, [values[cut:].view(shape_down) for values in both], share, off_diagonal)
        merged[group] = seen.start[group] + torch.cat([up.flatten(), down.flatten()])


def attention_by_gram(seen: Round, merged: Weights) -> None:
    """RegMean of q, k, v and o of every layer."""
    moe = seen.prepared.bench.moe
    share = [float(seen.examples[client]) for client in seen.passed]
    weight = [seen.examples[client] / passed.tokens for client, passed in seen.passed.items()]
    for layer, block in enumerate(moe.model.model.layers):
        attention, passes = block.self_attn, list(zip(weight, seen.passed.values(), strict=True))
        gram_in = [w * passed.attention_in_L_H_H[layer] for w, passed in passes]
        gram_out = [w * passed.attention_out_L_N_N[layer] for w, passed in passes]
        inward = (attention.q_proj, attention.k_proj, attention.v_proj)
        for linear, grams in (*((linear, gram_in) for linear in inward), (attention.o_proj, gram_out)):
            old, new = (part(moe, linear.weight, weights) for weights in (seen.start, merged))
            changes = [part(moe, linear.weight, seen.updates[client]) for client in seen.passed]
            new.copy_(old + regression_mean(grams, changes, share, OFF_DIAGONAL))


def token_rows(
    seen: Round,
    plan: Plan,
    rare: bool = False,
    counted: bool = True,
    words: Literal["all", "answers", "others"] = "all",
    holders: int = 1,
) -> Plan:
    """Each row that belongs to a token as a mean over the clients that met it, others as under FedAvg.

    Args:
        seen: the round.
        plan: of any algorithm.
        rare: whether a token counts too that fewer than `statistics.min_examples` of a client's examples hold.
        counted: weights n_c · (share of the client's tokens); else n_c of those that met it.
        words: which rows: all, those that stand in anybody's answers, or those that stand in none.
        holders: clients that must have met a token.
    """
    least = 1 if rare else seen.prepared.config.statistics.min_examples
    reports = []
    for report in seen.standard:
        count_M_V = seen.passed[report.client].met.finish(least)
        every_M_V = seen.passed[report.client].met.finish(1)
        if not counted:
            count_M_V, every_M_V = (count_M_V > 0).float(), torch.ones_like(every_M_V)
        rest_M_1 = (every_M_V - count_M_V).sum(-1, keepdim=True)  # shares are of all tokens, those left out too
        reports.append(replace(report, token_count_M_V=torch.cat([count_M_V, rest_M_1], -1)))
    weight_C_M_V = ByUse().plan(seen.given(reports), {}).token_weight_C_M_V
    assert weight_C_M_V is not None
    weight_C_M_V = weight_C_M_V[..., :-1]
    few_M_V = torch.stack([report.token_count_M_V[:, :-1] > 0 for report in reports]).sum(0) < holders
    weight_C_M_V = weight_C_M_V.where(~few_M_V, seen.share_C[:, None, None])
    if words != "all":
        answers_M_V = torch.stack([seen.passed[report.client].answers.finish(1) for report in reports]).sum(0)
        wanted_M_V = (answers_M_V > 0) == (words == "answers")
        weight_C_M_V = weight_C_M_V.where(wanted_M_V, seen.share_C[:, None, None])
    return replace(plan, token_weight_C_M_V=weight_C_M_V)


def calibrated_gate(seen: Round, merged: Weights, ridge: float = RIDGE) -> None:
    """Routers that decide on each client's tokens as that client's own do: see `calibration.py`."""
    share_C = seen.share_C
    for layer in range(seen.prepared.layout.layers):
        rows = [group for group in seen.prepared.layout.groups if group.kind == "gate" and group.layer == layer]
        start_E_H = torch.stack([seen.start[row] for row in rows])
        updates = [torch.stack([seen.updates[r.client][row] for row in rows]) for r in seen.standard]
        inputs = [seen.passed[report.client].router_input_T_H(layer) for report in seen.standard]
        tokens = Tokens.of(share_C.tolist(), inputs, [start_E_H + update for update in updates], updates)
        average_E_H = torch.einsum("c,ceh->eh", share_C, torch.stack(updates))
        solved_E_H, _ = calibrate(tokens, average_E_H, ridge)
        merged |= {row: old_H + new_H for row, old_H, new_H in zip(rows, start_E_H, solved_E_H, strict=True)}


def part(moe: MoEModel, parameter: Tensor, weights: Weights) -> Tensor:
    """What of its group's values belongs to a parameter that is no router and no expert, as a view in its shape."""
    starts: Counter[object] = Counter()
    for slot in moe.slots:
        if len(slot.groups) == 1 and slot.groups[0] in WHOLE and slot.parameter.requires_grad:
            (group,) = slot.groups
            if slot.parameter is parameter:
                return weights[group][starts[group] : starts[group] + slot.size].view(parameter.shape)
            starts[group] += slot.size
    raise ValueError("this parameter is not trained, or belongs to a router or an expert")


def aligned(label: str, about: str = "", **options: Any) -> Alternative:
    """FedAlign-MoE as the paper has it, with some options changed."""
    return Alternative(label, "fedalign_paper", options, about=about)


def alternatives() -> Iterator[Alternative]:
    """The first is what the others are measured against; the second is the paper's method."""
    yield Alternative("fedavg", "fedavg")
    yield aligned("FedAlign-MoE", "the paper's method")
    yield aligned("gate side alone", "sides", experts="average")
    yield aligned("expert side alone", "sides", gate="average")
    yield Alternative("fedavg, experts stretched", "fedavg", as_long_as="FedAlign-MoE", about="length")
    yield replace(aligned("FedAlign-MoE, experts shortened", "length"), as_long_as="fedavg")
    for other in ("fedmoe", "hfedmoe", "flame"):
        yield Alternative(other, other, about="other plans")
    yield Alternative("fc_moe", "fc_moe", {"residual": 0.0}, about="other plans")
    gates: dict[str, dict[str, Any]] = {
        "gate_weights = uniform": {"gate_weights": "uniform"},
        "overlap = relative": {"overlap": "relative"},
        "size_weighted": {"size_weighted": True},
        "max_weight = 1": {"max_weight": 1.0},
        "max_weight = 0.25": {"max_weight": 0.25},
        "overlap = relative, size_weighted": {"overlap": "relative", "size_weighted": True},
    }
    for label, options in gates.items():
        yield aligned(label, "gate weights", **options, experts="average")
    rows = aligned("rows not centred", "gate weights", experts="average")
    yield replace(rows, centre=False)
    experts: dict[str, dict[str, Any]] = {
        "consensus = relu": {"consensus": "relu"},
        "beta = 0": {"beta": 0.0},
        "beta = 1": {"beta": 1.0},
        "all pass (beta = 100)": {"beta": 100.0},
        "min_agreement = 0": {"min_agreement": 0.0},
        "min_agreement = 0.8": {"min_agreement": 0.8},
        "min_agreement = 0.95": {"min_agreement": 0.95},
        "min_holders = 1": {"min_holders": 1},
    }
    for label, options in experts.items():
        yield aligned(label, "expert weights", **options, gate="average")
    semantic = aligned("", "statistics")
    for width in (64, 1024):
        yield replace(semantic, label=f"sketches of {width}", reports=partial(Round.sketched, width=width))
    yield replace(semantic, label="exact cosines", reports=lambda seen: seen.exact)
    yield replace(semantic, label="statistics of a pass of their own", reports=lambda seen: seen.fresh)
    for wire in ("bfloat16", "int8"):
        yield Alternative(f"fedavg, {wire}", "fedavg", wire=wire, about="wire")
        yield replace(aligned(f"FedAlign-MoE, {wire}", "wire"), wire=wire)
    yield replace(aligned("min_agreement = 0.8, int8", "wire", min_agreement=0.8), wire="int8")
    yield from beyond()


def beyond() -> Iterator[Alternative]:
    """What the paper does not think of."""
    about = "beyond the paper"
    yield Alternative("align_projected", "align_projected", {"residual": 0.0}, about=about)
    load = aligned("experts by load", about, gate="average", experts="load", min_holders=1)
    yield load
    yield Alternative("experts by load^2", "fedavg", about=about, weigh=squared_load)
    ways: dict[str, dict[str, Any]] = {
        "experts by diagonal Gram": {"steps": (partial(experts_by_gram, off_diagonal=0.0),)},
        "experts by Gram": {"steps": (experts_by_gram,)},
        "attention by Gram": {"steps": (attention_by_gram,)},
        "token rows": {"weigh": token_rows},
        "token rows, every count": {"weigh": partial(token_rows, rare=True)},
        "token rows, seen or not": {"weigh": partial(token_rows, counted=False)},
        "token rows, met by two": {"weigh": partial(token_rows, holders=2)},
        "token rows of label words alone": {"weigh": partial(token_rows, words="answers")},
        "token rows but label words": {"weigh": partial(token_rows, words="others")},
        "token rows + Gram everywhere": {"weigh": token_rows, "steps": (experts_by_gram, attention_by_gram)},
        "calibrated gate": {"steps": (calibrated_gate,)},
        "calibrated gate, ridge 0.1": {"steps": (partial(calibrated_gate, ridge=0.1),)},
    }
    for label, way in ways.items():
        yield Alternative(label, "fedavg", about=about, **way)
    yield replace(load, label="token rows + experts by load", weigh=token_rows)
    yield replace(load, label="token rows, met by two + experts by load", weigh=partial(token_rows, holders=2))
    yield replace(aligned("token rows + FedAlign-MoE", about), weigh=token_rows)
    yield Alternative("gate as received", "fedavg", about=about, weigh=no_gates)


class Keep:
    """An accumulator that keeps what arrives."""

    def __init__(self) -> None:
        self.updates: dict[str, Weights] = {}

    def add(self, update: Update) -> None:
        """Keep it."""
        self.updates[update.client] = {group: unpack(packed) for group, packed in update.groups.items()}


def next_round(prepared: Prepared, number: int, start: Weights) -> Round:
    """Train all clients from `start`, as FedAvg does."""
    federation, layout = prepared.federation, prepared.layout
    broadcast = Broadcast(number, {group: pack(value, "float32", seed=0) for group, value in start.items()})
    reports = list(federation.train(broadcast, federation.members()))
    standard = [report for report in reports if isinstance(report, Statistics)]
    if len(standard) < len(reports):
        raise SystemExit(f"round {number}: a client failed: {reports}")
    kept = Keep()
    federation.collect([Request(report.client, number, layout.groups) for report in standard], kept)
    return Round(prepared, start, standard, kept.updates)


def run(part: Part, seed: int, data: Path, start: str, rounds: int, follow: str = "") -> list[dict[str, Any]]:
    """A line for each round and alternative; if one is followed, its alone."""
    compared = [alternative for alternative in alternatives() if follow in ("", alternative.label)]
    own = (*ASKING, f"run.seed={seed}", f"training.learning_rate={part.rate}")
    lines = []
    with TemporaryDirectory() as folder:
        prepared = prepare(load_config(None, [*overrides(part, data, start), *own]), Path(folder))
        weights = prepared.initial_weights(Heap())
        states: dict[str, State] = {}
        for number in range(1, rounds + 1):
            began = time.perf_counter()
            seen = next_round(prepared, number, weights)
            size_G = torch.tensor([seen.prepared.layout.sizes[group] for group in seen.prepared.layout.groups]).double()
            length: dict[str, float] = {}
            for alternative in compared:
                plan = alternative.plan(seen, states.get(alternative.label, {}))
                states[alternative.label] = plan.state
                merged = alternative.merged(seen, plan)
                change = norm_of_change(merged, weights)
                if alternative.as_long_as:
                    ratio = length[alternative.as_long_as] / change
                    merged |= {g: torch.lerp(weights[g], v, ratio) for g, v in merged.items() if g.kind == "expert"}
                    change = norm_of_change(merged, weights)
                length[alternative.label] = change
                score = prepared.bench.score(merged, prepared.test)
                assert score is not None
                sent = ((plan.weight_C_G > 0).double() @ size_G).sum() / (len(plan.clients) * size_G.sum())
                lines.append(
                    {
                        "round": number,
                        "alternative": alternative.label,
                        "about": alternative.about,
                        "accuracy": score.accuracy,
                        "loss_nats": score.loss,
                        "uploaded_share": float(sent),
                        "change_norm": change,
                    }
                )
                if alternative.label == (follow or "fedavg"):
                    following = merged
            weights = following
            print(f"{part.regime}, seed {seed}, round {number}: {time.perf_counter() - began:.0f} s", flush=True)
    return lines


def norm_of_change(new: Weights, old: Weights) -> float:
    """Of all experts together."""
    return float(sum((new[g] - old[g]).square().sum() for g in new if g.kind == "expert") ** 0.5)


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regime", choices=REGIMES)
    parser.add_argument("--seeds", default="5", help="how many, or which")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate", default="1e-3", help="learning rate")
    followable = [alternative.label for alternative in alternatives() if not alternative.as_long_as]
    parser.add_argument(
        "--follow", choices=followable, default="", help="one alternative, over whole runs", metavar="LABEL"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--data", type=Path, default=Path("runs/evidence/data"), help="what data.py wrote")
    parser.add_argument("--start", default="runs/evidence/start", help="a model folder")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    settings = (*SETTINGS, EVERY_TEST_ROW) if args.follow else SETTINGS
    part = Part(args.regime, args.regime, ("fedavg",), "full", 2, settings, rate=args.rate)
    kind = f"followed/{args.regime}/{args.follow.replace(' ', '_')}" if args.follow else f"merges/{args.regime}"
    for seed in parse_seeds(args.seeds):
        file = args.out / kind / f"seed-{seed}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = run(part, seed, args.data, args.start, args.rounds, args.follow)
            write_text(file, json.dumps({"rate": args.rate, "settings": settings, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
