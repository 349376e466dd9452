"""Which of a model's own parameters are trained: by kind, and by patterns over their names."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Protocol

from torch import nn
from transformers import PreTrainedModel

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.moe.families import is_encoder_decoder
from fedalign.protocol import KINDS, Kind

UNREACHED = "no gradient reaches it: it only chooses"
SELECTION_BIAS = ("e_score_correction_bias", "expert_bias")  # added to scores only to choose

# peft imports bitsandbytes where it is, and that advises at every start to install a package that is of no use here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

TRAINED: dict[str, tuple[Kind, ...]] = {
    "full": KINDS,
    "moe": ("gate", "expert"),
    "experts": ("expert",),
    "router": ("gate",),
}


def choosers(model: nn.Module) -> tuple[str, ...]:
    """Modules that only choose which keys are attended to, as prefixes of names: no gradient ever reaches them."""
    return tuple(f"{path}." for path, module in model.named_modules() if "Indexer" in type(module).__name__)


def freeze_unreached(model: PreTrainedModel) -> None:
    """Freeze parameters that no gradient of text reaches: they are neither trained nor sent."""
    for path in choosers(model):
        model.get_submodule(path.rstrip(".")).requires_grad_(False)
    for path in beside_text(model):
        model.get_submodule(path).requires_grad_(False)


def beside_text(model: PreTrainedModel) -> tuple[str, ...]:
    """Modules of a multimodal model that text does not pass through: towers and projectors, the outermost of each."""
    if model.config.get_text_config() is model.config or is_encoder_decoder(model.config):
        return ()
    text = {model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()} - {None}
    return tuple(_outside(model, "", text))


def _outside(module: nn.Module, path: str, text: Collection[nn.Module]) -> Iterator[str]:
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if child in text:
            continue
        if any(one in text for one in child.modules()):
            yield from _outside(child, inner, text)
        else:
            yield inner


class Named(Protocol):
    """A parameter, its name, and the kind of the groups that its values belong to."""

    @property
    def name(self) -> str:
        """As in `named_parameters`."""

    @property
    def parameter(self) -> nn.Parameter:
        """Itself."""

    @property
    def kind(self) -> Kind:
        """Of all its groups."""


def freeze(slots: Sequence[Named], options: TuningConfig) -> None:
    """Freeze all that `options` does not train; what is frozen already stays so.

    Raises:
        UserError: A pattern matches nothing, or nothing is left to train.
    """
    of_kind = {s.name: s.parameter for s in slots if s.parameter.requires_grad and s.kind in TRAINED[options.kind]}
    kept = {of_kind[name] for name in chosen(list(of_kind), options)}
    for slot in slots:
        if slot.parameter not in kept:
            slot.parameter.requires_grad_(False)


def chosen(names: Sequence[str], options: TuningConfig) -> list[str]:
    """The names that the patterns leave in, of all that the kind trains.

    Raises:
        UserError: A pattern matches nothing, or nothing is left.
    """
    examples = f"tuning.kind = {options.kind!r} trains for example: {', '.join(names[:3]) or 'nothing of this model'}."
    for key in ("include", "exclude"):
        for pattern in getattr(options, key):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"tuning.{key} = {pattern!r}: matches nothing. {examples}")
    included = [n for n in names if not options.include or any(fnmatchcase(n, p) for p in options.include)]
    left = [name for name in included if not any(fnmatchcase(name, pattern) for pattern in options.exclude)]
    if not left:
        what = f"tuning.exclude = {list(options.exclude)}: leaves nothing to train" if options.exclude else "[tuning]"
        raise UserError(f"{what}: everything is frozen. {examples}")
    return left
