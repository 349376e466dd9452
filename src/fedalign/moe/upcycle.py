"""Sparse upcycling: a dense model becomes a Mixture-of-Experts model that starts with what the dense one knows.

Komatsuzaki et al. 2022 (arXiv 2212.05055): in the chosen layers every expert begins as a copy of the dense feed-forward
network (FFN), and the router is random. The weights of the top-k experts sum to one [O], so equal experts give exactly
what the FFN gave, whatever the router says. Noise on the copies [O] makes them differ from the first step on; without
it they part only because each gets other tokens.

Mixtral has no dense layers. A Llama or Mistral of which some layers stay dense becomes a Qwen2-MoE, whose attention
is the same once its biases are left out (`qkv_bias = False`). Qwen2-MoE wants an expert that all tokens share: it is
narrow and zero, gives nothing and gets no gradient.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fedalign.errors import UserError, unknown
from fedalign.files import MARK, SUMS, refuse_damaged
from fedalign.moe.families import FAMILIES, family_of
from fedalign.moe.kept import save_with_kept
from fedalign.moe.load import DTYPES, ask_hub, load_plain, refuse_adapter
from fedalign.moe.model import MoEModel
from fedalign.moe.part import Grown, grown
from fedalign.moe.site_experts import COUNTS


@dataclass(frozen=True)
class Target:
    """The MoE family that one dense family becomes."""

    all_layers: str  # the MoE family if every layer gets experts
    some_layers: str  # and if some stay dense


TARGETS = {
    "llama": Target("mixtral", "qwen2_moe"),
    "mistral": Target("mixtral", "qwen2_moe"),
    "qwen2": Target("qwen2_moe", "qwen2_moe"),
    "qwen3": Target("qwen3_moe", "qwen3_moe"),
}
SHARED_WIDTH = 8  # of Qwen2-MoE's shared expert: as narrow as eight tensor-parallel GPUs can cut
PROBE_TOKENS = 32


@dataclass(frozen=True)
class Recipe:
    """Options of `fedalign upcycle`.

    Raises:
        UserError: A value is out of range.
    """

    experts: int = 8  # E, of each MoE layer
    top_k: int = 2  # K, experts a token is sent to
    layers: str = "all"  # "all", "every:N" (the Nth, 2Nth, ...) or numbers from 0, such as "0,3,6"
    noise: float = 0.01  # standard deviation of what is added to a copy, as a share of that of its matrix
    seed: int = 0  # of routers and noise

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise UserError(f"--experts {self.experts}: must be at least 2")
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"--top-k {self.top_k}: must be from 1 to the number of experts, {self.experts}")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UserError(f"--noise {self.noise}: must be a finite number, 0 or more")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must be 0 or more")


@dataclass(frozen=True)
class DenseSource:
    """Where a dense model lies: a folder or a Hub id, of which a GGUF file may be what counts."""

    place: str
    gguf: str | None = None
    revision: str | None = None

    @classmethod
    def find(cls, path_or_id: str, revision: str | None = None) -> DenseSource:
        """A folder saved by transformers, a GGUF file, a folder with one, or else a Hub id.

        Raises:
            UserError: It is clearly meant as a path, and no model lies there, or an adapter, or weights that are not as
                they were written.
        """
        path = Path(path_or_id).expanduser()
        if path.suffix == ".gguf" and path.is_file():
            return cls(str(path.parent), path.name)
        if path.is_dir():
            refuse_adapter(path)
            _refuse_damaged(path)
            return cls(str(path), None if (path / "config.json").is_file() else _only_gguf(path))
        if path.suffix == ".gguf" or path.is_absolute() or path_or_id[:1] in (".", "~") or path_or_id.count("/") > 1:
            raise UserError(
                f"model = {path_or_id!r}: no such file or folder. Give a folder saved by transformers, a .gguf file, "
                f"or a Hub id"
            )
        ask_hub(path_or_id)
        return cls(path_or_id, None, revision)

    def __str__(self) -> str:
        return str(Path(self.place) / self.gguf) if self.gguf else self.place

    @property
    def options(self) -> dict[str, Any]:
        """How transformers is asked for it."""
        named = {"gguf_file": self.gguf, "revision": self.revision}
        return {name: value for name, value in named.items() if value is not None}


def _refuse_damaged(folder: Path) -> None:
    """Of a model of ours: what is made of it gets digests of its own, by which no damage would be noticed any more."""
    weights = [file.name for file in folder.glob("*.safetensors")]
    ours = (folder / MARK).exists() and (folder / SUMS).exists()
    if weights and ours:
        refuse_damaged(folder, *weights, what="model = ")


def _only_gguf(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"model = {str(folder)!r}: holds {len(files)} GGUF files. Give one of: {', '.join(files)}")
    raise UserError(f"model = {str(folder)!r}: the folder must hold a config.json and weights, or one .gguf file")


def check_dense(source: DenseSource, recipe: Recipe) -> None:
    """See from the configuration alone whether the model can be upcycled as asked.

    Raises:
        UserError: It cannot, or there is no such model.
    """
    with _explained(source):
        config = AutoConfig.from_pretrained(source.place, **source.options)
    if getattr(config, "quantization_config", None) is not None and not source.gguf:
        raise UserError(f"model = {str(source)!r}: its weights are quantised. Give the model they were made from")
    moe_config(config, recipe)


def is_sparse(source: DenseSource) -> bool:
    """Whether it is a Mixture-of-Experts model already, by its configuration.

    Raises:
        UserError: There is no such model.
    """
    with _explained(source):
        return _is_sparse(AutoConfig.from_pretrained(source.place, **source.options))


def load_sparse(source: DenseSource, recipe: Recipe) -> PreTrainedModel:
    """A Mixture-of-Experts model on the CPU, in the precision it was saved in.

    Raises:
        UserError: There is no such model, it lacks weights, or it is one GGUF file; or the recipe is for a dense one.
    """
    if recipe != Recipe(seed=recipe.seed):
        raise UserError(
            f"model = {str(source)!r}: an MoE already, to which --site-experts adds experts. --experts, --top-k, "
            "--layers and --noise are for a dense one. Leave them out."
        )
    if source.gguf:
        raise UserError(f"model = {str(source)!r}: an MoE in a GGUF file. Give the folder that transformers saved.")
    with _explained(source):
        dtype = AutoConfig.from_pretrained(source.place, **source.options).get_text_config().dtype
    named = str(dtype).removeprefix("torch.")
    return load_plain(source.place, dtype=named if named in DTYPES else "float32", revision=source.revision)


def write_grown(source: DenseSource, sites: Sequence[str], seed: int, folder: Path) -> Grown:
    """Fill an empty folder with an MoE in which these sites have an expert of their own more, and its tokenizer.

    Raises:
        UserError: There is no such model or tokenizer, or it cannot have them.
    """
    more = grown(MoEModel.wrap(load_sparse(source, Recipe(seed=seed))), sites, seed)
    save_with_kept(more.model, folder)
    load_tokenizer(source).save_pretrained(folder)
    return more


def load_dense(source: DenseSource, recipe: Recipe | None = None) -> PreTrainedModel:
    """The dense model on the CPU, in the precision it was saved in (float32 for GGUF).

    Raises:
        UserError: There is no such model, or it lacks weights, or it cannot be upcycled so.
    """
    if recipe is not None:
        check_dense(source, recipe)
    with _explained(source):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.place, dtype="auto", output_loading_info=True, **source.options
        )
    if missing := sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()}):
        raise UserError(
            f"model = {str(source)!r}: must hold every weight of a dense {family_of(model.config)}; "
            f"{len(missing)} lack: {', '.join(missing[:3])}"
        )
    return model.eval()


def load_tokenizer(source: DenseSource) -> Any:
    """The tokenizer that comes with the model, with its chat template.

    Raises:
        UserError: There is none.
    """
    with _explained(source, "tokenizer", Exception):  # the library raises many kinds for what a user can mend
        tokenizer = AutoTokenizer.from_pretrained(source.place, **source.options)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # for Qwen it makes up one without words
            raise ValueError("there are no tokenizer files")
    return tokenizer


def chosen_layers(layers: str, depth: int) -> tuple[int, ...]:
    """The numbers, from 0, of the layers that get experts.

    >>> chosen_layers("all", 3), chosen_layers("every:4", 9), chosen_layers("6, 0", 9)
    ((0, 1, 2), (3, 7), (0, 6))
    """
    word, colon, step = layers.partition(":")
    if layers == "all":
        return tuple(range(depth))
    if word == "every" and colon and step.strip().isdecimal() and 1 <= int(step) <= depth:
        return tuple(range(int(step) - 1, depth, int(step)))
    numbers = [part.strip() for part in layers.split(",")]
    if all(number.isdecimal() and int(number) < depth for number in numbers):
        return tuple(sorted({int(number) for number in numbers}))
    raise UserError(
        f"--layers {layers!r}: the model has layers 0 to {depth - 1}. Give all, every:N with N from 1 to {depth}, or "
        f"numbers such as 0,{depth - 1}"
    )


def moe_config(dense: Any, recipe: Recipe) -> Any:
    """The configuration of the Mixture-of-Experts model that computes what the dense one does.

    Raises:
        UserError: No MoE family can compute the same, or the recipe does not fit.
    """
    _refuse_other_than_dense(dense)
    _refuse_what_no_moe_family_has(dense)
    layers = chosen_layers(recipe.layers, dense.num_hidden_layers)
    target = TARGETS[family_of(dense)]
    family = target.all_layers if len(layers) == dense.num_hidden_layers else target.some_layers
    kind = type(AutoConfig.for_model(family))
    fields = {field.name for field in dataclasses.fields(kind)} - {"architectures", "transformers_version"}
    same = {name: value for name, value in dense.to_dict().items() if name in fields}
    return kind(**same | _own(family, dense, recipe, layers))


def _own(family: str, dense: Any, recipe: Recipe, layers: tuple[int, ...]) -> dict[str, Any]:
    """The keys of the configuration that only this MoE family has."""
    own: dict[str, Any] = {"num_experts_per_tok": recipe.top_k, "head_dim": _head_dim(dense)}
    if family == "mixtral":
        return own | {"num_local_experts": recipe.experts}
    own |= {
        "num_experts": recipe.experts,
        "norm_topk_prob": True,
        "moe_intermediate_size": dense.intermediate_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(set(range(dense.num_hidden_layers)) - set(layers)),
    }
    windows = _windows(dense)
    slides = any(windows)
    own |= {"use_sliding_window": slides, "sliding_window": dense.sliding_window if slides else None}
    if family == "qwen3_moe":
        if slides and not all(windows):
            raise UserError(
                "model = qwen3: some of its layers attend to a sliding window and others do not, which Qwen3-MoE "
                "cannot do. Only a model with one kind can be upcycled"
            )
        return own
    return own | {
        "shared_expert_intermediate_size": SHARED_WIDTH,
        "qkv_bias": family_of(dense) == "qwen2",
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _refuse_other_than_dense(config: Any) -> None:
    family = family_of(config)
    if _is_sparse(config):
        raise UserError(
            f"model = {family}: already a Mixture-of-Experts model, so `fedalign run` takes it as it is, and "
            f"--site-experts gives sites experts of their own. "
            f"Dense families that can be upcycled: {', '.join(sorted(TARGETS))}"
        )
    if family not in TARGETS:
        raise unknown("dense family", family, TARGETS)


def _is_sparse(config: Any) -> bool:
    counts = (getattr(config.get_text_config(), name, None) or 0 for name in COUNTS)
    return family_of(config) in FAMILIES or any(count > 1 for count in counts)


def _refuse_what_no_moe_family_has(config: Any) -> None:
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False) and (family_of(config), name) != ("qwen3", "attention_bias"):
            raise UserError(
                f"model = {family_of(config)}: {name} = true: no MoE family has these biases and computes the same "
                f"otherwise. Only a model without them can be upcycled"
            )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _windows(config: Any) -> list[bool]:
    """Whether each layer attends to a sliding window."""
    if family_of(config) in ("qwen2", "qwen3"):
        return [kind == "sliding_attention" for kind in config.layer_types]
    return [getattr(config, "sliding_window", None) is not None] * int(config.num_hidden_layers)


@torch.no_grad()
def upcycle(dense: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """The Mixture-of-Experts model. The dense one is used up: its weights move over, layer by layer.

    Raises:
        UserError: No MoE family can compute the same, or the recipe does not fit.
    """
    config = moe_config(dense.config, recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype).eval()
    generator = torch.Generator().manual_seed(recipe.seed)
    for index in chosen_layers(recipe.layers, config.num_hidden_layers):
        layer = dense.model.layers[index]
        _fill(model.model.layers[index].mlp, layer.mlp, recipe, config.initializer_range, generator)
        layer.mlp = nn.Identity()  # the layer's dense weights are freed before the next layer's copies are made
    for name, parameter in dense.named_parameters():
        _put(model, name, parameter.detach())
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are computed, not loaded
    if empty := [name for name, value in model.named_parameters() if value.is_meta]:
        raise UserError(f"model = {family_of(dense.config)}: no value for {empty[0]}. It cannot be upcycled")
    model.generation_config = dense.generation_config
    return model


def _fill(block: nn.Module, ffn: nn.Module, recipe: Recipe, router_std: float, generator: torch.Generator) -> None:
    """Make a layer's MoE block of its dense FFN."""
    gate, up, down = (ffn.get_parameter(f"{name}_proj.weight") for name in ("gate", "up", "down"))
    gate_up_E_2I_H = torch.empty(recipe.experts, 2 * len(gate), gate.shape[1], dtype=gate.dtype)
    down_E_H_I = torch.empty(recipe.experts, *down.shape, dtype=down.dtype)
    for expert in range(recipe.experts):
        gate_up_E_2I_H[expert, : len(gate)] = _copy(gate, recipe.noise, generator)
        gate_up_E_2I_H[expert, len(gate) :] = _copy(up, recipe.noise, generator)
        down_E_H_I[expert] = _copy(down, recipe.noise, generator)
    _put(block, "experts.gate_up_proj", gate_up_E_2I_H)
    _put(block, "experts.down_proj", down_E_H_I)
    router_E_H = torch.randn(recipe.experts, gate.shape[1], generator=generator) * router_std
    _put(block, "gate.weight", router_E_H.to(gate.dtype))
    for name, parameter in block.named_parameters():
        if name.startswith("shared_expert"):
            _put(block, name, torch.zeros(parameter.shape, dtype=gate.dtype))


def _copy(matrix: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    if not noise:
        return matrix
    values = matrix.float()
    return values + noise * values.std() * torch.randn(matrix.shape, generator=generator)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Let a parameter have this value, without copying it."""
    path, _, leaf = name.rpartition(".")
    try:
        place = model.get_parameter(name)
    except AttributeError:
        place = None
    if place is None or place.shape != value.shape:
        raise UserError(f"model: {type(model).__name__} has no place for {name} {list(value.shape)}. Not upcycled")
    setattr(model.get_submodule(path), leaf, nn.Parameter(value))


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Tensor:
    """The model's logits [S, V] on a fixed row of tokens, in float32: to be held against another model's."""
    ids_B_S = torch.arange(PROBE_TOKENS).unsqueeze(0) % int(model.config.vocab_size)
    logits_B_S_V: Tensor = model(input_ids=ids_B_S, use_cache=False).logits
    return logits_B_S_V[0].float()


@contextmanager
def _explained(source: DenseSource, what: str = "model", *more: type[Exception]) -> Iterator[None]:
    """Turn what transformers raises for something that is not there or broken into a UserError."""
    if source.gguf and importlib.util.find_spec("gguf") is None:
        raise UserError(f"model = {str(source)!r}: GGUF files need the package gguf: pip install 'fedalign-moe[gguf]'")
    kinds: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
    try:
        yield
    except (*kinds, *more) as error:
        place = "" if Path(source.place).is_dir() else "no such folder, and from the Hub it "
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what} = {str(source)!r}: {place}cannot be loaded: {reason}") from error
