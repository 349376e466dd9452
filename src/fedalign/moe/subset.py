"""A checkpoint without some of its experts: cut tensor by tensor, so that no more than one of them is in memory.

Which tensors have a part for each expert, and on which axis, is seen by two models without values: that of the
configuration as it is, and that of the smaller one. What has one shape in both is copied. Of the rest the experts that
stay are copied, whole matrices or blocks of rows of a stack. Every byte that is written was there before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedalign.errors import UserError
from fedalign.maths.tensor_file import Named, create, in_order
from fedalign.moe.families import GROUPS, TOP_K
from fedalign.moe.load import configuration_of, explaining, quantised_by
from fedalign.moe.site_experts import COUNTS
from fedalign.moe.stored import WEIGHTS, Loading, read, shapes, stored, write_index

NUMBERED = re.compile(r"(.*\bexperts\.)(\d+)(\..+)")  # the name of one expert's own tensor
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """The experts that stay, of those that each layer has.

    >>> Cut(4, (0, 2, 3)).place(2)
    1
    """

    experts: int  # E
    stay: Sequence[int]  # in their old numbers, ascending

    def place(self, expert: int) -> int:
        """The new number of an expert that stays."""
        return self.stay.index(expert)

    def of(self, value: Tensor, axis: int) -> Tensor:
        """The blocks of a stack that belong to them."""
        blocks: Tensor = value.unflatten(axis, (self.experts, -1))
        return blocks.index_select(axis, torch.tensor(self.stay)).flatten(axis, axis + 1)


def experts_in(config: Mapping[str, Any], said: str) -> int:
    """The number of experts of each layer, E, that a configuration gives.

    Raises:
        UserError: It gives none, or several.
    """
    found = {value for name, value in _entries(config) if name in COUNTS and value is not None}
    if len(found) != 1 or not all(isinstance(value, int) and value > 1 for value in found):
        told = ", ".join(map(str, sorted(map(str, found)))) or "none"
        raise UserError(f"{said}: config.json must give one number of experts, of 2 or more, but gives {told}.")
    return int(found.pop())


def check_subset(config: Mapping[str, Any], cut: Cut, said: str) -> None:
    """Refuse what would be another model than the same one without these experts.

    Raises:
        UserError: Fewer experts would be left than a token is sent to, or experts form groups.
    """
    for name, value in _entries(config):
        if name in TOP_K and isinstance(value, int) and value > len(cut.stay):
            raise UserError(
                f"{said}: {len(cut.stay)} experts of {cut.experts} would stay, and a token is sent to {value} "
                f"({name}). Let at least {value} stay."
            )
        if name in GROUPS and isinstance(value, int) and value > 1:
            raise UserError(
                f"{said}: its experts form {value} groups ({name}), which would be other groups without these. Only "
                "a model with one group can be cut."
            )


def without(config: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """A configuration that counts the experts that stay."""
    return {
        name: without(value, cut)
        if isinstance(value, Mapping)
        else len(cut.stay)
        if name in COUNTS and value
        else value
        for name, value in config.items()
    }


def write_subset(source: Path, folder: Path, cut: Cut, *, trust_remote_code: bool = False) -> None:
    """Write the weights of a checkpoint without some experts, file by file under the same names.

    Args:
        source: a checkpoint in safetensors.
        folder: where the smaller configuration lies already.
        cut: the experts that stay.
        trust_remote_code: whether code that comes with the model may be run.

    Raises:
        UserError: Its tensors do not show which part is whose.
    """
    places, options = stored(str(source)), {"trust_remote_code": trust_remote_code}
    if not places:
        raise UserError(f"{str(source)!r}: holds no weights in safetensors. Save it so with transformers first.")
    whole, less = (_skeleton(path, options) for path in (source, folder))
    loading = Loading(whole, places)
    if several := [name for name in loading.without_place if "expert" in name]:
        raise UserError(
            f"{str(source)!r}: {several[0]} is of an expert that takes no part in the model as transformers loads it: "
            "nothing says whose it is. Not cut."
        )
    parts = _parts(shapes(places), loading.targets, _shapes(whole), _shapes(less), cut, str(source))
    written: dict[str, str] = {}
    for file, those in groupby(sorted(parts, key=lambda name: (places[name], name)), key=places.__getitem__):
        written |= _write(folder / file.name, {name: places[name] for name in those}, parts, cut)
    if WEIGHTS not in written.values():
        write_index(folder, written)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _entries(value)
        else:
            yield name, value


def _skeleton(folder: Path, options: dict[str, Any]) -> Any:
    """The model of a folder, without values."""
    with explaining(str(folder)), torch.device("meta"):
        config, auto = configuration_of(str(folder), options)
        if method := quantised_by(config):
            raise UserError(
                f"{str(folder)!r}: its weights are quantised by {method}. Give the model as it was trained."
            )
        return auto.from_config(config, **options)


def _shapes(model: Any) -> dict[str, Shape]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _parts(
    there: Mapping[str, Named],
    targets: Mapping[str, str],
    whole: Mapping[str, Shape],
    less: Mapping[str, Shape],
    cut: Cut,
    said: str,
) -> dict[str, tuple[str, int | None]]:
    """New names of the tensors that stay, and the axis on which each is cut; None: it is copied."""
    parts: dict[str, tuple[str, int | None]] = {}
    for name, (_, _, shape) in there.items():
        target, alone = targets.get(name), NUMBERED.fullmatch(name)
        if target is None or (whole[target] == less.get(target) and not NUMBERED.fullmatch(target)):
            parts[name] = name, None
        elif alone is None:
            parts[name] = name, _axis(shape, whole[target], less.get(target), cut, f"{said}: {name}")
        elif (number := int(alone[2])) >= cut.experts:
            raise UserError(f"{said}: {name} is of expert {number}, config.json counts {cut.experts} of them. Not cut.")
        elif number in cut.stay:
            parts[name] = f"{alone[1]}{cut.place(number)}{alone[3]}", None
    return parts


def _axis(shape: Shape, whole: Shape, less: Shape | None, cut: Cut, said: str) -> int:
    """The axis of a stack on which experts lie."""
    axes = [] if less is None or len(less) != len(whole) else [i for i, n in enumerate(whole) if n != less[i]]
    if len(axes) == 1 and less is not None and len(shape) == len(whole):
        (axis,) = axes
        block, rest = divmod(whole[axis], cut.experts)
        if not rest and less[axis] == block * len(cut.stay) and shape[axis] == whole[axis]:
            return axis
    raise UserError(f"{said} is laid out in a way that does not show which part is of which expert. Not cut.")


def _write(
    file: Path, tensors: Mapping[str, Path], parts: Mapping[str, tuple[str, int | None]], cut: Cut
) -> dict[str, str]:
    """Write one file; the names in it."""
    smaller = []
    for name, dtype, shape in shapes(tensors).values():
        new, axis = parts[name]
        kept = [n // cut.experts * len(cut.stay) if i == axis else n for i, n in enumerate(shape)]
        smaller.append(Named(new, dtype, tuple(kept)))
    there = create(file, in_order(smaller), {"format": "pt"})
    for name, value in read(tensors):
        new, axis = parts[name]
        there.pop(new).copy_(value if axis is None else cut.of(value, axis))
    return {one.name: file.name for one in smaller}
