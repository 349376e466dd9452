"""A checkpoint without some experts: what stays is as it was, and computes as if the others could not be chosen."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedalign.errors import UserError
from fedalign.moe import part
from fedalign.moe.load import load_plain
from fedalign.moe.model import MoEModel
from fedalign.moe.subset import Cut, check_subset, experts_in, without, write_subset
from tests.moe import tiny

ONE_GROUP = {"n_group": 1, "topk_group": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {},
    "qwen3_moe": {},
    "mixtral": {},
    "flex_olmo": {},
    "gpt_oss": {},  # routers have biases
    "deepseek_v3": ONE_GROUP,  # selection has biases
    "dbrx": {},  # experts are blocks of rows
    "granitemoe": {},  # head and embeddings are one
}
STAY = (0, 1, 3)


def saved(family: str, folder: Path, *, original: bool = True, **changes: Any) -> PreTrainedModel:
    """A tiny model whose routers and their biases are no zeros, on disk in one of two layouts."""
    model = tiny.build(family, **FAMILIES.get(family, {}) | changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("bias", "gate.weight", "router.weight")):
                value.copy_(torch.randn(value.shape, generator=generator) / 4)
    model.save_pretrained(folder, save_original_format=original)
    return model


def cut(whole: Path, folder: Path, stay: tuple[int, ...] = STAY) -> Cut:
    config = json.loads((whole / "config.json").read_text())
    made = Cut(experts_in(config, "--without b"), stay)
    check_subset(config, made, "--without b")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(without(config, made)))
    write_subset(whole, folder, made)
    return made


@pytest.mark.parametrize("original", [True, False], ids=["an_expert_each", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_whole_does_where_the_others_cannot_be_chosen(
    family: str, original: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = saved(family, tmp_path / "whole", original=original).eval()
    cut(tmp_path / "whole", tmp_path / "less")
    less, report = AutoModelForCausalLM.from_pretrained(tmp_path / "less", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(40).view(2, 20) % tiny.VOCABULARY
    with torch.no_grad():
        with_it = whole(input_ids=ids, use_cache=False).logits
        expected = _with_logit_at_minus_infinity(whole, ids, 2, monkeypatch)
        torch.testing.assert_close(less.eval()(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(with_it, expected, atol=1e-4)  # it had a say
    answer = less.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > ids.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_in_memory_computes_what_the_cut_checkpoint_does(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "whole", site_experts={"a": [0], "b": [2]})
    cut(tmp_path / "whole", tmp_path / "less")
    whole, less = (MoEModel.wrap(load_plain(tmp_path / name)) for name in ("whole", "less"))
    ids = torch.arange(40).view(2, 20) % tiny.VOCABULARY
    found, expected = (
        one.model.eval()(input_ids=ids, use_cache=False).logits.detach() for one in (part.without(whole, "b"), less)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_what_cannot_be_cut_cannot_be_had_without_an_owner_in_memory() -> None:
    grouped = MoEModel.wrap(tiny.build("deepseek_v3", n_group=2, topk_group=1, site_experts={"b": [2]}))
    with pytest.raises(UserError, match=r"^without b: its experts form 2 groups \(n_group\)"):
        part.without(grouped, "b")
    few = MoEModel.wrap(tiny.build("olmoe", num_experts_per_tok=3, site_experts={"b": [2, 3]}))
    with pytest.raises(UserError, match=r"^without b: 2 experts of 4 would stay, and a token is sent to 3"):
        part.without(few, "b")


def _with_logit_at_minus_infinity(model: Any, ids: Tensor, expert: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    linear = torch.nn.functional.linear

    def quiet(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = linear(hidden, weight, bias)
        if weight.shape == (tiny.EXPERTS, tiny.HIDDEN):
            found[..., expert] = -torch.inf
        return found

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "linear", quiet)
        for name, value in model.state_dict().items():
            if name.endswith("e_score_correction_bias"):
                value[expert] = -torch.inf
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("original", [True, False], ids=["an_expert_each", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_that_stays_is_as_it_was(family: str, original: bool, tmp_path: Path) -> None:
    saved(family, tmp_path / "whole", original=original, dtype=torch.bfloat16)
    cut(tmp_path / "whole", tmp_path / "less")
    whole, less = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "less"))
    seen = 0
    for name, value in less.items():
        head, word, rest = name.partition(".experts.")
        number = rest.partition(".")[0]
        before = f"{head}{word}{STAY[int(number)]}.{rest.partition('.')[2]}" if number.isdecimal() else name
        was = whole[before]
        if was.shape != value.shape:
            axis = next(i for i, n in enumerate(was.shape) if n != value.shape[i])
            was = torch.cat([was.chunk(tiny.EXPERTS, axis)[expert] for expert in STAY], axis)
        assert was.dtype == value.dtype
        assert torch.equal(was.view(torch.uint8), value.view(torch.uint8)), name
        seen += before != name or was is not whole[before]
    assert seen >= 2


def test_a_model_in_several_files_stays_in_these(tmp_path: Path) -> None:
    model = saved("olmoe", tmp_path / "whole")
    model.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    (tmp_path / "whole" / "model.safetensors").unlink()
    cut(tmp_path / "whole", tmp_path / "less")
    names = {file.name for file in (tmp_path / "less").glob("*.safetensors")}
    assert len(names) > 3
    assert names <= {file.name for file in (tmp_path / "whole").iterdir()}
    places = json.loads((tmp_path / "less" / "model.safetensors.index.json").read_text())["weight_map"]
    for name in names:
        with safe_open(tmp_path / "less" / name, framework="pt") as file:
            assert {places[tensor] for tensor in file.keys()} == {name}  # noqa: SIM118 # it is no dict
    less = AutoModelForCausalLM.from_pretrained(tmp_path / "less")
    assert torch.equal(less.model.layers[1].mlp.gate.weight, model.model.layers[1].mlp.gate.weight[list(STAY)])


def test_no_more_than_one_tensor_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("mixtral", tmp_path / "whole", original=False)
    held: list[int] = []
    of = Cut.of

    def counted(self: Cut, value: Tensor, axis: int) -> Tensor:
        held.append(value.nbytes)
        return of(self, value, axis)

    monkeypatch.setattr(Cut, "of", counted)
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("reads a file whole"))
    cut(tmp_path / "whole", tmp_path / "less")
    assert len(held) == 6  # of two layers: router, and two stacks


def test_fewer_experts_than_a_token_is_sent_to_are_refused(tmp_path: Path) -> None:
    saved("olmoe", tmp_path / "whole")
    with pytest.raises(UserError, match=r"--without b: 1 experts of 4 would stay, and a token is sent to 2"):
        cut(tmp_path / "whole", tmp_path / "less", (0,))


def test_groups_of_experts_are_refused(tmp_path: Path) -> None:
    saved("deepseek_v3", tmp_path / "whole", n_group=2)
    with pytest.raises(UserError, match=r"its experts form 2 groups \(n_group\)"):
        cut(tmp_path / "whole", tmp_path / "less")


@pytest.mark.parametrize(
    ("config", "told"),
    [({}, "none"), ({"num_experts": 4, "num_local_experts": 8}, "4, 8"), ({"num_experts": "4"}, "4")],
)
def test_a_configuration_that_does_not_count_experts_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"--only a: config.json must give one number .* gives {told}"):
        experts_in(config, "--only a")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model.layers.0.mlp.experts.4.up_proj.weight", torch.zeros(16, 32), "is of expert 4, config.json counts 4"),
        ("model.layers.7.mlp.experts.0.up_proj.weight", torch.zeros(16, 32), "nothing says whose it is"),
        ("model.layers.0.mlp.gate.weight", torch.zeros(32, 4), "does not show which part is of which expert"),
    ],
)
def test_weights_that_do_not_say_whose_they_are_are_refused(
    name: str, value: Tensor, said: str, tmp_path: Path
) -> None:
    saved("olmoe", tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    save_file(load_file(file) | {name: value}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=said):
        cut(tmp_path / "whole", tmp_path / "less")


def test_lacking_weights_of_an_expert_are_told(tmp_path: Path) -> None:
    saved("olmoe", tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights in safetensors"):
        cut(tmp_path / "whole", tmp_path / "less")
