from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedalign.errors import UserError
from fedalign.moe.families import FAMILIES, REFUSED, detect, expert_count, module_tree, refuse
from fedalign.moe.model import MoEModel
from tests.moe import tiny


def test_every_row_of_the_table_is_a_family_of_transformers_and_has_a_tiny_model() -> None:
    spelled = {name.replace("-", "_") for name in CONFIG_MAPPING}
    assert FAMILIES.keys() | REFUSED.keys() <= spelled
    assert FAMILIES.keys() < tiny.CONFIGS.keys()
    assert not FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("family", tiny.ALL)
def test_every_layer_is_found_with_its_sizes(family: str, tiny_moe: Callable[[str], MoEModel]) -> None:
    moe = tiny_moe(family)
    assert len(moe.layers) == 2
    assert (moe.experts, moe.hidden) == (tiny.EXPERTS, tiny.HIDDEN)
    assert moe.top_k == (1 if family == "switch_transformers" else 2)
    assert [layer.in_decoder for layer in moe.layers] == [False, family == "switch_transformers"]


@pytest.mark.parametrize("family", sorted({*tiny.TABLE} - {"switch_transformers"}))  # only the table knows one-hot
def test_the_search_finds_what_the_table_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(family)
    _, expected = detect(model)
    monkeypatch.delitem(FAMILIES, family)
    found, layers = detect(model)
    if family == "phimoe":  # sparsemixer's weights are neither softmax nor sigmoid scores
        assert found.endswith("choice seen in a trial run, scoring assumed to be softmax")
    else:
        assert found.endswith("choice and scoring seen in a trial run")
    assert layers == expected


@pytest.mark.parametrize("family", tiny.AUTODETECTED)
def test_the_search_is_as_sure_of_a_bfloat16_model(family: str, tiny_moe: Callable[[str], MoEModel]) -> None:
    found, layers = detect(tiny.build(family).bfloat16())
    assert found == tiny_moe(family).found
    assert list(layers) == list(tiny_moe(family).layers)


def test_a_router_that_scores_all_alike_leaves_the_scoring_open() -> None:
    model = tiny.build("glm4_moe")
    for layer in model.model.layers[1:]:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    found, _ = detect(model)
    assert found.endswith("choice seen in a trial run, scoring assumed to be softmax")


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "glm4_moe"])
def test_shapes_alone_find_routers_where_transformers_records_none(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build(family)
    _, expected = detect(model)
    monkeypatch.delitem(FAMILIES, family, raising=False)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            monkeypatch.setattr(type(module), "_can_record_outputs", {})
    found, layers = detect(model)
    assert "routers by shapes" in found
    assert layers == expected


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"model = llama: a dense model.*Choose one of: deepseek_v2, "):
        detect(tiny.build("llama"))


def test_a_moe_family_without_moe_layers_is_refused_with_its_modules() -> None:
    with pytest.raises(UserError, match=r"model = deepseek_v3: no router.*model.layers.\*.mlp \(DeepseekV3MLP\)"):
        detect(tiny.build("deepseek_v3", first_k_dense_replace=3))


def test_an_unknown_layout_is_refused_with_its_modules() -> None:
    with pytest.raises(UserError, match=r"model = dbrx: no router with experts beside it.*router \(DbrxRouter\)"):
        detect(_dbrx())


def _dbrx() -> PreTrainedModel:
    ffn = {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 16, "hidden_size": 32}
    config = AutoConfig.for_model(
        "dbrx",
        d_model=32,
        n_heads=4,
        n_layers=1,
        vocab_size=64,
        ffn_config=ffn,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
    )
    return AutoModelForCausalLM.from_config(config)


def test_nllb_moe_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"nllb_moe: refused: .*broken.*only experts 0 and 1"):
        refuse(AutoConfig.for_model("nllb-moe"))


@pytest.mark.parametrize("family", ["olmoe", "glm4_moe"])
def test_more_choices_than_experts_are_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"top-k = 5: must be at most the number of experts, 4"):
        detect(tiny.build(family, num_experts_per_tok=5))


def test_a_selection_bias_passed_to_the_router_is_seen_in_the_choice() -> None:
    """MiniMax-M2 scores with sigmoids and hands its router a bias: neither shows without running the model."""
    moe = MoEModel.wrap(tiny.build("minimax_m2", num_local_experts=4, head_dim=8))
    assert {(layer.scoring, layer.dispatch) for layer in moe.layers} == {("sigmoid", "index")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: (output[0].softmax(-1), *output[1:]), r"must return logits.*but returns probabilities"),
        (lambda output: (output[0][:, :2], *output[1:]), r"output 0 must be logits over 4 experts"),
        (lambda output: output[1:], r"glm4_moe: must run on plain tokens, but fails: not enough values"),
    ],
)
def test_what_a_trial_run_shows_to_be_unusable_is_refused(change: Callable[[Any], Any], message: str) -> None:
    model = tiny.build("glm4_moe")
    model.model.layers[1].mlp.gate.register_forward_hook(lambda _, __, output: change(output))
    with pytest.raises(UserError, match=message):
        detect(model)


def test_a_trial_run_leaves_the_model_as_it_was() -> None:
    model = tiny.build("glm4_moe").train()
    detect(model)
    assert model.training
    assert not any(module._forward_hooks for name, module in model.named_modules() if name.endswith("mlp.gate"))


def test_experts_without_a_router_are_refused() -> None:
    model = tiny.build("glm4_moe")
    model.model.layers[1].mlp.gate = nn.Identity()
    with pytest.raises(
        UserError, match=r"every module of experts needs a router, but model.layers.1.mlp.experts has none"
    ):
        detect(model)


def test_layers_of_different_size_are_refused() -> None:
    model, other = tiny.build("olmoe"), tiny.build("olmoe", num_experts=8)
    model.model.layers[1] = other.model.layers[1]
    with pytest.raises(UserError, match=r"must be of one size.*4 experts.*8 experts"):
        detect(model)


def test_expert_count_of_each_layout() -> None:
    fused = nn.Module()
    fused.up = nn.Parameter(torch.zeros(6, 2, 3))
    assert expert_count(fused) == 6
    assert expert_count(nn.ModuleList(nn.Linear(2, 2) for _ in range(3))) == 3
    assert expert_count(nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])) is None
    assert expert_count(nn.Linear(2, 2)) is None


def test_module_tree_folds_layers_and_is_one_line() -> None:
    tree = module_tree(tiny.build("llama"))
    assert tree.count("mlp (LlamaMLP)") == 1
    assert "\n" not in tree
    assert module_tree(tiny.build("llama"), limit=2).endswith("more")
