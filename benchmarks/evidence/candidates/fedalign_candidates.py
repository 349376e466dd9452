"""Ideas beyond the paper, as algorithms of their own: each joins FedAlign-MoE if it wins, see docs/evidence/studies.md.

align_projected   FC-MoE's projection on top of semantic experts: no update against the consensus
align_by_layer    λ of a layer follows its routing divergence: the early layers hardly part, the late ones do
align_mixed_rows  token rows go a part of the way towards FedAvg's; fedalign's `vocabulary_half_life` does so by and by
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedalign.algorithms.fc_moe import FCMoE
from fedalign.algorithms.fedalign_moe import TARGET, FedAlignMoE
from fedalign.algorithms.fedalign_paper import FedAlignPaper
from fedalign.protocol import LocalRound, ParameterGroup, Plan, Reports, State, Step

STRENGTH = "layer_strength_L"


@dataclass(frozen=True)
class Projected(FedAlignPaper):
    """FedAlign-MoE, where an expert's update that points against its clients' consensus is projected (see `fc_moe`)."""

    residual: float = 0.5
    max_stretch: float = 2.0

    @property
    def _projection(self) -> FCMoE:
        return FCMoE(residual=self.residual, max_stretch=self.max_stretch)

    def plan(self, reports: Reports, state: State) -> Plan:
        """Semantic weights, and the stretch that projecting onto their consensus amounts to."""
        plan, layout = super().plan(reports, state), reports.layout
        weight_C_L_E = layout.split(plan.weight_C_G)[2]
        norm_C_L_E = layout.split(reports.stack("norm_G"))[2]
        direction_C_L_E_S = reports.stack("update_L_E_S")
        stretch_L_E, against_C_L_E = self._projection.project(direction_C_L_E_S, weight_C_L_E * norm_C_L_E)
        ones_C_L_E = torch.ones_like(weight_C_L_E)
        factor_C_G = layout.table(ones_C_L_E[:, 0, 0], ones_C_L_E, stretch_L_E.expand_as(weight_C_L_E))
        if plan.factor_C_G is not None:
            factor_C_G = factor_C_G * plan.factor_C_G
        metrics = {**plan.metrics, "expert_updates_against_consensus": int(against_C_L_E.sum())}
        return replace(plan, factor_C_G=factor_C_G, metrics=metrics)

    def begin(self, local: LocalRound) -> None:
        """Go on from a part of what was removed."""
        self._projection.begin(local)

    def keep(self, local: LocalRound, update: Mapping[ParameterGroup, Tensor]) -> Mapping[str, Tensor]:
        """What finding it takes."""
        return self._projection.keep(local, update)


@dataclass(frozen=True)
class ByLayer(FedAlignPaper):
    """FedAlign-MoE with λ_l = λ · KL_l / mean KL: how far clients parted in the last round."""

    def plan(self, reports: Reports, state: State) -> Plan:
        """The strengths of the next round beside its target; their mean is one."""
        plan, prob_C_L_E = super().plan(reports, state), reports.stack("prob_L_E")
        divergence_L = torch.special.xlogy(prob_C_L_E, prob_C_L_E / prob_C_L_E.mean(0)).nansum(-1).mean(0)
        mean = divergence_L.mean()
        strength_L = divergence_L / mean if mean > 0 else torch.ones_like(divergence_L)
        return replace(plan, state={**plan.state, STRENGTH: strength_L})

    def penalty(self, step: Step) -> Tensor | None:
        """Mean over layers of λ_l · L_reg."""
        if not self.reg_strength or TARGET not in step.state:
            return None
        per_layer = [
            strength * self._stack_penalty([routing], step.state[TARGET][[layer]], step.prob_L_E, [layer])
            for layer, (routing, strength) in enumerate(zip(step.routing, step.state[STRENGTH], strict=True))
        ]
        return self.reg_strength * torch.stack(per_layer).mean()


@dataclass(frozen=True)
class MixedRows(FedAlignMoE):
    """The default, with a share of FedAvg's weights in each token's row.

    A row that only those move who met the token is pushed up by them and down by nobody: after many rounds it is surer
    than it is right. FedAvg's weights bring the others' push back.
    """

    mixed: float = 0.0  # share of FedAvg's weights
    reg_strength: float = 0.1  # as the default then had it

    def plan(self, reports: Reports, state: State) -> Plan:
        """Rows of both kinds, mixed."""
        plan = super().plan(reports, state)
        if plan.token_weight_C_M_V is None:
            return plan
        weight_C_M_V = torch.lerp(plan.token_weight_C_M_V, reports.share_C[:, None, None], self.mixed)
        return replace(plan, token_weight_C_M_V=weight_C_M_V)
