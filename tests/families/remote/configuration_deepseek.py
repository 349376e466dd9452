from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 32,
        intermediate_size: int = 16,
        moe_intermediate_size: int = 16,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        n_routed_experts: int = 4,
        n_shared_experts: int = 1,
        num_experts_per_tok: int = 2,
        first_k_dense_replace: int = 1,
        scoring_func: str = "softmax",
        norm_topk_prob: bool = True,
        aux_loss_alpha: float = 0.001,
        max_position_embeddings: int = 128,
        **kwargs: object,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.first_k_dense_replace = first_k_dense_replace
        self.scoring_func = scoring_func
        self.norm_topk_prob = norm_topk_prob
        self.aux_loss_alpha = aux_loss_alpha
        self.max_position_embeddings = max_position_embeddings
        super().__init__(**kwargs)
