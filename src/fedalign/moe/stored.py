"""The tensors of a checkpoint, one after another: where they lie, and what transformers makes of them on loading."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils import cached_file

from fedalign.errors import UserError
from fedalign.maths.tensor_file import CODES, Named

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def at_hand(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder, or of a Hub id if it is in the cache."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    found = cached_file(source, name, revision=revision, local_files_only=True, **quiet)
    return Path(found) if found else None


def stored(source: str, revision: str | None = None) -> dict[str, Path]:
    """Where each tensor lies, as far as it is at hand and in safetensors.

    Raises:
        UserError: A file is damaged.
    """
    if single := at_hand(source, WEIGHTS, revision):
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if (index := at_hand(source, INDEX, revision)) is None:
        return {}
    places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    files = {name: at_hand(source, name, revision) for name in set(places.values()) if Path(name).name == name}
    return {name: file for name, place in places.items() if (file := files.get(place))}  # none beside the checkpoint


def write_index(folder: Path, places: Mapping[str, str]) -> None:
    """Write the index of a checkpoint in several files, which are there: each tensor's file by its name."""
    size = sum((folder / name).stat().st_size for name in set(places.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read(tensors: Mapping[str, Path], names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name in this order, one after another; neighbours in one file are read from it at once.

    Raises:
        UserError: A file is gone, or damaged.
    """
    for path, those in groupby(tensors if names is None else names, key=tensors.__getitem__):
        with _opened(path) as file:
            for name in those:
                yield name, file.get_tensor(name)


def shapes(tensors: Mapping[str, Path]) -> dict[str, Named]:
    """Types and shapes of tensors, by name; no value is read.

    Raises:
        UserError: A file is gone or damaged, or a type is none that can be trained.
    """
    types, found = {code: dtype for dtype, code in CODES.items()}, {}
    for path, those in groupby(tensors, key=tensors.__getitem__):
        with _opened(path) as file:
            for name in those:
                part = file.get_slice(name)
                if (code := part.get_dtype()) not in types:
                    raise UserError(f"{str(path)!r}: {name} is of type {code}. Known are: {', '.join(types)}.")
                found[name] = Named(name, types[code], tuple(part.get_shape()))
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(path)!r}: cannot be read: {error}. Put it back as it was.") from None


def as_stored(model: PreTrainedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of a model under the names and in the parts that transformers saves: the inverse of `Loading`."""
    return dict(revert_weight_conversion(model, dict(values)))


def by_layer(names: Iterable[str]) -> Iterator[list[str]]:
    """A model's names in transformers' order, layer by layer: what it joins or cuts on saving belongs to one."""
    numbered = re.compile(r".*?\.\d+\.")
    for _, some in groupby(sorted(names, key=dot_natural_key), lambda name: (at := numbered.match(name)) and at[0]):
        yield list(some)


class Loading:
    """How transformers names and joins the tensors of a checkpoint when it loads this model.

    Attributes:
        without_place: names of tensors that the model has no place for.
        targets: where each of the others goes, by its name in the checkpoint: the model's name.
    """

    def __init__(self, model: PreTrainedModel, names: Iterable[str]) -> None:
        self._model, self._own = model, dict.fromkeys(model.state_dict(), True)
        mapping = get_model_conversion_mapping(model)
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        self.without_place: list[str] = []
        self.targets: dict[str, str] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self._renamed(name)
            if target in self._own:
                self._sources.setdefault(target, []).append((name, pattern))
                self.targets[name] = target
            else:
                self.without_place.append(name)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        prefix = self._model.base_model_prefix
        target: str
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._own)
        if target not in self._own and name in self._own:
            target, pattern = rename_source_key(name, [], [], prefix, self._own)
        return target, pattern

    def loaded(self, tensors: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
        """The values that the model would have, by name in the model; at any time no more than is joined into one."""
        of_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        for target, sources in self._sources.items():
            patterns = dict(sources)
            if None in patterns.values():
                yield from ((target, value) for _, value in read(tensors, patterns))
                continue
            converter: Any = copy.deepcopy(of_pattern[sources[0][1]])
            for name, value in read(tensors, patterns):
                converter.add_tensor(target, name, patterns[name], value)
            made = converter.convert(target, model=self._model, config=self._model.config)
            yield from ((name, value[0] if isinstance(value, list) else value) for name, value in made.items())
