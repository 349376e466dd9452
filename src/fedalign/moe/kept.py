"""Parts of a checkpoint that take no part in training, and are kept as they were beside the saved model.

Layers that predict several tokens at once have no place in the model that transformers loads, so saving it would lose
them. They are copied byte by byte. Where they are not at hand, or are quantised and the model no longer is, what is
saved goes without, and its configuration counts none.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from fedalign.errors import UserError
from fedalign.maths.tensor_file import Named, create, in_order
from fedalign.moe.stored import INDEX, WEIGHTS, Loading, at_hand, read, stored, write_index

KEPT, TUNED = "model-kept.safetensors", "model-tuned.safetensors"
LARGEST = "50GB"  # of a file, as transformers has it
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
COUNTS = re.compile(r"num_(nextn_predict|mtp)_\w+|mtp_num_\w+")  # of such layers, in configurations


@dataclass(frozen=True)
class Kept:
    """A checkpoint's content besides the model.

    Attributes:
        tensors: where each tensor lies that the model has no place for, by its name in the checkpoint.
        files: of processors of pictures and sound.
        lacking: the configuration's counts of layers that are not at hand, by name.
    """

    tensors: Mapping[str, Path] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    lacking: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, source: str, revision: str | None, dequantised: bool = False) -> Kept:
        """The other content of a checkpoint, whose model was loaded or made as a skeleton.

        Args:
            model: as transformers loaded it; its weights may be on the meta device.
            source: a folder or a Hub id; of the Hub what is in the cache is at hand.
            revision: of the Hub.
            dequantised: whether the model is, and its checkpoint is not.
        """
        places = {} if dequantised else stored(source, revision)
        found = {name: places[name] for name in Loading(model, places).without_place}
        there = any(_predicts_several(name, model.config.get_text_config()) for name in found)
        files = (at_hand(source, name, revision) for name in PROCESSORS)
        counts = {} if there else dict(_counted(model.config.to_dict()))
        return cls(found, tuple(file for file in files if file), counts)

    @property
    def notes(self) -> list[str]:
        """Notes for people, a line each."""
        said = []
        if self.tensors:
            said.append(f"kept as in the checkpoint, and not tuned: {', '.join(_folded(self.tensors))}")
        if self.lacking:
            counts = ", ".join(f"{name} = {count}" for name, count in self.lacking.items())
            said.append(
                f"layers that predict several tokens at once ({counts}) are not at hand, or quantised: what is saved "
                "goes without, and says 0"
            )
        return said

    def add_to(self, folder: Path) -> None:
        """Put it beside a model that was just saved to `folder`."""
        for file in self.files:
            shutil.copyfile(file, folder / file.name)
        if self.lacking:
            _edit(folder / "config.json", lambda config: _without_counts(config, self.lacking.keys()))
        places = stored(str(folder))
        if kept := {name: file for name, file in self.tensors.items() if name not in places}:
            save_file(dict(read(kept)), folder / KEPT, metadata={"format": "pt"})
            _write_index(folder, {name: file.name for name, file in places.items()} | dict.fromkeys(kept, KEPT))

    def check(self, folder: Path) -> None:
        """Hold what lies in `folder` against the checkpoint.

        Raises:
            UserError: A part of it is not there as it was.
        """
        places = stored(str(folder))
        for name, value in read(self.tensors):
            if name not in places or not same(next(read({name: places[name]}))[1], value):
                raise UserError(f"{str(folder)!r}: {name}, which is kept from the checkpoint, is not there as it was.")


def save_with_kept(model: Any, folder: str | Path, **options: Any) -> None:
    """Save a model as transformers does, with what its checkpoint held besides."""
    model.save_pretrained(folder, **options)
    kept_of(model).add_to(Path(folder))


@contextmanager
def saving(model: Any, folder: Path, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """As `save_with_kept`, of values that are yet to come: the files' own tensors, to be written to in the meantime.

    Args:
        model: which.
        folder: where.
        tensors: all of them by the names in the files; they may be on the meta device.
    """
    model.save_pretrained(folder, state_dict={}, save_original_format=False)  # all but the weights
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(dict(tensors), filename_pattern=pattern, max_shard_size=LARGEST)
    places: dict[str, Tensor] = {}
    for file, names in split.filename_to_tensors.items():
        those = [Named(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names]
        places |= create(folder / file, in_order(those), {"format": "pt"})
    if split.is_sharded:
        about = {"metadata": {"total_parameters": model.num_parameters(), **split.metadata}}
        text = json.dumps(about | {"weight_map": split.tensor_to_filename}, indent=2, sort_keys=True)
        (folder / INDEX).write_text(f"{text}\n", encoding="utf-8")
    yield places
    kept_of(model).add_to(folder)


def kept_of(model: Any) -> Kept:
    """Parts that were found where the model was loaded; none of a model that was made anew."""
    found = getattr(model, "kept", None)
    return found if isinstance(found, Kept) else Kept()


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def _bytes(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def _predicts_several(name: str, config: Any) -> bool:
    """Whether a tensor of a checkpoint belongs to a layer of that kind: it is called so, or follows the last layer."""
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return bool(re.search(r"(^|\.)mtp", name)) or (number is not None and int(number[1]) >= config.num_hidden_layers)


def _counted(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _counted(value)
        elif COUNTS.fullmatch(str(name)) and isinstance(value, int) and value > 0:
            yield name, value


def _without_counts(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {
        name: _without_counts(value, names) if isinstance(value, dict) else 0 if name in names else value
        for name, value in config.items()
    }


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a JSON file, written as transformers does."""
    changed = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_index(folder: Path, places: dict[str, str]) -> None:
    """Name the file of every tensor; a model in one file is called otherwise, or it would be read alone."""
    if (folder / WEIGHTS).exists():
        (folder / WEIGHTS).rename(folder / TUNED)
        places = {name: TUNED if place == WEIGHTS else place for name, place in places.items()}
    write_index(folder, places)


def _folded(names: Iterable[str]) -> list[str]:
    """The modules that tensors lie in, at most a few."""
    paths = dict.fromkeys(re.match(r"(?:.*?\.\d+(?=\.)|[^.]*)", name)[0] for name in names)  # type: ignore[index] # it always matches
    return [*list(paths)[:3], *([f"and {len(paths) - 3} more"] if len(paths) > 3 else [])]
