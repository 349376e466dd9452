"""Tiny models of every family, built from their configs: 2 or 3 layers, 4 experts, top-2, hidden 32, random weights.

`llama` is there too, for a dense one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from fedalign.moe.families import FAMILIES

VOCABULARY, EXPERTS, HIDDEN = 64, 4, 32

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

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_GROUPED, **_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**_GROUPED, **_LATENT},
    # its default rotary scaling warns about so short a context
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "granitemoe": {"num_local_experts": EXPERTS, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": EXPERTS},
    "olmoe": {"num_experts": EXPERTS},
    "phimoe": {"num_local_experts": EXPERTS, "router_jitter_noise": 0.01, "input_jitter_noise": 0.01},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
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
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 0,
    },
    "glm4_moe": {**_GROUPED, "head_dim": 8},
    "jamba": {
        "num_experts": EXPERTS,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 0,
        "expert_layer_period": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "minimax": {"num_local_experts": EXPERTS, "head_dim": 8, "block_size": 16},
}
TABLE = sorted(FAMILIES)
AUTODETECTED = sorted(CONFIGS.keys() - FAMILIES.keys())
ALL = [*TABLE, *AUTODETECTED]


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random model in evaluation mode, whose routers really prefer some experts."""
    extra = {"switch_transformers": {}, "llama": _ABSOLUTE}.get(family, _ABSOLUTE | _TOP_2)
    config = AutoConfig.for_model(family, **_COMMON | extra | CONFIGS.get(family, {}) | changes)
    auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(config).eval()
        with torch.no_grad():
            for name, values in [*model.named_parameters(), *model.named_buffers()]:
                if any(part in name for part in ("gate.weight", "router.weight", "classifier.weight", "bias")):
                    values.normal_(std=0.5)  # at their initial size all logits are nearly equal, biases are zero
    return model


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
