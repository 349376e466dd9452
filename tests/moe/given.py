"""What experts really are given in a forward pass, whatever their layout: what a router says is held against it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedalign.moe.families import MoELayer
from fedalign.moe.model import MoEModel


@contextmanager
def given_experts(moe: MoEModel) -> Iterator[list[list[Tensor]]]:
    """For each layer a list that grows by one boolean [T, E] a forward pass: expert e computes with token t."""
    given: list[list[Tensor]] = [[] for _ in moe.layers]
    watched = [_Watched(moe, layer, rows) for layer, rows in zip(moe.layers, given, strict=True)]
    try:
        yield given
    finally:
        for one in watched:
            one.finish()


class _Watched:
    """The calls of one layer's router and experts."""

    def __init__(self, moe: MoEModel, layer: MoELayer, passes: list[Tensor]) -> None:
        self._layer, self._passes = layer, passes
        self._hidden_T_H = torch.empty(0)
        router, self._experts = moe.model.get_submodule(layer.router), moe.model.get_submodule(layer.experts)
        self._handles = [router.register_forward_hook(self._enter)]
        if isinstance(self._experts, (nn.ModuleList, nn.ModuleDict)) and layer.dispatch != "one_hot":
            for index, child in enumerate(self._experts.children()):
                self._handles.append(child.register_forward_hook(self._one(index)))
        elif hasattr(self._experts, "input_linear"):
            self._handles.append(self._experts.input_linear.register_forward_hook(self._sorted))
        else:
            self._handles.append(self._experts.register_forward_hook(self._all))

    def finish(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        self._hidden_T_H = inputs[0].detach().reshape(-1, self._layer.hidden)
        self._passes.append(torch.zeros(len(self._hidden_T_H), self._layer.size, dtype=torch.bool))

    def _mark(self, expert: int, rows_N_H: Tensor) -> None:
        same_N_T = (rows_N_H.detach().unsqueeze(1) == self._hidden_T_H).all(2)
        assert same_N_T.any(1).all()
        self._passes[-1][:, expert] |= same_N_T.any(0)

    def _one(self, expert: int) -> Any:
        return lambda _, inputs, __: self._mark(expert, inputs[0])

    def _sorted(self, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        """jetmoe: the tokens of expert 0, those of expert 1, and so on."""
        for expert, rows_N_H in enumerate(inputs[0].split(inputs[1])):
            self._mark(expert, rows_N_H)

    def _all(self, _: nn.Module, inputs: tuple[Any, ...], __: Any) -> None:
        tokens, size = self._passes[-1].shape
        if self._layer.dispatch == "one_hot":
            self._passes[-1] |= inputs[1].reshape(tokens, size).bool()
        elif len(inputs) == 1:  # llama4: every expert reads every token, times zero where it was not chosen
            self._passes[-1] |= inputs[0].detach().view(size, tokens, -1).any(2).T
        else:
            self._passes[-1].scatter_(1, inputs[1], True)
