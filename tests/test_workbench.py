"""The validation part: apart from what clients hold, and the same for everyone."""

import pytest

from fedalign.config import load_config
from fedalign.errors import UserError
from fedalign.workbench import Workbench, set_aside, split_among_clients


def test_nobody_holds_the_validation_part(settings: list[str]) -> None:
    whole, _ = set_aside(load_config(None, settings))
    config = load_config(None, [*settings, "data.validation=0.2"])
    kept, aside = set_aside(config)
    assert len(aside) == round(0.2 * len(whole))
    assert sorted(example.prompt for example in kept + aside) == sorted(example.prompt for example in whole)
    examples, parts = split_among_clients(config)
    assert sorted(index for part in parts.values() for index in part) == list(range(len(kept)))
    assert {example.prompt for example in examples}.isdisjoint(example.prompt for example in aside)


def test_partition_and_validation_part_are_those_of_the_seed_alone(settings: list[str]) -> None:
    share = "data.validation=0.2"
    config = load_config(None, [*settings, share])
    tuning = load_config(None, [*settings, share, "evaluation.part=validation", "algorithm.name=fedavg"])
    assert split_among_clients(tuning) == split_among_clients(config)
    assert set_aside(load_config(None, [*settings, share, "run.seed=1"])) != set_aside(config)


def test_the_validation_part_stands_for_the_test_set(settings: list[str]) -> None:
    config = load_config(None, [*settings, "data.validation=0.2", "evaluation.part=validation"])
    tests = Workbench.load(config).test_set()
    assert tests is not None
    aside = set_aside(config)[1]
    assert len(tests) == len(aside)
    assert [example.choices.index(example.answer) for example in aside] == tests.right_N.tolist()


def test_a_share_that_leaves_nothing_is_refused(settings: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.validation = 0\.001: of 90 examples that is 0"):
        split_among_clients(load_config(None, [*settings, "data.validation=0.001"]))
