"""A loaded Mixture-of-Experts model, and its parameter groups: above this file there are no parameter names.

Row e of a router (with its biases) is `gate[l, e]`, the slice of expert e (with its biases) is `expert[l, e]`, tables
that tokens are looked up in are `embeddings`, a head of its own is `head`, all else is `shared` (ALGORITHM.md, "Plan,
then sum"). Groups are cut from `named_parameters()`, in which tied weights appear once, never from checkpoint files,
whose names differ from those in memory.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from fedalign import parallel
from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.maths.heap import Heap
from fedalign.moe.detect import detect
from fedalign.moe.families import TOP_K, MoELayer, family_of, is_encoder_decoder
from fedalign.moe.groups import Slot, find_slots, flat, unwrapped
from fedalign.moe.kept import Kept, kept_of, save_with_kept, saving
from fedalign.moe.load import (
    DTYPES,
    configuration_of,
    explaining,
    freeze_biases,
    in_one_line,
    load_plain,
    model_path,
    quantised_by,
    resolved_source,
)
from fedalign.moe.site_experts import TRAINED, owners
from fedalign.moe.stored import Loading, as_stored, by_layer, stored
from fedalign.moe.tuning import SELECTION_BIAS, beside_text, choosers, freeze, freeze_unreached
from fedalign.protocol import HEAD, WHOLE, WORDS, Factors, Layout, ParameterGroup, TokenRows, Weights

if TYPE_CHECKING:
    from fedalign.moe.four_bit import Saved
    from fedalign.moe.lora import Adapters


BASE_DIGEST = "base.sha256"  # in the constants of adapters


@dataclass(frozen=True)
class Description:
    """The model as `fedalign inspect` shows it. Numbers of parameters count every parameter once, trained or not."""

    family: str
    found: str  # "table", or how it was autodetected and how sure that is
    dtype: str
    moe_layers: int  # of the model's depth; jetmoe has two routers in each
    dense_layers: int
    experts: int
    top_k: int
    hidden: int
    scoring: tuple[str, ...]
    max_length: int | None  # tokens; None: no limit
    routers: tuple[str, ...]  # module paths, layer by layer
    expert_modules: tuple[str, ...]
    shared_experts: tuple[str, ...]  # always on, part of `shared`
    selection_biases: tuple[str, ...]  # they only choose experts: kept as loaded, not trained
    parameters: int
    active_parameters: int  # used for one token
    trainable_parameters: int
    trainable_megabytes: float  # on the wire, in float32
    group_parameters: Mapping[str, int]  # trainable ones: all of those without a place, one `gate` row, one `expert`


class MoEModel:
    """A transformers model whose trainable values are addressed by parameter group.

    Attributes:
        model: the transformers model itself; call it as usual.
        family: its `model_type`, with underscores.
        found: how its MoE layers were found.
        layers: its L MoE layers.
        slots: every parameter, trainable or not, with the groups its values belong to.
        layout: number of trainable values of each group. What is frozen later is still in it: wrap again then.
        sharded: whether this process holds only its rows of each parameter.
        devices: where the parameters live; more than one where the model is split.
        adapter: the adapters that are trained in place of the model's own weights; None: none.
        saved: what a base in 4 bits saves; None: it is not in 4 bits.
        written: digests of the values that were saved last, where no process holds them all.
    """

    def __init__(
        self, model: PreTrainedModel, found: str, layers: tuple[MoELayer, ...], adapter: Adapters | None = None
    ) -> None:
        self.model = model
        self.family = family_of(model.config)
        self.found, self.layers, self.adapter = found, layers, adapter
        for layer in layers:
            _keep_in_float32(unwrapped(model.get_submodule(layer.router)), layer)
        self.slots = tuple(find_slots(model, layers))
        self.saved: Saved | None = None
        self.sharded = any(parallel.is_sharded(slot.parameter) for slot in self.slots)
        self.devices = tuple(dict.fromkeys(slot.parameter.device for slot in self.slots))
        self._base_digest: Tensor | None = None
        self._origins: Mapping[str, bytes] = {}  # digests of what was packed
        self.written: dict[str, bytes] = {}
        self._owners: dict[ParameterGroup, list[Slot]] = defaultdict(list)
        for slot in self.slots:
            for group in slot.groups if slot.parameter.requires_grad else ():
                self._owners[group].append(slot)
        self.layout = self._layout()

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tuning: TuningConfig | None = None,
        seed: int = 0,
        device: str | torch.device | None = None,
    ) -> Self:
        """Address an already loaded transformers model by parameter group. Its routers become float32 in place.

        Args:
            model: changed in place: what is not tuned is frozen, adapters are put into it.
            tuning: what to train of it; None: all that is not frozen.
            seed: of the adapters' first values.
            device: where it goes; a 4-bit base is packed on its way there. None: it stays where it is.

        Raises:
            UserError: the model is dense, of a refused family, its MoE layers cannot be understood, or it cannot be
                tuned so.
        """
        freeze_unreached(model)
        if device is not None and not (tuning and tuning.kind == "qlora"):
            model.to(device)
        found, layers = detect(model)
        if tuning is None or not tuning.adapts:
            moe = cls(model, found, layers)
            if tuning is None or (tuning.kind == "full" and not (tuning.include or tuning.exclude)):
                return moe
            freeze(moe.slots, tuning)
            return cls(model, found, layers)
        from fedalign.moe import lora

        for layer in layers:
            _keep_in_float32(model.get_submodule(layer.router), layer)
        if tuning.kind == "lora":
            return cls(model, found, layers, lora.inject(model, layers, tuning, seed))
        from fedalign.moe import four_bit

        if model.device.type == "meta":
            origins, saved = {}, four_bit.forecast(model, layers)
        else:
            origins = {name: sha256(parameter.detach()) for name, parameter in model.named_parameters()}
            saved = four_bit.quantise(model, layers, device or model.device)
        moe = cls(model, found, layers, lora.inject(model, layers, tuning, seed))
        moe.saved, moe._origins = saved, origins
        if not tuning.gradient_checkpointing:
            four_bit.recompute_experts(model, layers)
        return moe

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        trust_remote_code: bool = False,
        revision: str | None = None,
        tuning: TuningConfig | None = None,
        seed: int = 0,
    ) -> Self:
        """Load a folder saved by transformers, or a model of the Hub; `tuning` and `seed` as in `wrap`.

        Routers have the values of a checkpoint in safetensors, whatever `dtype` is. Under adapters, and of other or
        dequantised checkpoints, those that plain libraries load.

        Raises:
            UserError: there is no such model, it is broken or incomplete, or `wrap` refuses it.
        """
        model = load_plain(path_or_id, dtype=dtype, trust_remote_code=trust_remote_code, revision=revision)
        moe = cls.wrap(freeze_biases(model), tuning, seed, device)
        if dtype != "float32" and moe.adapter is None and getattr(model, "dequantised_from", None) is None:
            moe._unround_routers(stored(str(resolved_source(path_or_id)), revision))
        return moe

    @torch.no_grad()
    def _unround_routers(self, places: Mapping[str, Path]) -> None:
        """Give routers, which are float32, the values that they have in a checkpoint's files."""
        routers = {
            f"{layer.router}.{name}": value
            for layer in self.layers
            for name, value in self.model.get_submodule(layer.router).state_dict().items()
        }
        targets = Loading(self.model, places).targets
        here = {name: places[name] for name, target in targets.items() if target in routers}
        for name, value in Loading(self.model, here).loaded(here):
            if name in routers:
                routers[name].copy_(value)

    @classmethod
    def skeleton(
        cls,
        path_or_id: str | Path,
        *,
        dtype: str = "float32",
        trust_remote_code: bool = False,
        revision: str | None = None,
        tuning: TuningConfig | None = None,
    ) -> Self:
        """The model without values, on the meta device: its configuration is read, its weights are not.

        Raises:
            UserError: as `load`.
        """
        source = resolved_source(path_or_id)
        options = {"trust_remote_code": trust_remote_code, "revision": revision}
        with explaining(source):
            config, auto = configuration_of(source, options)
            if method := quantised_by(config):
                del config.quantization_config
            with torch.device("meta"):
                model = auto.from_config(config, dtype=DTYPES[dtype], trust_remote_code=trust_remote_code)
            model.kept, model.dequantised_from = Kept.of(model, source, revision, bool(method)), method
            if (Path(source) / "generation_config.json").is_file() or not Path(source).is_dir():
                with contextlib.suppress(OSError):  # few models on the Hub have none
                    model.generation_config = GenerationConfig.from_pretrained(source, revision=revision)
        return cls.wrap(freeze_biases(model), tuning)

    def _filled(self, weights: Mapping[ParameterGroup, Tensor], constants: Mapping[str, Tensor]) -> Self:
        """A skeleton's copy whose adapters have these values; the base stays without: an adapter is saved without it.

        Raises:
            ValueError: These are not all values of this model.
        """
        model = copy.deepcopy(self.model)
        for path in {name.rpartition(".")[0] for name in self._adapter_slots()}:
            model.get_submodule(path).to_empty(device="cpu", recurse=False)
        moe = type(self)(freeze_biases(model), self.found, self.layers, self.adapter)
        moe._base_digest = constants.get(BASE_DIGEST)
        mine = moe.constants()
        moe._check_whole(weights, constants, mine)
        moe.write(weights)
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(constants[name])
        return moe

    def constants(self) -> dict[str, Tensor]:
        """Tensors that are saved but never trained, by name: frozen parameters and persistent buffers.

        Adapters are saved without their base: of it there is a digest alone.
        """
        if self.adapter is not None:
            frozen = {
                n: s.parameter.detach() for n, s in self._adapter_slots().items() if not s.parameter.requires_grad
            }
            return frozen | self._adapter_buffers() | {BASE_DIGEST: self._digest_of_base()}
        frozen = {slot.name: slot.parameter.detach() for slot in self.slots if not slot.parameter.requires_grad}
        saved = self.model.state_dict().keys()
        return frozen | {name: value for name, value in self.model.named_buffers() if name in saved}

    def weights_hash(self) -> str:
        """64 hex digits over all values: equal if and only if two loaded models are."""
        slots = self._adapter_slots().values() if self.adapter else self.slots
        values = {slot.name: slot.parameter.detach() for slot in slots} | self.constants()
        return str(_digest(self.fingerprint(), sorted(values.items())).hexdigest())

    def weights_hash_of(
        self, weights: Mapping[ParameterGroup, Tensor], constants: Mapping[str, Tensor], heap: Heap | None = None
    ) -> str:
        """The `weights_hash` that this model, which may be a skeleton, would have with these values.

        Args:
            weights: of all groups.
            constants: of the same model, see `constants`.
            heap: where one parameter after another lies.

        Raises:
            ValueError: These are not all values of this model.
        """
        if self.adapter is not None:  # small
            return self._filled(weights, constants).weights_hash()
        self._check_whole(weights, constants, self.constants())
        values = self._filled_values(weights, constants, heap or Heap())
        return str(_digest(self.fingerprint(), ((name, make()) for name, make in sorted(values.items()))).hexdigest())

    def _filled_values(
        self, weights: Mapping[ParameterGroup, Tensor], constants: Mapping[str, Tensor], heap: Heap
    ) -> Mapping[str, Callable[[], Tensor]]:
        """Makers of the values that are saved, parameters and persistent buffers, by name."""
        fixed = {name: partial(constants[name].to, value.dtype) for name, value in self.constants().items()}
        trained = (slot for slot in self.slots if slot.parameter.requires_grad)
        return {slot.name: partial(self._built, slot, weights, heap) for slot in trained} | fixed

    def _built(self, slot: Slot, weights: Mapping[ParameterGroup, Tensor], heap: Heap) -> Tensor:
        """A parameter's values out of those of its groups."""
        whole = heap.zeros(slot.parameter.numel(), slot.parameter.dtype).view(slot.parameter.shape)
        for group in slot.groups:
            start, values = 0, weights[group]
            self._check_size(group, values)
            for owner in self._owners[group]:
                if owner is slot:
                    part = slot.part(whole, group)
                    part.copy_(values[start : start + slot.size].view_as(part))
                start += owner.size
        return whole

    def _check_size(self, group: ParameterGroup, values: Tensor) -> None:
        if values.numel() != self.layout.sizes.get(group):
            raise ValueError(
                f"{group}: {values.numel()} values, the model trains {self.layout.sizes.get(group, 'none such')}"
            )

    def _check_whole(
        self,
        weights: Mapping[ParameterGroup, Tensor],
        constants: Mapping[str, Tensor],
        mine: Mapping[str, Tensor],
    ) -> None:
        """Refuse weights and constants that are not all of this model's, whose own constants are `mine`."""
        for what, lacking in (
            ("weights", self.layout.sizes.keys() ^ weights.keys()),
            ("constants", mine.keys() ^ constants),
        ):
            if lacking:
                raise ValueError(f"{what}: {min(map(str, lacking))} is lacking, or is not of this model")
        for name, value in mine.items():
            if value.shape != constants[name].shape:
                raise ValueError(f"{name}: {list(constants[name].shape)}, the model has {list(value.shape)}")

    def _adapter_slots(self) -> dict[str, Slot]:
        """The content of an adapter's file: all factors, and routers trained whole, with what is frozen in them."""
        trained = {s.name for s in self.slots if s.parameter.requires_grad and ".lora_" not in s.name}
        routers = [f"{layer.router}." for layer in self.layers]
        whole = tuple(path for path in routers if any(name.startswith(path) for name in trained))
        return {s.name: s for s in self.slots if s.name in trained or ".lora_" in s.name or s.name.startswith(whole)}

    def _adapter_buffers(self) -> dict[str, Tensor]:
        """The buffers of routers trained whole, which plain peft wants beside their weights."""
        saved, whole = self.model.state_dict().keys(), {name.rpartition(".")[0] for name in self._adapter_slots()}
        return {n: value for n, value in self.model.named_buffers() if n in saved and n.rpartition(".")[0] in whole}

    def base_digest(self) -> str:
        """64 hex digits over what the adapters are put upon: equal if and only if two bases are."""
        return bytes(self._digest_of_base().tolist()).hex()

    def _digest_of_base(self) -> Tensor:
        if self._base_digest is None:
            adapter, saved = self._adapter_slots(), self.model.state_dict().keys()
            values: dict[str, Tensor | bytes] = {n: v for n, v in self.model.named_buffers() if n in saved}
            for slot in self.slots:
                if slot.name not in adapter:
                    name = slot.name.replace(".base_layer", "")
                    values[name] = self._origins.get(name, slot.parameter.detach())
            if any(isinstance(value, Tensor) and value.is_meta for value in values.values()):
                return torch.empty(hashlib.sha256().digest_size, dtype=torch.uint8, device="meta")  # of a skeleton
            self._base_digest = torch.frombuffer(
                bytearray(_digest("", sorted(values.items())).digest()), dtype=torch.uint8
            )
        return self._base_digest

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters as they lie in memory."""
        adapter = self._adapter_slots()
        unpacked = sum(int(s.parameter.nbytes) for s in self.slots if self.saved is None or s.name in adapter)
        return unpacked + (self.saved.after if self.saved else 0)

    @property
    def experts(self) -> int:
        """E, experts of each layer."""
        return self.layers[0].size

    @property
    def top_k(self) -> int:
        """K, experts a token is sent to."""
        return self.layers[0].top_k

    @property
    def hidden(self) -> int:
        """H, size of what enters a router."""
        return self.layers[0].hidden

    @property
    def is_seq2seq(self) -> bool:
        """Whether it has an encoder and a decoder."""
        return is_encoder_decoder(self.model.config)

    @property
    def max_length(self) -> int | None:
        """The longest sequence in tokens; None if positions are relative and nothing limits it."""
        text = self.model.config.get_text_config()
        return getattr(text, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.slots[0].parameter.device

    @property
    def home(self) -> torch.device:
        """Where whole copies of its values go: beside the parameters, unless no device holds them all."""
        return torch.device("cpu") if self.sharded or len(self.devices) > 1 else self.device

    @property
    def notes(self) -> list[str]:
        """Notes on how this model is trained, a line each."""
        said = [f"not adapted: {layers}" for layers in _by_reason(self.adapter.left_out if self.adapter else {})]
        if self.equal_lengths:
            said.append("sparse attention depends on padding: batches are of equal lengths")
        if parts := beside_text(self.model):
            said.append(f"multimodal checkpoint: text alone is tuned, and the rest kept as it was: {', '.join(parts)}")
        said += kept_of(self.model).notes if self.adapter is None else []
        if method := getattr(self.model, "dequantised_from", None):
            said.append(f"{method} checkpoint, dequantised: {self.nbytes / 1e6:,.1f} MB in {self.model.dtype}")
        return said

    def not_adaptable(self) -> list[str]:
        """Linear layers that LoRA would leave out, whatever it targets, by reason."""
        from fedalign.moe import lora

        return _by_reason(lora.left_out_of(self.model, self.layers))

    @property
    def equal_lengths(self) -> bool:
        """Whether a batch must not be padded: sparse attention lets padding change the numbers of a sequence."""
        return bool(choosers(self.model))

    @torch.no_grad()
    def shift_gradients(self, shift: Weights) -> None:
        """Add flat vectors [N], by group, to the gradients in place; a gradient that is not there counts as zero."""
        trained = [slot.parameter for slot in self.slots if slot.parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = {parameter: parameter.grad for parameter in trained if parameter.grad is not None}
        for group, vector in shift.items():
            for piece, start in self._places(group, gradients):
                piece.add_(vector[start : start + piece.numel()].to(piece.device).view_as(piece))

    def with_gradients(self, groups: Collection[ParameterGroup]) -> set[ParameterGroup]:
        """Those groups of which a value has a gradient that is not zero, in any process."""
        trained = [slot.parameter for slot in self.slots if slot.parameter.requires_grad]
        gradients = {p: torch.zeros_like(p) if p.grad is None else p.grad for p in trained}
        found = [sum(piece.count_nonzero() for piece, _ in self._places(group, gradients)) for group in groups]
        if not found:
            return set()
        count_G = parallel.total(torch.stack([torch.as_tensor(count, device=self.device) for count in found]))
        return {group for group, count in zip(groups, count_G.tolist(), strict=True) if count}

    @property
    def views(self) -> dict[ParameterGroup, tuple[Tensor, ...]]:
        """Every trainable value that is here exactly once, by group, as views of the parameters' own storage."""
        return self.views_of({})

    def views_of(self, stand_ins: Mapping[nn.Parameter, Tensor]) -> dict[ParameterGroup, tuple[Tensor, ...]]:
        """As `views`, but of these tensors in place of the parameters that they stand for."""
        return {group: tuple(view for view, _ in self._places(group, stand_ins)) for group in self.layout.groups}

    def _places(self, group: ParameterGroup, stand_ins: Mapping[nn.Parameter, Tensor]) -> Iterator[tuple[Tensor, int]]:
        """This process's pieces of a group, and where in its flat vector each begins."""
        start = 0
        for slot in self._owners.get(group, ()):
            values = stand_ins.get(slot.parameter, slot.parameter.detach())
            if self.sharded:
                view, begin = slot.held(values, group)
                yield view, start + begin
            else:
                yield slot.part(values, group), start
            start += slot.size

    def weaker_components(self, rank: int) -> list[Tensor]:
        """Of all trained factors, views of what comes after the first `rank` components."""
        from fedalign.moe import lora

        found = []
        for slot in self.slots:
            if slot.parameter.requires_grad and (place := lora.pair_of(slot.name)):
                whole = slot.parameter.detach().view(slot.owners.shape or slot.parameter.shape)
                axis = whole.dim() - 2 if place[1] == "A" else 1
                found.append(whole.narrow(axis, rank, whole.shape[axis] - rank))
        return found

    @contextlib.contextmanager
    def freezing(self, groups: Collection[ParameterGroup]) -> Iterator[None]:
        """Meanwhile parameters that belong to these groups alone need no gradient; the layout stays."""
        still = set(groups)
        parameters = [s.parameter for s in self.slots if s.parameter.requires_grad and still.issuperset(s.groups)]
        try:
            for parameter in parameters:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def sending_to(self, top_k: int) -> Iterator[None]:
        """Meanwhile routers choose so many experts for a token; 0: as many as ever.

        Raises:
            UserError: More than ever, or this family's number is fixed.
        """
        if top_k in (0, self.top_k):
            yield
            return
        before, layers = [], self.layers
        for layer in layers:
            block = layer.router.rpartition(".")[0]
            holders = [unwrapped(self.model.get_submodule(path)) for path in (layer.router, block, layer.experts)]
            places = [(h, name) for h in holders for name in TOP_K if getattr(h, name, None) == layer.top_k]
            if not places:
                raise UserError(f"top_k = {top_k}: {self.family} fixes it at {layer.top_k}. Leave it out.")
            before += places
        if top_k > self.top_k:
            raise UserError(
                f"top_k = {top_k}: the model has {self.experts} experts and sends a token to {self.top_k}. "
                f"Choose 1 to {self.top_k}, or 0."
            )
        try:
            for holder, name in before:
                setattr(holder, name, top_k)
            self.layers = tuple(replace(layer, top_k=top_k) for layer in layers)
            yield
        finally:
            for holder, name in before:
                setattr(holder, name, layers[0].top_k)
            self.layers = layers

    @torch.no_grad()
    def read(
        self, groups: Iterable[ParameterGroup] | None = None, stand_ins: Mapping[nn.Parameter, Tensor] | None = None
    ) -> Weights:
        """Flat float32 copies [N] of the groups (all by default) at `home`; of `stand_ins` as in `views_of`."""
        groups, stand_ins = self.layout.groups if groups is None else groups, stand_ins or {}
        if not self.sharded:
            return {group: flat([view for view, _ in self._places(group, stand_ins)], self.home) for group in groups}
        parts: dict[ParameterGroup, list[Tensor]] = {group: [] for group in groups}
        for slot in self.slots:
            if wanted := [group for group in slot.groups if group in parts and slot.parameter.requires_grad]:
                whole = parallel.whole(stand_ins.get(slot.parameter, slot.parameter.detach())).to(self.home)
                for group in wanted:
                    parts[group].append(slot.part(whole, group))
        return {group: flat(pieces, self.home) for group, pieces in parts.items()}

    @torch.no_grad()
    def write(
        self, weights: Mapping[ParameterGroup, Tensor], stand_ins: Mapping[nn.Parameter, Tensor] | None = None
    ) -> None:
        """Overwrite the groups in place from flat tensors [N] of any float type and device.

        Args:
            weights: the new values.
            stand_ins: what is overwritten, as in `views_of`.

        Raises:
            ValueError: a group of another model or of another size.
        """
        for group, values in weights.items():
            self._check_size(group, values)
            for view, start in self._places(group, stand_ins or {}):
                view.copy_(values[start : start + view.numel()].view_as(view))

    def checkpoint_activations(self) -> None:
        """Compute each layer's activations again in the backward pass instead of keeping them.

        Raises:
            UserError: This family cannot.
        """
        # older releases of transformers have the second name alone
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(
                f"tuning.gradient_checkpointing = true: {self.family} cannot: {in_one_line(error)}"
            ) from None

    def save(self, folder: str | Path) -> None:
        """Save as an ordinary transformers folder, adapters as one of peft; the same weights give the same bytes."""
        if self.sharded:
            self._save_whole(folder)
            return
        if self.adapter is None:
            save_with_kept(self.model, folder)
            return
        from fedalign.moe import lora

        values = {name: slot.parameter.detach() for name, slot in self._adapter_slots().items()}
        lora.save(self.adapter, values | self._adapter_buffers(), Path(folder), self.base_digest())

    def save_filled(
        self,
        weights: Mapping[ParameterGroup, Tensor],
        constants: Mapping[str, Tensor],
        folder: str | Path,
        heap: Heap | None = None,
    ) -> Self:
        """Save a skeleton as `save` would if it had these values; it stays one.

        Args:
            weights: of all groups.
            constants: of the same model, see `constants`.
            folder: where.
            heap: where one layer after another lies before it is written.

        Returns:
            The model to hold the folder against: this one, with digests of what was written, or adapters with values.

        Raises:
            ValueError: These are not all values of this model.
        """
        if self.adapter is not None:
            filled = self._filled(weights, constants)
            filled.save(folder)
            return filled
        self._check_whole(weights, constants, self.constants())
        values, self.written = self._filled_values(weights, constants, heap or Heap()), {}
        without = {slot.name: slot.parameter.detach() for slot in self.slots} | self.constants()
        layers = list(by_layer(values))
        stored = (as_stored(self.model, {name: without[name] for name in names}) for names in layers)
        with saving(self.model, Path(folder), dict(item for one in stored for item in one.items())) as places:
            for names in layers:
                layer = {name: values[name]() for name in names}
                self.written |= {name: sha256(value) for name, value in layer.items()}
                for name, value in as_stored(self.model, layer).items():
                    places[name].copy_(value)
        return self

    def _save_whole(self, folder: str | Path) -> None:
        """Gather one parameter after another in the first process, which alone writes."""
        own = {name for name, _ in (*self.model.named_parameters(), *self.model.named_buffers())}  # tied ones once
        state = {}
        for name, value in self.model.state_dict().items():
            if name in own:
                whole = parallel.whole(value)
                if parallel.is_first():
                    state[name] = whole.cpu()
        if parallel.is_first():
            self.written = {name: sha256(value) for name, value in state.items()}
            save_with_kept(self.model, folder, state_dict=state)

    def shard(self, device: torch.device) -> Self:
        """The same model with only this process's rows of every parameter, on `device`; this one is used up.

        Raises:
            UserError: It cannot be sharded.
        """
        if self.model.dtype != torch.float32 and any(layer.logits is None for layer in self.layers):
            raise UserError(
                f'tuning.dtype = "bfloat16": torchrun cannot shard {self.family}, whose routers return no logits. '
                'Choose "float32", or leave torchrun out.'
            )
        routers = [self.model.get_submodule(layer.router) for layer in self.layers]
        parallel.shard(self.model, self._blocks(), routers, device)
        return type(self)(self.model, self.found, self.layers)

    def split(self, places: Mapping[str, str | int] | None = None) -> Self:
        """The same model with its layers on several devices, as `parallel.split` places them; this one is used up."""
        parallel.split(self.model, self._blocks(), places)
        return type(self)(self.model, self.found, self.layers, self.adapter)

    def _blocks(self) -> list[nn.Module]:
        """The layers of the encoder and of the decoder, dense ones too."""
        stacks = {match[1] for layer in self.layers if (match := re.match(r"(.*?)\.\d+\.", layer.router))}
        return [block for stack in sorted(stacks) for block in self.model.get_submodule(stack).children()]

    def read_adapter(self, folder: str | Path) -> None:
        """Take over the values of an adapter that `save` wrote.

        Raises:
            UserError: It is damaged, or made for another model or another tuning.
        """
        mine = self._adapter_values()
        with torch.no_grad():
            for name, value in self._stored_adapter(folder).items():
                mine[name].copy_(value)

    def check_adapter(self, folder: str | Path) -> None:
        """Hold an adapter that `save` wrote against the model's own.

        Raises:
            UserError: As `read_adapter`, it has other values, or it names another base.
        """
        from fedalign.moe import lora

        mine, recorded = self._adapter_values(), lora.recorded_base(Path(folder))
        if recorded != self.base_digest():
            raise UserError(f"adapter {str(folder)!r}: it names another base ({str(recorded)[:12]}) than the model's.")
        for name, value in self._stored_adapter(folder).items():
            if not torch.equal(mine[name].detach().cpu(), value):
                raise UserError(f"adapter {str(folder)!r}: {name} has other values than the model.")

    def _adapter_values(self) -> dict[str, Tensor]:
        return {name: slot.parameter for name, slot in self._adapter_slots().items()} | self._adapter_buffers()

    def _stored_adapter(self, folder: str | Path) -> dict[str, Tensor]:
        from fedalign.moe import lora

        assert self.adapter is not None, "it has no adapters"
        return lora.read(self.adapter, Path(folder), {n: value.shape for n, value in self._adapter_values().items()})

    def fingerprint(self) -> str:
        """64 hex digits, the same for all weights of one architecture with the same parts trained."""
        config = _lasting(self.model.config.to_dict())
        groups = [(str(group), size) for group, size in self.layout.sizes.items()]
        shapes = [(slot.name, tuple(slot.parameter.shape)) for slot in self.slots]
        text = json.dumps([config, groups, shapes], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> Description:
        """This model's MoE layers, for people."""
        total = sum(slot.parameter.numel() for slot in self.slots)
        routed = sum(slot.parameter.numel() for slot in self.slots if slot.kind == "expert")
        trainable = sum(self.layout.sizes.values())
        config = self.model.config.get_text_config()
        depth = sum(getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "num_decoder_layers"))
        moe_layers = len({re.sub(r"(\.\d+)\..*", r"\1", layer.router) for layer in self.layers})
        return Description(
            family=self.family,
            found=self.found,
            dtype=str(self.model.dtype).removeprefix("torch."),
            moe_layers=moe_layers,
            dense_layers=max(0, depth - moe_layers),
            experts=self.experts,
            top_k=self.top_k,
            hidden=self.hidden,
            scoring=tuple(sorted({layer.scoring for layer in self.layers})),
            max_length=self.max_length,
            routers=tuple(layer.router for layer in self.layers),
            expert_modules=tuple(layer.experts for layer in self.layers),
            shared_experts=tuple(self._shared_experts()),
            selection_biases=tuple(name for name in self.model.state_dict() if name.endswith(SELECTION_BIAS)),
            parameters=total,
            active_parameters=total - routed * (self.experts - self.top_k) // self.experts,
            trainable_parameters=trainable,
            trainable_megabytes=trainable * 4 / 1e6,
            group_parameters={
                group.kind: self.layout.sizes[group]
                for group in (*WHOLE, ParameterGroup("gate"), ParameterGroup("expert"))
            },
        )

    def _layout(self) -> Layout:
        names = Layout(len(self.layers), self.layers[0].whole or self.experts, {})
        sizes = {group: sum(slot.size for slot in self._owners.get(group, ())) for group in names.groups}
        factors = {group: found for group in names.groups if self.adapter and (found := tuple(self._factors(group)))}
        softmax_L = tuple(layer.scoring == "softmax" for layer in self.layers)
        top_k_L = tuple(layer.top_k for layer in self.layers)
        rows = tuple(self._token_rows())
        whose = owners(self.model.config, names.experts)
        return Layout(names.layers, names.experts, sizes, factors, rows, softmax_L, top_k_L, self.is_seq2seq, whose)

    def _token_rows(self) -> Iterator[TokenRows]:
        """Embeddings and head, if they are trained whole: where their rows lie in their groups."""
        modules = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for group, module in zip(WORDS, modules, strict=True):
            start = 0
            for slot in self._owners.get(group, ()):
                if slot.parameter is getattr(module, "weight", None):
                    tokens, width = slot.parameter.shape
                    yield TokenRows(start, tokens, width, answers=group is HEAD)
                start += slot.size

    def _factors(self, group: ParameterGroup) -> Iterator[Factors]:
        """Where in the group's flat vector its pairs of factors lie. Of a pair with one frozen factor there is none."""
        from fedalign.moe import lora

        begin, pairs = 0, defaultdict[str, dict[str, tuple[int, Tensor]]](dict)
        for slot, view in zip(self._owners[group], self._views(group), strict=True):
            if place := lora.pair_of(slot.name):
                pairs[place[0]][place[1]] = begin, view
            begin += view.numel()
        for pair in pairs.values():
            if len(pair) == 2:
                (start_A, A_R_N), (start_B, B_M_R) = pair["A"], pair["B"]
                yield Factors(start_A, start_B, A_R_N.shape[0], A_R_N.shape[1], B_M_R.shape[0])

    def _views(self, group: ParameterGroup) -> tuple[Tensor, ...]:
        return tuple(slot.view(group) for slot in self._owners.get(group, ()))

    def cells(self, mask_L_E: Tensor) -> list[ParameterGroup]:
        """The experts that are true in a mask over those that are here, by their numbers in the whole model."""
        return [
            ParameterGroup("expert", layer, self.layers[layer].named[e]) for layer, e in mask_L_E.nonzero().tolist()
        ]

    def _shared_experts(self) -> Iterator[str]:
        for layer in self.layers:
            block = layer.router.rpartition(".")[0]
            for place in (block, block.rpartition(".")[0]):  # granitemoeshared has it beside the block
                for name, module in self.model.get_submodule(place).named_children():
                    dense = name == "mlp" and not block.startswith(f"{place}.mlp")  # gemma4 has one beside its router
                    if dense or (name.startswith("shared_") and not name.endswith("gate")):
                        yield f"{place}.{name} ({type(module).__name__})"


def _by_reason(left_out: Mapping[str, str]) -> list[str]:
    """Layers that are left out, by path, a line for each reason."""
    left: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        left.setdefault(reason, []).append(re.sub(r"\.\d+\.", ".*.", path))
    return [f"{', '.join(dict.fromkeys(paths))}: {reason}" for reason, paths in left.items()]


def _lasting(config: Any) -> Any:
    """A configuration, nested ones too, without what differs from place to place, or from run to run."""
    volatile = {"transformers_version", "architectures", "_name_or_path", "dtype", "use_cache", "auto_map", TRAINED}
    if not isinstance(config, dict):
        return config
    return {key: _lasting(value) for key, value in config.items() if key not in volatile}


def _digest(text: str, values: Iterable[tuple[str, Tensor | bytes]]) -> Any:
    """SHA-256 over a text and named values, or digests of them, in this order."""
    digest = hashlib.sha256(text.encode())
    for name, value in values:
        digest.update(name.encode())
        digest.update(value if isinstance(value, bytes) else sha256(parallel.whole(value)))
    return digest


def sha256(value: Tensor) -> bytes:
    """Of a tensor's bytes."""
    return hashlib.sha256(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def _keep_in_float32(router: nn.Module, layer: MoELayer) -> None:
    """Hold and run the router in float32, also under autocast: bfloat16 adds 21 % noise to its gradient."""
    router.float()
    if isinstance(getattr(router, "dtype", None), torch.dtype):
        # Switch would cast its weight to this at the first forward pass
        router.dtype = torch.float32  # type: ignore[assignment] # torch says that a module's attributes are tensors or modules
    # a bound method, not a closure: a deep copy of the model then runs the copy's weights
    router.forward = MethodType(partial(_forward_and_cast, layer) if layer.cast else _forward_in_float32, router)


def _forward_and_cast(layer: MoELayer, router: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """As below, but for its logits the output has the type of the input: not all experts can mix types."""
    output = _forward_in_float32(router, hidden, *args, **kwargs)
    if not isinstance(output, tuple):
        return output.to(hidden.dtype)
    cast = (isinstance(o, Tensor) and o.is_floating_point() and index != layer.logits for index, o in enumerate(output))
    return tuple(o.to(hidden.dtype) if wanted else o for o, wanted in zip(output, cast, strict=True))


def _forward_in_float32(router: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    forward = type(router).forward
    if not torch.is_autocast_enabled(hidden.device.type):  # entering a context costs a small model a percent
        return forward(router, hidden.float(), *args, **kwargs)
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(router, hidden.float(), *args, **kwargs)


def load_model(
    name: str,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    tuning: TuningConfig | None = None,
    seed: int = 0,
) -> MoEModel:
    """Load any Hugging Face MoE model, or the demo's, to be tuned as configured."""
    return MoEModel.load(
        model_path(name),
        dtype=tuning.loaded_dtype if tuning else "float32",
        device=device,
        trust_remote_code=trust_remote_code,
        revision=revision,
        tuning=tuning,
        seed=seed,
    )
