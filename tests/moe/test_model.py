from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.maths.heap import Heap
from fedalign.moe.families import router_outputs
from fedalign.moe.load import ask_hub
from fedalign.moe.model import MoEModel
from fedalign.moe.upcycle import DenseSource
from fedalign.protocol import EMBEDDINGS, HEAD, SHARED, ParameterGroup
from tests.moe import tiny

Tiny = Callable[[str], MoEModel]


@pytest.mark.parametrize("family", tiny.ALL)
def test_groups_cover_every_trainable_value_exactly_once(family: str) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    tiny.assert_views_hold_every_trained_value_once(moe)
    trained = sum(p.numel() for p in moe.model.parameters() if p.requires_grad)
    assert sum(moe.layout.sizes.values()) == trained
    assert tuple(moe.layout.sizes) == moe.layout.groups


@pytest.mark.parametrize("family", tiny.ALL)
def test_views_are_views_of_the_parameters(family: str, tiny_moe: Tiny) -> None:
    moe = tiny_moe(family)
    storages = {p.untyped_storage().data_ptr() for p in moe.model.parameters()}
    assert all(view.untyped_storage().data_ptr() in storages for views in moe.views.values() for view in views)
    assert not any(view.requires_grad for views in moe.views.values() for view in views)


@pytest.mark.parametrize("family", tiny.ALL)
def test_sizes_of_gates_and_experts(family: str, tiny_moe: Tiny) -> None:
    sizes = tiny_moe(family).layout.sizes
    gate = 33 if family in ("gpt_oss", "gemma4") else 32  # a row of H, and its bias or the expert's scale
    expert = {
        "gpt_oss": 3 * 16 * 32 + 2 * 16 + 32,  # with biases
        **dict.fromkeys(("nemotron_h", "switch_transformers"), 2 * 16 * 32),  # no gate projection
    }.get(family, 3 * 16 * 32)
    attention = {2 * 16 * 32} if family == "jetmoe" else set()  # its attention has experts too
    assert {n for g, n in sizes.items() if g.kind == "gate"} == {gate}
    assert {n for g, n in sizes.items() if g.kind == "expert"} == {expert} | attention


@pytest.mark.parametrize("family", tiny.ALL)
def test_read_then_write_restores_everything(family: str) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    before = {name: p.clone() for name, p in moe.model.named_parameters()}
    saved = moe.read()
    moe.write({group: torch.zeros_like(values) for group, values in saved.items()})
    assert all(not p.any() for p in moe.model.parameters() if p.requires_grad)
    moe.write(saved)
    assert all(torch.equal(p, before[name]) for name, p in moe.model.named_parameters())


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("kind", ["gate", "expert"])
def test_writing_one_group_changes_only_that_group(family: str, kind: str) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    group = ParameterGroup(kind, layer=1, expert=2)  # type: ignore[arg-type] # pytest's parameters are words of that kind
    before = moe.read()
    moe.write({group: before[group] + 1})
    changed = {g for g, values in moe.read().items() if not torch.equal(values, before[g])}
    assert changed == {group}


def test_an_expert_is_what_its_tokens_are_computed_with() -> None:
    """Rebuild one fused expert's output from its views."""
    moe = MoEModel.wrap(tiny.build("mixtral"))
    hidden = torch.randn(5, tiny.HIDDEN)
    experts = moe.model.get_submodule(moe.layers[0].experts)
    gate_up, down = moe.views[ParameterGroup("expert", 0, 3)]
    gate, up = (hidden @ gate_up.T).chunk(2, dim=-1)
    rebuilt = (torch.nn.functional.silu(gate) * up) @ down.T
    with torch.no_grad():
        output = experts(hidden, torch.full((5, 1), 3), torch.ones(5, 1))
    torch.testing.assert_close(output, rebuilt)


def test_a_flat_expert_is_a_block_of_rows(tiny_moe: Tiny) -> None:
    """dbrx keeps the experts' matrices one below the other."""
    moe = tiny_moe("dbrx")
    mlp = moe.model.get_submodule(moe.layers[0].experts).mlp
    group = ParameterGroup("expert", 0, 3)
    expected = torch.cat([whole[3 * 16 : 4 * 16].reshape(-1) for whole in (mlp.w1, mlp.v1, mlp.w2)])
    assert torch.equal(moe.read([group])[group], expected)


def test_gate_row_is_the_experts_router_row(tiny_moe: Tiny) -> None:
    moe = tiny_moe("gpt_oss")
    router = moe.model.get_submodule(moe.layers[1].router)
    expected = torch.cat([router.weight[2], router.bias[2:3]])
    torch.testing.assert_close(moe.read([ParameterGroup("gate", 1, 2)])[ParameterGroup("gate", 1, 2)], expected)


def test_tied_embeddings_are_there_once() -> None:
    tied, untied = (MoEModel.wrap(tiny.build("granitemoe", tie_word_embeddings=tie)) for tie in (True, False))
    rows = tiny.VOCABULARY * tiny.HIDDEN
    assert (tied.layout.sizes[EMBEDDINGS], untied.layout.sizes[EMBEDDINGS]) == (rows, rows)
    assert (tied.layout.sizes[HEAD], untied.layout.sizes[HEAD]) == (0, rows)
    assert tied.layout.sizes[SHARED] == untied.layout.sizes[SHARED]


@pytest.mark.parametrize("family", tiny.ALL)
def test_no_table_of_tokens_is_outside_of_its_group(family: str) -> None:
    """Whoever freezes embeddings and head must have frozen every matrix with a row for each token."""
    moe = MoEModel.wrap(tiny.build(family, vocab_size=71))  # the size of nothing else
    rows = moe.model.get_input_embeddings().weight.shape[0]
    of_words = [slot for slot in moe.slots if slot.groups[0] in (EMBEDDINGS, HEAD)]
    assert of_words
    assert all(len(slot.groups) == 1 for slot in of_words)
    others = [slot.name for slot in moe.slots if slot not in of_words and rows in slot.parameter.shape]
    assert others == []


def test_token_rows_lie_where_the_layout_says() -> None:
    for tie in (True, False):
        moe = MoEModel.wrap(tiny.build("granitemoe", tie_word_embeddings=tie))
        found = {rows.answers: rows for rows in moe.layout.token_rows}
        assert list(found) == ([False] if tie else [False, True])
        embeddings = {False: moe.model.get_input_embeddings(), True: moe.model.get_output_embeddings()}
        for answers, rows in found.items():
            assert rows.group == (HEAD if answers else EMBEDDINGS)
            values = moe.read([rows.group])[rows.group]
            matrix = values[rows.start : rows.stop].view(rows.tokens, rows.width)
            torch.testing.assert_close(matrix, embeddings[answers].weight.detach())
        assert moe.layout.token_cells == (len(found), tiny.VOCABULARY)


def test_an_encoder_and_a_decoder_share_their_token_rows() -> None:
    moe = MoEModel.wrap(tiny.build("switch_transformers"))
    rows = moe.layout.token_rows[0]
    matrix = moe.read([EMBEDDINGS])[EMBEDDINGS][rows.start : rows.stop].view(rows.tokens, rows.width)
    torch.testing.assert_close(matrix, moe.model.get_input_embeddings().weight.detach())


def test_what_is_not_trained_has_no_token_rows() -> None:
    moe = MoEModel.wrap(tiny.build("granitemoe"), TuningConfig(kind="moe"))
    assert moe.layout.token_rows == ()
    assert moe.layout.token_cells == (0, 0)


def test_frozen_parameters_are_in_no_group() -> None:
    model = tiny.build("olmoe")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name)
    moe = MoEModel.wrap(model)
    assert {g.kind for g, size in moe.layout.sizes.items() if size} == {"expert"}
    assert moe.read([SHARED])[SHARED].shape == (0,)


def test_a_trained_selection_bias_belongs_to_the_gate_rows() -> None:
    model = tiny.build("ernie4_5_moe")
    model.requires_grad_(True)
    moe = MoEModel.wrap(model)
    assert moe.layout.sizes[ParameterGroup("gate", 0, 0)] == tiny.HIDDEN + 1
    bias = model.get_submodule(moe.layers[0].router).moe_statics.e_score_correction_bias
    row = moe.read([ParameterGroup("gate", 0, 2)])[ParameterGroup("gate", 0, 2)]
    assert bias[0, 2] in row


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_selection_bias_buffers_are_described_and_not_trained(family: str, tiny_moe: Tiny) -> None:
    moe = tiny_moe(family)
    assert len(moe.describe().selection_biases) == 2
    assert not any("correction_bias" in slot.name for slot in moe.slots)


def test_a_frozen_selection_bias_stays_frozen_when_loaded(tmp_path: Path) -> None:
    tiny.build("ernie4_5_moe").save_pretrained(tmp_path)
    moe = MoEModel.load(tmp_path)
    assert moe.layout.sizes[ParameterGroup("gate", 0, 0)] == tiny.HIDDEN
    assert len(moe.describe().selection_biases) == 2


def test_write_checks_sizes_and_groups(tiny_moe: Tiny) -> None:
    moe = tiny_moe("olmoe")
    group = ParameterGroup("gate", 0, 0)
    with pytest.raises(ValueError, match=r"gate\[0,0\]: 3 values, the model trains 32"):
        moe.write({group: torch.zeros(3)})
    with pytest.raises(ValueError, match=r"gate\[7,0\]"):
        moe.write({ParameterGroup("gate", 7, 0): torch.zeros(32)})


@pytest.mark.parametrize("family", tiny.ALL)
def test_saved_model_loads_with_plain_transformers_and_again(family: str, tmp_path: Path, tiny_moe: Tiny) -> None:
    moe = tiny_moe(family)
    moe.save(tmp_path)
    inputs = tiny.batch(family)
    with torch.no_grad():
        expected = moe.model(**inputs).logits
        assert torch.equal(tiny.plain(tmp_path)(**inputs).logits, expected)
        again = MoEModel.load(str(tmp_path), trust_remote_code=True)
        assert torch.equal(again.model(**inputs).logits, expected)
    assert again.layers == moe.layers
    assert again.fingerprint() == moe.fingerprint()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "switch_transformers"])
def test_saving_twice_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        MoEModel.wrap(tiny.build(family)).save(tmp_path / name)
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("a", "b")}
    assert files["a"] == files["b"]
    assert "model.safetensors" in files["a"]


def test_a_fingerprint_is_the_same_before_and_after_saving_nested_configurations(tmp_path: Path) -> None:
    model = tiny.build("dbrx")
    model.save_pretrained(tmp_path)
    assert MoEModel.load(tmp_path).fingerprint() == MoEModel.wrap(model).fingerprint()
    wider = MoEModel.wrap(tiny.build("dbrx", attn_config={"kv_n_heads": 2, "rope_theta": 1e5, "clip_qkv": 8}))
    assert wider.fingerprint() != MoEModel.wrap(model).fingerprint()


def test_fingerprint_tells_models_apart_but_not_weights(tiny_moe: Tiny) -> None:
    olmoe = tiny_moe("olmoe").fingerprint()
    assert MoEModel.wrap(tiny.build("olmoe", seed=5)).fingerprint() == olmoe
    assert MoEModel.wrap(tiny.build("olmoe", num_experts=8)).fingerprint() != olmoe
    assert tiny_moe("qwen3_moe").fingerprint() != olmoe
    frozen = tiny.build("olmoe")
    frozen.lm_head.requires_grad_(False)
    assert MoEModel.wrap(frozen).fingerprint() != olmoe


def test_describe(tiny_moe: Tiny) -> None:
    olmoe, deepseek = tiny_moe("olmoe").describe(), tiny_moe("deepseek_v3").describe()
    assert olmoe.found == "table"
    assert (olmoe.moe_layers, olmoe.dense_layers, deepseek.moe_layers, deepseek.dense_layers) == (2, 0, 2, 1)
    assert olmoe.parameters - olmoe.active_parameters == 2 * 2 * 3 * 16 * 32  # 2 layers, 2 idle experts each
    assert olmoe.trainable_megabytes == pytest.approx(olmoe.parameters * 4e-6)
    rows = 64 * 32
    shared = olmoe.parameters - 2 * rows - 8 * (1536 + 32)
    each = {"shared": shared, "embeddings": rows, "head": rows, "gate": 32, "expert": 1536}
    assert olmoe.group_parameters == each
    assert olmoe.shared_experts == ()
    assert deepseek.shared_experts[0] == "model.layers.1.mlp.shared_experts (DeepseekV3MLP)"
    assert deepseek.scoring == ("sigmoid",)
    assert tiny_moe("switch_transformers").describe().dense_layers == 2
    assert tiny_moe("switch_transformers").max_length is None
    assert tiny_moe("olmoe").max_length == 128
    beside = MoEModel.wrap(tiny.build("granitemoeshared", num_local_experts=4, shared_intermediate_size=16)).describe()
    assert beside.shared_experts[0] == "model.layers.0.shared_mlp (GraniteMoeSharedMLP)"
    jetmoe = tiny_moe("jetmoe").describe()
    assert (jetmoe.moe_layers, jetmoe.dense_layers, len(jetmoe.routers)) == (2, 0, 4)
    assert set(jetmoe.expert_modules) >= {"model.layers.0.mlp", "model.layers.0.self_attention.experts"}
    assert tiny_moe("gemma4").describe().shared_experts[0] == "model.layers.0.mlp (Gemma4TextMLP)"
    assert not tiny_moe("jetmoe").describe().shared_experts
    assert len(tiny_moe("lfm2_moe").describe().selection_biases) == 2
    assert tiny_moe("qwen2_moe").describe().shared_experts == (
        "model.layers.0.mlp.shared_expert (Qwen2MoeMLP)",
        "model.layers.1.mlp.shared_expert (Qwen2MoeMLP)",
    )


@pytest.mark.parametrize("family", tiny.ALL)
def test_routers_stay_float32_in_a_bfloat16_model(family: str, tmp_path: Path) -> None:
    tiny.build(family).save_pretrained(tmp_path)
    moe = MoEModel.load(tmp_path, dtype="bfloat16", trust_remote_code=True)
    kinds = {slot.kind: {s.parameter.dtype for s in moe.slots if s.kind == slot.kind} for slot in moe.slots}
    assert kinds["gate"] == {torch.float32}
    assert kinds["expert"] == {torch.bfloat16}
    exact = MoEModel.load(tmp_path, trust_remote_code=True).read()
    assert all(torch.equal(value, exact[group]) for group, value in moe.read().items() if group.kind == "gate")
    seen = []
    layer, router = moe.layers[0], moe.model.get_submodule(moe.layers[0].router)
    router.register_forward_hook(
        lambda module, args, output: seen.append(router_outputs(layer, module, args[0], output)[layer.logits or 0])
    )
    loss = moe.model(**tiny.batch(family)).logits.float().square().mean()
    loss.backward()
    if layer.logits is not None:
        # dbrx chooses experts by what its router returns, in its own type: captured as they are, choices agree
        assert seen[0].dtype == (torch.bfloat16 if family == "dbrx" else torch.float32)
    assert {slot.parameter.dtype for slot in moe.slots if slot.kind == "gate"} == {torch.float32}
    assert all(values.dtype == torch.float32 for values in moe.read().values())


def test_routers_run_in_float32_under_autocast() -> None:
    moe = MoEModel.wrap(tiny.build("olmoe"))
    router = moe.model.get_submodule(moe.layers[0].router)
    hidden = torch.randn(7, tiny.HIDDEN)
    with torch.no_grad():
        expected = router(hidden)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(hidden)[0], expected)
            assert (hidden @ router.weight.T).dtype == torch.bfloat16  # what it would have computed


def test_a_deep_copy_runs_its_own_router() -> None:
    model = MoEModel.wrap(tiny.build("olmoe")).model
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.model.layers[0].mlp.gate.weight.zero_()
        hidden = torch.randn(3, tiny.HIDDEN)
        assert not clone.model.layers[0].mlp.gate(hidden)[0].any()
        assert model.model.layers[0].mlp.gate(hidden)[0].any()


def test_wrapping_twice_is_harmless() -> None:
    model = tiny.build("olmoe")
    inputs = tiny.batch("olmoe")
    with torch.no_grad():
        expected = model(**inputs).logits
        MoEModel.wrap(model)
        MoEModel.wrap(model)
        assert torch.equal(model(**inputs).logits, expected)


def test_load_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere': no such folder. Give a folder saved by transformers, or a Hub id"):
        MoEModel.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"must hold a config.json"):
        MoEModel.load(tmp_path)
    with pytest.raises(UserError, match=r"model.dtype = 'floaty32': unknown.*bfloat16, float16, float32"):
        MoEModel.load(tmp_path, dtype="floaty32")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a PEFT adapter, not a model. Merge it"):
        MoEModel.load(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(UserError, match=r"cannot be loaded"):
        MoEModel.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    with pytest.raises(UserError, match=r"cannot be loaded.*no_such_family"):
        MoEModel.load(tmp_path)


def test_load_says_what_is_wrong_with_the_weights(tmp_path: Path) -> None:
    tiny.build("olmoe").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be loaded"):
        MoEModel.load(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"cannot be loaded"):
        MoEModel.load(tmp_path)


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    model = tiny.build("olmoe")
    state = {name: t for name, t in model.state_dict().items() if "layers.1.mlp.gate" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"must hold every weight; 1 lack: model.layers.1.mlp.gate.weight"):
        MoEModel.load(tmp_path)


@pytest.mark.parametrize("find", [MoEModel.load, MoEModel.skeleton, DenseSource.find])
def test_a_name_that_the_hub_does_not_know_is_told_after_one_question(
    find: Callable[[str], object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Transformers asks five times, with longer and longer breaks; a model that was loaded before is not asked for."""
    asked: list[tuple[str, float]] = []

    def unknown(_: object, source: str, timeout: float) -> None:
        asked.append((source, timeout))
        raise OSError("404: no such\nmodel")

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unknown)
    told = (
        "model = 'nobody/nothing': no such folder, and the Hub does not give it: 404: no such model Check the spelling"
    )
    with pytest.raises(UserError, match=re.escape(told)):
        find("nobody/nothing")
    assert asked == [("nobody/nothing", 10)]
    (tmp_path / "models--nobody--nothing" / "snapshots").mkdir(parents=True)
    ask_hub("nobody/nothing")
    assert len(asked) == 1


def test_an_unreachable_hub_is_told_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"model = 'nobody/nothing': no such folder, and from the Hub it cannot be loaded"
    ) as caught:
        MoEModel.load("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_refused_family_is_told_before_its_weights_are_read(tmp_path: Path) -> None:
    AutoConfig.for_model("nllb-moe").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"nllb_moe: refused"):
        MoEModel.load(tmp_path)


def test_a_dense_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny.build("llama").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model = llama: a dense model"):
        MoEModel.load(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("family", tiny.ALL)
def test_a_skeleton_filled_with_a_models_values_is_that_model(family: str, tmp_path: Path) -> None:
    """Where a coordinator never loads the model: what it saves is what the one who has it would save."""
    tiny.build(family).save_pretrained(tmp_path / "model")
    moe, skeleton = (make(tmp_path / "model", trust_remote_code=True) for make in (MoEModel.load, MoEModel.skeleton))
    assert {value.device.type for value in skeleton.model.parameters()} == {"meta"}
    assert skeleton.layout == moe.layout
    assert [(one.router, one.experts) for one in skeleton.layers] == [(one.router, one.experts) for one in moe.layers]
    assert (skeleton.experts, skeleton.top_k, skeleton.hidden) == (moe.experts, moe.top_k, moe.hidden)
    assert skeleton.fingerprint() == moe.fingerprint()
    assert skeleton.max_length == moe.max_length
    assert skeleton.weights_hash_of(moe.read(), moe.constants()) == moe.weights_hash()
    skeleton.save_filled(moe.read(), moe.constants(), tmp_path / "filled", Heap(tmp_path / "heap"))
    moe.save(tmp_path / "saved")
    assert files(tmp_path / "filled") == files(tmp_path / "saved")
    assert {value.device.type for value in skeleton.model.parameters()} == {"meta"}


@pytest.mark.parametrize("family", tiny.ALL)
def test_the_hash_of_weights_is_of_every_value(family: str) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    whole = moe.weights_hash()
    assert MoEModel.wrap(tiny.build(family)).weights_hash() == whole
    seen = {whole}
    every = {name: p.detach() for name, p in moe.model.named_parameters()} | moe.constants()
    for value in every.values():
        last = value.view(-1)[-1:]
        before = last.clone()
        last.copy_(1 - before)
        seen.add(moe.weights_hash())
        last.copy_(before)
    assert len(seen) == 1 + len(every)
    assert moe.weights_hash() == whole


@pytest.mark.parametrize("family", tiny.ALL)
def test_weights_and_constants_are_all_that_is_saved(family: str) -> None:
    moe = MoEModel.wrap(tiny.build(family))
    trained = {slot.name for slot in moe.slots if slot.parameter.requires_grad}
    saved = {name: value.data_ptr() for name, value in moe.model.state_dict().items()}
    places = {saved[name] for name in {*trained, *moe.constants()}}
    assert set(saved.values()) == places  # tied ones have one place and two names
    assert not trained & moe.constants().keys()


def test_generation_settings_are_saved_from_a_skeleton_too(tmp_path: Path) -> None:
    model = tiny.build("olmoe")
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path / "model")
    moe = MoEModel.load(tmp_path / "model")
    MoEModel.skeleton(tmp_path / "model").save_filled(moe.read(), moe.constants(), tmp_path / "filled")
    assert json.loads((tmp_path / "filled" / "generation_config.json").read_text())["max_new_tokens"] == 17


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_checkpoint_of_few_bits_has_the_same_hash_by_either_way(dtype: str, tmp_path: Path) -> None:
    tiny.build("olmoe").to(getattr(torch, dtype)).save_pretrained(tmp_path)
    moe, skeleton = MoEModel.load(tmp_path), MoEModel.skeleton(tmp_path)
    assert skeleton.fingerprint() == moe.fingerprint()
    for heap in (None, Heap(tmp_path / "heap")):
        assert skeleton.weights_hash_of(moe.read(), moe.constants(), heap) == moe.weights_hash()


def test_a_skeleton_is_not_filled_with_less_than_the_model(tmp_path: Path) -> None:
    tiny.build("ernie4_5_moe").save_pretrained(tmp_path)
    moe, skeleton = MoEModel.load(tmp_path), MoEModel.skeleton(tmp_path)
    weights, constants = moe.read(), moe.constants()
    assert constants
    with pytest.raises(ValueError, match=r"constants: .*correction_bias is lacking"):
        skeleton.weights_hash_of(weights, {})
    with pytest.raises(ValueError, match="constants: more is lacking, or is not of this model"):
        skeleton.weights_hash_of(weights, {**constants, "more": torch.zeros(1)})
    with pytest.raises(ValueError, match="shared: 3 values"):
        skeleton.weights_hash_of({**weights, SHARED: torch.zeros(3)}, constants)
    less = {group: value for group, value in weights.items() if group.kind != "gate"}
    with pytest.raises(ValueError, match=r"weights: gate\[0,0\] is lacking"):
        skeleton.weights_hash_of(less, constants)
    name = next(iter(constants))
    with pytest.raises(ValueError, match="correction_bias"):
        skeleton.weights_hash_of(weights, {**constants, name: constants[name].view(-1)[:1]})


def test_a_skeleton_says_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such folder"):
        MoEModel.skeleton(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))
    with pytest.raises(UserError, match=r"cannot be loaded.*no_such_family"):
        MoEModel.skeleton(tmp_path)
    tiny.build("llama").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a dense model"):
        MoEModel.skeleton(tmp_path)
