"""What plain libraries load of a run is held against the model that was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.moe import saved
from fedalign.moe.model import MoEModel
from fedalign.moe.saved import check_saved
from tests.moe import tiny

OPTIONS: dict[str, Any] = {"trust_remote_code": False, "revision": None}


def made(folder: Path, kind: str, family: str = "olmoe", dtype: str = "float32") -> MoEModel:
    tiny.build(family).save_pretrained(folder / "base")
    moe = MoEModel.load(folder / "base", dtype=dtype, tuning=TuningConfig(kind=kind, dtype=dtype))  # type: ignore[arg-type] # pytest's words
    generator = torch.Generator().manual_seed(3)
    moe.write({g: v + 0.05 * torch.randn(v.shape, generator=generator) for g, v in moe.read().items()})
    moe.save(folder / "model")
    return moe


def check(moe: MoEModel, folder: Path, dtype: str = "float32", **more: Any) -> str:
    return check_saved(moe, folder / "model", str(folder / "base"), dtype=dtype, **OPTIONS, **more)


def change(folder: Path, act: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    (file,) = (folder / "model").glob("*.safetensors")
    values = {name: value.clone() for name, value in load_file(file).items()}
    save_file(act(values), file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers", "deepseek_v3"])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_what_was_trained(family: str, kind: str, dtype: str, tmp_path: Path) -> None:
    told = check(made(tmp_path, kind, family, dtype), tmp_path, dtype)
    assert told.startswith("names, shapes and values")
    assert "logits to" in told


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_does_not_fit_into_memory_is_held_tensor_by_tensor(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "_fits", lambda moe: False)
    moe = made(tmp_path, kind)
    told = check(moe, tmp_path)
    assert told == ("names, shapes and values" if kind == "full" else "names, shapes and values of the adapter")
    if kind == "full":
        change(tmp_path, lambda values: {name.replace("k_norm", "z_norm"): value for name, value in values.items()})
        with pytest.raises(UserError, match=r"plain libraries load another model.*layers.0.*and \d more"):
            check(moe, tmp_path)


@pytest.mark.parametrize("family", [*tiny.ALL, *tiny.marked(tiny.COMPOSITES_ALONE, ["aria", "qwen3_vl_moe"])])
def test_tensor_by_tensor_is_as_transformers_would_load_them(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "_fits", lambda moe: False)
    build = tiny.composite if family in tiny.COMPOSITES_ALONE else tiny.build
    build(family).save_pretrained(tmp_path / "base")
    moe = MoEModel.load(tmp_path / "base", trust_remote_code=True)
    moe.save(tmp_path / "model")
    options = {"dtype": "float32", "trust_remote_code": True, "revision": None}
    told = check_saved(moe, tmp_path / "model", "", **options)  # type: ignore[arg-type] # values of several types
    assert told.startswith("names, shapes and values")
    for kind in ("shared", "gate", "expert"):
        value = next(slot.parameter for slot in moe.slots if slot.kind == kind).detach().view(-1)[0]
        before = float(value)
        value += 1e-2
        with pytest.raises(UserError, match="has other values"):
            check_saved(moe, tmp_path / "model", "", **options)  # type: ignore[arg-type] # as above
        value.fill_(before)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_other_values_and_names_are_told(kind: str, tmp_path: Path) -> None:
    moe = made(tmp_path, kind)
    change(tmp_path, lambda values: {name: value * 1.01 for name, value in values.items()})
    with pytest.raises(UserError, match="has other values"):
        check(moe, tmp_path)
    change(tmp_path, lambda values: {name.replace("q_proj", "z_proj"): value for name, value in values.items()})
    with pytest.raises(UserError, match="q_proj"):
        check(moe, tmp_path)


def test_an_adapter_on_another_base_computes_something_else(tmp_path: Path) -> None:
    moe = made(tmp_path, "lora")
    tiny.build("olmoe", seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"its logits are .* off, at most 0.001"):
        check(moe, tmp_path)


@pytest.mark.parametrize(("kind", "told"), [("full", ""), ("lora", " of the adapter")])
def test_a_skeleton_that_was_filled_is_held_by_its_values(kind: str, told: str, tmp_path: Path) -> None:
    moe = made(tmp_path, kind)
    skeleton = MoEModel.skeleton(tmp_path / "base", tuning=TuningConfig(kind=kind))  # type: ignore[arg-type] # pytest's words
    filled = skeleton.save_filled(moe.read(), moe.constants(), tmp_path / "model")
    assert check(filled, tmp_path, runs=False) == f"names, shapes and values{told}"
    change(tmp_path, lambda values: {name: value * 1.01 for name, value in values.items()})
    with pytest.raises(UserError, match="has other values"):
        check(filled, tmp_path, runs=False)


def test_an_adapter_that_names_another_base_is_told(tmp_path: Path) -> None:
    moe = made(tmp_path, "lora")
    (tmp_path / "model" / "base.sha256").write_text("0" * 64 + "\n")
    with pytest.raises(UserError, match=r"it names another base \(000000000000\)"):
        check(moe, tmp_path)
