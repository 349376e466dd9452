"""Rules against hostile sites: Flower's own results, numbers worked out by hand, and who holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median, aggregate_trimmed_avg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.maths import average
from fedalign.maths.average import StreamingSum
from fedalign.maths.robust import (
    AGAINST,
    Directions,
    capped,
    guarded,
    holders,
    krum,
    make_sum,
    median,
    trimmed_mean,
    typical_norms,
)
from fedalign.protocol import (
    EMBEDDINGS,
    SHARED,
    Layout,
    Packed,
    ParameterGroup,
    Plan,
    Robust,
    TokenRows,
    Update,
    Weights,
)

EXPERTS = [ParameterGroup("expert", 0, expert) for expert in range(3)]
SIZES = dict.fromkeys(Layout(1, 3, {}).groups, 2) | {SHARED: 4, EMBEDDINGS: 4}
LAYOUT = Layout(1, 3, SIZES)
GROUPS = len(SIZES)
NAMES = "abcdefghij"


def values(clients: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(clients, size, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------- as Flower has them


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 7, 10])
def test_the_median_is_flowers(clients: int) -> None:
    value_C_N = values(clients, 50)
    (expected,) = aggregate_median([([row.numpy()], 1) for row in value_C_N])
    assert_close(median(value_C_N), torch.from_numpy(expected).float())


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.3, 0.49])
def test_the_trimmed_mean_is_flowers(clients: int, share: float) -> None:
    value_C_N = values(clients, 50)
    (expected,) = aggregate_trimmed_avg([([row.numpy()], 1) for row in value_C_N], share)
    assert_close(trimmed_mean(value_C_N, share), torch.from_numpy(expected).float())


@pytest.mark.parametrize("clients", [3, 4, 7, 10])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.3])
def test_krum_is_flowers(clients: int, share: float) -> None:
    for seed in range(5):
        value_C_N = values(clients, 20, seed)
        (expected,) = aggregate_krum([([row.numpy()], 1) for row in value_C_N], int(share * clients), 0)
        assert torch.equal(krum(value_C_N, share), torch.from_numpy(np.asarray(expected)))


def test_of_two_krum_takes_the_mean() -> None:
    assert krum(tensor([[1.0, 0.0], [0.0, 3.0]]), 0.3).tolist() == [0.5, 1.5]


def test_values_that_a_client_does_not_hold_are_no_vote() -> None:
    value_C_N = tensor([[1.0, 7.0], [5.0, 0.0], [6.0, 0.0], [99.0, 0.0]])
    held_C_N = tensor([[True, True], [True, False], [True, False], [True, False]])
    assert median(value_C_N, held_C_N).tolist() == [5.5, 7.0]
    assert trimmed_mean(value_C_N, 0.25, held_C_N).tolist() == [5.5, 7.0]
    assert median(value_C_N, torch.zeros(4, 2, dtype=torch.bool)).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------------- shares and norms


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=8), st.floats(0.05, 1), st.floats(1, 10))
def test_no_share_is_above_the_cap_and_none_is_lost(scores: list[float], most: float, ratio: float) -> None:
    score_C_1 = tensor(scores, dtype=torch.float64).unsqueeze(1)
    weight_C_1 = (score_C_1 / score_C_1.sum().clamp_min(1e-300)).float()
    held = int((weight_C_1 > 0).sum())
    capped_C_1 = capped(weight_C_1, most, ratio)
    assert float(capped_C_1.sum()) == pytest.approx(1.0 if held else 0.0, abs=1e-5)
    assert float(capped_C_1.max()) <= max(min(most, ratio / max(held, 1)), 1 / max(held, 1)) * (1 + 1e-5)
    assert not capped_C_1[weight_C_1 == 0].any()


def by_group(*, shared: float, gate: float, experts: Sequence[float]) -> list[float]:
    return [float(norm) for norm in (shared, 0, 0, gate, gate, gate, *experts)]  # nobody trains embeddings


def test_norms_are_compared_among_holders_and_those_of_few_with_their_layer() -> None:
    norm_C_G = tensor(
        [
            by_group(shared=1, gate=1, experts=[2, 0, 0]),
            by_group(shared=2, gate=1, experts=[4, 0, 0]),
            by_group(shared=3, gate=1, experts=[6, 0, 50]),
            by_group(shared=99, gate=1, experts=[900, 0, 800]),
        ]
    )
    typical_G = typical_norms(norm_C_G, norm_C_G > 0, LAYOUT)
    assert typical_G[0] == 2  # the lower one of the middle two
    assert typical_G[6] == 4
    assert typical_G[8] == 4  # two holders: of the layer's other experts, 2, 4, 6 and 900
    assert typical_G[7].isfinite()  # nobody holds it


def test_with_nothing_to_compare_nothing_is_clipped() -> None:
    norm_1_G = tensor([by_group(shared=1e6, gate=0, experts=[3.0, 0, 0])])
    typical_G = typical_norms(norm_1_G, norm_1_G > 0, LAYOUT)
    assert typical_G[0] == torch.inf
    assert typical_G[6] == torch.inf  # the only expert that anybody holds
    plan = guarded(Plan(("a",), torch.ones(1, GROUPS)), norm_1_G, LAYOUT, 0.5, 3.0, 3.0)
    assert plan.factor_C_G is not None
    assert plan.factor_C_G.tolist() == [[1.0] * GROUPS]
    assert plan.weight_C_G.tolist() == [[1.0] * GROUPS]


def test_of_two_the_shorter_one_is_the_measure() -> None:
    norm_C_G = tensor([by_group(shared=1, gate=0, experts=[0] * 3), by_group(shared=99, gate=0, experts=[0] * 3)])
    assert typical_norms(norm_C_G, norm_C_G > 0, LAYOUT)[0] == 1


def test_one_voice_a_client_however_many_experts_it_claims() -> None:
    """Seven experts of eight that hardly anybody holds: a liar's own lengths were the median to which it was held."""
    cells = [ParameterGroup("expert", 0, expert) for expert in range(8)]
    layout = Layout(1, 8, {**dict.fromkeys(Layout(1, 8, {}).groups, 2), **dict.fromkeys(cells, 2)})
    held_C_G = torch.zeros(4, len(layout.groups), dtype=torch.bool)
    for client in range(3):
        held_C_G[client, [layout.groups.index(cells[2 * client]), layout.groups.index(cells[2 * client + 1])]] = True
    held_C_G[3, [layout.groups.index(cell) for cell in cells]] = True
    norm_C_G = held_C_G * tensor([[1.0], [1.0], [1.0], [1e6]])
    typical_G = typical_norms(norm_C_G, held_C_G, layout)
    assert [float(typical_G[layout.groups.index(cell)]) for cell in cells] == [1.0] * 8


def test_who_alone_trains_embeddings_moves_them_no_further_than_others_move_other_values() -> None:
    norm_C_G = torch.ones(10, GROUPS) * tensor([float(LAYOUT.sizes[group]) for group in LAYOUT.groups]).sqrt()
    column = LAYOUT.groups.index(EMBEDDINGS)
    norm_C_G[:, column] = 0
    norm_C_G[9, column] = 1e12
    held_C_G = norm_C_G > 0
    assert_close(typical_norms(norm_C_G, held_C_G, LAYOUT)[column], tensor(2.0))  # four values, each moved by one
    new = guarded(Plan(tuple(NAMES), held_C_G / held_C_G.sum(0).clamp_min(1)), norm_C_G, LAYOUT, 0.5, 3.0, 3.0)
    assert new.factor_C_G is not None
    assert_close(norm_C_G[9, column] * new.factor_C_G[9, column], tensor(6.0))
    assert_close(new.factor_C_G[:9], torch.ones(9, GROUPS))


def test_those_whom_an_algorithm_leaves_out_still_say_what_is_long() -> None:
    """Liars that agree with each other can have a method take everybody else for the odd ones."""
    norm_C_G = torch.ones(10, GROUPS)
    norm_C_G[8:] = 1e6
    held_C_G = torch.zeros(10, GROUPS, dtype=torch.bool)
    held_C_G[7:] = True  # one honest among them
    assert typical_norms(norm_C_G, held_C_G, LAYOUT)[LAYOUT.groups.index(EXPERTS[0])] == 1


def test_a_stream_is_no_longer_than_others_whatever_steps_a_client_claims() -> None:
    plan = Plan(tuple(NAMES), torch.full((10, GROUPS), 0.1), streams={"s": torch.full((10, GROUPS), 0.01)})
    plan.streams["s"][9] = 1.0  # one step, it says, where the others had a hundred
    new = guarded(plan, torch.ones(10, GROUPS), LAYOUT, 0.5, 3.0, 3.0)
    assert_close(new.streams["s"][:, 0], tensor([0.01] * 9 + [0.03]))
    assert_close(new.weight_C_G, plan.weight_C_G)


def test_a_guarded_plan_by_hand() -> None:
    weight_C_G = tensor([[0.9] * GROUPS, [0.06] * GROUPS, [0.04] * GROUPS])
    norm_C_G = tensor([[30.0] * GROUPS, [1.0] * GROUPS, [2.0] * GROUPS])
    rows = torch.tensor([[[0.9, 1.0, 0.0]], [[0.06, 0.0, 0.0]], [[0.04, 0.0, 1.0]]])
    plan = Plan(
        ("liar", "b", "c"),
        weight_C_G,
        factor_C_G=torch.full((3, GROUPS), 0.5),
        token_weight_C_M_V=rows,
        streams={"s": torch.full((3, GROUPS), 4.0)},
    )
    new = guarded(plan, norm_C_G, replace(LAYOUT, token_rows=(TokenRows(0, 3, 1),)), 0.5, 3.0, 3.0)
    assert_close(new.weight_C_G[:, 0], tensor([0.5, 0.3, 0.2]))
    assert new.factor_C_G is not None
    assert_close(new.factor_C_G[:, 0], tensor([0.5 * 3 * 1.0 / 15, 0.5, 0.5]))  # lengths 15, 0.5, 1
    assert new.token_weight_C_M_V is not None
    assert_close(new.token_weight_C_M_V[:, 0], tensor([[0.5, 0, 0], [0.3, 0, 0], [0.2, 0, 0]]))
    assert_close(new.streams["s"][:, 0], 4 * tensor([0.2, 1, 1]))  # what the algorithm made of it, clipped
    assert torch.equal(new.weight_C_G > 0, plan.weight_C_G > 0)


def test_who_sends_zeros_holds_nothing() -> None:
    plan = Plan(("a", "b"), tensor([[0.5] * GROUPS, [0.5] * GROUPS]))
    assert holders(plan, tensor([[1.0] * GROUPS, [0.0] * GROUPS])).sum(1).tolist() == [GROUPS, 0]


# ---------------------------------------------------------------------------------------------------------- the sums


def run(
    rule: Robust,
    updates: Mapping[str, Weights],
    layout: Layout = LAYOUT,
    *,
    rows: Tensor | None = None,
    center: Weights | None = None,
    radius: float = 1.0,
    order: str = "",
) -> Weights:
    """The change that a round of equal weights makes."""
    clients = tuple(updates)
    weight_C_G = torch.stack([tensor([float(g in u) for g in layout.groups]) for u in updates.values()])
    weight_C_G = weight_C_G / weight_C_G.sum(0).clamp_min(1)
    plan = Plan(clients, weight_C_G, token_weight_C_M_V=rows)
    norms = {
        c: torch.stack([u[g].norm() if g in u else tensor(0.0) for g in layout.groups]) for c, u in updates.items()
    }
    total = make_sum(rule, layout, plan, norms, "float32", hostile=0.3, radius=radius, center=center or {})
    for client in order or clients:
        assert total.add(Update(client, 1, {g: Packed(v) for g, v in updates[client].items()})) is None
    old = {group: torch.zeros(layout.sizes[group]) for group in layout.groups}
    return {group: value for group, value in total.result(old).items() if value is not old[group]}


def everywhere(value: float, *groups: ParameterGroup) -> Weights:
    return {group: torch.full((SIZES[group],), value) for group in groups or LAYOUT.groups}


@pytest.mark.parametrize(
    ("rule", "shared", "alone"),
    [("median", 2.5, 7.0), ("trimmed_mean", 2.5, 7.0), ("krum", 1.0, 7.0)],
)
def test_rules_count_holders_only_and_everybody_alike(rule: Robust, shared: float, alone: float) -> None:
    common = [group for group in LAYOUT.groups if group != EXPERTS[2]]
    updates = {c: everywhere(v, *common) for c, v in zip("abcd", (1.0, 2.0, 3.0, 1000.0), strict=True)}
    updates["d"] |= everywhere(7.0, EXPERTS[2])
    for order in ("abcd", "dbca"):
        change = run(rule, updates, order=order)
        assert change[SHARED].tolist() == [shared] * 4
        assert change[EXPERTS[2]].tolist() == [alone] * 2


def test_an_update_of_zeros_is_no_vote() -> None:
    updates = {c: everywhere(v) for c, v in zip("abcde", (0.0, 0.0, 0.0, 3.0, 5.0), strict=True)}
    assert run("median", updates)[SHARED].tolist() == [4.0] * 4


def test_centred_clipping_by_hand() -> None:
    """Karimireddy et al. 2021, eq. 4, with numpy: around v, radius 2 medians; the lower one of two is the median."""
    update_C_N = np.array([[3.0, 4, 0, 0], [0, 0, 6, 8], [0, 0, 0, 400], [3, 0, 0, 4]])
    center_N = np.array([1.0, 1, 1, 1])
    radius = 2 * 5.0  # norms 5, 10, 400, 5
    expected = center_N.copy()
    for update_N in update_C_N:
        apart_N = update_N - center_N
        expected += apart_N * min(1.0, radius / float(np.linalg.norm(apart_N))) / 4
    updates: dict[str, Weights] = {
        c: {SHARED: torch.from_numpy(u).float()} for c, u in zip("abcd", update_C_N, strict=True)
    }
    center = {SHARED: torch.from_numpy(center_N).float()}
    change = run("centered_clip", updates, center=center, radius=2.0)
    assert_close(change[SHARED], torch.from_numpy(expected).float())


def test_without_a_last_round_the_centre_is_zero_and_short_updates_are_averaged() -> None:
    updates = {c: everywhere(v) for c, v in zip("abc", (1.0, 2.0, 3.0), strict=True)}
    assert_close(run("centered_clip", updates, radius=2.0)[SHARED], torch.full((4,), 2.0))


@pytest.mark.parametrize(("rule", "met"), [("median", 2.0), ("trimmed_mean", 2.0), ("centered_clip", 2.0)])
def test_a_token_is_voted_on_by_those_who_met_it(rule: Robust, met: float) -> None:
    layout = replace(LAYOUT, token_rows=(TokenRows(0, 3, 1),))
    rows_C_M_V = tensor([[[0.5, 0.0, 1.0]], [[0.5, 0.0, 0.0]], [[0.0, 0.0, 0.0]]])
    updates: dict[str, Weights] = {
        "a": {EMBEDDINGS: tensor([1.0, 1, 5, 1])},
        "b": {EMBEDDINGS: tensor([3.0, 1, 1, 1])},
        "c": {EMBEDDINGS: tensor([9.0, 1, 1, 1])},
    }
    change = run(rule, updates, layout, rows=rows_C_M_V, radius=10.0)
    assert_close(change[EMBEDDINGS], tensor([met, 0.0, 5.0, 1.0]))  # met by two, by none, by one, and no token's


def test_streams_need_a_weighted_sum() -> None:
    plan = Plan(("a",), torch.ones(1, GROUPS), streams={"control": torch.ones(1, GROUPS)})
    with pytest.raises(ValueError, match=r'streams control: server.robust = "median" has none; use "clip"'):
        make_sum("median", LAYOUT, plan, {"a": torch.ones(GROUPS)}, "float32", hostile=0.3, radius=1.0, center={})


# ---------------------------------------------------------------------------------------------- the streaming sum


def test_a_clipped_update_is_clipped_in_its_token_rows_too() -> None:
    layout = replace(LAYOUT, token_rows=(TokenRows(0, 3, 1),))
    plan = Plan(("a",), torch.ones(1, GROUPS), torch.full((1, GROUPS), 0.25), token_weight_C_M_V=torch.ones(1, 1, 3))
    total = StreamingSum(layout, plan, {"a": torch.full((GROUPS,), 99.0)}, "float32")
    assert total.add(Update("a", 1, {g: Packed(v) for g, v in everywhere(4.0).items()})) is None
    assert total.result({EMBEDDINGS: torch.zeros(4)})[EMBEDDINGS].tolist() == [1.0] * 4


def test_what_must_arrive_is_counted_in_sites_where_their_word_is_not_trusted() -> None:
    plan = Plan(("liar", "b", "c"), tensor([[0.998] * GROUPS, [0.001] * GROUPS, [0.001] * GROUPS]))
    norms = dict.fromkeys(plan.clients, torch.full((GROUPS,), 9.0))
    for by_sites, moved in ((False, 0.0), (True, 2.0)):
        total = StreamingSum(LAYOUT, plan, norms, "float32", by_sites=by_sites)
        for client, value in (("b", 1.0), ("c", 3.0)):
            total.add(Update(client, 1, {g: Packed(v) for g, v in everywhere(value).items()}))
        assert_close(total.result({SHARED: torch.zeros(4)})[SHARED], torch.full((4,), moved))
    total.add(Update("liar", 1, {g: Packed(v) for g, v in everywhere(2.0).items()}))
    alone = StreamingSum(LAYOUT, plan, norms, "float32", by_sites=True)
    alone.add(Update("b", 1, {g: Packed(v) for g, v in everywhere(1.0).items()}))
    assert alone.unchanged() == list(LAYOUT.groups)  # one of three


def test_an_update_that_the_plan_would_blow_up_is_refused_and_the_sum_stays_finite() -> None:
    plan = Plan(("a", "b"), torch.full((2, GROUPS), 0.5), tensor([[1.0] * GROUPS, [3e38] * GROUPS]))
    total = StreamingSum(LAYOUT, plan, dict.fromkeys("ab", torch.full((GROUPS,), 1e15)), "float32")
    for client in "ab":
        failure = total.add(Update(client, 1, {g: Packed(v) for g, v in everywhere(1e14).items()}))
        assert (failure is None) == (client == "a")
    assert "shared: the plan would make its update" in failure.reason if failure else False
    assert bool(total.result({SHARED: torch.zeros(4)})[SHARED].isfinite().all())


# ------------------------------------------------------------------------------------------------------- directions

LONG = Layout(1, 3, dict.fromkeys(Layout(1, 3, {}).groups, 2000))


def directions(rows: Mapping[str, Tensor], seed: int = 0, of: Layout = LONG) -> Directions:
    """Sketches of updates that are the same values in each group."""
    told = Directions(of, seed)
    for name, row in rows.items():
        told.add(Update(name, 1, {group: Packed(row) for group in of.groups}))
    return told


def crowd(clients: int, common: float, seed: int = 0) -> dict[str, Tensor]:
    """Updates with a direction in common, whose cosines are about common² / (1 + common²)."""
    value_C_N = values(clients, 2000, seed) + common * values(1, 2000, 99)
    return dict(zip(NAMES, value_C_N, strict=False))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("liars", [1, 2, 3])
def test_opposite_updates_are_told_however_long(seed: int, liars: int) -> None:
    rows = crowd(10, 1.0, seed)
    for name, length in zip(NAMES[:liars], (1e-3, 1.0, 1e3), strict=False):
        rows[name] = -length * rows[name]
    found = directions(rows, seed).against(0.3)
    assert sorted(found) == list(NAMES[:liars])
    assert all(-1 <= cosine < -AGAINST for cosine in found.values())


@pytest.mark.parametrize("seed", range(10))
def test_an_opposite_update_is_told_where_honest_ones_have_little_in_common(seed: int) -> None:
    """Their cosines are about 0.13, as in the demo's second round; a round later they are too small."""
    rows = crowd(10, 0.38, seed)
    rows["c"] = -rows["c"]
    assert list(directions(rows, seed).against(0.3)) == ["c"]


@pytest.mark.parametrize("common", [0.0, 0.3, 1.0])
def test_honest_updates_are_not_however_little_they_share(common: float) -> None:
    assert [directions(crowd(10, common, seed), seed).against(0.3) for seed in range(20)] == [{}] * 20


@pytest.mark.parametrize("kinds", [("embeddings", "head"), ("shared",), ("expert", "gate")])
def test_a_part_that_is_opposite_is_told_however_long_the_rest_is(kinds: tuple[str, ...]) -> None:
    for seed in range(5):
        told = Directions(LONG, seed)
        for name, row in crowd(10, 1.0, seed).items():
            turned = {group: Packed(-row if group.kind in kinds else 100 * row) for group in LONG.groups}
            told.add(Update(name, 1, turned if name == "d" else {group: Packed(row) for group in LONG.groups}))
        assert list(told.against(0.3)) == ["d"]


def test_where_many_are_against_each_other_nobody_tells_who_is_right() -> None:
    rows = crowd(10, 1.0)
    for name in NAMES[:4]:
        rows[name] = -rows[name]
    assert directions(rows).against(0.3) == {}
    assert directions({"a": values(1, 2000)[0], "b": -values(1, 2000)[0]}).against(0.3) == {}


def test_of_three_one_can_be_told() -> None:
    rows = crowd(3, 3.0)
    rows["b"] = -rows["b"]
    assert list(directions(rows).against(0.3)) == ["b"]


def test_groups_of_one_shape_do_not_meet_in_a_sketch() -> None:
    """One client moves one expert, the others another, by the same values: these have nothing in common."""
    row, (first, second) = values(1, 2000)[0], [ParameterGroup("expert", 0, expert) for expert in range(2)]
    for seed in range(5):
        told = Directions(LONG, seed)
        told.add(Update("a", 1, {first: Packed(-row)}))
        for name in "bcd":
            told.add(Update(name, 1, {second: Packed(row)}))
        assert told.against(0.3) == {}


def test_the_row_of_a_word_that_one_client_alone_met_stays_as_it_is() -> None:
    """Word 0 is the first client's alone; 3 is nobody's, and moves as all have it."""
    layout = Layout(1, 3, SIZES, token_rows=(TokenRows(0, 4, 1),))
    weight_C_G = tensor([[0.7] * GROUPS, [0.1] * GROUPS, [0.1] * GROUPS, [0.1] * GROUPS])
    token_C_M_V = tensor([[[1.0, 0.5, 0.4, 0.7]], [[0.0, 0.5, 0.6, 0.1]], [[0.0, 0, 0, 0.1]], [[0.0, 0, 0, 0.1]]])
    met_C_M_V = (token_C_M_V > 0) & tensor([True, True, True, False])
    plan = Plan(tuple("abcd"), weight_C_G, token_weight_C_M_V=token_C_M_V, met_C_M_V=met_C_M_V)
    new = guarded(plan, torch.ones(4, GROUPS), layout, 0.5, 3.0, 3.0)
    assert new.token_weight_C_M_V is not None
    rows = tensor([[0.0] * 4, [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3]])
    assert_close(new.token_weight_C_M_V[:, 0].T, rows)
    assert new.metrics == {"token_rows_of_one_kept": 1}


def test_of_two_sites_each_keeps_half_a_say_in_a_word_of_its_own() -> None:
    layout = Layout(1, 3, SIZES, token_rows=(TokenRows(0, 4, 1),))
    token_C_M_V = tensor([[[1.0, 0.0, 0.5, 0.0]], [[0.0, 1.0, 0.5, 0.0]]])
    plan = Plan(("a", "b"), torch.full((2, GROUPS), 0.5), token_weight_C_M_V=token_C_M_V)
    new = guarded(plan, torch.ones(2, GROUPS), layout, 0.5, 3.0, 3.0)
    assert new.token_weight_C_M_V is not None
    assert new.token_weight_C_M_V[:, 0].T.tolist() == [[0.5, 0.5]] * 3 + [[0.0, 0.0]]
    assert new.metrics == {"token_rows_of_one_kept": 0}


WORDS = replace(LAYOUT, sizes=SIZES | {EMBEDDINGS: 7}, token_rows=(TokenRows(1, 3, 2),))  # a value of no token's before
MET = tensor([[[True, True, True]], [[True, False, True]], [[True, False, False]], [[True, False, False]]])
PLANTED: dict[str, Weights] = {
    "liar": {EMBEDDINGS: tensor([0.0, 3, 4, 600, 800, 600, 800])},
    **{name: {EMBEDDINGS: tensor([0.0, 3, 4, 0, 0, 0, 0])} for name in "bcd"},
}


def planted() -> tuple[Plan, dict[str, Tensor]]:
    """A guarded plan: all met token 0, two of them token 2, and the liar alone token 1."""
    norms = {
        name: tensor([float(update[g].norm()) if g in update else 0.0 for g in WORDS.groups])
        for name, update in PLANTED.items()
    }
    weight_C_G = torch.full((4, GROUPS), 0.25)
    token_C_M_V = MET / MET.sum(0)
    plan = Plan(tuple(PLANTED), weight_C_G, token_weight_C_M_V=token_C_M_V, met_C_M_V=MET)
    return guarded(plan, torch.stack(list(norms.values())), WORDS, 0.5, 3.0, 1e9), norms


def test_rows_of_tokens_that_few_met_are_bounded_and_others_are_not() -> None:
    plan, _ = planted()
    assert plan.row_most_M_V is not None
    typical = 5.0  # lengths 1414 / √3, 5 / √2, 5, 5: the lower one of the middle two
    assert_close(plan.row_most_M_V, tensor([[torch.inf, typical, typical]]))
    two = replace(plan, clients=plan.clients[:2], weight_C_G=plan.weight_C_G[:2], token_weight_C_M_V=MET[:2] / 2)
    alone = guarded(replace(two, met_C_M_V=MET[:2], factor_C_G=None), torch.ones(2, GROUPS), WORDS, 0.5, 3.0, 2.0)
    assert alone.row_most_M_V is not None
    assert alone.row_most_M_V.isinf().all()  # of two a liar is half: nothing is typical


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("rule", ["clip", "centered_clip", "trimmed_mean", "median", "krum"])
def test_a_trigger_of_one_does_not_move_and_of_two_by_a_typical_row_at_most(
    rule: Robust, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else trains the liar's token, so that a norm of all embeddings is all that would hold it otherwise."""
    monkeypatch.setattr(average, "CHUNK", chunk)
    plan, norms = planted()
    if rule == "clip":
        total = StreamingSum(WORDS, plan, norms, "float32", by_sites=True)
    else:
        total = make_sum(rule, WORDS, plan, norms, "float32", hostile=0.3, radius=1e9, center={})
    for name, update in PLANTED.items():
        groups = {g: Packed(update.get(g, torch.zeros(WORDS.sizes[g]))) for g in WORDS.groups}
        assert total.add(Update(name, 1, groups)) is None
    change = total.result({EMBEDDINGS: torch.zeros(7)})[EMBEDDINGS]
    assert_close(change[1:3], tensor([3.0, 4.0]))  # as all would have it
    assert change[3:5].tolist() == [0.0, 0.0]
    assert float(change[5:7].norm()) <= 5 / 2 + 1e-4


def test_a_word_of_few_is_told_by_who_met_it_whatever_its_weights() -> None:
    """With vocabulary_holders = 2 all have weight in the row of a word that one alone met: FedAvg's."""
    plan, _ = planted()
    everybody = replace(plan, token_weight_C_M_V=torch.full((4, 1, 3), 0.25), row_most_M_V=None, factor_C_G=None)
    new = guarded(everybody, torch.ones(4, GROUPS), WORDS, 0.5, 3.0, 2.0)
    assert new.row_most_M_V is not None
    assert new.row_most_M_V.isfinite().tolist() == [[False, True, True]]
