"""Quantised checkpoints, and folders that hold no sound model: each is trained, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.moe.four_bit import _weights
from fedalign.moe.load import pick_device
from fedalign.moe.model import MoEModel
from fedalign.moe.tuning import beside_text
from tests.moe import tiny

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def rewrite(folder: Path, weights: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> Path:
    """The folder with other weights and more in its configuration."""
    file = folder / "model.safetensors"
    values = {name: value.clone() for name, value in load_file(file).items()}
    save_file(weights(values), file, metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def quantised(
    folder: Path, method: str, weights: Callable[[dict[str, Tensor]], dict[str, Tensor]], **more: Any
) -> Path:
    return rewrite(folder, weights, quantization_config={"quant_method": method, **more})


def mxfp4(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tiny gpt-oss as its makers ship it, and what its experts' codes and scales stand for."""
    tiny.build("gpt_oss", intermediate_size=32).save_pretrained(folder)
    generator, meant = torch.Generator().manual_seed(0), {}

    def pack(values: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = {}
        for name, value in values.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                packed[name] = value.bfloat16()
                continue
            experts, inputs, outputs = value.shape
            code = torch.randint(0, 16, (experts, outputs, inputs // 32, 32), generator=generator, dtype=torch.uint8)
            scale = torch.randint(122, 126, code.shape[:3], generator=generator, dtype=torch.uint8)
            packed |= {f"{name}_blocks": code[..., ::2] | (code[..., 1::2] << 4), f"{name}_scales": scale}
            dense = FP4[code.long()] * torch.exp2(scale.float() - 127).unsqueeze(-1)
            meant[name] = dense.reshape(experts, outputs, inputs).transpose(1, 2)
        return packed

    return quantised(folder, "mxfp4", pack), meant


def fp8(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tiny deepseek_v3 as its makers ship it, and what some of its codes and scales stand for."""
    tiny.build("deepseek_v3").save_pretrained(folder)
    meant = {}

    def pack(values: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name, value in values.items() if value.dim() == 2 and "proj" in name]:
            values[name] = (values[name] / 0.01).to(torch.float8_e4m3fn)
            values[name.replace(".weight", ".weight_scale_inv")] = torch.full((1, 1), 0.01)
            meant[name] = values[name].float() * 0.01
        return values

    return quantised(folder, "fp8", pack, weight_block_size=[128, 128], activation_scheme="dynamic"), {
        name: value for name, value in meant.items() if ".experts." not in name
    }


@pytest.mark.filterwarnings("ignore:`torch_dtype`")
@pytest.mark.parametrize("made", [mxfp4, fp8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_checkpoint_is_dequantised_trained_and_saved_dense(made: Any, dtype: str, tmp_path: Path) -> None:
    folder, meant = made(tmp_path / "base")
    moe = MoEModel.load(folder, dtype=dtype)
    values = dict(moe.model.named_parameters())
    assert meant
    for name, value in meant.items():
        torch.testing.assert_close(values[name].float(), value, rtol=1e-2 if dtype == "bfloat16" else 0, atol=1e-6)
    routers = tuple(layer.router for layer in moe.layers)
    other = {p.dtype for n, p in values.items() if not n.startswith(routers)}
    assert other == {getattr(torch, dtype)}
    assert any(f"{made.__name__} checkpoint, dequantised: " in note for note in moe.notes)
    moe.save(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(p, values[name].to(p.dtype)) for name, p in plain.named_parameters())


@pytest.mark.parametrize("made", [mxfp4, fp8])
def test_a_skeleton_of_a_quantised_checkpoint_is_of_the_same_architecture(made: Any, tmp_path: Path) -> None:
    folder, _ = made(tmp_path / "base")
    for tuning in (None, TuningConfig(kind="lora")):
        moe, skeleton = MoEModel.load(folder, tuning=tuning), MoEModel.skeleton(folder, tuning=tuning)
        assert skeleton.fingerprint() == moe.fingerprint()
        assert skeleton.notes == moe.notes


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_what_cannot_be_dequantised_is_refused_in_one_line(method: str, tmp_path: Path) -> None:
    tiny.build("olmoe").save_pretrained(tmp_path)
    quantised(tmp_path, method, lambda values: values, bits=4, group_size=128)
    with pytest.raises(UserError, match=rf"quantised by {method}, and cannot be trained.*mxfp4, fp8, mxfp8\.$"):
        MoEModel.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"hidden_size": 0}, r"hidden_size = 0: must be from 1 to 1,000,000"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers = 1000000: must be from 1 to 10,000"),
        ({"hidden_size": "many"}, r"hidden_size"),
        ({"num_attention_heads": "x"}, r"cannot be loaded: .*num_attention_heads"),
        ({"num_attention_heads": 0}, r"cannot be loaded: "),
    ],
)
def test_a_configuration_of_no_model_is_refused_in_one_line(config: dict[str, Any], told: str, tmp_path: Path) -> None:
    tiny.build("olmoe").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda values: values, **config)
    for load in (MoEModel.load, MoEModel.skeleton):
        with pytest.raises(UserError, match=told) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    tiny.build("olmoe").save_pretrained(tmp_path)

    def spoil(values: dict[str, Tensor]) -> dict[str, Tensor]:
        values["model.layers.1.self_attn.q_proj.weight"][3, 4] = value
        return values

    rewrite(tmp_path, spoil)
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj.weight holds NaN or infinite values"):
        MoEModel.load(tmp_path)


def test_another_shape_than_the_configuration_says_is_one_line(tmp_path: Path) -> None:
    tiny.build("olmoe").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda values: values | {"model.norm.weight": torch.ones(7)})
    with pytest.raises(UserError, match=r"model.norm.weight is \[7\], config.json says \[32\]\.$"):
        MoEModel.load(tmp_path)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path(str(tmp_path / "ran")).touch, ()  # type: ignore[return-value] # what pickle would call

    tiny.build("olmoe").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        MoEModel.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_device_without_values_is_refused() -> None:
    with pytest.raises(UserError, match=r"run.device = 'meta': not on this machine. Choose one of: auto, cpu"):
        pick_device("meta")


def test_what_text_does_not_pass_through_is_neither_trained_nor_adapted_nor_packed(tmp_path: Path) -> None:
    tiny.composite("qwen3_vl_moe").save_pretrained(tmp_path)
    moe = MoEModel.load(tmp_path)
    assert beside_text(moe.model) == ("model.visual",)
    assert {slot.name for slot in moe.slots if not slot.parameter.requires_grad} == {
        slot.name for slot in moe.slots if slot.name.startswith("model.visual.")
    }
    adapted = MoEModel.load(tmp_path, tuning=TuningConfig(kind="lora", targets=("attention", "experts", "dense")))
    assert not any("visual" in slot.name for slot in adapted.slots if ".lora_" in slot.name)
    packed = {path for path, _, _ in _weights(moe.model, moe.layers)}
    assert packed
    assert not any("visual" in path for path in packed)


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
def test_of_a_model_of_text_nothing_is_beside_it(family: str) -> None:
    assert beside_text(tiny.build(family)) == ()


def test_a_multimodal_family_without_a_language_model_of_its_own_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen3_omni_moe").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"multimodal \(qwen3_omni_moe has .*thinker_config.*checkpoint of text alone"):
        MoEModel.load(tmp_path)
