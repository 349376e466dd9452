"""Adapters beside a frozen model, made and saved by peft: its spelling of fused experts is known here alone.

An adapter adds alpha / rank · B·A to a matrix, A [rank, inputs], B [outputs, rank]. Of a fused tensor of E experts peft
keeps one A [rank·E, inputs], expert after expert, and one B [outputs, rank·E] in which the experts alternate: of expert
e, A[e·rank : (e+1)·rank] and B[:, e::E].
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as as_peft_reads
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.maths.hashing import derive_seed
from fedalign.moe.families import MoELayer, family_of, is_encoder_decoder
from fedalign.moe.site_experts import owners
from fedalign.moe.tuning import UNREACHED, beside_text, choosers, chosen

NAME = ".default"  # peft's name of the one adapter, in the names of parameters but not of files
PREFIX = "base_model.model."  # of names in files
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.sha256"  # which base it was trained on: a file of ours beside those of peft
# In target_modules peft takes these for the experts of older transformers, now fused, and adapts those instead. Their
# weights can still be targeted as parameters.
TAKEN_FOR_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
FAILS_UPSTREAM = {  # family -> why its routed experts cannot be adapted
    "dbrx": "its code reads the weights of experts past what peft puts around them, and crashes",
}

ATTENDS = {"q", "k", "v", "kv", "qkv", "qkvz", "wq", "wk", "wv", "wqkv", "query", "key", "value"}  # in names of layers
SCANS = {"A_log", "D"}  # what a state-space mixer holds

Role = Literal["A", "B"]


@dataclass(frozen=True)
class Adapters:
    """The adapters that were put into a model."""

    config: LoraConfig  # peft's own description
    names: Mapping[str, str]  # of every factor in memory -> in a file that peft reads
    left_out: Mapping[str, str]  # linear layers that fit the targets and are not adapted, and why


def inject(model: PreTrainedModel, layers: Sequence[MoELayer], options: TuningConfig, seed: int) -> Adapters:
    """Put adapters into a model, in place, and freeze all else but what `options` trains whole.

    Every B starts at zero, every A at random from `seed`, the same at all sites.

    Raises:
        UserError: Nothing to adapt is left by the patterns, or peft cannot adapt this family.
    """
    (modules, parameters, routers), left_out = _wanted(model, layers, options)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type] # peft says int and takes any number
        target_modules=_as_suffixes(modules, [path for path, _ in model.named_modules()]),
        target_parameters=_as_suffixes(parameters, [name for name, _ in model.named_parameters()]) or None,
        modules_to_save=_as_suffixes(routers, [path for path, _ in model.named_modules()]) or None,
        **_kind(model),
        base_model_name_or_path=str(model.config._name_or_path),
    )
    trainable = [p for path in routers for p in model.get_submodule(path).parameters() if p.requires_grad]
    model.requires_grad_(False)
    if modules or parameters:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks for it
            torch.manual_seed(seed)
            # routers are trained in place: peft would keep a dead copy of each
            inject_adapter_in_model(replace(config, modules_to_save=None), model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(options.average != "freeze_a" or ".lora_B." in name)
    for parameter in trainable:
        parameter.requires_grad_(True)
    _draw_own(model, layers, seed)
    return Adapters(config, _names_in_files(model, config), left_out)


@torch.no_grad()
def _draw_own(model: PreTrainedModel, layers: Sequence[MoELayer], seed: int) -> None:
    """Draw each A of an expert that a site owns by the site's name: it is the same whoever else has one."""
    whose = owners(model.config, layers[0].size).items()
    own = [(name, number, expert) for name, experts in whose for number, expert in enumerate(experts)]
    for layer in layers if own else ():
        for path, module in model.get_submodule(layer.experts).named_modules():
            if not isinstance(module, ParamWrapper):
                continue
            factor, shape, _ = next(fused_factors(module, layer.size))
            for name, number, expert in own:
                drawn = torch.Generator().manual_seed(derive_seed(seed, "adapter", name, number, layer.experts, path))
                own_R_N = torch.empty(shape[1:])
                nn.init.kaiming_uniform_(own_R_N, a=math.sqrt(5), generator=drawn)  # as peft does
                factor.view(shape)[expert].copy_(own_R_N)


def _kind(model: PreTrainedModel) -> dict[str, Any]:
    """By what peft's auto classes load the base: a task's, or, as no task has a class for it, a multimodal model's."""
    if beside_text(model):
        return {"auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}}
    return {"task_type": "SEQ_2_SEQ_LM" if is_encoder_decoder(model.config) else "CAUSAL_LM"}


def pair_of(name: str) -> tuple[str, Role] | None:
    """The module whose factors a parameter belongs to, and which factor it is; None if it is none."""
    path, lora, rest = name.rpartition(".lora_")
    return (path, "A" if rest.startswith("A.") else "B") if lora else None


def fused_factors(module: nn.Module, size: int) -> Iterator[tuple[nn.Parameter, tuple[int, ...], int]]:
    """The factors around `size` fused experts; of each the shape in which experts have an axis, and that axis."""
    while isinstance(module, ParamWrapper):
        for factor, axis in ((module.lora_A, 0), (module.lora_B, 2)):
            weight: nn.Parameter = factor["default"].weight  # type: ignore[assignment] # torch says that it may be a module
            rows, columns = weight.shape
            yield weight, (size, rows // size, columns) if axis == 0 else (rows, columns // size, size), axis
        module = module.base_layer


def save(adapters: Adapters, values: Mapping[str, Tensor], folder: Path, base_digest: str) -> None:
    """Write an adapter that plain peft loads; `values`: what it holds, by parameter name."""
    folder.mkdir(parents=True, exist_ok=True)
    named = {_in_file(adapters, name): value.detach().cpu().contiguous() for name, value in values.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    _write(replace(adapters.config, inference_mode=True), folder)
    (folder / BASE).write_text(f"{base_digest}\n", encoding="utf-8")


def read(adapters: Adapters, folder: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Tensors that `save` wrote, by parameter name.

    Raises:
        UserError: There is no adapter, it is damaged, or it does not hold exactly parameters of these `shapes`.
    """
    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {str(folder)!r}: cannot be read: {error}") from None
    mine = {_in_file(adapters, name): name for name in shapes}
    for name in sorted(mine.keys() | found.keys()):
        has, wants = (list(found[name].shape) if name in found else "none"), list(shapes.get(mine.get(name, ""), []))
        if name not in mine or has != wants:
            raise UserError(
                f"adapter {str(folder)!r}: {name.removeprefix(PREFIX)}: it has {has}, the model {wants or 'none'}. "
                "It was made for another base or tuned otherwise: choose the model and [tuning] that it was made with."
            )
    return {mine[name]: value for name, value in found.items()}


def _in_file(adapters: Adapters, name: str) -> str:
    """A parameter's name in an adapter's file; of a router trained whole its own."""
    return PREFIX + adapters.names.get(name, name)


def _names_in_files(model: PreTrainedModel, config: LoraConfig) -> dict[str, str]:
    """How each factor is to be called in a file, so that peft, which renames as transformers does, finds it.

    Raises:
        UserError: Peft finds one under no name.
    """
    plain = {name: name.replace(NAME, "") for name, _ in model.named_parameters() if ".lora_" in name}
    lost = _lost_by_peft(model, config, plain, plain)
    names = plain | {name: _as_in_checkpoints(model, plain[name]) for name in lost}
    if lost := _lost_by_peft(model, config, {name: names[name] for name in lost}, plain):
        raise UserError(
            f"tuning.targets: peft would not find the adapter of {min(lost).partition('.lora_')[0]} again. "
            "Leave it out with tuning.exclude."
        )
    return names


def _lost_by_peft(
    model: PreTrainedModel, config: LoraConfig, names: Mapping[str, str], plain: Mapping[str, str]
) -> set[str]:
    """Factors in memory that would get no value from a file in which they are called so."""
    file = {PREFIX + name: torch.empty(0) for name in names.values()}
    read = as_peft_reads(model, config, file, NAME.strip("."))
    return {name for name in names if PREFIX + plain[name] not in read}


def _as_in_checkpoints(model: PreTrainedModel, name: str) -> str:
    for entry in get_model_conversion_mapping(model):
        if isinstance(entry, WeightRenaming):
            name, _ = entry.reverse_transform().rename_source_key(name)
    return name


def _wanted(
    model: PreTrainedModel, layers: Sequence[MoELayer], options: TuningConfig
) -> tuple[tuple[list[str], list[str], list[str]], dict[str, str]]:
    """Paths of the linear layers and names of the parameters to adapt, paths of the routers to train whole.

    And the linear layers that are left out, with the reason.
    """
    _refuse_experts(model, layers, options)
    parts = {*options.targets, *(["router"] if options.router == "lora" else [])}
    part, left_out = _parts(model, layers), left_out_of(model, layers, options.targets)
    fitting = [path for path in part if part[path] in parts]
    linears = [path for path in fitting if path not in left_out]
    parameters = [name for layer in layers for name in _fused(model, layer) if "experts" in parts]
    if options.targets and not linears and not parameters:
        there = sorted({*part.values()} & {"attention", "experts", "shared_experts", "dense"} - left_out.keys())
        raise UserError(
            f"tuning.targets = {list(options.targets)}: no linear layer of {family_of(model.config)} is one of these. "
            f"Choose among: {', '.join(there)}."
        )
    taken = [path for path in linears if path.rpartition(".")[2] in TAKEN_FOR_EXPERTS]
    modules = [path for path in linears if path not in taken]
    parameters += [f"{path}.weight" for path in taken]
    routers = [layer.router for layer in layers if options.router != "frozen"]
    if options.router == "lora":
        matrices = [
            (path, n) for path in routers for n, p in model.get_submodule(path).named_parameters() if p.dim() == 2
        ]
        parameters += [f"{path}.{name}" for path, name in matrices if path not in linears]
        routers = []
    left = set(chosen([*modules, *parameters, *routers], options))
    kept = tuple([name for name in names if name in left] for names in (modules, parameters, routers))
    return kept, left_out  # type: ignore[return-value] # a tuple of three


def left_out_of(
    model: PreTrainedModel, layers: Sequence[MoELayer], targets: Collection[str] | None = None
) -> dict[str, str]:
    """Linear layers among these targets, or among all, that are not adapted, and why."""
    blind, parts = choosers(model), _parts(model, layers).items()
    fitting = [path for path, part in parts if part != "router" and (targets is None or part in targets)]
    return {path: reason for path in fitting if (reason := _unfit(model, path, blind))}


def _unfit(model: PreTrainedModel, path: str, blind: tuple[str, ...]) -> str:
    """Why an adapter of this linear layer would not train, or not be applied; empty: it is fit."""
    module, (above, _, name) = model.get_submodule(path), path.rpartition(".")
    if type(module).forward is not nn.Linear.forward:
        return f"peft would compute {type(module).__name__} as an ordinary linear layer"
    if path.startswith(blind):
        return UNREACHED
    if {part for part, _ in model.get_submodule(above).named_parameters()} >= SCANS and name in ("out_proj", "dt_proj"):
        return "the scan reads its weight past what peft puts around it"
    return ""


def _refuse_experts(model: PreTrainedModel, layers: Sequence[MoELayer], options: TuningConfig) -> None:
    if "experts" not in options.targets:
        return
    family, reason = family_of(model.config), FAILS_UPSTREAM.get(family_of(model.config))
    linears = _parts(model, ())
    for layer in layers:
        if not _fused(model, layer) and not any(path.startswith(f"{layer.experts}.") for path in linears):
            reason = reason or f"{layer.experts} holds neither tensors of all experts nor linear layers"
    if reason:
        raise UserError(
            f"tuning.targets = {list(options.targets)}: the experts of {family} cannot be adapted: {reason}. "
            "Leave experts out of tuning.targets, or choose one of tuning.kind = full, moe, experts, router."
        )


def _parts(model: PreTrainedModel, layers: Sequence[MoELayer]) -> dict[str, str]:
    """The part that each linear layer belongs to: one of `targets`, "router", or "gate of shared experts"."""
    head, attending, outside = model.get_output_embeddings(), set[str](), tuple(f"{p}." for p in beside_text(model))
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    linears = [path for path in linears if not f"{path}.".startswith(outside)]
    for path in linears:  # what has a layer for queries, keys or values attends, with all that is in it
        above, _, name = path.rpartition(".")
        attending |= {f"{above}."} if ATTENDS & {*name.lower().split("_")} else set()
    return {path: _part(path, layers, attending) for path in linears}


def _part(path: str, layers: Sequence[MoELayer], attending: Iterable[str]) -> str:
    for layer in layers:
        if f"{path}.".startswith(f"{layer.router}."):
            return "router"
        if path.startswith(f"{layer.experts}."):
            return "experts"
    names = path.lower().split(".")
    if any(name.startswith("shared_") for name in names):
        return "gate of shared experts" if names[-1].endswith("expert_gate") else "shared_experts"
    return "attention" if path.startswith(tuple(attending)) else "dense"


def _fused(model: PreTrainedModel, layer: MoELayer) -> list[str]:
    """Names of the tensors [E, ., .] of a layer's experts."""
    experts = model.get_submodule(layer.experts)
    whole = [n for n, p in experts.named_parameters() if p.dim() == 3 and p.shape[0] == layer.size]
    return [f"{layer.experts}.{name}" for name in whole]


def _as_suffixes(names: Collection[str], every: Collection[str]) -> list[str]:
    """Names without all up to the layer's number, where that says the same as the list of names."""
    suffixes = sorted({re.split(r"\.\d+\.", name)[-1] for name in names})
    alike = {name for name in every if any(name.endswith(f".{suffix}") for suffix in suffixes)} == set(names)
    return suffixes if alike else sorted(names)


def recorded_base(folder: Path) -> str | None:
    """The digest of the base that an adapter was trained on; None: it does not say."""
    file = folder / BASE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def rename_base(folder: Path, base: str, revision: str | None) -> None:
    """Have an adapter name its base so: a folder or a Hub id."""
    config: LoraConfig = PeftConfig.from_pretrained(str(folder))
    config.base_model_name_or_path, config.revision = base, revision
    _write(config, folder)


def _write(config: LoraConfig, folder: Path) -> None:
    if not isinstance(config.target_modules, str | None):  # a set, which every process writes in another order
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def cast(folder: Path, dtype: torch.dtype) -> None:
    """Round an adapter's factors. Routers trained whole stay: peft gives them the type of the model that it loads."""
    values = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()  # what was read may still lie in it
    rounded = {name: value.to(dtype) if ".lora_" in name else value for name, value in values.items()}
    save_file(rounded, folder / WEIGHTS, metadata={"format": "pt"})


def remove(folder: Path) -> None:
    """Delete an adapter's files, and nothing else that lies beside them."""
    for name in (CONFIG, WEIGHTS, BASE):
        (folder / name).unlink(missing_ok=True)


def put_upon(model: Any, folder: Path) -> Any:
    """A plain model with the adapter of `folder` around its weights, by plain peft.

    Raises:
        UserError: Peft does not find a value for every adapter, or a place for every value.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft asks for it
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder))
        except UserWarning as warning:
            raise UserError(f"adapter {str(folder)!r}: plain peft loses a part of it: {str(warning)[:200]}") from None
    factors = sum(".lora_" in name for name, _ in adapted.named_parameters())
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        held = sum(".lora_" in name for name in file.keys())  # noqa: SIM118 # no mapping: it has keys() alone
    if factors != held:
        raise UserError(f"adapter {str(folder)!r}: plain peft takes {factors} of its {held} factors.")
    return adapted
