"""Every family, tuned whole and by LoRA: capture, groups, a federated round, and a model that others load.

`python -m tests.families` runs all of it and writes docs/models.md from what came out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.in_process import prepare
from fedalign.maths.heap import Heap
from fedalign.maths.routing import router_log_prob
from fedalign.moe.families import MoELayer
from fedalign.moe.lora import FAILS_UPSTREAM
from fedalign.moe.model import MoEModel
from fedalign.moe.probe import Captured, RoutingProbe, RoutingStatistics
from fedalign.moe.tuning import beside_text
from fedalign.protocol import ParameterGroup
from fedalign.server.results import RunFolder
from fedalign.server.run import execute
from tests.families.table import CASES, EVERY, QUICK
from tests.moe import tiny
from tests.moe.given import given_experts
from tests.server.test_run import Silent

Folder = Callable[[str], Path]
MASKS_PADDING = {"qwen4_exp_text", "qwen4_exp"}  # its attention is sparse, but chooses among real tokens alone

TUNING = {
    "full": ["tuning.kind=full"],
    "lora": ["tuning.kind=lora", "tuning.rank=3"],
    "attention": ["tuning.kind=lora", "tuning.rank=3", 'tuning.targets=["attention"]'],
}


@pytest.fixture(scope="module")
def base(model_folder: Callable[..., Path]) -> Folder:
    """The folder of a family's tiny model, with a tokenizer."""
    return cache(model_folder)


def load(folder: Path, kind: str) -> MoEModel:
    tuning = load_config(None, TUNING[kind]).tuning
    moe = MoEModel.load(folder, trust_remote_code=True, tuning=tuning)
    generator = torch.Generator().manual_seed(5)  # an adapter's factors begin at zero
    news = {g: v + 0.1 * torch.randn(v.shape, generator=generator) for g, v in moe.read().items()}
    moe.write({group: value for group, value in news.items() if group.kind == "expert"})
    moe.model.eval()
    return moe


def capture(moe: MoEModel, inputs: dict[str, Tensor]) -> tuple[Captured, list[Tensor]]:
    """One pass: what the probe saw, and which experts [T, E] of each layer really computed."""
    with RoutingProbe(moe) as probe, given_experts(moe) as given, probe.capture(*tiny.masks(inputs)) as captured:
        moe.model(**inputs)
    return captured, [passes[0] for passes in given]


def mask_of(layer: MoELayer, inputs: dict[str, Tensor]) -> Tensor:
    return inputs["decoder_attention_mask" if layer.in_decoder else "attention_mask"].flatten().bool()


@pytest.mark.parametrize(("family", "kind"), CASES)
@pytest.mark.parametrize("train", [False, True])
def test_routing_is_captured(family: str, kind: str, train: bool, base: Folder) -> None:
    moe, inputs = load(base(family), kind), tiny.batch(family)
    moe.model.train(train)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        captured, given = capture(moe, inputs)
    statistics = RoutingStatistics(len(moe.layers), moe.experts, moe.hidden)
    statistics.update(captured)
    summary = statistics.finish(min_tokens=1, min_examples=1)
    for index, (layer, routing) in enumerate(zip(moe.layers, captured.routing, strict=True)):
        mask_T = mask_of(layer, inputs)
        given_T_E = given[index][mask_T]
        chosen_T_E = torch.zeros_like(given_T_E).scatter_(1, routing.topk_T_K, True)
        dropped = given_T_E.sum(1) == 0 if layer.dispatch == "one_hot" else torch.zeros(len(given_T_E)).bool()
        assert torch.equal(chosen_T_E[~dropped], given_T_E[~dropped])
        assert torch.equal(summary.load_L_E[index], given_T_E.sum(0).float())
        assert summary.load_L_E[index].sum() == int(mask_T.sum() - dropped.sum()) * moe.top_k
        prob_T_E = router_log_prob(routing.logits_T_E, routing.scoring).exp()
        torch.testing.assert_close(prob_T_E.sum(1), torch.ones(len(prob_T_E)))
        torch.testing.assert_close(summary.prob_L_E[index], prob_T_E.detach().mean(0))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_groups_hold_every_trained_value_once(family: str, kind: str, base: Folder) -> None:
    moe = load(base(family), kind)
    assert all(moe.layout.sizes[group] for group in moe.layout.groups if group.kind in ("gate", "expert"))
    tiny.assert_views_hold_every_trained_value_once(moe)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_change_of_an_expert_changes_its_tokens_alone(family: str, kind: str, base: Folder) -> None:
    """Also that what was captured is what computed: capture, groups and computation agree, whatever the layout."""
    moe, inputs = load(base(family), kind), tiny.batch(family)
    for index, layer in enumerate(moe.layers):
        mask_T = mask_of(layer, inputs)
        with leaving(moe, index) as outputs, torch.no_grad():
            _, given = capture(moe, inputs)
            for expert in range(moe.experts):
                group = ParameterGroup("expert", index, expert)
                before = moe.read([group])
                moe.write({group: before[group] * 1.5 + 0.05})
                moe.model(**inputs)
                moe.write(before)
                changed_T = (outputs[0] - outputs.pop()).abs().amax(1) > 1e-6
                assert torch.equal(changed_T[mask_T], given[index][mask_T, expert]), f"{group}"


@pytest.mark.parametrize("family", tiny.marked([*EVERY, *tiny.COMPOSITES_ALONE], (*QUICK, "deepseek_v32")))
def test_padding_changes_answers_where_batches_are_of_equal_lengths_and_nowhere_else(family: str) -> None:
    """A family that this names as new wants `MoEModel.equal_lengths`."""
    build = tiny.composite if family in tiny.COMPOSITES_ALONE else tiny.build
    moe = MoEModel.wrap(build(family))
    apart = padding_tells(moe, tiny.batch(family, length=40))
    assert (apart > 1e-4) == (moe.equal_lengths and family not in MASKS_PADDING), f"{family}: {apart:.2g}"


@torch.no_grad()
def padding_tells(moe: MoEModel, inputs: dict[str, Tensor]) -> float:
    """How far logits of an example in a padded batch are from those of it alone, in standard deviations."""
    together, worst = moe.model(**inputs, use_cache=False).logits, 0.0
    for row, logits_S_V in enumerate(together):
        lengths = {name: int(inputs[mask_name(name)][row].sum()) for name in inputs}
        single = {name: values[row : row + 1, : lengths[name]] for name, values in inputs.items()}
        alone_S_V = moe.model(**single, use_cache=False).logits[0]
        worst = max(worst, float((alone_S_V - logits_S_V[: len(alone_S_V)]).abs().max() / together.std()))
    return worst


def mask_name(name: str) -> str:
    return "decoder_attention_mask" if name.startswith("decoder_") else "attention_mask"


@contextmanager
def leaving(moe: MoEModel, index: int) -> Iterator[list[Tensor]]:
    """What leaves the decoder layer around a router in each pass, [T, H]: only experts see to it token by token."""
    found = re.match(r".*?\.\d+(?=\.)", moe.layers[index].router)
    assert found
    # a convolution over tokens follows the experts of inkling2
    watched = f"{found[0]}.mlp" if moe.family == "inkling2_text" else found[0]
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden.detach().flatten(0, 1).flatten(1).clone())  # some keep several streams of a token

    handle = moe.model.get_submodule(watched).register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_round_gives_a_model_that_plain_libraries_load(
    family: str, kind: str, base: Folder, settings: list[str], tmp_path: Path
) -> None:
    moved = one_round(family, kind, base, settings, tmp_path / "run")
    assert moved - {"head"} == {"shared", "gate", "expert"} | ({"embeddings"} if kind == "full" else set())


@pytest.mark.parametrize("family", sorted(FAILS_UPSTREAM))
def test_where_adapted_experts_crash_they_are_refused_and_attention_is_not(
    family: str, base: Folder, settings: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        load(base(family), "lora")
    assert f"the experts of {family} cannot be adapted: {FAILS_UPSTREAM[family]}. Leave experts out" in str(
        caught.value
    )
    assert one_round(family, "attention", base, settings, tmp_path / "run") == {"shared", "gate"}


def one_round(
    family: str,
    kind: str,
    base: Folder,
    settings: list[str],
    out: Path,
    plainly: Callable[[Path], PreTrainedModel] = tiny.plain,
) -> set[str]:
    """Two clients; what plain libraries load of it computes the same. The kinds of groups that moved."""
    changes = [f"model.path={base(family)}", "model.trust_remote_code=true", "clients.count=2", "run.rounds=1"]
    most = ("algorithm.name=fedalign_paper", "algorithm.vocabulary=tokens")  # asks most of a model
    config = load_config(None, [*settings, "training.epochs=1", *most, *changes, *TUNING[kind]])
    folder = RunFolder(out)
    prepared = prepare(config, folder.clients)
    before = prepared.initial_weights(Heap())
    folder.begin(config)
    summary = execute(prepared, folder, Silent())
    assert summary["algorithm"] == "fedalign_paper"
    moe, inputs = prepared.bench.moe, tiny.batch(family)
    plain = plainly(folder.model) if kind == "full" else adapted(plainly(base(family)), folder.model)
    with torch.no_grad():
        expected = moe.model.eval()(**inputs).logits
        torch.testing.assert_close(plain.eval()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    return {group.kind for group, value in moe.read().items() if not torch.equal(value, before[group])}


@pytest.mark.parametrize("family", tiny.marked(tiny.COMPOSITES, ["qwen3_5_moe", "aria", "qwen3_vl_moe"]))
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_of_a_multimodal_checkpoint_the_text_is_tuned_and_the_rest_kept(
    family: str, kind: str, model_folder: Callable[..., Path], settings: list[str], tmp_path: Path
) -> None:
    folder, plainly = model_folder(family, reads_pictures=True), AutoModelForImageTextToText.from_pretrained
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "AnyImageProcessor"}')
    moved = one_round(family, kind, lambda _: folder, settings, tmp_path / "run", plainly)
    assert moved - {"head"} == {"shared", "gate", "expert"} | ({"embeddings"} if kind == "full" else set())
    before, moe = plainly(folder), load(folder, kind)
    towers = beside_text(before)
    assert towers
    assert any(f"the rest kept as it was: {', '.join(towers)}" in note for note in moe.notes)
    assert not any(slot.parameter.requires_grad for slot in moe.slots if slot.name.startswith(towers))
    if kind == "full":
        after = plainly(tmp_path / "run" / "model").state_dict()
        kept = {name: value for name, value in before.state_dict().items() if name.startswith(towers)}
        assert all(torch.equal(after[name], value) for name, value in kept.items())
        assert (tmp_path / "run" / "model" / "preprocessor_config.json").is_file()
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own
            auto = AutoPeftModel.from_pretrained(str(tmp_path / "run" / "model"))
        assert type(auto.get_base_model()) is type(before)


def adapted(model: Any, folder: Path) -> Any:
    """A plain model with an adapter, by plain peft."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft's own
        return PeftModel.from_pretrained(model, str(folder))
