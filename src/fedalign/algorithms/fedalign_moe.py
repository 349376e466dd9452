"""FedAlign-MoE (arXiv 2603.21276): routing aligned, experts averaged where they do the same job.

    router rows   row_e  ← row_e + Σ_c ω_c(e) · Δrow_c(e)      ω from `maths.routing`: consistency of routing     [P]
    target        p_g(e) ← Σ_c ω_c(e) · p̄_c(e), normalised      ω of the next round; may pull clients' routers    [P]
    experts       θ_e    ← θ_e + Σ_c b_c(e) · Δ_c(e)            b from `maths.experts`: same role, same aim        [P]
    token rows    row_v  ← row_v + Σ_c k_c(v) · Δrow_c(v)       k by who met the token                             [O]
    the rest      FedAvg

Rows of embeddings averaged over those who involve them are FedSubAvg's (Ding et al. 2022, arXiv 2109.07704), without
counts: `vocabulary = "clients"`.

The paper's pull on routers is off: `reg_strength`. It makes clients route alike, and over many rounds that costs what
their experts had learnt apart.

Marks: [P] the paper says so, [O] our choice where it is silent. Every [O] is an option. `fedalign_paper` and `by_use`
are other defaults of the same options. Which of them won or lost what, and on which models: docs/evidence.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedalign.algorithms.fedavg import FedAvg, column_shares, option
from fedalign.maths import torch
from fedalign.maths.experts import (
    PARTNERS,
    Consensus,
    bimodality,
    centred_directions,
    cosines,
    directions,
    directions_from,
    expert_weights,
    sampled_weights,
)
from fedalign.maths.routing import (
    Form,
    Granularity,
    Overlap,
    alignment_strength,
    cap_weights,
    consistency,
    consistency_weights,
    global_routing,
    router_log_prob,
    routing_penalty,
)
from fedalign.protocol import Ask, Kind, LayerRouting, Plan, Reports, Shares, State, Step

if TYPE_CHECKING:
    from torch import Tensor

TARGET = "target_L_E"
TWO_ROLES = 5 / 9  # bimodality of a uniform distribution
PAIRS = 1 << 20  # entries of one [E, C, C] table at a time: 4 MB stay in cache
ALL_PAIRS = 100  # clients up to which all pairs are looked at
STACKED = 1 << 25  # numbers of sketches stacked at a time beyond that: 64 MB of half precision


@dataclass(frozen=True)
class FedAlignMoE(FedAvg):
    """Options with their defaults."""

    reg_strength: float = option(0.0, "λ of the pull on routers while training, 0.1 [P]; 0: none [O]")
    overlap: Overlap = option("product", "of own and global routing [P], or the smaller over the larger [O]")
    granularity: Granularity = option("batch", "what is pulled: each token [P]; a batch's mean keeps tokens sharp [O]")
    form: Form = option("bregman", "of the pull: as printed [P], or never negative [O]")
    gate: Literal["rows", "average", "local"] = option("rows", "routers: row by row, as FedAvg, or clients keep theirs")
    gate_weights: Literal["consistency", "uniform"] = option(
        "consistency", "of rows: overlap times margin [P], or alike"
    )
    max_weight: float = option(0.5, "no client counts for more in a router row [O]")
    size_weighted: bool = option(True, "whether data size enters the weights of rows [O]; it does not in the paper [P]")
    target_momentum: float = option(0.0, "share of the old routing target that stays [O]")
    adaptive_strength: bool = option(True, "whether the pull is stronger where routing is agreed about [P]")
    experts: Literal["semantic", "load", "average"] = option(
        "semantic", "by agreement [P] and use, by use alone, or FedAvg"
    )
    beta: float = option(0.5, "standard deviations below the mean similarity that still agree [O]")
    consensus: Consensus = option("half", "of cosines D of updates: (1 + D) / 2, or max(0, D) [O]")
    min_agreement: float = option(0.0, "clients with less of the largest agreement are left out of an expert [O]")
    vocabulary: Literal["tokens", "clients", "average"] = option(
        "tokens", "trained token embeddings: by how often a client met the token, by whether it did, or FedAvg [O]"
    )
    vocabulary_holders: int = option(
        1, "rows whose token fewer clients met go on as under FedAvg, so that no single client owns a word [O]"
    )
    vocabulary_half_life: float = option(
        0.0, "rounds in which half of what sets weights of token rows apart from FedAvg's goes; 0: it stays [O]"
    )
    min_holders: int = option(2, "with fewer, an expert's update is clipped to its layer's median norm [O]")

    def __post_init__(self) -> None:
        for name, low, high in [
            ("reg_strength", 0, 1e6),
            ("max_weight", 1e-6, 1),
            ("target_momentum", 0, 1),
            ("beta", -100, 100),
            ("min_agreement", 0, 1),
            ("vocabulary_holders", 1, 1e9),
            ("vocabulary_half_life", 0, 1e9),
            ("min_holders", 1, 1e9),
        ]:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} = {getattr(self, name)}: must lie between {low:g} and {high:g}")

    @property
    def aligns(self) -> bool:
        """Whether routers are weighted or pulled, so that there is a target."""
        return self.gate != "average" or self.reg_strength > 0

    @property
    def asks(self) -> Set[Ask]:
        """The statistics that these options read."""
        wanted: dict[Ask, bool] = {
            "probabilities": self.aligns,
            "margins": self.aligns and self.gate_weights == "consistency",
            "centroids": self.experts == "semantic",
            "directions": self.experts == "semantic",
            "tokens": self.vocabulary == "tokens",
            "met": self.vocabulary == "clients",
        }
        return frozenset(ask for ask, needed in wanted.items() if needed)

    @property
    def private(self) -> Set[Kind]:
        """With gate = "local", gates."""
        return frozenset[Kind]({"gate"} if self.gate == "local" else ())

    @property
    def shares(self) -> Shares | None:
        """Of load and of token counts; not where routers are aligned, experts are compared, or norms clip them."""
        clips = self.experts != "average" and self.min_holders > 1
        if type(self).plan is not FedAlignMoE.plan or self.aligns or self.experts == "semantic" or clips:
            return None
        rows: dict[str, Literal["examples", "tokens", "met"]] = {"tokens": "tokens", "clients": "met"}
        by = rows.get(self.vocabulary, "examples")
        return Shares(self.experts == "load", by, self.vocabulary_holders, self.vocabulary_half_life)

    def plan(self, reports: Reports, state: State) -> Plan:
        """Weights of router rows, experts and token rows from the statistics; the new target becomes the state."""
        gate_C_L_E, state = self._gate_weights(reports, state.get(TARGET)) if self.aligns else (None, {})
        expert_C_L_E, metrics = self._expert_weights(reports)
        return reports.plan(
            None if self.gate == "average" else gate_C_L_E,
            expert_C_L_E,
            factor_C_G=None if self.experts == "average" else self._clip(reports),
            **self._token_weights(reports),
            state=state,
            metrics=metrics,
        )

    def penalty(self, step: Step) -> Tensor | None:
        """λ · L_reg, the mean over layers; None in round 1, when there is no target yet."""
        target_L_E = step.state.get(TARGET)
        if not self.reg_strength or target_L_E is None:
            return None
        alike: defaultdict[tuple[torch.Size, torch.Size, str], list[int]] = defaultdict(list)
        for layer, routing in enumerate(step.routing):
            alike[routing.logits_T_E.shape, routing.topk_T_K.shape, routing.scoring].append(layer)
        per_stack = [
            len(layers)
            * self._stack_penalty([step.routing[i] for i in layers], target_L_E[layers], step.prob_L_E, layers)
            for layers in alike.values()
        ]
        return self.reg_strength * torch.stack(per_stack).sum() / len(step.routing)

    def _gate_weights(self, reports: Reports, old_L_E: Tensor | None) -> tuple[Tensor, State]:
        """ω, [C, L, E], whose columns sum to one, and the new target p_g."""
        prob_C_L_E, held_C_L_E = reports.stack("prob_L_E"), reports.held_C_L_E
        by_size_C_L_E = reports.share_C[:, None, None].expand_as(prob_C_L_E)
        target_L_E = global_routing(prob_C_L_E, by_size_C_L_E) if old_L_E is None else old_L_E
        score_C_L_E = torch.ones_like(prob_C_L_E)
        if self.gate_weights == "consistency":
            score_C_L_E = consistency(prob_C_L_E, reports.stack("margin_L_E"), target_L_E, held_C_L_E, self.overlap)
        if self.size_weighted:
            score_C_L_E = score_C_L_E * by_size_C_L_E
        weight_C_L_E = cap_weights(consistency_weights(score_C_L_E, held_C_L_E), self.max_weight, held_C_L_E)
        new_L_E = global_routing(prob_C_L_E, weight_C_L_E)
        if old_L_E is not None:
            new_L_E = torch.lerp(new_L_E, old_L_E, self.target_momentum)
        return weight_C_L_E, {TARGET: new_L_E}

    def _expert_weights(self, reports: Reports) -> tuple[Tensor | None, dict[str, float]]:
        """b, [C, L, E], or None for FedAvg's; and what there is to say of it."""
        if self.experts == "average":
            return None, {}
        if self.experts == "load":
            return column_shares(expert_sizes(reports)), {}
        weight_C_L_E, two_roles = self._semantic_weights(reports)
        return weight_C_L_E, {"experts_in_two_roles": two_roles}

    def _semantic_weights(self, reports: Reports) -> tuple[Tensor, int]:
        """B a few experts at a time: memory does not grow with their number.

        Beside it, of how many experts the similarity is bimodal: same-index averaging leaves a minority out there.
        """
        held_C_L_E, size_C_L_E = reports.held_C_L_E, expert_sizes(reports)
        weight_C_L_E = torch.empty_like(size_C_L_E)
        two_roles = 0
        few = len(reports.of) <= ALL_PAIRS
        for layer, part, centroid_C_E_D, update_C_E_S in (stacked_by_layer if few else stacked_by_part)(reports):
            size_C_E, held_C_E = size_C_L_E[:, layer, part], held_C_L_E[:, layer, part]
            bar = self.beta, self.consensus, self.min_agreement
            if few:
                similarity_E_C_C = cosines(centroid_C_E_D)
                modes_E = bimodality(similarity_E_C_C, held_C_E)
                weight_C_E = expert_weights(similarity_E_C_C, cosines(update_C_E_S), size_C_E, held_C_E, *bar)
            else:
                weight_C_E, modes_E = sampled_weights(centroid_C_E_D, update_C_E_S, size_C_E, held_C_E, *bar)
            weight_C_L_E[:, layer, part] = weight_C_E
            two_roles += int((modes_E > TWO_ROLES).sum())
        return weight_C_L_E, two_roles

    def _clip(self, reports: Reports) -> Tensor | None:
        """Factors that hold an expert of few holders to the median update norm of its layer's held experts."""
        held_C_L_E = reports.held_C_L_E
        rare_L_E = held_C_L_E.any(dim=0) & (held_C_L_E.sum(dim=0) < self.min_holders)
        if not rare_L_E.any():
            return None
        norm_C_L_E = reports.layout.split(reports.stack("norm_G"))[2]
        known_L_CE = norm_C_L_E.masked_fill(~held_C_L_E, torch.nan).transpose(0, 1).flatten(1)
        lower_L_1 = known_L_CE.nanmedian(dim=1, keepdim=True).values
        upper_L_1 = -(-known_L_CE).nanmedian(dim=1, keepdim=True).values
        median_L_1 = (lower_L_1 + upper_L_1) / 2
        ones_C_L_E = torch.ones_like(norm_C_L_E)
        factor_C_L_E = (median_L_1 / norm_C_L_E).where((norm_C_L_E > median_L_1) & rare_L_E, ones_C_L_E)
        return reports.layout.table(ones_C_L_E[:, 0, 0], ones_C_L_E, factor_C_L_E)

    def _token_weights(self, reports: Reports) -> dict[str, Tensor]:
        """k, [C, M, V], normalised over clients, and who met what; nothing, also if nobody said it: FedAvg's.

        Rows of tokens that fewer than `vocabulary_holders` met: n_c / Σ n, and all rows by and by, see `apart` [O].
        """
        field = {"tokens": "token_count_M_V", "clients": "token_met_M_B"}.get(self.vocabulary)
        if field is None or not any(getattr(report, field).numel() for report in reports.of):
            return {}
        size_C_M_V = row_sizes(reports, counted=self.vocabulary == "tokens")
        met_C_M_V = size_C_M_V > 0
        enough_1_M_V = met_C_M_V.sum(0, keepdim=True) >= self.vocabulary_holders
        by_size_C_1_1 = reports.share_C[:, None, None]
        weight_C_M_V = torch.where(enough_1_M_V, column_shares(size_C_M_V), by_size_C_1_1)
        weight_C_M_V = torch.lerp(by_size_C_1_1, weight_C_M_V, apart(reports.round, self.vocabulary_half_life))
        return {"token_weight_C_M_V": weight_C_M_V, "met_C_M_V": met_C_M_V}

    def _stack_penalty(
        self, routing: Sequence[LayerRouting], target_L_E: Tensor, prob_L_E: Tensor | None, layers: list[int]
    ) -> Tensor:
        """L_reg, the mean over layers that see equally many tokens and so can be stacked."""
        logits_L_T_E = torch.stack([layer.logits_T_E for layer in routing])
        topk_L_T_K = torch.stack([layer.topk_T_K for layer in routing])
        scoring = routing[0].scoring
        target_L_E = target_L_E.to(logits_L_T_E.device)
        if not self.adaptive_strength:
            strength_L_E = torch.ones_like(target_L_E)
        elif prob_L_E is not None:
            strength_L_E = alignment_strength(prob_L_E[layers].to(target_L_E.device), target_L_E, self.overlap)
        else:  # this client's first round: the batch speaks for it
            prob_L_T_E = router_log_prob(logits_L_T_E.detach(), scoring).exp()
            strength_L_E = alignment_strength(prob_L_T_E.mean(dim=-2), target_L_E, self.overlap)
        return routing_penalty(logits_L_T_E, topk_L_T_K, target_L_E, strength_L_E, self.granularity, self.form, scoring)


Part = tuple[int, slice, "Tensor", "Tensor"]  # of a layer some experts, their directions [C, E, D] and [C, E, S]


def stacked_by_layer(reports: Reports) -> Iterator[Part]:
    """Directions of centroids and updates of all experts, of so many at a time that their pairs stay few."""
    load_C_L_E = reports.stack("load_L_E")
    clients, layers, experts = load_C_L_E.shape
    some = max(1, PAIRS // clients**2)
    for layer in range(layers):
        centroid_C_E_D = torch.stack([r.centroid_L_E_D[layer].float() * r.centroid_scale_L[layer] for r in reports.of])
        centroid_C_E_D = centred_directions(centroid_C_E_D, load_C_L_E[:, layer])
        update_C_E_S = directions(torch.stack([report.update_L_E_S[layer] for report in reports.of]))
        for first in range(0, experts, some):
            part = slice(first, first + some)
            yield layer, part, centroid_C_E_D[:, part], update_C_E_S[:, part]


def stacked_by_part(reports: Reports) -> Iterator[Part]:
    """As `stacked_by_layer`, but never all of a layer where clients are many."""
    load_C_L_E = reports.stack("load_L_E")
    layers, experts = load_C_L_E.shape[1:]
    widths = reports.of[0].centroid_L_E_D.shape[-1] + reports.of[0].update_L_E_S.shape[-1]
    some = max(1, STACKED // (len(reports.of) * widths))
    beside = max(1, PAIRS // (len(reports.of) * PARTNERS))
    total_L_D = torch.zeros(layers, reports.of[0].centroid_L_E_D.shape[-1], dtype=torch.float64)
    for report in reports.of:
        sum_L_1_D = report.load_L_E.unsqueeze(1) @ report.centroid_L_E_D.float()
        total_L_D += sum_L_1_D.squeeze(1).double() * report.centroid_scale_L.unsqueeze(1)
    mean_L_D = (total_L_D / load_C_L_E.sum((0, 2), dtype=torch.float64).clamp_min(1).unsqueeze(1)).float()
    for layer in range(layers):
        scale_C_1_1 = torch.stack([report.centroid_scale_L[layer] for report in reports.of])[:, None, None]
        for first in range(0, experts, some):
            part = slice(first, first + some)
            centroid_C_E_D = torch.stack([report.centroid_L_E_D[layer, part] for report in reports.of])
            update_C_E_S = torch.stack([report.update_L_E_S[layer, part] for report in reports.of])
            for begin in range(0, centroid_C_E_D.shape[1], beside):
                these = slice(begin, begin + beside)
                here = slice(first + begin, first + begin + len(centroid_C_E_D[0, these]))
                unit_C_E_D = centroid_C_E_D[:, these].float() * scale_C_1_1
                unit_C_E_D = directions_from(mean_L_D[layer], unit_C_E_D, load_C_L_E[:, layer, here])
                # squares of half precision stay within float32, so no peak is looked for
                unit_C_E_S = torch.nn.functional.normalize(update_C_E_S[:, these].float(), dim=-1)
                yield layer, here, unit_C_E_D, unit_C_E_S


def expert_sizes(reports: Reports) -> Tensor:
    """n_c(e), [C, L, E]: a client's examples times the expert's share of its load; 0 if it does not hold the expert."""
    load_C_L_E = reports.stack("load_L_E")
    return reports.examples_C[:, None, None].float() * load_C_L_E / load_C_L_E.sum(dim=-1, keepdim=True).clamp_min(1)


def row_sizes(reports: Reports, counted: bool) -> Tensor:
    """k_c(v), [C, M, V]: a client's examples times the token's share of the tokens that it met; or if it met it at all.

    By counts it is what RegMean (arXiv 2212.09849) makes of an embedding, as the Gram matrix of its one-hot inputs is
    diagonal and holds the counts.
    """
    size_C_1_1 = reports.examples_C[:, None, None].float()
    if counted:
        count_C_M_V = reports.stack("token_count_M_V")
        return size_C_1_1 * count_C_M_V / count_C_M_V.sum(dim=-1, keepdim=True).clamp_min(1)
    return size_C_1_1 * unpacked(reports.stack("token_met_M_B").byte(), reports.layout.token_cells[1])


def apart(round: int, half_life: float) -> float:
    """How much of a token row's own weights is left in a round; the rest is n_c / Σ n [O].

    Only those who met a token move its row by its own weights: they push it up, and nobody pushes it down. After many
    rounds it is surer than it is right; FedAvg's weights bring the others' push back.

    >>> apart(1, 5.0), apart(6, 5.0), apart(11, 5.0), apart(100, 0.0)
    (1.0, 0.5, 0.25, 1.0)
    """
    return 0.5 ** ((round - 1) / half_life) if half_life else 1.0


def unpacked(byte_C_M_B: Tensor, tokens: int) -> Tensor:
    """The bits of each byte, lowest first, as float32 [C, M, V].

    >>> unpacked(torch.tensor([[[0b101]]], dtype=torch.uint8), 4)
    tensor([[[1., 0., 1., 0.]]])
    """
    bit_8 = torch.arange(8, dtype=torch.uint8)
    return (byte_C_M_B.unsqueeze(-1) >> bit_8 & 1).flatten(-2)[..., :tokens].float()
