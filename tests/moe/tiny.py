"""Tiny models of every family, built from their configs: 2 or 3 layers, 4 experts, top-2, hidden 32, random weights.

`llama` is there too, for a dense one, and `deepseek`, a checkpoint that brings its own code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from fedalign.moe.families import FAMILIES, REFUSED, TOP_K
from fedalign.moe.model import MoEModel
from fedalign.moe.site_experts import COUNTS
from tests.families.remote.configuration_deepseek import DeepseekConfig
from tests.families.remote.modeling_deepseek import DeepseekForCausalLM

VOCABULARY, EXPERTS, HIDDEN = 64, 4, 32
ROUTERS = (
    "gate.weight",
    "gate.wg.weight",
    "router.weight",
    "router.layer.weight",
    "router.proj.weight",
    "router.per_expert_scale",
    "classifier.weight",
    "bias",
)

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ABSOLUTE = {"max_position_embeddings": 128}
_TOP_2 = {"num_experts_per_tok": 2}
_GROUPED = {  # one dense layer first, experts in two groups of which one is open to a token
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

_SHARED_EXPERT = {"num_experts": EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_LINEAR_ATTENTION = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": HIDDEN,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "ffn_config": {"moe_num_experts": EXPERTS, "moe_top_k": 2, "ffn_hidden_size": 16, "hidden_size": HIDDEN},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    },
    "deepseek_v2": {**_GROUPED, **_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_GROUPED, **_LATENT},
    "gemma4": {
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "num_experts": EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    # its default rotary scaling warns about so short a context
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "granitemoe": {"num_local_experts": EXPERTS, "tie_word_embeddings": True},
    "jetmoe": {"num_local_experts": EXPERTS, "kv_channels": 8},
    "llama4": {
        "model_type": "llama4_text",
        "num_local_experts": EXPERTS,
        "intermediate_size_mlp": 16,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
    },
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "phimoe": {"num_local_experts": EXPERTS, "router_jitter_noise": 0.01, "input_jitter_noise": 0.01},
    "qwen2_moe": _SHARED_EXPERT,
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 8},
    "switch_transformers": {
        "num_experts": EXPERTS,
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 16,
        "num_heads": 4,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "expert_capacity": 4,
        "decoder_start_token_id": 0,
    },
    # not in the table: found by themselves
    "dots1": {**_GROUPED, "head_dim": 8},
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "flex_olmo": {"num_experts": EXPERTS},
    "glm4_moe": {**_GROUPED, "head_dim": 8},
    "glm4_moe_lite": {**_GROUPED, **_LATENT},
    "granitemoehybrid": {
        "num_local_experts": EXPERTS,
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "granitemoeshared": {"num_local_experts": EXPERTS, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": 2, "head_dim": 8},
    "jamba": {
        "num_experts": EXPERTS,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": {
        "num_experts": EXPERTS,
        "moe_intermediate_size": 16,
        "num_dense_layers": 0,
        "layer_types": ["conv", "full_attention"],
    },
    "minimax": {"num_local_experts": EXPERTS, "head_dim": 8, "block_size": 16},
    "minimax_m2": {"num_local_experts": EXPERTS, "head_dim": 8},
    "qwen3_5_moe": {"model_type": "qwen3_5_moe_text", **_SHARED_EXPERT, **_LINEAR_ATTENTION},
    "qwen3_next": {**_SHARED_EXPERT, **_LINEAR_ATTENTION},
    "deepseek": {"num_hidden_layers": 3},
}
SMALL: dict[str, Any] = {  # of whatever a configuration calls its sizes
    **_COMMON,
    **_ABSOLUTE,
    **dict.fromkeys(COUNTS, EXPERTS),
    **dict.fromkeys(TOP_K, 2),
    **_LATENT,
    **{name: value for name, value in _LINEAR_ATTENTION.items() if name != "layer_types"},
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "dense_intermediate_size": 16,
    "mlp_layer_types": ["sparse", "sparse"],
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
}
OWN: dict[str, dict[str, Any]] = {  # what else a family needs
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
        "o_groups": 2,
        "o_lora_rank": 8,
    },
    "flint": {"mlp_only_layers": []},
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 8,
        "d_rel": 8,
        "rel_extent": 16,
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "afmoe": {"num_dense_layers": 0},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
}


def found(names: Iterable[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every language model of the installed transformers whose configuration counts experts, made small."""
    causal, seq2seq = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    for model_type in sorted({*causal, *seq2seq}):
        family, kind = model_type.replace("-", "_"), CONFIG_MAPPING[model_type]
        known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
        if known & set(COUNTS) and not {family, family.removesuffix("_text")} & (CONFIGS.keys() | REFUSED.keys()):
            small = {name: value for name, value in SMALL.items() if name in known}
            if "kv_lora_rank" in known:  # latent attention has a key for every query
                small["num_key_value_heads"] = small["num_attention_heads"]
            yield family, {"model_type": model_type, **small, **OWN.get(family, {})}


CONFIGS |= dict(found())
_TOWER = {  # whatever sizes towers of pictures and sound have
    **dict.fromkeys(("depth", "num_hidden_layers", "encoder_layers"), 1),
    **dict.fromkeys(("hidden_size", "intermediate_size", "image_size", "embed_dim", "encoder_ffn_dim"), 16),
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_key_value_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("out_hidden_size", "output_dim"), HIDDEN),
    **{"patch_size": 4, "num_channels": 3, "head_dim": 8},
}
COMPOSITES = ("aria", "gemma4", "llama4", "minimax_m3_vl", "qwen3_5_moe", "qwen3_vl_moe", "qwen4_exp")
COMPOSITES_ALONE = sorted({*COMPOSITES} - CONFIGS.keys())  # whose text has another name
QUICK = {  # tested wherever all are; the others with `make test-families`
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5_moe",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "jamba",
    "minimax",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "switch_transformers",
}


def marked(families: Iterable[str], quick: Iterable[str] = QUICK) -> list[ParameterSet]:
    """These families as parameters of a test; all but the `quick` ones are of `make test-families`."""
    return [pytest.param(f, marks=() if f in quick else pytest.mark.families) for f in families]


TABLE = marked(sorted(FAMILIES))
AUTODETECTED = marked(sorted(CONFIGS.keys() - FAMILIES.keys()))
ALL = [*TABLE, *AUTODETECTED]


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode, whose routers really prefer some experts."""
    extra = {"switch_transformers": {}, "llama": _ABSOLUTE}.get(family, _ABSOLUTE | _TOP_2)
    spelled = _COMMON | extra | CONFIGS.get(family, {}) | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _built(family, spelled).eval()
        with torch.no_grad():
            for name, values in [*model.named_parameters(), *model.named_buffers()]:
                if any(part in name for part in ROUTERS):
                    values.normal_(std=0.5)  # at their initial size all logits are nearly equal, biases are zero
                elif name.endswith("tid2eid"):  # deepseek_v4: which experts a token's number means
                    values.copy_(torch.stack([torch.randperm(EXPERTS)[: values.shape[1]] for _ in values]))
    return model


def composite(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model that reads pictures too, its text model as of `build`; `changes` are of that."""
    kinds = CONFIG_MAPPING[family].sub_configs
    text = kinds["text_config"]
    own = CONFIGS.get(family) or CONFIGS.get(text.model_type) or {}
    small = {n: value for n, value in SMALL.items() if n in _known(text)} | _TOP_2 | own | changes
    parts: dict[str, dict[str, Any]] = {
        name: {n: v for n, v in _TOWER.items() if n in _known(kind)} for name, kind in kinds.items()
    }
    parts["text_config"] = small | {"model_type": text.model_type}
    for name, kind in kinds.items():
        parts[name]["model_type"] = getattr(kind, "model_type", "") or "siglip_vision_model"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **parts)).eval()


def _known(config: Any) -> set[str]:
    """What a kind of configuration takes; of a tower of any kind all that we give."""
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    return {field.name for field in fields} | set(getattr(config, "attribute_map", ())) or set(_TOWER)


def _built(family: str, spelled: dict[str, Any]) -> PreTrainedModel:
    if family == "deepseek":
        DeepseekConfig.register_for_auto_class()
        DeepseekForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        return DeepseekForCausalLM(DeepseekConfig(**spelled))
    config = AutoConfig.for_model(spelled.pop("model_type", family), **spelled)
    auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    return auto.from_config(config)


def plain(folder: Path) -> PreTrainedModel:
    """What plain transformers loads from a folder."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(folder, trust_remote_code=True)


def batch(family: str, examples: int = 3, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Right-padded random tokens of different lengths, as keyword arguments of the model (without labels)."""
    generator = torch.Generator().manual_seed(seed)

    def side(length: int) -> tuple[Tensor, Tensor]:
        ids_B_S = torch.randint(3, VOCABULARY, (examples, length), generator=generator)
        lengths_B_1 = length - torch.arange(examples).unsqueeze(1) * 3
        mask_B_S = (torch.arange(length) < lengths_B_1).long()
        return ids_B_S * mask_B_S, mask_B_S

    ids_B_S, mask_B_S = side(length)
    inputs = {"input_ids": ids_B_S, "attention_mask": mask_B_S}
    if family == "switch_transformers":
        inputs["decoder_input_ids"], inputs["decoder_attention_mask"] = side(length - 4)
    return inputs


def masks(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What `RoutingProbe.capture` wants of a batch."""
    return inputs["attention_mask"], inputs.get("decoder_attention_mask")


@torch.no_grad()
def assert_views_hold_every_trained_value_once(moe: MoEModel) -> None:
    """The model is used up: its values become ones and zeros."""
    for parameter in moe.model.parameters():
        parameter.zero_()
    for views in moe.views.values():
        for view in views:
            view.add_(1)
    for name, parameter in moe.model.named_parameters():
        assert torch.all(parameter == (1.0 if parameter.requires_grad else 0.0)), name
