"""Whose expert is whose: the record in a model's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, OlmoeConfig

from fedalign.config.run import AlgorithmConfig
from fedalign.errors import UserError
from fedalign.moe.site_experts import owners, trained_by, with_owners


def test_plain_transformers_keeps_the_record(tmp_path: Path) -> None:
    config = with_owners(OlmoeConfig(num_experts=10), {"hospital-a": (8,), "hospital-b": [9]})
    config.save_pretrained(tmp_path)
    assert owners(AutoConfig.from_pretrained(tmp_path)) == {"hospital-a": (8,), "hospital-b": (9,)}


def test_no_record_means_that_all_experts_are_public() -> None:
    config = with_owners(OlmoeConfig(num_experts=10), {"a": [9]})
    assert owners(with_owners(config, {})) == owners(OlmoeConfig()) == {}
    assert "site_experts" not in config.to_dict()


def test_each_algorithm_that_trained_what_sites_share_is_recorded_once() -> None:
    average, frozen = (
        AlgorithmConfig.model_validate({"name": "site_experts", "shared": s}) for s in ("average", "frozen")
    )
    by_use = AlgorithmConfig(name="by_use")
    assert trained_by({}, frozen) == []
    assert trained_by({"site_experts": {"a": [8]}}, frozen) == ["unknown"]
    for run in (by_use, frozen, by_use):
        assert trained_by({"shared_trained_by": ["by_use", "fedavg"]}, run) == ["by_use", "fedavg"]
    assert trained_by({"shared_trained_by": []}, average) == ["site_experts"]


@pytest.mark.parametrize("record", ["fedavg", {"fedavg": 1}, [1], ["\x1b[2J"], [""], ["a"] * 65, None])
def test_a_broken_record_of_training_is_refused_in_one_line(record: Any) -> None:
    with pytest.raises(UserError, match=r"^shared_trained_by = .*: must be a list of at most 64") as error:
        trained_by({"shared_trained_by": record})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([8], "site_experts = [8]: must be a table"),
        ({"": [8]}, "site_experts: '': a site's name"),
        ({"\x1b[2J": [8]}, "a site's name must be 1 to 64 printable characters"),
        ({8: [8]}, "site_experts: 8: a site's name must be"),
        ({"a": 8}, "site_experts.a = 8: must be a list"),
        ({"a": []}, "site_experts.a = []: must be a list"),
        ({"a": [10]}, "site_experts.a: 10: no such expert. Choose numbers from 0 to 9."),
        ({"a": [-1]}, "no such expert"),
        ({"a": [True]}, "no such expert"),
        ({"a": ["8"]}, "no such expert"),
        ({"a": [8], "b": [8]}, "site_experts.b: 8: is a's already"),
        ({"a": [8, 8]}, "is a's already"),
        ({"a": list(range(10))}, "all 10 experts have an owner"),
    ],
)
def test_a_broken_record_is_refused_in_one_line(record: Any, said: str) -> None:
    config = OlmoeConfig(num_experts=10)
    config.site_experts = record
    with pytest.raises(UserError) as error:
        owners(config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
