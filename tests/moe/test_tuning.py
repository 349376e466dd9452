"""What is trained of a model: by kind and pattern, and adapters beside it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.moe.lora import put_upon
from fedalign.moe.model import BASE_DIGEST, MoEModel
from fedalign.protocol import SHARED, ParameterGroup
from tests.moe import tiny


def tuned(kind: str, family: str = "olmoe", seed: int = 0, **options: Any) -> MoEModel:
    return MoEModel.wrap(tiny.build(family), TuningConfig(kind=kind, **options), seed)  # type: ignore[arg-type] # pytest's parameters are words of that kind


def trained(moe: MoEModel) -> set[str]:
    return {name for name, parameter in moe.model.named_parameters() if parameter.requires_grad}


def moved(moe: MoEModel, scale: float = 0.1) -> None:
    """Every trained value anew, at random."""
    generator = torch.Generator().manual_seed(7)
    moe.write({group: scale * torch.randn(value.shape, generator=generator) for group, value in moe.read().items()})


def plain(base: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        ("full", {"shared", "embeddings", "head", "gate", "expert"}),
        ("moe", {"gate", "expert"}),
        ("experts", {"expert"}),
        ("router", {"gate"}),
    ],
)
def test_a_kind_trains_its_groups_alone(kind: str, kinds: set[str]) -> None:
    moe, whole = tuned(kind), tuned("full")
    for group, size in whole.layout.sizes.items():
        assert moe.layout.sizes[group] == (size if group.kind in kinds else 0)
    assert sum(moe.layout.sizes.values()) == sum(p.numel() for p in moe.model.parameters() if p.requires_grad)
    assert not moe.layout.factors


def test_patterns_choose_among_what_the_kind_trains() -> None:
    moe = tuned("moe", include=("*.layers.1.*",), exclude=("*.down_proj",))
    assert trained(moe) == {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts.gate_up_proj"}
    adapted = tuned("lora", include=("*.layers.1.*",), exclude=("*.mlp.*", "*.k_proj"))
    assert {name.split(".lora_")[0] for name in trained(adapted)} == {
        f"model.layers.1.self_attn.{which}_proj" for which in "qvo"
    }


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("moe", {"include": ("*.nowhere",)}, r"tuning.include = '\*.nowhere': matches nothing.*mlp.gate.weight"),
        ("moe", {"exclude": ("*.q_proj.*",)}, r"tuning.exclude = .*matches nothing"),
        ("moe", {"exclude": ("*",)}, r"leaves nothing to train: everything is frozen"),
        ("lora", {"exclude": ("*",)}, r"leaves nothing to train: everything is frozen"),
        ("lora", {"include": ("lm_head*",)}, r"tuning.include = 'lm_head\*': matches nothing"),
        (
            "lora",
            {"targets": ("shared_experts",), "router": "frozen"},
            r"no linear layer of olmoe is one of these. Choose among",
        ),
    ],
)
def test_what_leaves_nothing_to_train_is_refused(kind: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tuned(kind, **options)


def test_rank_zero_and_no_targets_are_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        TuningConfig(kind="lora", rank=0)
    with pytest.raises(UserError, match=r"tuning.targets = \[\].*nothing is trained"):
        TuningConfig(kind="lora", targets=(), router="frozen")
    with pytest.raises(UserError, match=r'tuning.router = "lora".*Choose one of: full, frozen'):
        TuningConfig(kind="lora", router="lora", average="exact")


def wrappers(moe: MoEModel, layer: int) -> dict[str, ParamWrapper]:
    """Peft's adapters around the fused experts of a layer, by the tensor they adapt."""
    module, found = moe.model.get_submodule(moe.layers[layer].experts), {}
    while isinstance(module, ParamWrapper):
        found[module.parameter_name] = module
        module = module.base_layer
    return found


def deltas(moe: MoEModel, layer: int) -> dict[str, Tensor]:
    """What peft adds to each fused tensor."""
    return {name: w.get_delta_weight("default") for name, w in wrappers(moe, layer).items()}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_an_experts_group_is_its_slice_of_both_factors(family: str) -> None:
    """peft keeps A expert after expert, but B with the experts alternating: B_e = B[:, e::E]."""
    moe = tuned("lora", family, rank=3)
    moved(moe)
    before = deltas(moe, 1)
    assert before.keys() == {"gate_up_proj", "down_proj"}
    group = ParameterGroup("expert", 1, 2)
    moe.write({group: torch.zeros(moe.layout.sizes[group])})
    after_all = deltas(moe, 1)
    for name, wrapper in wrappers(moe, 1).items():
        after = after_all[name]
        assert not after[2].any()
        others = [0, 1, 3]
        assert torch.equal(after[others], before[name][others])
        b: Tensor = wrapper.lora_B["default"].weight  # type: ignore[assignment] # torch says that it may be a module
        assert not b[:, 2::4].any()
        assert b[:, 1::4].all()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_the_layout_finds_the_factors_in_a_groups_vector(family: str) -> None:
    moe = tuned("lora", family, rank=3, alpha=6.0)
    moved(moe)
    group = ParameterGroup("expert", 0, 3)
    flat = moe.read([group])[group]
    products: list[Tensor] = []
    for place in moe.layout.factors[group]:
        a = flat[place.start_A :][: place.rank * place.inputs].view(place.rank, place.inputs)
        b = flat[place.start_B :][: place.outputs * place.rank].view(place.outputs, place.rank)
        products.append(2.0 * b @ a)  # alpha / rank
    transposed = family == "gpt_oss"
    for delta_E in deltas(moe, 0).values():
        wanted = delta_E[3].T if transposed else delta_E[3]
        assert any(p.shape == wanted.shape and torch.allclose(p, wanted, atol=1e-6) for p in products)
    assert len(moe.layout.factors[SHARED]) == 2 * 4  # q, k, v, o of two layers


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_shared_experts_are_not_taken_for_routed_ones(family: str, tmp_path: Path) -> None:
    """Their layers are called as those of the experts once were, and peft would adapt the fused experts instead."""
    tiny.build(family).save_pretrained(tmp_path / "base")
    tuning = TuningConfig(kind="lora", rank=3, targets=("shared_experts", "experts"))
    moe = MoEModel.load(tmp_path / "base", tuning=tuning)
    assert {place.rank for places in moe.layout.factors.values() for place in places} == {3}
    assert len(moe.layout.factors[SHARED]) == 2 * 3  # gate, up and down of two layers
    moved(moe)
    moe.save(tmp_path / "adapter")
    inputs = tiny.batch(family)
    with torch.no_grad():
        ours = moe.model.eval()(**inputs).logits
        assert torch.equal(plain(tmp_path / "base", tmp_path / "adapter")(**inputs).logits, ours)


def adapted(moe: MoEModel) -> set[str]:
    """The names, within their layers, of all that adapters are put upon."""
    assert moe.adapter
    return {name.partition(".lora_")[0].split(".", 3)[3] for name in moe.adapter.names}


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("nemotron_h", ("attention",), {f"mixer.{which}_proj" for which in "qkvo"}),
        ("nemotron_h", ("dense",), {"mixer.in_proj"}),
        ("jamba", ("dense",), {"mamba.in_proj", "mamba.x_proj"}),
        (
            "qwen4_exp_text",
            ("attention",),
            {f"self_attn.{which}_proj" for which in "qkvo"}
            | {f"linear_attn.{which}" for which in ("in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj")},
        ),
        (
            "deepseek_v4",
            ("attention",),
            {f"self_attn.{which}_proj" for which in ("q_a", "q_b", "kv", "o_b")}
            | {f"self_attn.compressor.{which}_proj" for which in ("gate", "kv")},
        ),
    ],
)
def test_targets_are_found_by_what_a_module_holds(family: str, targets: tuple[str, ...], expected: set[str]) -> None:
    assert adapted(tuned("lora", family, targets=targets)) == expected


@pytest.mark.parametrize(
    ("family", "target", "name", "reason"),
    [
        ("deepseek_v4", "attention", "self_attn.o_a_proj", "peft would compute DeepseekV4GroupedLinear as an ordinary"),
        ("deepseek_v32", "attention", "self_attn.indexer.wk", "no gradient reaches it: it only chooses"),
        ("nemotron_h", "dense", "mixer.out_proj", "the scan reads its weight past what peft puts around it"),
    ],
)
def test_what_would_not_train_is_left_out_and_said(family: str, target: str, name: str, reason: str) -> None:
    moe = tuned("lora", family, targets=(target,))
    assert moe.adapter
    (said,) = {why for path, why in moe.adapter.left_out.items() if path.endswith(name)}
    assert said.startswith(reason)
    assert any(f"layers.*.{name}" in note and reason in note for note in moe.notes)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("laguna", ("attention", "experts", "shared_experts")),  # its checkpoints spell shared_expert otherwise
        ("beam", ("attention", "dense")),  # its attention has a gate_proj
        ("glm4_moe", ("shared_experts", "dense")),
        ("deepseek_v4", ("attention", "experts", "shared_experts", "dense")),
    ],
)
def test_every_adapter_is_found_again_by_plain_peft(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    tiny.build(family).save_pretrained(tmp_path / "base")
    moe = MoEModel.load(tmp_path / "base", tuning=TuningConfig(kind="lora", rank=3, targets=targets))  # type: ignore[arg-type] # pytest's words
    assert not any(".experts." in name for name in adapted(moe)) or "experts" in targets
    moved(moe)
    moe.save(tmp_path / "adapter")
    moe.read_adapter(tmp_path / "adapter")
    inputs = tiny.batch(family)
    with torch.no_grad():
        ours = moe.model.eval()(**inputs).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        whole = put_upon(base, tmp_path / "adapter").merge_and_unload().eval()
        torch.testing.assert_close(whole(**inputs).logits, ours, rtol=1e-5, atol=1e-5)
        assert torch.equal(plain(tmp_path / "base", tmp_path / "adapter")(**inputs).logits, ours)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda name: name.replace("q_proj", "z_proj"), "plain peft loses a part of it: Found missing adapter keys"),
        (lambda name: [name, name.replace("q_proj", "z_proj")], "plain peft takes [0-9]+ of its [0-9]+ factors"),
    ],
)
def test_a_merge_that_would_lose_keys_is_refused(change: Any, told: str, tmp_path: Path) -> None:
    tiny.build("olmoe").save_pretrained(tmp_path / "base")
    MoEModel.load(tmp_path / "base", tuning=TuningConfig(kind="lora")).save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    values = load_file(file)
    renamed = {new: value.clone() for old, value in values.items() for new in {*np.atleast_1d(change(old)).tolist()}}
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=told):
        put_upon(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_every_trained_value_belongs_to_one_group() -> None:
    moe = tuned("lora", rank=3)
    for number, (group, value) in enumerate(moe.read().items(), start=1):
        moe.write({group: torch.full_like(value, float(number))})
    for number, (group, value) in enumerate(moe.read().items(), start=1):
        assert bool((value == number).all()), group
    assert sum(moe.layout.sizes.values()) == sum(p.numel() for p in moe.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("router", ["full", "lora", "frozen"])
def test_plain_peft_loads_what_is_saved(router: str, tmp_path: Path) -> None:
    tiny.build("olmoe").save_pretrained(tmp_path / "base")
    moe = MoEModel.load(tmp_path / "base", tuning=TuningConfig(kind="lora", rank=3, router=router))  # type: ignore[arg-type] # pytest's parameters are words of that kind
    assert any("gate" in name for name in trained(moe)) == (router != "frozen")
    moved(moe)
    moe.save(tmp_path / "adapter")
    inputs = tiny.batch("olmoe")
    with torch.no_grad():
        ours = moe.model.eval()(**inputs).logits
        theirs = plain(tmp_path / "base", tmp_path / "adapter")(**inputs).logits
        untuned = tiny.build("olmoe")(**inputs).logits
    assert torch.equal(ours, theirs)
    assert float((ours - untuned).abs().max()) > 0.01


def test_an_adapter_is_small_and_has_no_dead_router(tmp_path: Path) -> None:
    moe = tuned("lora")
    moe.save(tmp_path)
    assert not any("original_module" in slot.name for slot in moe.slots)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_adapter_is_read_back(tmp_path: Path) -> None:
    moe = tuned("lora")
    moved(moe)
    moe.save(tmp_path)
    again = tuned("lora", seed=5)
    again.read_adapter(tmp_path)
    assert all(torch.equal(value, again.read([group])[group]) for group, value in moe.read().items())
    assert again.weights_hash() == moe.weights_hash()


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"rank": 2}, r"lora_A.weight: it has \[\d+, \d+\], the model \[\d+, \d+\].*another base or tuned otherwise"),
        ({"family": "mixtral", "targets": ("experts",)}, r"the model none"),
    ],
)
def test_an_adapter_for_another_base_or_tuning_is_refused(other: dict[str, Any], told: str, tmp_path: Path) -> None:
    tuned("lora").save(tmp_path)
    with pytest.raises(UserError, match=told):
        tuned("lora", **other).read_adapter(tmp_path)


def test_a_damaged_or_missing_adapter_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter .*cannot be read"):
        tuned("lora").read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"adapter .*cannot be read"):
        tuned("lora").read_adapter(tmp_path)


def test_a_frozen_a_is_saved_but_neither_trained_nor_sent(tmp_path: Path) -> None:
    moe, whole = tuned("lora", average="freeze_a"), tuned("lora")
    assert all("lora_A" not in name for name in trained(moe))
    assert not moe.layout.factors
    group = ParameterGroup("expert", 0, 1)
    assert 0 < moe.layout.sizes[group] < whole.layout.sizes[group]
    moe.save(tmp_path)
    again = tuned("lora", average="freeze_a", seed=3)
    assert again.weights_hash() != moe.weights_hash()
    again.read_adapter(tmp_path)
    assert again.weights_hash() == moe.weights_hash()


def test_first_values_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = tuned("lora", seed=4)
    torch.manual_seed(2)
    assert tuned("lora", seed=4).weights_hash() == first.weights_hash()
    assert tuned("lora", seed=5).weights_hash() != first.weights_hash()
    inputs = tiny.batch("olmoe")
    assert torch.equal(first.model(**inputs).logits, tiny.build("olmoe")(**inputs).logits)  # every B is zero


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize("average", ["factors", "freeze_a"])
def test_a_skeleton_saves_the_same_adapter_without_the_base(family: str, average: str, tmp_path: Path) -> None:
    tiny.build(family).save_pretrained(tmp_path / "base")
    tuning = TuningConfig(kind="lora", average=average)  # type: ignore[arg-type] # pytest's parameters are words of that kind
    moe = MoEModel.load(tmp_path / "base", tuning=tuning, seed=1)
    skeleton = MoEModel.skeleton(tmp_path / "base", tuning=tuning)
    assert skeleton.fingerprint() == moe.fingerprint()
    constants = moe.constants()
    assert sum(value.nbytes for value in constants.values()) < 30_000
    assert skeleton.weights_hash_of(moe.read(), constants) == moe.weights_hash()
    moe.save(tmp_path / "one")
    skeleton.save_filled(moe.read(), constants, tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_another_base_has_another_hash() -> None:
    tuning = TuningConfig(kind="lora")
    one, two = (MoEModel.wrap(tiny.build("olmoe", seed=seed), tuning) for seed in (0, 1))
    assert not torch.equal(one.constants()[BASE_DIGEST], two.constants()[BASE_DIGEST])
    assert one.weights_hash() != two.weights_hash()


def test_fewer_experts_a_token_for_a_while() -> None:
    moe = tuned("full")
    before = moe.layers
    with moe.sending_to(1):
        assert moe.top_k == 1
        assert moe.model.get_submodule(moe.layers[0].router).top_k == 1
    assert moe.layers == before
    assert moe.model.get_submodule(moe.layers[0].router).top_k == 2
    with pytest.raises(UserError, match="top_k = 9: the model has 4 experts"), moe.sending_to(9):
        pass
    with (
        pytest.raises(UserError, match="switch_transformers fixes it at 1"),
        tuned("full", "switch_transformers").sending_to(2),
    ):
        pass
