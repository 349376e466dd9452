"""Which modules of a Hugging Face model are routers and experts: a table, and a search for families not in it.

A row says where a family deviates from the usual spelling: router `<block>.gate` with `weight` [E, H] that returns
(logits [T, E], weights [T, K], experts [T, K]), experts fused beside it with a leading axis E. Adding a family is one
row here and one tiny config in the tests; or, in a package of your own, an entry point of the group
"fedalign.families", under the model_type, with underscores::

    [project.entry-points."fedalign.families"]
    my_moe = "my_package:MY_MOE"  # a Family

Most families need no row: where transformers, or the shapes of weights, show a router beside experts, one run over a
few tokens shows the rest, checked against what the experts were really given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedalign.algorithms import from_package, offered
from fedalign.errors import UserError
from fedalign.protocol import Scoring

Dispatch = Literal["index", "one_hot", "logits"]
GROUP = "fedalign.families"  # entry points of other packages: a model_type, and a row
GROUPS = ("n_group", "num_expert_group", "n_groups_of_experts")  # how configurations say that experts form groups
TOP_K = (  # how routers, blocks, experts and configurations say to how many experts a token goes
    "top_k",
    "num_experts_per_tok",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "num_experts_per_token",
    "num_selected_experts",
)


@dataclass(frozen=True)
class Family:
    """One family's spelling. Paths are suffixes of module names."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"  # what the router's suffix is replaced by; empty: the block that the router is in
    scoring: Scoring = "softmax"
    logits: int | None = 0  # which output of the router is its logits; None: none is, its weight gives them
    probabilities: bool = False  # that output is their softmax
    dispatch: Dispatch = "index"  # how it says where tokens go: chosen experts, one-hot, or the top-k of its logits
    chosen: int = 2  # which output says so
    top_k: int | None = None  # only where no attribute of the router or the config says it


FAMILIES: dict[str, Family] = {
    "dbrx": Family(router="ffn.router", experts="ffn.experts", dispatch="logits"),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(scoring="sigmoid"),
    "gemma4": Family(router="router", experts="experts", probabilities=True),
    "gpt_oss": Family(router="mlp.router"),
    "granitemoe": Family(router="block_sparse_moe.router", experts="block_sparse_moe.experts"),
    "jetmoe": Family(router="router", experts="", logits=4, dispatch="logits"),
    "llama4": Family("feed_forward.router", "feed_forward.experts", scoring="sigmoid", logits=1, dispatch="logits"),
    "mixtral": Family(),
    "olmoe": Family(),
    "phimoe": Family(router="mlp.router"),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
    "switch_transformers": Family(router="mlp.router", logits=2, dispatch="one_hot", chosen=0, top_k=1),
}
REFUSED = {
    "doge": "its experts are rows of an embedding found by pairs of keys: no router has a row for each of them",
    "inkling_text": "its routers have rows for the experts that all tokens share, too",
    "longcat_flash": "some of its experts are the identity and have no weights to be averaged",
    "nllb_moe": "its code in transformers is broken: only experts 0 and 1 ever run",
    "zaya": "its router may skip all experts, and what it returns then names expert 0",
}


def family_row(name: str) -> Family | None:
    """The row of a family: ours, or one that an installed package offers; None: it is searched for.

    Raises:
        UserError: Several packages offer it, or the package is broken.
    """
    if name in FAMILIES or name not in offered(GROUP):
        return FAMILIES.get(name)
    row: Family = from_package(GROUP, "model", name, FAMILIES, _flaw)
    return row


def every_family() -> list[str]:
    """Families with a row: ours, then those that installed packages offer."""
    return [*FAMILIES, *(name for name in offered(GROUP) if name not in FAMILIES)]


def _flaw(row: Any) -> str | None:
    return None if isinstance(row, Family) else "is no fedalign.moe.families.Family"


@dataclass(frozen=True)
class MoELayer:
    """One router and its experts, as transformers spells them."""

    router: str  # module path
    experts: str  # module path
    scoring: Scoring
    size: int  # E
    top_k: int  # K
    hidden: int  # H
    in_decoder: bool  # its tokens are those of the decoder of an encoder-decoder model
    logits: int | None  # the rest as in `Family`
    dispatch: Dispatch
    chosen: int
    probabilities: bool = False
    cast: bool = False  # its experts want weights in the type of the model; those of transformers take float32 too
    whole: int = 0  # experts of the model that it is a part of; 0: it is no part
    numbers: tuple[int, ...] = ()  # of its E experts in that model; empty: as they come

    @property
    def named(self) -> tuple[int, ...]:
        """The numbers that its E experts go by, in their order."""
        return self.numbers or tuple(range(self.size))


def refuse(config: Any) -> None:
    """Raise a UserError if this family is known not to work. Cheap: needs no weights."""
    if reason := REFUSED.get(family_of(config)):
        raise UserError(f"model = {family_of(config)}: refused: {reason}. Choose one of: {', '.join(sorted(FAMILIES))}")


def family_of(config: Any) -> str:
    """The family's name as our tables spell it: transformers' `model_type`, always with underscores."""
    return str(config.model_type).replace("-", "_")


def is_encoder_decoder(config: Any) -> bool:
    """Whether a config is of a model with an encoder and a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def router_weight(router: nn.Module) -> Tensor:
    """The [E, H] matrix of a router: its own or its only linear child's."""
    matrices = [p for p in router.parameters() if p.dim() == 2 and min(p.shape) > 1]
    if len(matrices) != 1:
        raise UserError(
            f"router = {type(router).__name__}: must hold one weight [experts, hidden], but holds {len(matrices)}"
        )
    return matrices[0]


def router_outputs(layer: MoELayer, router: nn.Module, hidden: Tensor, output: Any) -> tuple[Any, ...]:
    """A router's output as several values; where it returns no logits, they come last."""
    outputs = output if isinstance(output, tuple) else (output,)
    return outputs if layer.logits is not None else (*outputs, computed_logits(router, hidden))


def read_logits(layer: MoELayer, outputs: tuple[Any, ...]) -> Tensor:
    """The logits [T, E] in float32 among a router's outputs. Differentiable."""
    logits: Tensor = outputs[-1 if layer.logits is None else layer.logits]
    logits_T_E = logits.reshape(-1, layer.size).float()
    # the softmax of the logarithms of probabilities are these probabilities
    return logits_T_E.clamp_min(torch.finfo(torch.float32).tiny).log() if layer.probabilities else logits_T_E


def computed_logits(router: nn.Module, hidden: Tensor) -> Tensor:
    """A router's weight times its input, [T, E]."""
    weight_E_H = router_weight(router)
    bias_E = getattr(router, "bias", None)
    with torch.autocast(hidden.device.type, enabled=False):
        flat_T_H = hidden.reshape(-1, weight_E_H.shape[1]).float()
        return functional.linear(flat_T_H, weight_E_H.float(), None if bias_E is None else bias_E.float())
