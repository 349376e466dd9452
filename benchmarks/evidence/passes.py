"""What one pass of a client's trained model over its own training data tells, and means that are made from it.

For models built as OLMoE is: `self_attn.{q,k,v,o}_proj` in every layer, and fused experts `gate_up_proj` [E, 2I, H]
and `down_proj` [E, H, I]. All sums are over tokens that are not padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedalign.client.forward import answer_logits
from fedalign.data.batches import batches
from fedalign.data.encode import Encoded
from fedalign.data.tokens import TokenCounts
from fedalign.moe.model import MoEModel

EXAMPLES = 64  # of a batch
SAMPLE = 1024  # tokens whose router inputs are kept
RIDGE = 1e-6  # of the Gram matrix's mean diagonal


@dataclass(frozen=True)
class Passed:
    """Sums over one client's tokens, float64; N inputs of `o_proj`, I of an expert's `down_proj`."""

    tokens: int  # of all examples
    met: TokenCounts  # those that own rows, as a client counts them
    answers: TokenCounts  # the same, in answers alone
    attention_in_L_H_H: Tensor  # XᵀX of the input of q, k and v
    attention_out_L_N_N: Tensor  # of o's
    expert_in_L_E_H_H: Tensor  # of gate_up's, tokens sent to the expert alone
    expert_mid_L_E_I_I: Tensor  # of down's
    load_L_E: Tensor  # tokens sent to the expert
    router_inputs: tuple[list[Tensor], ...]  # of each layer, [T, H] a batch: a random sample of the tokens

    @classmethod
    def nothing(cls, moe: MoEModel, tokens: int) -> Self:
        """Before the first batch."""
        layers, experts, hidden = len(moe.layers), moe.experts, moe.hidden
        heads = moe.model.model.layers[0].self_attn.o_proj.in_features
        middle = moe.model.get_submodule(moe.layers[0].experts).down_proj.shape[2]
        rows = moe.layout.token_rows

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(
            tokens,
            TokenCounts(rows),
            TokenCounts([replace(matrix, answers=True) for matrix in rows]),
            zeros(layers, hidden, hidden),
            zeros(layers, heads, heads),
            zeros(layers, experts, hidden, hidden),
            zeros(layers, experts, middle, middle),
            zeros(layers, experts),
            tuple([] for _ in range(layers)),
        )

    def router_input_T_H(self, layer: int) -> Tensor:
        """What entered the layer's router, for at most `SAMPLE` tokens, the same in all layers."""
        return torch.cat(self.router_inputs[layer])


@dataclass(frozen=True)
class Kept:
    """Which positions of a batch count."""

    token_T: Tensor  # indices into all positions, padding included
    sample_T: Tensor  # boolean, of those: kept for the router


class Watch:
    """Hooks that add to `passed` what enters attention and experts of the batch that `kept` is about."""

    def __init__(self, moe: MoEModel, passed: Passed) -> None:
        self.passed = passed
        self.kept = Kept(torch.empty(0), torch.empty(0))
        self._handles = []
        for layer, block in enumerate(moe.model.model.layers):
            experts = moe.model.get_submodule(moe.layers[layer].experts)
            sums = (
                (block.self_attn.q_proj, passed.attention_in_L_H_H),
                (block.self_attn.o_proj, passed.attention_out_L_N_N),
            )
            self._handles += [linear.register_forward_hook(self._linear(gram[layer])) for linear, gram in sums]
            self._handles.append(experts.register_forward_hook(self._experts(layer)))

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _linear(self, gram_N_N: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
            gram_N_N.add_(gram(inputs[0].flatten(0, -2)[self.kept.token_T]))

        return hook

    def _experts(self, layer: int) -> Callable[[Any, tuple[Tensor, ...], Any], None]:
        def hook(module: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
            input_T_H = inputs[0].flatten(0, -2)[self.kept.token_T]
            chosen_T_K = inputs[1].flatten(0, -2)[self.kept.token_T]
            passed = self.passed
            passed.router_inputs[layer].append(input_T_H[self.kept.sample_T])
            for expert in range(len(module.gate_up_proj)):
                sent_T_H = input_T_H[(chosen_T_K == expert).any(1)]
                gate_T_I, up_T_I = nn.functional.linear(sent_T_H, module.gate_up_proj[expert]).chunk(2, dim=-1)
                passed.expert_in_L_E_H_H[layer, expert] += gram(sent_T_H)
                passed.expert_mid_L_E_I_I[layer, expert] += gram(module.act_fn(gate_T_I) * up_T_I)
                passed.load_L_E[layer, expert] += len(sent_T_H)

        return hook


@contextmanager
def watching(moe: MoEModel, passed: Passed) -> Iterator[Watch]:
    """Meanwhile forward passes add to `passed`."""
    watch = Watch(moe, passed)
    try:
        yield watch
    finally:
        watch.close()


@torch.no_grad()
def walk(moe: MoEModel, encoded: Sequence[Encoded], batch_tokens: int, seed: int) -> Passed:
    """Run the model as it is over these examples."""
    moe.model.eval()
    total, begin = sum(one.tokens for one in encoded), 0
    sample_T = torch.zeros(total, dtype=torch.bool)
    sample_T[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:SAMPLE]] = True
    passed = Passed.nothing(moe, total)
    with watching(moe, passed) as watch:
        for batch in batches(encoded, batch_tokens, EXAMPLES):
            token_T = batch.attention_mask_B_S.flatten().nonzero().squeeze(1)
            watch.kept = Kept(token_T, sample_T[begin : begin + len(token_T)])
            begin += len(token_T)
            answer_logits(moe, batch)
            passed.met.update(batch)
            passed.answers.update(batch)
    return passed


def gram(input_T_N: Tensor) -> Tensor:
    """XᵀX.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    return (input_T_N.T @ input_T_N).double()


def regression_mean(
    grams: Sequence[Tensor], changes: Sequence[Tensor], shares: Sequence[float], off_diagonal: float
) -> Tensor:
    """RegMean (arXiv 2212.09849): the change of a linear map whose outputs are nearest to those of all clients.

    (Σ G_c)⁻¹ Σ G_c Δ_cᵀ, transposed, with a tiny ridge towards the mean of the changes by `shares`.

    Args:
        grams: of each client, [N, N], its weight in it.
        changes: of each client, [M, N].
        shares: of each client, for the mean.
        off_diagonal: what off-diagonal entries are multiplied with; 0: a mean for each input by itself.

    >>> one, other = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]])
    >>> regression_mean([torch.eye(2), torch.diag(torch.tensor([1.0, 3.0]))], [one, other], [1, 1], 0.0)
    tensor([[0.5000, 1.7500]])
    """
    mean_M_N = sum((s / sum(shares) * d.double() for s, d in zip(shares, changes, strict=True)), torch.zeros(()))
    damped = [off_diagonal * g + (1 - off_diagonal) * g.diagonal().diag() for g in (g.double() for g in grams)]
    total_N_N = torch.stack(damped).sum(0)
    total_N_N.diagonal().add_(RIDGE * total_N_N.diagonal().mean())
    wanted_N_M = sum((g @ (d - mean_M_N).T for g, d in zip(damped, changes, strict=True)), torch.zeros(()))
    off_N_M: Tensor = torch.linalg.solve(total_N_N, wanted_N_M)
    return (mean_M_N + off_N_M.T).float()
