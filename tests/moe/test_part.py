"""Models of some of another's experts, and those in which sites have one of their own."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedalign.config.run import TuningConfig
from fedalign.errors import UserError
from fedalign.moe.model import MoEModel
from fedalign.moe.part import grown, part_of, picked
from fedalign.moe.rows import Seen, fitted_row, look, public_text, quiet_row
from fedalign.moe.site_experts import owners
from fedalign.protocol import CELLS, ParameterGroup
from tests.moe import tiny

FAMILIES = ("olmoe", "flex_olmo", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "granitemoe", "phimoe")
NEW = tiny.EXPERTS  # the first expert that is added
LEAST = 0.15  # share of public tokens that a new expert of a random model of four experts may be sent to


def model(family: str, **changes: Any) -> MoEModel:
    return MoEModel.wrap(tiny.build(family, **{"initializer_range": 0.2} | changes))


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**tiny.batch(family)).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_loads_what_has_grown_and_the_old_is_as_it_was(family: str, tmp_path: Path) -> None:
    base = model(family)
    before = {group: value.clone() for group, value in base.read().items()}
    more = grown(base, ["a", "ward b"])
    more.model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert owners(loaded.config) == {"a": (NEW,), "ward b": (NEW + 1,)}
    text = loaded.generate(torch.tensor([[5, 9, 40, 7]]), min_new_tokens=6, max_new_tokens=6, do_sample=False)
    assert text.shape == (1, 10)
    now = MoEModel.wrap(loaded)
    assert now.layout.owners == {"a": (NEW,), "ward b": (NEW + 1,)}
    after = now.read()
    assert all(torch.equal(after[group], value) for group, value in before.items())
    for layer, copied in enumerate(more.copied_L):
        for expert in (NEW, NEW + 1):
            group = ParameterGroup("expert", layer, expert)
            assert torch.equal(after[group], before[ParameterGroup("expert", layer, copied)])


@pytest.mark.parametrize("family", FAMILIES)
def test_new_experts_are_as_quiet_as_is_said(family: str) -> None:
    more = grown(model(family), ["a", "b"], seed=3)
    bigger = MoEModel.wrap(more.model)
    old = part_of(bigger, range(NEW))
    seen_L = look(bigger, public_text(old, seed=3), range(NEW + 2))
    for said, seen in zip(more.reached_L, seen_L, strict=True):
        measured = float(seen.load_E[NEW]) / len(seen.last_T)  # in later layers a little, since earlier ones differ
        assert measured <= said + 0.05
        assert said <= LEAST


@pytest.mark.parametrize("family", ["gpt_oss", "phimoe"])
def test_with_a_bias_or_a_mean_nothing_is_said_otherwise(family: str) -> None:
    base = model(family, **({} if family == "gpt_oss" else {"initializer_range": 0.02}))
    before = logits(base.model, family)
    more = grown(base, ["a", "b"])
    if family == "gpt_oss":
        assert max(more.reached_L) == 0
        assert torch.equal(logits(more.model, family), before)
    else:
        assert float((logits(more.model, family) - before).abs().max()) < 0.1 * float(before.std())


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_part_computes_what_the_whole_does_without_the_others(family: str) -> None:
    whole = model(family)
    part = part_of(whole, (0, 1, 3))
    expected = picked(whole, (0, 1, 3))
    assert torch.equal(logits(part.model, family), logits(expected, family))
    assert [layer.named for layer in part.layers] == [(0, 1, 3)] * 2
    sizes = part.layout.sizes
    assert part.layout.groups == whole.layout.groups
    for group, size in whole.layout.sizes.items():
        assert sizes[group] == (0 if group.expert == 2 and group.kind in ("gate", "expert") else size)
    here = [group for group in whole.layout.groups if sizes[group]]
    old, new = whole.read(here), part.read(here)
    assert all(torch.equal(old[group], new[group]) for group in here)
    one = ParameterGroup("expert", 1, 3)
    part.write({one: torch.ones(sizes[one])})
    assert bool((part.model.get_submodule(part.layers[1].experts).down_proj[2] == 1).all())
    assert torch.equal(whole.read([one])[one], old[one])


def adapted(family: str, *sites: str) -> MoEModel:
    """A model in which sites have low-rank experts of their own, as if these and the public ones had been trained."""
    tuning = TuningConfig(kind="lora", targets=("experts",), rank=3)
    moe = MoEModel.wrap(grown(model(family), sites).model, tuning)
    torch.manual_seed(1)
    for slot in moe.slots:
        if ".lora_B." in slot.name:
            slot.parameter.data.normal_(0, 0.3)
    return moe


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_with_adapters_computes_what_it_does_when_they_are_merged(family: str) -> None:
    whole, here = adapted(family, "a", "b"), (0, 1, 2, NEW + 1)
    part = part_of(whole, here)
    assert {group.expert for group, size in part.layout.sizes.items() if size and group.kind == "expert"} == {*here}
    found = logits(part.model, family)
    for module in whole.model.modules():
        if isinstance(module, ParamWrapper):
            module.merge()
    expected = logits(picked(whole, here), family)
    assert torch.allclose(found, expected, atol=1e-4)
    one = ParameterGroup("expert", 1, NEW + 1)
    part.write({one: torch.ones(part.layout.sizes[one])})
    views = part.views[one]
    assert all(bool((view == 1).all()) for view in views)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "granitemoe"])
def test_a_low_rank_expert_starts_alike_whoever_else_has_one(family: str) -> None:
    tuning = TuningConfig(kind="lora", targets=("experts",), rank=3)
    three, one = (
        MoEModel.wrap(grown(model(family), sites).model, tuning, seed=5).read() for sites in (["a", "b"], ["b"])
    )
    for kind, layer in itertools.product(CELLS, range(2)):
        b = three[ParameterGroup(kind, layer, NEW + 1)]
        assert torch.equal(b, one[ParameterGroup(kind, layer, NEW)])
    a, b = (three[ParameterGroup("expert", 0, NEW + number)] for number in range(2))
    assert not torch.equal(a, b)


def test_who_has_an_expert_keeps_it_when_others_come() -> None:
    first = MoEModel.wrap(grown(model("olmoe"), ["a"]).model)
    expert = first.read()
    second = grown(first, ["b"])
    assert owners(second.model.config) == {"a": (NEW,), "b": (NEW + 1,)}
    assert all(copied < NEW for copied in second.copied_L)
    now = MoEModel.wrap(second.model).read()
    assert all(torch.equal(now[group], value) for group, value in expert.items())
    with pytest.raises(UserError, match="'a' has an expert already"):
        grown(MoEModel.wrap(second.model), ["a"])


@pytest.mark.parametrize("family", ["deepseek_v3", "switch_transformers", "llama4"])
def test_routers_that_do_more_than_send_to_the_highest_are_refused(family: str) -> None:
    with pytest.raises(UserError, match="Sites can have experts of their own where") as error:
        grown(MoEModel.wrap(tiny.build(family)), ["a"])
    assert "\n" not in str(error.value)


def seen(inputs: list[list[float]], last: list[float]) -> Seen:
    table = torch.tensor(inputs, dtype=torch.float64)
    return Seen(table, torch.tensor(last, dtype=torch.float64), 1.0, torch.zeros(1))


def test_a_quiet_row_goes_against_what_all_tokens_have_in_common() -> None:
    row, share = quiet_row(seen([[1.0, 0.5], [1.0, -0.5]], [-1.0, -1.0]))
    assert share == 0
    assert row[0] < -1
    assert abs(float(row[1])) < 1e-9


def test_where_all_logits_are_above_zero_a_row_of_steps_alone_is_enough() -> None:
    row, share = quiet_row(seen([[1.0, 0.0], [-1.0, 0.0]], [2.0, 2.0]))  # no mean to go against
    assert share == 0
    assert float(row.abs().max()) < 2


def test_a_fitted_row_is_chosen_on_the_sites_text_and_not_elsewhere() -> None:
    own, public = seen([[1.0, 1.0], [1.0, 1.5]], [0.2, 0.1]), seen([[1.0, -1.0], [1.0, -1.2]], [0.1, 0.3])
    row = fitted_row(own, public)
    assert own.reached(row) == 1
    assert public.reached(row) == 0
