from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fedalign.errors import UserError
from fedalign.moe.model import MoEModel
from fedalign.moe.upcycle import (
    TARGETS,
    DenseSource,
    Recipe,
    check_dense,
    chosen_layers,
    load_dense,
    load_tokenizer,
    moe_config,
    probe_logits,
    upcycle,
)
from tests.moe import tiny

LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 16}),
    "llama, one head for keys": ("llama", {"num_key_value_heads": 1, "rms_norm_eps": 1e-2, "hidden_act": "gelu"}),
    "llama 3 positions": ("llama", {"rope_parameters": LLAMA_3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3, biases": ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
}
EXACT = Recipe(experts=4, noise=0.0)


def dense(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Random, with weights so large that every part of it shows in the logits."""
    return tiny.build(family, **{"num_hidden_layers": 4, "initializer_range": 0.2} | changes)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(**tiny.batch("llama", length=24)).logits
    return found


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("layers", ["all", "every:2"])
@pytest.mark.parametrize("case", DENSE)
def test_without_noise_it_computes_what_the_dense_model_does(case: str, layers: str, tmp_path: Path) -> None:
    family, changes = DENSE[case]
    model = dense(family, **changes)
    before, scale = logits(model), float(logits(model).std())
    prompt = torch.tensor([[5, 9, 40, 7]])
    said = model.generate(prompt, max_new_tokens=6, do_sample=False)
    sparse = upcycle(model, Recipe(experts=4, top_k=2, layers=layers, noise=0.0))
    expected = TARGETS[family].all_layers if layers == "all" else TARGETS[family].some_layers
    assert sparse.config.model_type == expected
    assert scale > 0.5
    assert differs(logits(sparse), before) < 1e-5
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert differs(logits(loaded), before) < 1e-5
    assert torch.equal(loaded.generate(prompt, max_new_tokens=6, do_sample=False), said)
    about = MoEModel.wrap(loaded).describe()
    chosen = chosen_layers(layers, 4)
    assert [about.moe_layers, about.dense_layers] == [len(chosen), 4 - len(chosen)]
    assert {int(path.split(".")[2]) for path in about.routers} == set(chosen)


@pytest.mark.parametrize("case", ["llama 3 positions", "mistral, window", "qwen2, windows", "qwen3, windows"])
def test_what_has_to_be_taken_over_shows_in_the_logits(case: str) -> None:
    family, changes = DENSE[case]
    without = {"head_dim": changes["head_dim"]} if "head_dim" in changes else {}
    plain = dense(family, **without | ({"sliding_window": None} if family == "mistral" else {}))
    assert differs(logits(dense(family, **changes)), logits(plain)) > 0.01


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_any_number_of_equal_experts_gives_the_same(top_k: int) -> None:
    for layers in ("all", "1,3"):
        model = dense()
        before = logits(model)
        assert differs(logits(upcycle(model, Recipe(4, top_k, layers, noise=0.0))), before) < 1e-5


def test_tokens_go_to_different_experts() -> None:
    sparse = upcycle(dense(), EXACT)
    router = sparse.model.layers[0].mlp.gate
    _, weights_T_K, chosen_T_K = router(torch.randn(200, tiny.HIDDEN, generator=torch.Generator().manual_seed(0)))
    assert differs(weights_T_K.detach().sum(1), torch.ones(200)) < 1e-6
    assert set(chosen_T_K.flatten().tolist()) == {0, 1, 2, 3}


def test_noise_is_a_share_of_the_spread_of_each_matrix() -> None:
    model = dense(hidden_size=128, intermediate_size=64)
    ffn = {name: p.detach().clone() for name, p in model.model.layers[0].mlp.named_parameters()}
    experts = upcycle(model, Recipe(experts=4, noise=0.1)).model.layers[0].mlp.experts
    gate_E, up_E = experts.gate_up_proj.detach().chunk(2, dim=1)
    for name, copies_E in (("gate_proj", gate_E), ("up_proj", up_E), ("down_proj", experts.down_proj.detach())):
        matrix = ffn[f"{name}.weight"]
        for copy in copies_E:
            assert float((copy - matrix).std() / matrix.std()) == pytest.approx(0.1, rel=0.05)
            assert float((copy - matrix).mean() / matrix.std()) == pytest.approx(0, abs=0.01)
        between = (copies_E[0] - matrix).flatten() @ (copies_E[1] - matrix).flatten()
        assert float(between) < 0.1 * float((copies_E[0] - matrix).square().sum())


def test_the_seed_decides_noise_and_routers() -> None:
    first, again, other = (upcycle(dense(), Recipe(experts=4, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if ".mlp." in name}
    assert {name for name in first if not torch.equal(first[name], other[name])} == drawn


def test_weights_move_and_are_not_copied() -> None:
    model = dense(tie_word_embeddings=True)
    kept = {name: p.data_ptr() for name, p in model.named_parameters() if ".mlp." not in name}
    sparse = upcycle(model, Recipe(experts=4, layers="0,2"))
    moved = {name: p.data_ptr() for name, p in sparse.named_parameters()}
    assert all(moved[name] == place for name, place in kept.items())
    assert sparse.lm_head.weight is sparse.model.embed_tokens.weight
    assert not any(".mlp." in name and name.split(".")[2] in "02" for name, _ in model.named_parameters())


def test_precision_and_generation_settings_stay() -> None:
    model = dense().to(torch.bfloat16)
    model.generation_config.max_new_tokens = 77
    sparse = upcycle(model, Recipe(experts=4))
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    assert sparse.generation_config.max_new_tokens == 77
    assert sparse.config.dtype == torch.bfloat16


def test_the_shared_expert_of_qwen2_moe_stays_out_of_it_while_others_learn() -> None:
    sparse = upcycle(dense("qwen2"), Recipe(experts=4, top_k=4)).train()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2)
    before = sparse.model.layers[0].mlp.experts.down_proj.detach().clone()
    inputs = tiny.batch("qwen2")
    sparse(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()
    shared = [p for name, p in sparse.named_parameters() if "shared_expert" in name]
    assert len(shared) == 4 * 4
    assert not any(p.any() for p in shared)
    assert (sparse.model.layers[0].mlp.experts.down_proj != before).flatten(1).any(1).all()


def test_a_model_folder_is_checked_before_its_weights_are_read(tmp_path: Path) -> None:
    dense().config.save_pretrained(tmp_path)  # no weights at all
    check_dense(DenseSource.find(str(tmp_path)), EXACT)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_dense(DenseSource.find(str(tmp_path)))
    with pytest.raises(UserError, match=r"layers 0 to 3.*every:N with N from 1 to 4"):
        check_dense(DenseSource.find(str(tmp_path)), Recipe(layers="4"))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"must hold every weight.*1 lack: model\.layers\.2\.mlp\.up_proj\.weight"):
        load_dense(DenseSource.find(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": 1}, "--experts 1: must be at least 2"),
        ({"experts": 4, "top_k": 5}, "--top-k 5: must be from 1 to the number of experts, 4"),
        ({"top_k": 0}, "--top-k 0"),
        ({"noise": -0.1}, "--noise -0.1"),
        ({"noise": float("nan")}, "--noise nan"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Recipe(**changes)


@pytest.mark.parametrize("layers", ["", "every", "every:0", "every:5", "every:x", "4", "0,4", "-1", "1.5", "some"])
def test_layers_that_are_not_there_are_refused(layers: str) -> None:
    with pytest.raises(UserError, match=f"--layers '{layers}': the model has layers 0 to 3"):
        chosen_layers(layers, 4)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "ernie4_5_moe", "jamba", "switch_transformers"])
def test_what_already_has_experts_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=rf"{family}: already a Mixture-of-Experts.*llama, mistral, qwen2, qwen3"):
        moe_config(tiny.build(family).config, EXACT)


def test_other_dense_families_are_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"dense family = 'gpt2': unknown. Choose one of: llama, mistral, qwen2, qwen3"):
        moe_config(AutoConfig.for_model("gpt2"), EXACT)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_that_no_moe_family_has_are_refused(bias: str) -> None:
    with pytest.raises(UserError, match=rf"llama: {bias} = true"):
        moe_config(dense("llama", **{bias: True}).config, EXACT)


def test_windows_that_qwen3_moe_cannot_mix_are_refused() -> None:
    config = dense("qwen3", use_sliding_window=True, sliding_window=5, max_window_layers=2).config
    with pytest.raises(UserError, match="some of its layers attend to a sliding window"):
        moe_config(config, EXACT)


def test_a_parameter_without_a_place_is_an_error_not_a_silent_loss() -> None:
    model = dense()
    model.model.layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(tiny.HIDDEN))
    with pytest.raises(UserError, match=r"MixtralForCausalLM has no place for model.layers.1.self_attn.o_proj.bias"):
        upcycle(model, EXACT)


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its weights are quantised"):
        check_dense(DenseSource.find(str(tmp_path)), EXACT)


def test_places_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold a config\.json and weights, or one \.gguf file"):
        DenseSource.find(str(tmp_path))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds 2 GGUF files. Give one of: a\.gguf, b\.gguf"):
        DenseSource.find(str(tmp_path))
    for path in (str(tmp_path / "none"), "./none", "none.gguf", "a/b/c"):
        with pytest.raises(UserError, match="no such file or folder"):
            DenseSource.find(path)
    assert DenseSource.find("owner/name", "main").options == {"revision": "main"}


def write_gguf(path: Path, model: PreTrainedModel) -> None:
    """A Llama as llama.cpp stores it: halves of rotary dimensions interleaved, its own names, a byte-pair tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", "<s>", "</s>", *(chr(ord("!") + i) for i in range(config.vocab_size - 4)), "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if (projection := name.split(".")[-2]) in heads:
            array = array.reshape(heads[projection], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(str(names.get_name(name, (".weight",))), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_can_be_upcycled(tmp_path: Path) -> None:
    model = dense()
    write_gguf(tmp_path / "tiny.gguf", model)
    for place in (tmp_path, tmp_path / "tiny.gguf"):
        source = DenseSource.find(str(place))
        assert source == DenseSource(str(tmp_path), "tiny.gguf")
    check_dense(source, EXACT)
    loaded = load_dense(source)
    before = probe_logits(loaded)
    assert differs(before, probe_logits(model)) < 1e-5
    sparse = upcycle(loaded, EXACT)
    assert differs(probe_logits(sparse), before) < 1e-5
    sparse.save_pretrained(tmp_path / "sparse")
    saved = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert "quantization_config" not in saved
    assert differs(probe_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")), before) < 1e-5
    tokenizer = load_tokenizer(source)
    assert tokenizer("!!#", add_special_tokens=False).input_ids == [tiny.VOCABULARY - 1, 5]
    assert "m.content" in tokenizer.chat_template


def test_without_the_gguf_package_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fedalign-moe\[gguf\]'"):
        check_dense(DenseSource.find(str(tmp_path)), EXACT)


def test_a_broken_gguf_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"not one")
    with pytest.raises(UserError, match="cannot be loaded"):
        check_dense(DenseSource.find(str(tmp_path)), EXACT)
