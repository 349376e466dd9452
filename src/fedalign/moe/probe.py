"""Routing in a forward pass: captured by hooks, summed into a client's routing statistics.

The statistics are those of ALGORITHM.md, "What a client measures": mean routing distribution, load, decision margin and
centroid of each expert, streamed over the training passes themselves, padding left out.

Switch routers drop tokens beyond an expert's capacity. Here `topk_T_K` is what the router chose, dropped tokens
included, for it is the router's decision that margins, penalties and balance are about; load and centroid count only
tokens that the expert did receive [O].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from fedalign import parallel
from fedalign.errors import UserError
from fedalign.maths.routing import decision_margin, router_log_prob
from fedalign.moe.families import MoELayer, read_logits, router_outputs
from fedalign.moe.model import MoEModel
from fedalign.protocol import LayerRouting, Scoring


@dataclass(frozen=True)
class LayerStack:
    """M neighbouring layers that saw the same tokens, as one tensor: small models are all overhead.

    Where several processes share a batch these are the tokens of all of them.
    """

    ordinals: range  # which layers
    scoring: Scoring
    logits_M_T_E: Tensor  # differentiable
    topk_M_T_K: Tensor
    received_M_T: Tensor | None  # False where the chosen expert was full; None: nothing is ever dropped
    example_T: Tensor  # the batch's example each token belongs to
    examples: int

    @cached_property
    def choice_M_T_E(self) -> Tensor:
        """1 where the router chose the expert for the token, else 0."""
        return torch.zeros_like(self.logits_M_T_E).scatter_(2, self.topk_M_T_K, 1.0)

    @property
    def prob_M_T_E(self) -> Tensor:
        """Probabilities, detached; where the scoring is unknown the experts that were chosen share them equally."""
        if self.scoring == "unknown":
            return self.choice_M_T_E / self.topk_M_T_K.shape[2]
        return router_log_prob(self.logits_M_T_E.detach(), self.scoring).exp()

    @cached_property
    def dispatch_M_T_E(self) -> Tensor:
        """1 where the expert received the token, else 0."""
        return self.choice_M_T_E if self.received_M_T is None else self.choice_M_T_E * self.received_M_T.unsqueeze(2)

    @cached_property
    def load_M_E(self) -> Tensor:
        """Tokens that each expert received."""
        return self.dispatch_M_T_E.sum(1)


class Captured:
    """One forward pass as its routers saw it. Filled while the model runs; read it afterwards."""

    def __init__(self, layers: Sequence[MoELayer], mask_B_S: Tensor, decoder_mask_B_S: Tensor | None) -> None:
        self._layers = layers
        self._masks = (mask_B_S, decoder_mask_B_S)
        self._seen: list[tuple[Tensor, tuple[Any, ...]] | None] = [None] * len(layers)

    def add(self, index: int, hidden: Tensor, outputs: tuple[Any, ...]) -> None:
        """Take a router's input and outputs, from its hook."""
        if self._seen[index] is not None:
            raise RuntimeError(
                f"{self._layers[index].router} ran twice within one capture: capture each forward pass by itself"
            )
        self._seen[index] = (hidden.detach(), outputs)

    @cached_property
    @torch.enable_grad()  # what is first asked for where gradients are off must still carry them
    def routing(self) -> list[LayerRouting]:
        """Each layer's routing, as a penalty may see it: non-padding tokens only, differentiable."""
        return [
            LayerRouting(logits_T_E, topk_T_K, stack.scoring)
            for stack in self.stacks
            for logits_T_E, topk_T_K in zip(stack.logits_M_T_E.unbind(), stack.topk_M_T_K.unbind(), strict=True)
        ]

    def hidden_T_H(self, index: int) -> Tensor:
        """Inputs of the router of layer `index`, for the same tokens as `routing`; detached."""
        hidden, _ = self._entry(index)
        hidden = hidden.to(self._masks[0].device)
        return self._select(hidden.reshape(-1, self._layers[index].hidden), 0, index)

    @cached_property
    @torch.enable_grad()  # as above
    def stacks(self) -> list[LayerStack]:
        """All layers, neighbours of the same tokens and scoring together."""
        ordinals = range(len(self._layers))
        runs = groupby(ordinals, key=lambda o: (self._layers[o].in_decoder, self._layers[o].scoring))
        return [self._stack(list(run)) for _, run in runs]

    def _stack(self, ordinals: Sequence[int]) -> LayerStack:
        first = ordinals[0]
        read = [_decision(self._layers[ordinal], self._entry(ordinal)[1]) for ordinal in ordinals]
        logits, topk, received = zip(*read, strict=True)
        keep_T, (examples, length) = self._kept(first)
        first_example, examples = parallel.numbered(examples, keep_T.device)
        return LayerStack(
            ordinals=range(first, ordinals[-1] + 1),
            scoring=self._layers[first].scoring,
            logits_M_T_E=self._select(self._stacked(logits), 1, first),
            topk_M_T_K=self._select(self._stacked(topk), 1, first),
            received_M_T=None if received[0] is None else self._select(self._stacked(received), 1, first),
            example_T=parallel.joined(keep_T // length + first_example),
            examples=examples,
        )

    def _stacked(self, layers: Sequence[Tensor]) -> Tensor:
        """Layers as one tensor, where the masks are: a split model has them on different devices."""
        return torch.stack([values.to(self._masks[0].device) for values in layers])

    def _entry(self, index: int) -> tuple[Tensor, tuple[Any, ...]]:
        entry = self._seen[index]
        if entry is None:
            raise RuntimeError(f"{self._layers[index].router} did not run: capture a whole forward pass of the model")
        return entry

    def _select(self, values: Tensor, axis: int, index: int) -> Tensor:
        keep_T, (examples, length) = self._kept(index)
        if values.shape[axis] != examples * length:
            raise RuntimeError(f"the router saw {values.shape[axis]} tokens, the mask has {examples} x {length}")
        own = values if len(keep_T) == examples * length else values.index_select(axis, keep_T)
        return parallel.joined(own, axis)

    def _kept(self, index: int) -> tuple[Tensor, torch.Size]:
        return self._decoder_kept if self._layers[index].in_decoder else self._encoder_kept

    @cached_property
    def _encoder_kept(self) -> tuple[Tensor, torch.Size]:
        return self._masks[0].flatten().nonzero().squeeze(1), self._masks[0].shape

    @cached_property
    def _decoder_kept(self) -> tuple[Tensor, torch.Size]:
        mask = self._masks[1]
        if mask is None:
            raise RuntimeError("an encoder-decoder model needs decoder_mask_B_S too")
        return mask.flatten().nonzero().squeeze(1), mask.shape


def _decision(layer: MoELayer, outputs: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """A router's float32 logits [T, E], its choice [T, K], and which tokens were received (None: all)."""
    logits_T_E = read_logits(layer, outputs)
    if layer.dispatch == "index":
        return logits_T_E, outputs[layer.chosen].reshape(-1, layer.top_k), None
    if layer.dispatch == "logits":
        return logits_T_E, logits_T_E.detach().topk(layer.top_k, dim=1).indices, None
    sent_T_E = outputs[layer.chosen].reshape(-1, layer.size)
    received_T = sent_T_E.any(1)
    # a dropped token's one-hot is all zero: its choice is then read from the logits
    choice_T = torch.where(received_T, sent_T_E.argmax(1), logits_T_E.detach().argmax(1))
    return logits_T_E, choice_T.unsqueeze(1), received_T


class RoutingProbe:
    """Forward hooks on every router of a model. Idle outside `capture`; removed by `close` or at the end of a `with`.

    Raises:
        UserError: gradient checkpointing with use_reentrant=True, which silently cuts gradients from what hooks see.
    """

    def __init__(self, moe: MoEModel) -> None:
        self._model, self._layers = moe.model, moe.layers
        self._current: Captured | None = None
        self._grad = False  # whether the current capture began with gradients on
        _refuse_reentrant(moe.model)
        self._handles = [
            moe.model.get_submodule(layer.router).register_forward_hook(self._hook(index))
            for index, layer in enumerate(moe.layers)
        ]

    @contextmanager
    def capture(self, attention_mask_B_S: Tensor, decoder_mask_B_S: Tensor | None = None) -> Iterator[Captured]:
        """Capture the one forward pass run inside the `with`.

        Args:
            attention_mask_B_S: nonzero where a token is not padding, on the model's device (the encoder's, if any).
            decoder_mask_B_S: the same for the decoder of an encoder-decoder model.
        """
        self._current = Captured(self._layers, attention_mask_B_S, decoder_mask_B_S)
        self._grad = torch.is_grad_enabled()
        try:
            yield self._current
        finally:
            self._current = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(router: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            # inside a backward pass this is gradient checkpointing computing the same tokens again
            if self._current is None or torch._C._current_graph_task_id() != -1:
                return
            if self._grad and not torch.is_grad_enabled():
                _refuse_reentrant(self._model)
            outputs = router_outputs(self._layers[index], router, inputs[0], output)
            self._current.add(index, inputs[0], outputs)

        return hook


def _refuse_reentrant(model: nn.Module) -> None:
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        enabled = getattr(module, "gradient_checkpointing", False)
        if enabled and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise UserError(
                "gradient checkpointing: use_reentrant = True: it silently cuts gradients from captured logits. "
                "Choose use_reentrant = False"
            )


class RoutingSummary(NamedTuple):
    """A client's routing statistics of a round, float32; layers L, experts E, hidden H."""

    prob_L_E: Tensor  # mean router probability [P]
    load_L_E: Tensor  # tokens received; 0: withheld [P]
    margin_L_E: Tensor  # mean decision margin over the tokens that chose the expert [P idea, O formula]
    centroid_L_E_H: Tensor  # mean router input over the tokens received [P]
    tokens: int  # non-padding tokens (of the longer side of an encoder-decoder model)

    def without(self, frozen_L_E: Tensor) -> RoutingSummary:
        """The same of a client that did not train these experts: it does not hold them."""
        kept_L_E = (~frozen_L_E).to(self.load_L_E)
        return self._replace(
            load_L_E=self.load_L_E * kept_L_E,
            margin_L_E=self.margin_L_E * kept_L_E,
            centroid_L_E_H=self.centroid_L_E_H * kept_L_E.unsqueeze(2),
        )

    def spread(self, numbers: Sequence[int], experts: int) -> RoutingSummary:
        """The same over all experts of a model of which these were here: nothing reached the others."""

        def spread(value_L_E: Tensor) -> Tensor:
            whole = value_L_E.new_zeros(len(value_L_E), experts, *value_L_E.shape[2:])
            whole[:, list(numbers)] = value_L_E
            return whole

        return RoutingSummary(
            spread(self.prob_L_E),
            spread(self.load_L_E),
            spread(self.margin_L_E),
            spread(self.centroid_L_E_H),
            self.tokens,
        )


class RoutingStatistics:
    """Sums over the tokens of many batches, kept on `device` in float64; nothing here waits for an accelerator.

    Args:
        layers: L.
        experts: E.
        hidden: H; 0 where nobody asks for centroids.
        device: where the model is.
        margins: whether anybody asks for them.
    """

    def __init__(
        self, layers: int, experts: int, hidden: int, device: torch.device | str = "cpu", margins: bool = True
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(layers, *shape, dtype=torch.float64, device=device)

        self._tokens = [0] * layers
        self._prob, self._chosen, self._load, self._margin, self._examples = (zeros(experts) for _ in range(5))
        self._hidden, self._margins = zeros(experts, hidden), margins

    @torch.no_grad()
    def update(self, captured: Captured, whole_B: Tensor | None = None) -> None:
        """Add one forward pass. Each row of a batch counts as one example, seen once, but where `whole_B` is False."""
        whole_B = None if whole_B is None else parallel.joined(whole_B)
        for stack in captured.stacks:
            with torch.autocast(stack.logits_M_T_E.device.type, enabled=False):
                self._add(stack, captured, whole_B)

    def _add(self, stack: LayerStack, captured: Captured, whole_B: Tensor | None) -> None:
        rows = slice(stack.ordinals.start, stack.ordinals.stop)
        prob_M_T_E = stack.prob_M_T_E
        dispatch_M_T_E, load_M_E = stack.dispatch_M_T_E, stack.load_M_E
        chosen_M_E = load_M_E if stack.received_M_T is None else stack.choice_M_T_E.sum(1)
        layers, _, experts = prob_M_T_E.shape
        reached_M_B_E = prob_M_T_E.new_zeros(layers, stack.examples, experts).index_add_(
            1, stack.example_T, dispatch_M_T_E
        )
        self._prob[rows] += prob_M_T_E.sum(1)
        self._chosen[rows] += chosen_M_E
        self._load[rows] += load_M_E
        if self._margins:
            self._margin[rows] += decision_margin(prob_M_T_E, stack.topk_M_T_K) * chosen_M_E
        self._examples[rows] += (reached_M_B_E[:, slice(None) if whole_B is None else whole_B] > 0).sum(1)
        for row, ordinal in enumerate(stack.ordinals):
            self._tokens[ordinal] += len(stack.example_T)
            if self._hidden.shape[-1]:
                self._hidden[ordinal] += dispatch_M_T_E[row].T @ captured.hidden_T_H(ordinal).float()

    def finish(self, min_tokens: int = 32, min_examples: int = 4) -> RoutingSummary:
        """The means. Load, margin and centroid of an expert that too few tokens or examples reached are zero [O]."""
        tokens_L = torch.tensor(self._tokens, dtype=torch.float64, device=self._prob.device).clamp(min=1)
        held_L_E = (self._load >= max(min_tokens, 1)) & (self._examples >= min_examples)
        load_L_E = self._load * held_L_E
        margin_L_E = self._margin / self._chosen.clamp(min=1) * held_L_E
        centroid_L_E_H = self._hidden / self._load.clamp(min=1).unsqueeze(2) * held_L_E.unsqueeze(2)
        prob_L_E = self._prob / tokens_L.unsqueeze(1)
        return RoutingSummary(
            prob_L_E.float(), load_L_E.float(), margin_L_E.float(), centroid_L_E_H.float(), max(self._tokens)
        )


def idle_experts(captured: Captured) -> Tensor:
    """Boolean [L, E]: experts that received no non-padding token in this pass.

    Padding does not count: nothing that enters the loss depends on what an expert makes of it, so an expert reached by
    padding alone has no gradient, only the optimiser's momentum and decay, which are to be masked.
    """
    return torch.cat([stack.load_M_E == 0 for stack in captured.stacks])


def balancing_loss(routing: Sequence[LayerRouting], experts: int) -> Tensor:
    """Switch Transformers' balancing loss (arXiv 2101.03961, eq. 4), averaged over layers; 1 if balanced.

    E · Σ_e f_e · P_e: f_e is the share of the tokens' choices that fell on e, P_e the mean probability of e
    (differentiable). Unlike that of transformers it is computed layer by layer and leaves padding out.
    """
    alike: dict[tuple[torch.Size, torch.Size, Scoring], list[LayerRouting]] = defaultdict(list)
    for layer in routing:
        alike[layer.logits_T_E.shape, layer.topk_T_K.shape, layer.scoring].append(layer)
    return torch.stack([_balance(layers, experts) for layers in alike.values()]).sum() / len(routing)


def _balance(layers: Sequence[LayerRouting], experts: int) -> Tensor:
    """The summed loss of layers of one shape."""
    logits_M_T_E = torch.stack([layer.logits_T_E for layer in layers])
    topk_M_N = torch.stack([layer.topk_T_K for layer in layers]).flatten(1)
    prob_M_E = router_log_prob(logits_M_T_E, layers[0].scoring).exp().mean(1)
    count_M_E = torch.zeros_like(prob_M_E).scatter_add_(1, topk_M_N, torch.ones_like(topk_M_N, dtype=prob_M_E.dtype))
    return experts * (count_M_E / topk_M_N.shape[1] * prob_M_E).sum()
