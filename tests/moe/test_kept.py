"""What of a checkpoint takes no part is kept byte by byte, or is named and no longer counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.export.write import _cast
from fedalign.moe import saved
from fedalign.moe.kept import same, save_with_kept
from fedalign.moe.load import load_plain
from fedalign.moe.lora import put_upon
from fedalign.moe.model import MoEModel
from fedalign.moe.saved import check_saved
from fedalign.moe.stored import stored
from tests.moe import tiny

COUNTED = "num_nextn_predict_layers"
QUICK = ("deepseek_v3", "glm4_moe", "olmoe")
FAMILIES = tiny.marked(
    ("deepseek_v3", "glm4_moe", "mimo_v2_flash", "ernie4_5_moe", "qwen3_next", "bailing_hybrid", "mellum", "olmoe"),
    QUICK,
)


def with_more_layers(family: str, folder: Path, shards: int = 1, **config: Any) -> dict[str, Tensor]:
    """A tiny checkpoint with layers that predict several tokens at once, as makers name them; what these hold."""
    model = tiny.build(family)
    model.save_pretrained(folder)
    last = model.config.num_hidden_layers - 1
    values = load_file(folder / "model.safetensors")
    more = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): (value * 3).bfloat16()
        for name, value in values.items()
        if f"layers.{last}." in name and not name.endswith(("gate_up_proj", "down_proj"))
    }
    for expert in range(tiny.EXPERTS):  # one by one, as they are shipped
        more[f"model.layers.{last + 1}.mlp.experts.{expert}.up_proj.weight"] = torch.full((16, 32), expert + 0.5)
    more |= {"mtp.fc.weight": torch.arange(6.0).view(2, 3)}
    if shards == 1:
        save_file(values | more, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        parts = {"model-00001-of-00002.safetensors": values, "model-00002-of-00002.safetensors": more}
        for name, part in parts.items():
            save_file(part, folder / name, metadata={"format": "pt"})
        places = {tensor: name for name, part in parts.items() for tensor in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    told = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(told))
    return more


def tensors(folder: Path) -> dict[str, Tensor]:
    """All that the index, or the one file, of a folder names, in the file where it says."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return dict(load_file(folder / "model.safetensors"))
    found = {}
    for name, place in json.loads(index.read_text())["weight_map"].items():
        with safe_open(folder / place, framework="pt") as file:
            found[name] = file.get_tensor(name)
    return found


def holds(folder: Path, more: dict[str, Tensor]) -> bool:
    found = tensors(folder)
    return all(name in found and same(found[name], value) for name, value in more.items())


def checked(moe: MoEModel, folder: Path, base: Path) -> str:
    return check_saved(moe, folder, str(base), dtype="float32", trust_remote_code=False, revision=None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 2])
def test_layers_without_a_place_in_the_model_are_kept_byte_by_byte(family: str, shards: int, tmp_path: Path) -> None:
    more = with_more_layers(family, tmp_path / "base", shards)
    moe = MoEModel.load(tmp_path / "base")
    assert any(note.startswith("kept as in the checkpoint, and not tuned: ") for note in moe.notes)
    for group, values in moe.read().items():
        moe.write({group: values + 0.01})
    moe.save(tmp_path / "model")
    assert holds(tmp_path / "model", more)
    assert checked(moe, tmp_path / "model", tmp_path / "base").startswith("names, shapes and values, logits to")
    assert counts(tmp_path / "model") == counts(tmp_path / "base")
    again = MoEModel.load(tmp_path / "model")  # what is saved is a source as good as the first
    again.save(tmp_path / "again")
    assert holds(tmp_path / "again", more)


def counts(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get(COUNTED)


@pytest.mark.parametrize("family", tiny.marked(sorted(tiny.CONFIGS), QUICK))
def test_layers_that_are_not_there_are_named_and_no_longer_counted(family: str, tmp_path: Path) -> None:
    tiny.build(family).save_pretrained(tmp_path / "base")
    counted = any(v for n, v in json.loads((tmp_path / "base" / "config.json").read_text()).items() if n == COUNTED)
    moe = MoEModel.load(tmp_path / "base", trust_remote_code=True)
    assert any(f"{COUNTED} = 1" in note for note in moe.notes) == bool(counted)
    moe.save(tmp_path / "model")
    assert not counts(tmp_path / "model")
    plain = tiny.plain(tmp_path / "model").eval()
    inputs = tiny.batch(family)
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, moe.model.eval()(**inputs).logits)
    assert (counts(tmp_path / "base") or 0) == int(counted)


def test_a_damaged_copy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_more_layers("deepseek_v3", tmp_path / "base")
    moe = MoEModel.load(tmp_path / "base")
    moe.save(tmp_path / "model")
    file = tmp_path / "model" / "model-kept.safetensors"
    values = {name: value.clone() for name, value in load_file(file).items()}
    values["mtp.fc.weight"][0, 0] = 7
    save_file(values, file, metadata={"format": "pt"})
    for fits in (True, False):
        monkeypatch.setattr(saved, "_fits", lambda moe, fits=fits: fits)
        with pytest.raises(
            UserError, match=r"mtp.fc.weight, which is kept from the checkpoint, is not there as it was"
        ):
            checked(moe, tmp_path / "model", tmp_path / "base")


def test_a_checkpoint_that_went_meanwhile_is_one_line(tmp_path: Path) -> None:
    with_more_layers("deepseek_v3", tmp_path / "base")
    moe = MoEModel.load(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"base/model.safetensors': cannot be read: .* Put it back as it was\.$"):
        moe.save(tmp_path / "model")


def test_an_index_that_points_elsewhere_is_not_followed(tmp_path: Path) -> None:
    with_more_layers("deepseek_v3", tmp_path / "base", shards=2)
    save_file({"mtp.secret": torch.ones(2)}, tmp_path / "elsewhere.safetensors")
    index = tmp_path / "base" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["mtp.secret"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(places))
    found = stored(str(tmp_path / "base"))
    assert "mtp.fc.weight" in found
    assert "mtp.secret" not in found


def test_without_weights_at_hand_a_skeleton_is_saved_without(tmp_path: Path) -> None:
    more = with_more_layers("deepseek_v3", tmp_path / "base")
    moe = MoEModel.load(tmp_path / "base")
    skeleton = MoEModel.skeleton(tmp_path / "base")
    skeleton.save_filled(moe.read(), moe.constants(), tmp_path / "kept")
    assert holds(tmp_path / "kept", more)
    (tmp_path / "base" / "model.safetensors").unlink()
    bare = MoEModel.skeleton(tmp_path / "base")
    assert bare.fingerprint() == moe.fingerprint()
    assert any(COUNTED in note for note in bare.notes)
    bare.save_filled(moe.read(), moe.constants(), tmp_path / "without")
    assert counts(tmp_path / "without") == 0
    assert not tensors(tmp_path / "without").keys() & more.keys()


def test_a_merged_adapter_and_a_rounded_model_keep_them_too(tmp_path: Path) -> None:
    more = with_more_layers("deepseek_v3", tmp_path / "base")
    moe = MoEModel.load(tmp_path / "base", tuning=TuningConfig(kind="lora"))
    assert not any("kept as in the checkpoint" in note for note in moe.notes)  # of an adapter its base keeps them
    moe.save(tmp_path / "adapter")
    save_with_kept(
        put_upon(load_plain(tmp_path / "base"), tmp_path / "adapter").merge_and_unload(), tmp_path / "merged"
    )
    assert holds(tmp_path / "merged", more)
    _cast(tmp_path / "merged", "bfloat16", trust_remote_code=False)
    assert holds(tmp_path / "merged", more)
    assert tensors(tmp_path / "merged")["model.norm.weight"].dtype == torch.bfloat16


def test_a_large_skeleton_is_saved_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_more_layers("deepseek_v3", tmp_path / "base")
    moe, skeleton = MoEModel.load(tmp_path / "base"), MoEModel.skeleton(tmp_path / "base")
    monkeypatch.setattr("fedalign.moe.kept.LARGEST", "40KB")
    skeleton.save_filled(moe.read(), moe.constants(), tmp_path / "filled")
    moe.save(tmp_path / "saved")
    files = list((tmp_path / "filled").glob("model-*-of-*.safetensors"))
    assert len(files) > 1
    assert all(path.stat().st_size < 50_000 for path in files)
    places = stored(str(tmp_path / "filled"))
    assert {path.name for path in places.values()} == {
        path.name for path in (tmp_path / "filled").glob("*.safetensors")
    }
    one, several = tensors(tmp_path / "saved"), tensors(tmp_path / "filled")
    assert one.keys() == several.keys()
    assert all(same(one[name], several[name]) for name in one)
