from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedalign.errors import UserError
from fedalign.moe.detect import detect, expert_count, module_tree
from fedalign.moe.families import FAMILIES, REFUSED, every_family, family_row, refuse, router_weight
from fedalign.moe.model import MoEModel
from tests.conftest import Command
from tests.moe import tiny


def test_every_row_of_the_table_is_a_family_of_transformers_and_has_a_tiny_model() -> None:
    spelled = {name.replace("-", "_") for name in CONFIG_MAPPING}
    assert FAMILIES.keys() | REFUSED.keys() <= spelled
    assert FAMILIES.keys() < tiny.CONFIGS.keys()
    assert not FAMILIES.keys() & REFUSED.keys()


@pytest.mark.parametrize("family", tiny.ALL)
def test_every_layer_is_found_with_its_sizes(family: str, tiny_moe: Callable[[str], MoEModel]) -> None:
    moe = tiny_moe(family)
    assert len(moe.layers) == (4 if family == "jetmoe" else 2)
    assert (moe.experts, moe.hidden) == (tiny.EXPERTS, tiny.HIDDEN)
    assert moe.top_k == (1 if family == "switch_transformers" else 2)
    assert [layer.in_decoder for layer in moe.layers[:2]] == [False, family == "switch_transformers"]


# only the table knows one-hot choices and flat experts
@pytest.mark.parametrize("family", tiny.marked(sorted(FAMILIES.keys() - {"switch_transformers", "dbrx"})))
def test_the_search_finds_what_the_table_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(family)
    _, expected = detect(model)
    monkeypatch.delitem(FAMILIES, family)
    found, layers = detect(model)
    if family == "phimoe":  # sparsemixer's weights are no scores that are known
        assert found.endswith("choice seen in a trial run, scoring unknown")
    elif family == "jetmoe":  # its router returns neither choice nor weights by token
        assert found.endswith("choice assumed to be the top-k of the logits, scoring unknown")
    else:
        assert found.endswith("choice and scoring seen in a trial run")
        assert layers == expected


PACKAGE = """
from fedalign.moe.families import Family

JET = Family(router="router", experts="", logits=4, dispatch="logits")
ROUTER = "router"
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`package(points)`: an installed package that offers families, as pip would leave it."""

    def install(points: str) -> None:
        info = tmp_path / "jets-1.0.dist-info"
        info.mkdir()
        (tmp_path / "jets.py").write_text(PACKAGE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: jets\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fedalign.families]\n{points}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("jets", None)


def test_a_family_of_another_package(package: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("jetmoe")
    by_table = detect(model)
    monkeypatch.delitem(FAMILIES, "jetmoe")
    assert detect(model) != by_table
    package("jetmoe = jets:JET\nolmoe = jets:ROUTER")
    assert detect(model) == by_table
    assert every_family() == [*FAMILIES, "jetmoe"]
    assert family_row("olmoe") is FAMILIES["olmoe"]  # ours cannot be replaced


@pytest.mark.parametrize(
    ("point", "told"),
    [
        ("jets:ROUTER", "jets:ROUTER of package jets is no fedalign.moe.families.Family"),
        ("jets:MISSING", "does not load (AttributeError"),
    ],
)
def test_a_broken_package_of_families_is_one_line(
    package: Callable[[str], None], point: str, told: str, monkeypatch: pytest.MonkeyPatch, fedalign: Command
) -> None:
    monkeypatch.delitem(FAMILIES, "jetmoe")
    package(f"jetmoe = {point}")
    with pytest.raises(UserError) as caught:
        detect(tiny.build("jetmoe"))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    code, out, _ = fedalign("families")  # the others are still listed
    assert code == 0
    assert all(family in out for family in FAMILIES)


# inkling2's router wants float32, and loading keeps it so
@pytest.mark.parametrize("family", [p for p in tiny.AUTODETECTED if p.values[0] != "inkling2_text"])
def test_the_search_is_as_sure_of_a_bfloat16_model(family: str, tiny_moe: Callable[[str], MoEModel]) -> None:
    found, layers = detect(tiny.build(family).bfloat16())
    assert found == tiny_moe(family).found
    assert list(layers) == list(tiny_moe(family).layers)


@pytest.mark.parametrize("size", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("family", "scoring"),
    [
        ("afmoe", "sigmoid"),
        ("cohere2_moe", "softmax"),
        ("deepseek", "softmax"),  # its code returns no logits
        ("deepseek_v4", "sqrtsoftplus"),
        ("glm4_moe", "sigmoid"),
        ("granitemoe_swa", "softmax"),
    ],
)
def test_the_scoring_of_a_router_that_tells_nothing_apart_is_measured(family: str, scoring: str, size: float) -> None:
    model = tiny.build(family)
    _, layers = detect(model)
    with torch.no_grad():
        weights = [router_weight(model.get_submodule(layer.router)) for layer in layers]
        for weight in weights:
            weight.mul_(size)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):
                table.zero_()  # as a new model has it: every token goes to expert 0, twice
    before = [weight.clone() for weight in weights]
    found, layers = detect(model)
    assert found.endswith("choice and scoring seen in a trial run")
    assert {layer.scoring for layer in layers} == {scoring}
    assert all(map(torch.equal, weights, before))


@pytest.mark.parametrize("family", ["afmoe", "cohere2_moe", "glm4_moe", "qwen3_next"])
def test_a_router_without_values_shows_its_scoring_too(family: str) -> None:
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(tiny.build(family).config)
    _, layers = detect(skeleton)
    assert list(layers) == list(detect(tiny.build(family))[1])


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
    with pytest.raises(UserError, match=r"model = llama: a dense model.*Choose one of: dbrx, deepseek_v2, "):
        detect(tiny.build("llama"))


def test_a_moe_family_without_moe_layers_is_refused_with_its_modules() -> None:
    with pytest.raises(UserError, match=r"model = deepseek_v3: no router.*model.layers.\*.mlp \(DeepseekV3MLP\)"):
        detect(tiny.build("deepseek_v3", first_k_dense_replace=3))


def test_an_unknown_layout_is_refused_with_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("dbrx")
    monkeypatch.delitem(FAMILIES, "dbrx")
    with pytest.raises(UserError, match=r"model = dbrx: no router with experts beside it.*router \(DbrxRouter\)"):
        detect(model)


def test_nllb_moe_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"nllb_moe: refused: .*broken.*only experts 0 and 1"):
        refuse(AutoConfig.for_model("nllb-moe"))


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_every_refused_family_is_told_with_its_reason_and_the_choices(family: str) -> None:
    model_type = next(name for name in CONFIG_MAPPING if name.replace("-", "_") == family)
    with pytest.raises(UserError) as caught:
        refuse(AutoConfig.for_model(model_type))
    assert f"model = {family}: refused: {REFUSED[family]}. Choose one of: dbrx, " in str(caught.value)


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
        (lambda output: (output[0][:, :2], *output[1:]), r"output 0 must be logits over 4 experts"),
        (lambda output: output[1:], r"glm4_moe: must run on plain tokens, but fails: not enough values"),
    ],
)
def test_what_a_trial_run_shows_to_be_unusable_is_refused(change: Callable[[Any], Any], message: str) -> None:
    model = tiny.build("glm4_moe")
    model.model.layers[1].mlp.gate.register_forward_hook(lambda _, __, output: change(output))
    with pytest.raises(UserError, match=message):
        detect(model)


def on_gates(model: PreTrainedModel, change: Callable[[Any], Any]) -> PreTrainedModel:
    """The model with what its gates return changed."""
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, __, output: change(output))
    return model


def test_probabilities_are_taken_for_what_they_are() -> None:
    model = on_gates(tiny.build("flex_olmo"), lambda output: (output[0].softmax(-1), *output[1:]))
    found, layers = detect(model)
    assert found.endswith("choice and scoring seen in a trial run")
    assert {(layer.probabilities, layer.scoring) for layer in layers} == {(True, "softmax")}


def test_a_checkpoints_own_code_is_looked_at_itself_even_under_a_name_of_the_table() -> None:
    model = tiny.build("deepseek", scoring_func="sigmoid")
    model.config.model_type = "deepseek_v3"
    found, layers = detect(model)
    assert found == "autodetected: routers by shapes; logits computed, choice and scoring seen in a trial run"
    assert {(layer.logits, layer.chosen, layer.scoring) for layer in layers} == {(None, 0, "sigmoid")}
    assert [layer.router for layer in layers] == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]


def test_a_gate_without_logits_whose_weights_are_no_scores_of_its_input_is_refused() -> None:
    model = on_gates(tiny.build("deepseek"), lambda output: (output[0], torch.rand_like(output[1]), output[2]))
    with pytest.raises(
        UserError, match=r"mlp.gate: must return logits over 4 experts, or weights that are the softmax"
    ):
        detect(model)


class LinearGate(nn.Module):
    """As of Mixtral before transformers fused it: the block chooses, by what a linear layer returns."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(tiny.HIDDEN, tiny.EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(tiny.HIDDEN, tiny.HIDDEN) for _ in range(tiny.EXPERTS))
        self.shift = shift

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, tiny.HIDDEN)
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k)
        chosen = (chosen + self.shift) % tiny.EXPERTS
        output = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            tokens, place = (chosen == index).nonzero(as_tuple=True)
            output = output.index_add(0, tokens, expert(flat[tokens]) * weights[tokens, place, None])
        return output.view_as(hidden)


def own_code(block: nn.Module) -> PreTrainedModel:
    model = tiny.build("deepseek")
    for layer in model.model.layers[1:]:
        layer.mlp = block
        block = copy.deepcopy(block)
    return model


def test_a_linear_gate_is_believed_as_far_as_its_experts_show() -> None:
    found, layers = detect(own_code(LinearGate()))
    assert found.endswith("routers by shapes; choice seen in a trial run, scoring unknown")
    assert {(layer.dispatch, layer.logits, layer.top_k) for layer in layers} == {("logits", 0, 2)}


def test_a_router_whose_tokens_go_elsewhere_than_it_says_is_refused() -> None:
    with pytest.raises(UserError, match=r"mlp.gate: must say which experts its tokens go to, but they go to others"):
        detect(own_code(LinearGate(shift=1)))


def test_a_router_that_is_not_run_is_refused() -> None:
    model = tiny.build("deepseek")
    model.model.layers[1].forward = lambda hidden, mask: hidden
    with pytest.raises(UserError, match=r"router = model.layers.1.mlp.gate: must run whenever the model does"):
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
