"""A model made of another's experts: fewer of them, or some of them again. What all experts share is not copied."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedalign.errors import UserError
from fedalign.moe.families import MoELayer
from fedalign.moe.groups import Slot, unwrapped
from fedalign.moe.kept import kept_of
from fedalign.moe.model import MoEModel
from fedalign.moe.rows import look, public_text, quiet_row, refuse_unlike, with_row
from fedalign.moe.site_experts import COUNTS, TRAINED, checked, trained_by, with_owners
from fedalign.moe.subset import Cut, check_subset
from fedalign.protocol import ParameterGroup

HOLDERS = (*COUNTS, "num_experts", "n_experts")  # how routers, blocks and experts say how many they are


def part_of(moe: MoEModel, experts: Sequence[int]) -> MoEModel:
    """A model of some of its experts, which go by the numbers that they have in the whole.

    Groups of experts that are not in it train nothing. Whatever is written to one of the two of what they share, the
    other has too.

    Args:
        moe: stays as it is.
        experts: numbers, in the order that they get.

    Raises:
        UserError: As `picked`.
    """
    layers = tuple(replace(one, size=len(experts), whole=one.size, numbers=tuple(experts)) for one in moe.layers)
    return MoEModel(picked(moe, experts), moe.found, layers, moe.adapter)


def without(moe: MoEModel, owner: str) -> MoEModel:
    """The model that `fedalign export --without` writes of a whole one, in memory beside it.

    Args:
        moe: stays as it is, and shares with the smaller one what is of no expert.
        owner: whose experts are taken out.

    Raises:
        UserError: As `check_without`.
    """
    check_without(moe, owner)
    return part_of(moe, _others(moe, owner))


def check_without(moe: MoEModel, owner: str) -> None:
    """Refuse a model that cannot be had without an owner's experts.

    Raises:
        UserError: As `picked`, or its experts form groups.
    """
    stay = _others(moe, owner)
    check_subset(moe.model.config.to_dict(), Cut(moe.experts, stay), f"without {owner}")
    _check_picked(moe, len(stay))


def _others(moe: MoEModel, owner: str) -> list[int]:
    """All experts but an owner's."""
    gone = moe.layout.owners[owner]
    return [expert for expert in range(moe.experts) if expert not in gone]


@torch.no_grad()
def picked(moe: MoEModel, experts: Sequence[int]) -> PreTrainedModel:
    """A model with these experts and router rows, in this order; one that comes again is copied. No site owns any.

    Raises:
        UserError: It is in 4 bits or spread over processes or devices, its experts are modules of their own, or there
            would be fewer than a token is sent to.
    """
    _check_picked(moe, len(experts))
    index = torch.tensor(experts)
    same: dict[int, Any] = {id(slot.parameter): _picked(slot, index) for slot in moe.slots}
    for layer in moe.layers:
        for buffer in moe.model.get_submodule(layer.router).buffers():
            if buffer.shape[-1:] == (layer.size,):
                same[id(buffer)] = buffer.index_select(-1, index.to(buffer.device))
    model = copy.deepcopy(moe.model, same)
    for layer in moe.layers:
        for module in _holders(model, layer):
            _recount(module, layer.size, len(experts))
    for config in _configurations(model.config):
        _recount(config, moe.experts, len(experts))
    with_owners(model.config, {})
    return model


def _check_picked(moe: MoEModel, count: int) -> None:
    spread = {
        "a base in 4 bits": moe.saved is not None,
        "a model over processes of torchrun": moe.sharded,
        "a model on several devices": len(moe.devices) > 1,
    }
    if where := next((place for place, true in spread.items() if true), None):
        raise UserError(f"model = {moe.family}: of {where} experts cannot be picked.")
    if count < moe.top_k:
        raise UserError(f"model = {moe.family}: {count} experts are fewer than the {moe.top_k} of a token.")
    if alone := [slot.name for slot in moe.slots if slot.kind == "expert" and slot.owners.axis is None]:
        raise UserError(f"model = {moe.family}: {alone[0]} is a module of one expert; only stacked ones can be picked.")


def _picked(slot: Slot, index: Tensor) -> nn.Parameter:
    """The same parameter, or a smaller or larger one."""
    axis, parameter = slot.owners.axis, slot.parameter
    if axis is None:
        return parameter
    whole = parameter.detach().view(slot.owners.shape or parameter.shape)
    chosen = whole.index_select(axis, index.to(parameter.device))
    if slot.owners.shape is not None:
        chosen = chosen.flatten(0, 1) if axis == 0 else chosen.flatten(1)
    return nn.Parameter(chosen, parameter.requires_grad)


def _holders(model: PreTrainedModel, layer: MoELayer) -> Collection[nn.Module]:
    """Modules that may say how many experts they have."""
    places = (layer.router, layer.router.rpartition(".")[0], layer.experts)
    found = [unwrapped(model.get_submodule(path)) for path in places]
    around = [module for module in model.get_submodule(layer.experts).modules() if unwrapped(module) is not module]
    return [*found, *found[0].children(), *found[2].children(), *around]


def _configurations(config: Any) -> list[Any]:
    nested = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return [config, *(one for one in nested if one is not None)]


def _recount(holder: Any, before: int, now: int) -> None:
    for name in HOLDERS:
        if getattr(holder, name, None) == before:
            setattr(holder, name, now)


@dataclass(frozen=True)
class Grown:
    """A model in which sites have experts of their own, and how quiet these are."""

    model: PreTrainedModel
    copied_L: tuple[int, ...]  # the public expert that those of each layer are copies of
    reached_L: tuple[float, ...]  # share of public tokens that a new expert would be sent to, if it came alone
    tokens: int  # of public text


@torch.no_grad()
def grown(moe: MoEModel, sites: Sequence[str], seed: int = 0) -> Grown:
    """A model with one more expert in each layer for each site: a copy of the public one that is used most.

    Its router row is a quiet one (see `rows`); usage is that of public text. Both are seen in the public experts alone,
    so that a site which joins later gets what it would have got at the start, whoever has trained meanwhile.

    Args:
        moe: used up. Owners that it has keep their experts.
        sites: names.
        seed: of the public text.

    Raises:
        UserError: A name cannot be one or has an expert already, or the model's experts cannot have more beside them.
    """
    owned = dict(moe.layout.owners)
    for number, name in enumerate(sites, moe.experts):
        if name in owned:
            raise UserError(f"--site-experts: {name!r} has an expert already. Name each site once.")
        owned[name] = (number,)
    checked(owned, moe.experts + len(sites))
    refuse_unlike(moe)
    if beside := [name for name in kept_of(moe.model).tensors if "expert" in name]:
        raise UserError(f"model = {moe.family}: {beside[0]} is kept as it was, and has no place for more experts.")
    public = moe.layout.public
    anchor = part_of(moe, public) if moe.layout.owners else moe
    text = public_text(anchor, seed)
    seen_L = look(anchor, text, range(len(public)))
    copied_L = tuple(public[int(seen.load_E.argmax())] for seen in seen_L)
    rows = [quiet_row(seen) for seen in seen_L]
    bigger = MoEModel.wrap(picked(moe, [*range(moe.experts), *[public[0]] * len(sites)]))
    for layer, (copied, (row_H, _)) in enumerate(zip(copied_L, rows, strict=True)):
        expert, gate = (bigger.read([ParameterGroup(kind, layer, copied)]).popitem()[1] for kind in ("expert", "gate"))
        for new in range(moe.experts, bigger.experts):
            place = ParameterGroup("gate", layer, new)
            bigger.write({ParameterGroup("expert", layer, new): expert, place: with_row(bigger, place, gate, row_H)})
    setattr(bigger.model.config, TRAINED, trained_by(moe.model.config.to_dict()))
    with_owners(bigger.model.config, owned)
    return Grown(bigger.model, copied_L, tuple(share for _, share in rows), sum(mask.numel() for _, mask in text))
