"""Each example finds exactly one client, the same one for the same seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.config.run import ClientsConfig
from fedalign.data.formats import Example
from fedalign.data.partition import hold_out, partition
from fedalign.errors import UserError


def examples(count: int, classes: int = 4) -> list[Example]:
    return [
        Example("", "", label=f"class {i % classes}", client=f"user {i % 3}", file=f"file {i % 2}")
        for i in range(count)
    ]


def clients(kind: str, count: int = 5, **options: Any) -> ClientsConfig:
    return ClientsConfig.model_validate({"partition": kind, "count": count, "min_examples": 1, **options})


@pytest.mark.parametrize("kind", ["dirichlet", "iid", "pathological", "size", "natural", "files"])
@settings(deadline=None, max_examples=5)
@given(count=st.integers(100, 200), seed=st.integers(0, 99))
def test_each_example_once_and_the_same_for_the_same_seed(kind: str, count: int, seed: int) -> None:
    data, config = examples(count), clients(kind, alpha=1.0)
    parts = partition(data, config, seed)
    assert sorted(i for part in parts.values() for i in part) == list(range(count))
    assert list(parts) == sorted(parts)
    assert all(part == sorted(part) for part in parts.values())
    assert partition(data, config, seed) == parts


@pytest.mark.parametrize("kind", ["dirichlet", "iid", "pathological", "size"])
def test_another_seed_gives_another_split(kind: str) -> None:
    assert partition(examples(200), clients(kind), 0) != partition(examples(200), clients(kind), 1)


def test_ids() -> None:
    assert list(partition(examples(20), clients("iid", 3), 0)) == ["client-00", "client-01", "client-02"]
    assert list(partition(examples(20), clients("natural"), 0)) == ["user 0", "user 1", "user 2"]
    assert partition(examples(5), clients("files"), 0) == {"file 0": [0, 2, 4], "file 1": [1, 3]}


def test_iid_is_even_and_does_not_follow_the_order_of_rows() -> None:
    parts = partition(examples(103), clients("iid"), 0)
    assert sorted(len(part) for part in parts.values()) == [20, 20, 21, 21, 21]
    assert parts["client-00"] != list(range(21))


@pytest.mark.parametrize(("growth", "sizes"), [("linear", [10, 20, 30]), ("square", [4, 17, 39])])
def test_sizes_grow_with_the_number_of_the_client(growth: str, sizes: list[int]) -> None:
    # 60 examples over shares 1:2:3 (linear) and 1:4:9 (square: 60/14 = 4.28..., the last one takes the rest)
    parts = partition(examples(60), clients("size", 3, size_growth=growth), 0)
    assert [len(part) for part in parts.values()] == sizes


def test_dirichlet_is_skewed_for_small_alpha_and_even_for_large() -> None:
    def largest_share(alpha: float) -> float:
        data = examples(2000)
        parts = partition(data, clients("dirichlet", alpha=alpha), 0).values()
        tops = [Counter(data[i].label for i in part).most_common(1)[0][1] / len(part) for part in parts]
        return sum(tops) / len(tops)

    assert largest_share(0.1) > 0.5
    assert largest_share(1000.0) < 0.3  # four classes: a quarter each


def test_pathological_clients_hold_the_number_of_classes_asked_for() -> None:
    data = examples(200)
    for part in partition(data, clients("pathological", classes=2), 0).values():
        assert len({data[i].label for i in part}) == 2


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("iid", {"count": 21}, "clients.count = 21: more clients than examples (20)"),
        ("pathological", {"classes": 5}, "clients.classes = 5: the data has 4 classes. Choose 1 to 4"),
        ("pathological", {"classes": 1, "count": 2}, "nobody holds 2 of 4 classes"),
        ("iid", {"min_examples": 5}, "clients.min_examples = 5: 5 of 5 clients hold fewer: client-00 (4)"),
        ("dirichlet", {"min_examples": 5}, "clients.alpha = 0.1: in 110 draws"),
        ("files", {"min_examples": 11}, "2 of 2 clients hold fewer: file 0 (10), file 1 (10)"),
    ],
)
def test_what_cannot_be_split(kind: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        partition(examples(20), clients(kind, **options), 0)
    assert said in str(caught.value)


def test_alpha_must_be_positive_even_where_the_configuration_was_not_checked() -> None:
    config = clients("dirichlet").model_copy(update={"alpha": 0.0})
    with pytest.raises(UserError, match=r"clients\.alpha = 0\.0: must be above 0"):
        partition(examples(20), config, 0)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("dirichlet", "data.columns.label"), ("natural", "data.columns.client"), ("files", "a folder of files")],
)
def test_examples_without_what_the_split_needs(kind: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        partition([Example("a", "b")] * 20, clients(kind), 0)
    assert said in str(caught.value)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(2, 50), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 9))
def test_hold_out_loses_nothing(count: int, fraction: float, seed: int) -> None:
    indices = [3 * i for i in range(count)]
    train, held = hold_out(indices, fraction, seed, "a")
    assert sorted(train + held) == indices
    assert len(held) == max(1, round(fraction * count))
    assert (train, held) == hold_out(indices, fraction, seed, "a")


def test_hold_out_of_nothing() -> None:
    assert hold_out([4, 5], 0.0, 0, "a") == ([4, 5], [])


def test_hold_out_draws_differently_for_each_client_and_seed() -> None:
    draws = {tuple(hold_out(range(100), 0.1, seed, name)[1]) for seed, name in [(0, "a"), (0, "b"), (1, "a")]}
    assert len(draws) == 3


def test_hold_out_names_the_client_that_is_too_small() -> None:
    with pytest.raises(UserError, match=r"client 'client-03' holds 1 example\(s\)"):
        hold_out([7], 0.1, 0, "client-03")
