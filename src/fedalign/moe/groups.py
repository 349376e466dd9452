"""Parameters and the parameter groups that their values belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedalign import parallel
from fedalign.moe.families import MoELayer
from fedalign.protocol import EMBEDDINGS, HEAD, SHARED, Kind, ParameterGroup


@dataclass(frozen=True)
class Owners:
    """The groups that one parameter's values belong to: one, or index e of an axis to the group of expert e."""

    groups: tuple[ParameterGroup, ...] = (SHARED,)
    axis: int | None = None
    shape: tuple[int, ...] | None = None  # in which experts have an axis of their own; None: the parameter's


@dataclass(frozen=True)
class Slot:
    """One parameter, and whose its values are."""

    name: str
    parameter: nn.Parameter
    owners: Owners

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """The groups that its values belong to."""
        return self.owners.groups

    @property
    def kind(self) -> Kind:
        """The kind that all its groups share."""
        return self.groups[0].kind

    @property
    def size(self) -> int:
        """Number of values of each of its groups."""
        return self.parameter.numel() // len(self.groups)

    def view(self, group: ParameterGroup) -> Tensor:
        """The part that belongs to `group`: the parameter's own storage, outside autograd."""
        return self.part(self.parameter.detach(), group)

    def part(self, whole: Tensor, group: ParameterGroup) -> Tensor:
        """The part that belongs to `group` of any tensor shaped like the parameter."""
        owners = self.owners
        whole = whole if owners.shape is None else whole.view(owners.shape)
        return whole if owners.axis is None else whole.select(owners.axis, owners.groups.index(group))

    def some(self, whole: Tensor, start: int, length: int) -> Tensor:
        """The part that belongs to neighbouring groups of any tensor shaped like the parameter."""
        owners = self.owners
        whole = whole if owners.shape is None else whole.view(owners.shape)
        return whole if owners.axis is None else whole.narrow(owners.axis, start, length)

    def held(self, sharded: Tensor, group: ParameterGroup) -> tuple[Tensor, int]:
        """This process's piece of that part, in place, flat in its first axes, and its start in the flat part."""
        local, first = parallel.held(sharded)
        if self.owners.axis and self.owners.shape is None:
            row = self.size // len(sharded)
            return local.select(self.owners.axis, self.groups.index(group)), first * row
        row, skipped = sharded.numel() // len(sharded), self.groups.index(group) * self.size
        begin = max(first * row, skipped)
        end = max(begin, min(first * row + local.numel(), skipped + self.size))
        return local.view(-1)[begin - first * row : end - first * row], begin - skipped


def flat(pieces: Sequence[Tensor], device: torch.device) -> Tensor:
    """A flat float32 copy [N] of a group's pieces on `device`."""
    parts = [piece.reshape(-1).float().to(device) for piece in pieces]
    return torch.cat(parts) if parts else torch.empty(0, device=device)


def find_slots(model: PreTrainedModel, layers: Iterable[MoELayer]) -> Iterator[Slot]:
    """Every parameter of the model, with the groups that own its values."""
    owned = _words(model)
    for index, layer in enumerate(layers):
        owned |= _gate_rows(model.get_submodule(layer.router), index, layer.named)
        owned |= _expert_slices(model.get_submodule(layer.experts), index, layer.named)
    for name, parameter in model.named_parameters():
        yield Slot(name, parameter, owned.get(parameter, Owners()))


def _words(model: PreTrainedModel) -> dict[nn.Parameter, Owners]:
    """Embeddings, all tables that are looked up among them, and what there is of a head of its own."""
    read, answered = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [read, *(module for module in model.modules() if isinstance(module, nn.Embedding))]
    head = {parameter: Owners((HEAD,)) for parameter in answered.parameters()} if answered is not None else {}
    return head | {parameter: Owners((EMBEDDINGS,)) for table in tables for parameter in table.parameters()}


def _gate_rows(router: nn.Module, layer: int, named: Sequence[int]) -> dict[nn.Parameter, Owners]:
    """Weights [E, H], biases [E] and [1, E]; a norm or scale without an axis of length E stays shared.

    Of an adapter B has a row for each expert, and A, which has none, is shared.
    """
    rows, size = tuple(ParameterGroup("gate", layer, expert) for expert in named), len(named)
    cut = [(n, p) for n, p in router.named_parameters() if "lora_A." not in n]
    axes = ((p, axis) for n, p in cut for axis in (p.dim() - 1, 0) if p.dim() and p.shape[axis] == size)
    return {parameter: Owners(rows, axis) for parameter, axis in axes}


def _expert_slices(experts: nn.Module, layer: int, named: Sequence[int]) -> dict[nn.Parameter, Owners]:
    """Tensors [E, ...] slice by slice, E child modules, or tensors [E·F, H] block by block; all else stays shared."""
    slices, size = tuple(ParameterGroup("expert", layer, expert) for expert in named), len(named)
    owned: dict[nn.Parameter, Owners] = {}
    for module in _fused(experts, size):
        owned |= {p: Owners(slices, 0) for p in unwrapped(module).parameters(recurse=False) if p.shape[:1] == (size,)}
        if module is not unwrapped(module):
            from fedalign.moe import lora

            owned |= {p: Owners(slices, axis, shape) for p, shape, axis in lora.fused_factors(module, size)}
    children = list(experts.children())
    if not owned and len(children) == size:
        owned = {p: Owners((group,)) for group, child in zip(slices, children, strict=True) for p in child.parameters()}
    if not owned:
        flat = [p for p in experts.parameters() if p.dim() == 2 and p.shape[0] % size == 0]
        owned = {p: Owners(slices, 0, (size, p.shape[0] // size, p.shape[1])) for p in flat}
    return owned


def _fused(experts: nn.Module, size: int) -> list[nn.Module]:
    """Modules with tensors of E experts, adapters around them or not: this one, or those in it with a part of each."""

    def holds(module: nn.Module) -> bool:
        fused = any(p.dim() == 3 and len(p) == size for p in unwrapped(module).parameters(recurse=False))
        return fused or module is not unwrapped(module)

    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        return []
    return [experts] if holds(experts) else [child for child in experts.children() if holds(child)]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that adapters were put around, or itself."""
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator] # peft adds it, torch takes it for a tensor
