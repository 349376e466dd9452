"""A model is scored whole and without each owner of experts, and a run that must not tell that says why."""

from __future__ import annotations

import pytest
import torch

from fedalign.client.leaving import by_leaving, not_told
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.moe.model import MoEModel
from tests.moe import tiny

NOISE = ("privacy.epsilon=3", "privacy.delta=1e-3", "algorithm.name=fedavg", "evaluation.clients=false")


def owned(top_k: int = 2, **record: list[int]) -> MoEModel:
    return MoEModel.wrap(tiny.build("olmoe", num_experts_per_tok=top_k, site_experts=record))


def test_each_owner_leaves_in_turn_and_the_model_stays_as_it_was() -> None:
    moe = owned(a=[1], b=[3])
    before = {group: value.clone() for group, value in moe.read().items()}
    assert dict(by_leaving(moe, ["a", "b"], lambda one: one.experts)) == {None: 4, "a": 3, "b": 3}
    numbers = dict(by_leaving(moe, ["b"], lambda one: one.layers[0].named))
    assert numbers == {None: (0, 1, 2, 3), "b": (0, 1, 2)}
    assert all(torch.equal(before[group], value) for group, value in moe.read().items())


def test_nothing_is_scored_where_one_of_them_cannot_leave() -> None:
    scored = list[MoEModel]()
    with pytest.raises(UserError, match="without b: 2 experts of 4 would stay"):
        dict(by_leaving(owned(3, a=[0], b=[1, 2]), ["a", "b"], scored.append))
    assert not scored


@pytest.mark.parametrize(
    ("settings", "rows", "said"),
    [
        ((), 9, ""),
        (("evaluation.leaving=2",), 9, ""),
        (("evaluation.leaving=1",), 9, "evaluation.leaving = 1, and owners of experts are 2"),
        (("evaluation.leaving=0",), 9, "evaluation.leaving = 0, and owners of experts are 2"),
        (("evaluation.clients=false",), 9, "evaluation.clients = false"),
        ((), 0, "no client holds out rows to be scored on"),
        (NOISE, 9, "with [privacy] clients tell no scores"),
        (
            ("privacy.masked=true", "algorithm.name=by_use", "server.max_norm_ratio=0"),
            9,
            "privacy.masked = true: sums over clients alone are told, and each score is of one",
        ),
    ],
    ids=str,
)
def test_why_a_run_does_not_tell_it(settings: tuple[str, ...], rows: int, said: str) -> None:
    config = load_config(None, settings)
    assert not_told(config, owned(a=[1], b=[3]), rows) == said
    assert not_told(config, owned(), rows) == ""  # nobody can leave


def test_a_model_that_cannot_be_cut_is_the_reason() -> None:
    assert not_told(load_config(None), owned(a=[0, 1, 2]), 9).startswith("without a: 1 experts of 4 would stay")


def test_nor_is_a_model_copied_that_is_not_in_one_piece() -> None:
    moe = owned(a=[1], b=[3])
    moe.devices = (torch.device("cpu"), torch.device("meta"))
    with pytest.raises(UserError, match="of a model on several devices experts cannot be picked"):
        next(by_leaving(moe, ["a"], lambda one: one.experts))
    assert not_told(load_config(None), moe, 9).endswith("of a model on several devices experts cannot be picked")
