"""A model as checkpoints of the first DeepSeek models bring it along, reduced to what matters here.

Experts are a ModuleList of MLPs, one of which does not run where no token is sent to it. The gate returns
(chosen experts, weights, auxiliary loss) and no logits.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_deepseek import DeepseekConfig


class DeepseekMLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEGate(nn.Module):
    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.alpha = config.aux_loss_alpha
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size).normal_(std=0.02))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden_states = hidden_states.view(-1, hidden_states.shape[-1])
        logits = functional.linear(hidden_states, self.weight)
        scores = logits.softmax(-1) if self.scoring_func == "softmax" else logits.sigmoid()
        topk_weight, topk_idx = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.norm_topk_prob:
            topk_weight = topk_weight / (topk_weight.sum(-1, keepdim=True) + 1e-20)
        aux_loss = self.alpha * (scores.mean(0) * scores.mean(0)).sum() if self.training else None
        return topk_idx, topk_weight, aux_loss


class AddAuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones((), dtype=ctx.dtype, device=grad.device)


class DeepseekMoE(nn.Module):
    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        inner = config.moe_intermediate_size
        self.experts = nn.ModuleList(DeepseekMLP(config.hidden_size, inner) for _ in range(config.n_routed_experts))
        self.gate = MoEGate(config)
        self.shared_experts = DeepseekMLP(config.hidden_size, inner * config.n_shared_experts)

    def forward(self, hidden_states: Tensor) -> Tensor:
        topk_idx, topk_weight, aux_loss = self.gate(hidden_states)
        x = hidden_states.view(-1, hidden_states.shape[-1])
        flat = topk_idx.view(-1)
        y = torch.empty_like(x).repeat_interleave(topk_idx.shape[1], dim=0)
        for index, expert in enumerate(self.experts):
            if (flat == index).any():
                y[flat == index] = expert(x.repeat_interleave(topk_idx.shape[1], dim=0)[flat == index])
        y = (y.view(*topk_weight.shape, -1) * topk_weight.unsqueeze(-1)).sum(dim=1).view_as(hidden_states)
        if aux_loss is not None:
            y = AddAuxiliaryLoss.apply(y, aux_loss)
        return y + self.shared_experts(hidden_states)


class DeepseekAttention(nn.Module):
    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(batch, length, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))


class DeepseekDecoderLayer(nn.Module):
    def __init__(self, config: DeepseekConfig, index: int) -> None:
        super().__init__()
        dense = index < config.first_k_dense_replace
        self.self_attn = DeepseekAttention(config)
        self.mlp = DeepseekMLP(config.hidden_size, config.intermediate_size) if dense else DeepseekMoE(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), mask)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DeepseekModel(nn.Module):
    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(DeepseekDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
        mask = causal if attention_mask is None else causal & attention_mask[:, None, None, :].bool()
        mask = mask | torch.eye(length, dtype=torch.bool, device=input_ids.device)  # padding may look at itself
        hidden_states = self.embed_tokens(input_ids) + self.embed_positions.weight[:length]
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask)
        return self.norm(hidden_states)


class DeepseekForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DeepseekConfig
    base_model_prefix = "model"

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, attention_mask)))
