"""Low-rank averages: the dense sum's best approximation by numpy's SVD, found without ever forming the dense sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from fedalign.maths import low_rank as module
from fedalign.maths.average import StreamingSum
from fedalign.maths.low_rank import Pair, Stack, best_factors, lost_products, owed, pair_in, plain_ranges
from fedalign.maths.rounding import pack, unpack
from fedalign.protocol import Factors, Layout, ParameterGroup, Plan, Update, Weights, WireDtype

EXPERTS = [ParameterGroup("expert", 0, expert) for expert in range(3)]
GATE_UP = Factors(start_A=5, start_B=5 + 4 * 12, rank=4, inputs=12, outputs=20)
DOWN = Factors(start_B=300, start_A=300 + 12 * 3, rank=3, inputs=10, outputs=12)
SIZE = 366 + 140  # of which int8 makes two blocks
PLAIN = [(0, 5), (133, 300), (366, SIZE)]  # no factors
GROUPS = Layout(1, 3, {}).groups
SIZES = {group: SIZE if group.kind == "expert" else 7 for group in GROUPS}
LAYOUT = Layout(1, 3, SIZES, dict.fromkeys(EXPERTS, (GATE_UP, DOWN)))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair_of(outputs: int, inputs: int, rank: int, seed: int) -> Pair:
    return normal(outputs, rank, seed=seed), normal(rank, inputs, seed=seed + 1000)


def product(pair: Pair) -> Tensor:
    B, A = pair
    return B.double() @ A.double()


def dense_sum(terms: Sequence[tuple[float, Pair]]) -> Tensor:
    return torch.stack([coefficient * product(pair) for coefficient, pair in terms]).sum(dim=0)


def numpy_best(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest matrix of that rank, and all singular values."""
    U, S, V = np.linalg.svd(dense.numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :rank] * S[:rank]) @ V[:rank]), torch.from_numpy(S)


def assert_best(pair: Pair, dense: Tensor, rank: int) -> None:
    """The pair is the best of its rank, evenly split, strongest first, and as far from `dense` as theory says."""
    B, A = pair
    best, S = numpy_best(dense, rank)
    scale = float(S[0])
    assert B.dtype == A.dtype == torch.float32
    assert (B.shape, A.shape) == ((len(dense), rank), (rank, dense.shape[1]))
    assert_close(product(pair), best, atol=2e-6 * scale, rtol=0)
    assert float((product(pair) - dense).norm()) == pytest.approx(float(S[rank:].norm()), abs=5e-6 * scale)
    count = min(rank, len(S))
    assert_close(B.double().norm(dim=0).square()[:count], S[:count], atol=1e-5 * scale, rtol=0)
    used = S[:count] > 1e-5 * scale
    assert_close(A.double().norm(dim=1).square()[:count][used], S[:count][used], atol=1e-5 * scale, rtol=0)


SHAPES = [
    (20, 12, [4, 4], 4),  # outputs, inputs, ranks of the terms, rank wanted
    (12, 20, [4, 4, 4], 4),
    (30, 30, [2, 8, 5], 6),  # sites of different ranks
    (16, 16, [1], 1),
    (9, 40, [4, 4, 4, 4], 4),  # together wider than one side
    (7, 6, [4, 4, 4, 4], 3),  # than both
    (5, 8, [2, 3], 6),  # wanted rank above what the matrix can have
]


@pytest.mark.parametrize(("outputs", "inputs", "ranks", "rank"), SHAPES)
@pytest.mark.parametrize("coefficients", [[0.5, 0.3, 0.2, 0.1], [1.7, -0.6, 0.4, -1.1]])
def test_the_best_of_its_rank(
    outputs: int, inputs: int, ranks: list[int], rank: int, coefficients: list[float]
) -> None:
    pairs = [pair_of(outputs, inputs, r, seed) for seed, r in enumerate(ranks)]
    terms = list(zip(coefficients[: len(pairs)], pairs, strict=True))
    assert_best(best_factors(terms, normal(rank, inputs, seed=99)), dense_sum(terms), rank)


@settings(max_examples=60, deadline=None)
@given(
    outputs=st.integers(1, 24),
    inputs=st.integers(1, 24),
    ranks=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    rank=st.integers(1, 10),
    data=st.data(),
)
def test_the_best_of_its_rank_whatever_the_shapes(
    outputs: int, inputs: int, ranks: list[int], rank: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 10_000))
    size = st.floats(0.01, 3).flatmap(lambda k: st.sampled_from([k, -k]))
    terms = [(data.draw(size), pair_of(outputs, inputs, r, seed + i)) for i, r in enumerate(ranks)]
    assert_best(best_factors(terms, normal(rank, inputs, seed=seed)), dense_sum(terms), rank)


def test_by_hand() -> None:
    """2·diag(3, 0) − 1·diag(0, 4) = diag(6, −4): its best of rank one is diag(6, 0)."""
    first = torch.tensor([[3.0], [0.0]]), torch.tensor([[1.0, 0.0]])
    second = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 4.0]])
    B, A = best_factors([(2, first), (-1, second)], spare_A=torch.ones(1, 2))
    assert_close(B, torch.tensor([[6.0**0.5], [0.0]]))
    assert_close(A, torch.tensor([[6.0**0.5, 0.0]]))
    B, A = best_factors([(2, first), (-1, second)], spare_A=torch.ones(2, 2))
    assert_close(B, torch.tensor([[6.0**0.5, 0.0], [0.0, 2.0]]))
    assert_close(A, torch.tensor([[6.0**0.5, 0.0], [0.0, -2.0]]))


def test_signs_do_not_depend_on_the_svd() -> None:
    """Flipping or rotating the components of the terms changes nothing in the product, so nothing in the result."""
    terms = [(0.5, pair_of(20, 12, 4, 0)), (0.7, pair_of(20, 12, 4, 1))]
    spare = normal(4, 12, seed=2)
    B, A = best_factors(terms, spare)
    assert (B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all()
    for turn in (torch.diag(torch.tensor([-1.0, 1.0, -1.0, -1.0])), torch.linalg.qr(normal(4, 4, seed=3))[0]):
        turned = [(k, (b @ turn, turn.T @ a)) for k, (b, a) in terms]
        other_B, other_A = best_factors(turned, spare)
        assert_close(other_B, B, atol=1e-5, rtol=1e-5)
        assert_close(other_A, A, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own", [1, 3])
def test_missing_components_can_still_be_trained(own: int) -> None:
    """Columns of B are zero there, but rows of A are not, and all rows together stay linearly independent."""
    spare = normal(5, 30, seed=0)
    B, A = normal(20, own, seed=1), normal(own, 30, seed=2)
    terms = [(0.4, (B, A)), (0.6, (B @ normal(own, own, seed=3), A))]
    new_B, new_A = best_factors(terms, spare)
    assert_best((new_B, new_A), dense_sum(terms), 5)
    assert torch.equal(new_B[:, own:], torch.zeros(20, 5 - own))
    assert (torch.linalg.svdvals(new_A) > 0.1).all()
    assert_close(new_A[own:] @ new_A[:own].T, torch.zeros(5 - own, own), atol=1e-4, rtol=0)
    known = torch.cat([spare, new_A[:own]]).T  # nothing is made up: old rows, less what is in use
    fitted = known @ torch.linalg.lstsq(known, new_A[own:].T).solution
    assert_close(fitted, new_A[own:].T, atol=1e-4, rtol=1e-4)


def test_a_component_comes_to_life_again() -> None:
    """One step of gradient descent on a loss that wants rank two moves the second component away from zero."""
    once = normal(6, 1, seed=0), normal(1, 5, seed=1)
    B, A = (factor.requires_grad_() for factor in best_factors([(1.0, once)], normal(2, 5, seed=2)))
    loss = (B @ A - normal(6, 5, seed=3)).square().sum()
    loss.backward()
    assert B.grad is not None
    assert float(B.grad[:, 1].norm()) > 0.1


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_terms_that_cancel_leave_zeros_and_not_noise(length: float) -> None:
    B, A = pair_of(20, 12, 4, 0)
    turn = torch.linalg.qr(normal(4, 4, seed=3).double())[0]
    same = length * (B.double() @ turn), turn.T @ A.double()
    spare = normal(4, 12, seed=5)
    zero_B, kept_A = best_factors([(1.0, (length * B.double(), A)), (-1.0, same)], spare)
    assert torch.equal(zero_B, torch.zeros(20, 4))
    assert torch.equal(kept_A, spare)


# groups: two pairs, and values that are no factors


def weights_of(seed: int, scale: float = 1.0) -> Weights:
    return {g: scale * normal(LAYOUT.sizes[g], seed=seed + 10 * i) for i, g in enumerate(LAYOUT.groups)}


def update_of(client: str, seed: int, dtype: WireDtype = "float32", scale: float = 0.3) -> Update:
    values = weights_of(seed, scale)
    return Update(client, 1, {group: pack(flat, dtype, seed) for group, flat in values.items()})


def uniform_plan(*shares: float, factor: Tensor | None = None) -> Plan:
    weight_C_G = torch.tensor(shares).unsqueeze(1).expand(-1, len(LAYOUT.groups)).contiguous()
    return Plan(tuple("abcdefgh"[: len(shares)]), weight_C_G, factor)


def exact_sum(plan: Plan, updates: Sequence[Update], dtype: WireDtype = "float32") -> StreamingSum:
    norms = {u.client: torch.stack([unpack(u.groups[g]).norm() for g in LAYOUT.groups]) for u in updates}
    missing = {client: torch.zeros(len(LAYOUT.groups)) for client in plan.clients}
    total = StreamingSum(LAYOUT, plan, missing | norms, dtype, average="exact")
    assert [total.add(update) for update in updates] == [None] * len(updates)
    return total


def assert_dense(new: Weights, old: Weights, steps: Sequence[tuple[float, Update]]) -> None:
    """What `exact` has to give for all experts, by dense arithmetic: Σ k (B_c·A_c − B·A) added to B·A, then cut."""
    for group in EXPERTS:
        flats = [(k, old[group].double() + unpack(update.groups[group]).double()) for k, update in steps]
        for place in (GATE_UP, DOWN):
            before = product(pair_in(old[group], place))
            change = torch.stack([k * (product(pair_in(flat, place)) - before) for k, flat in flats]).sum(dim=0)
            assert_best(pair_in(new[group], place), before + change, place.rank)
        for start, end in PLAIN:
            change = torch.stack([k * unpack(update.groups[group])[start:end] for k, update in steps]).sum(dim=0)
            assert_close(new[group][start:end], old[group][start:end] + change, atol=1e-5, rtol=1e-5)


def test_what_is_no_factor_is_known() -> None:
    assert plain_ranges([GATE_UP, DOWN], SIZE) == PLAIN
    assert plain_ranges([], 3) == [(0, 3)]
    assert plain_ranges([Factors(0, 2, 1, 2, 3)], 5) == []
    for place, size in [(Factors(0, 1, 1, 2, 3), 5), (Factors(0, 2, 1, 2, 3), 4), (Factors(-1, 2, 1, 2, 3), 5)]:
        with pytest.raises(ValueError, match="must lie apart, within 0 and"):
            plain_ranges([place], size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_every_expert_gets_the_best_of_the_weighted_products(dtype: WireDtype) -> None:
    updates = [update_of(client, seed, dtype) for seed, client in enumerate("abc")]
    old = weights_of(seed=500)
    new = exact_sum(uniform_plan(0.5, 0.3, 0.2), updates, dtype).result(old)
    assert_dense(new, old, list(zip([0.5, 0.3, 0.2], updates, strict=True)))


def test_each_expert_has_weights_of_its_own() -> None:
    weight_C_G = torch.zeros(2, len(LAYOUT.groups))
    weight_C_G[:, -3:] = torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.75, 0.0]])
    asked = [EXPERTS[:2], EXPERTS[1:2]]
    everything = [update_of("a", 0), update_of("b", 1)]
    updates = [
        Update(u.client, 1, {g: u.groups[g] for g in groups}) for u, groups in zip(everything, asked, strict=True)
    ]
    norms = {u.client: torch.stack([unpack(u.groups[g]).norm() for g in LAYOUT.groups]) for u in everything}
    total = StreamingSum(LAYOUT, Plan(("a", "b"), weight_C_G), norms, "float32", average="exact")
    assert [total.add(update) for update in updates] == [None, None]
    old = weights_of(seed=500)
    new = total.result(old)
    for group, shares in zip(EXPERTS[:2], [(1.0, 0.0), (0.25, 0.75)], strict=True):
        for place in (GATE_UP, DOWN):
            moved = [pair_in(old[group] + unpack(update.groups[group]), place) for update in everything]
            assert_best(pair_in(new[group], place), dense_sum(list(zip(shares, moved, strict=True))), place.rank)
    assert all(new[group] is old[group] for group in LAYOUT.groups if group not in EXPERTS[:2])


@pytest.mark.parametrize("factors", [[0.4, 0.4], [1.5, 0.2], [-0.5, 1.0], [-1.0, 0.0]])
def test_factors_clip_stretch_and_turn_products(factors: list[float]) -> None:
    """Coefficients no longer sum to 1, so the old product keeps a part."""
    updates = [update_of("a", 0), update_of("b", 1)]
    factor_C_G = torch.tensor(factors).unsqueeze(1).expand(-1, len(LAYOUT.groups)).contiguous()
    old = weights_of(seed=500)
    new = exact_sum(uniform_plan(0.5, 0.5, factor=factor_C_G), updates).result(old)
    assert_dense(new, old, [(0.5 * factor, update) for factor, update in zip(factors, updates, strict=True)])


def test_the_old_pair_drops_out_where_weights_sum_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def watched(terms: Sequence[tuple[float, Pair]], spare_A: Tensor) -> Pair:
        widths.append(len(terms))
        return best_factors(terms, spare_A)

    monkeypatch.setattr(module, "best_factors", watched)
    updates = [update_of(client, seed) for seed, client in enumerate("abc")]
    exact_sum(uniform_plan(0.1, 0.2, 0.7), updates).result(weights_of(seed=500))  # not quite 1 in float32
    exact_sum(uniform_plan(0.1, 0.2, 0.6), updates).result(weights_of(seed=500))
    assert widths == [3] * 6 + [4] * 6


def test_a_lost_client_is_made_up_for() -> None:
    updates = [update_of("a", 0), update_of("c", 2)]
    old = weights_of(seed=500)
    total, other = (exact_sum(uniform_plan(0.5, 0.25, 0.25), updates) for _ in range(2))
    assert_dense(total.result(old), old, [(0.5 / 0.75, updates[0]), (0.25 / 0.75, updates[1])])
    assert total.unchanged(0.8) == list(LAYOUT.groups)
    assert all(value is old[group] for group, value in other.result(old, 0.8).items())


def test_the_order_of_arrival_does_not_matter() -> None:
    updates = [update_of(client, seed) for seed, client in enumerate("abcd")]
    old = weights_of(seed=500)
    totals = [exact_sum(uniform_plan(0.4, 0.1, 0.2, 0.3), order) for order in (updates, updates[::-1])]
    first, second = (total.result(old) for total in totals)
    for group in EXPERTS:
        assert torch.equal(first[group], second[group])
        assert torch.equal(old[group], weights_of(seed=500)[group])


def test_what_arrived_may_be_reused_by_its_sender() -> None:
    updates, old = [update_of("a", 0), update_of("b", 1)], weights_of(seed=500)
    total, other = (exact_sum(uniform_plan(0.5, 0.5), updates) for _ in range(2))
    before = other.result(old)
    for update in updates:
        for packed in update.groups.values():
            packed.values.zero_()
    after = total.result(old)
    assert all(torch.equal(after[group], before[group]) for group in EXPERTS)


def test_without_factors_exact_is_the_sum() -> None:
    updates, old = [update_of("a", 0), update_of("b", 1)], weights_of(seed=500)
    plan = uniform_plan(0.3, 0.7)
    exact = exact_sum(plan, updates).result(old)
    norms = {u.client: torch.full((len(LAYOUT.groups),), 1e3) for u in updates}
    usual = StreamingSum(LAYOUT, plan, norms, "float32")
    for update in updates:
        usual.add(update)
    summed = usual.result(old)
    for group in LAYOUT.groups:
        if group not in EXPERTS:
            assert torch.equal(exact[group], summed[group])
        else:
            assert all(torch.equal(exact[group][a:b], summed[group][a:b]) for a, b in PLAIN)
            assert not torch.allclose(exact[group], summed[group])


def test_the_mean_of_factors_is_not_the_mean_of_products() -> None:
    """Two sites that learnt opposite factors of the same product: their mean is that product, and not nothing."""
    B, A = pair_of(20, 12, 4, 0)
    old = {g: torch.zeros(LAYOUT.sizes[g]) for g in LAYOUT.groups}
    flats = {"a": torch.zeros(SIZE), "b": torch.zeros(SIZE)}
    for sign, flat in zip((1, -1), flats.values(), strict=True):
        for target, source in zip(pair_in(flat, GATE_UP), (B, A), strict=True):
            target.copy_(sign * source)
    updates = [Update(c, 1, {g: pack(flats[c] if g in EXPERTS else old[g], "float32", 0) for g in old}) for c in flats]
    new = exact_sum(uniform_plan(0.5, 0.5), updates).result(old)
    assert_close(product(pair_in(new[EXPERTS[0]], GATE_UP)), product((B, A)), atol=1e-5, rtol=1e-5)


def test_a_pair_that_nobody_moved_stays_bit_by_bit() -> None:
    old = weights_of(seed=500)
    still = {g: torch.zeros(LAYOUT.sizes[g]) for g in LAYOUT.groups}
    for flat in still.values():
        flat[0] = 0.5
    updates = [Update(client, 1, {g: pack(flat, "float32", 0) for g, flat in still.items()}) for client in "ab"]
    new = exact_sum(uniform_plan(0.5, 0.5), updates).result(old)
    for group in EXPERTS:
        assert torch.equal(new[group][1:], old[group][1:])
        assert float(new[group][0]) == float(old[group][0] + 0.5)


def sorted_start() -> Weights:
    """Weights as an exact round leaves them."""
    return exact_sum(uniform_plan(1.0), [update_of("a", 7)]).result(weights_of(seed=500))


def test_sites_of_smaller_rank_train_the_strongest_components() -> None:
    """Site a trains all components of each pair, b two and c one; the rest of their updates is zero."""
    old = sorted_start()
    for group in EXPERTS:
        for place in (GATE_UP, DOWN):
            strength = [
                float(b.norm() * a.norm()) for b, a in zip(*transposed(pair_in(old[group], place)), strict=True)
            ]
            assert strength == sorted(strength, reverse=True)
            assert strength[0] > 1.2 * strength[-1] > 0
    updates = []
    for client, seed, own in [("a", 0, 4), ("b", 1, 2), ("c", 2, 1)]:
        full = weights_of(seed, 0.3)
        for group in EXPERTS:
            for place in (GATE_UP, DOWN):
                B, A = pair_in(full[group], place)
                B[:, own:] = 0
                A[own:] = 0
        updates.append(Update(client, 1, {g: pack(flat, "float32", 0) for g, flat in full.items()}))
    new = exact_sum(uniform_plan(0.5, 0.3, 0.2), updates).result(old)
    assert_dense(new, old, list(zip([0.5, 0.3, 0.2], updates, strict=True)))
    alone = exact_sum(uniform_plan(1.0), [Update("a", 1, updates[2].groups)]).result(old)
    B, A = pair_in(old[EXPERTS[0]], GATE_UP)  # of site c by hand: all but the first component are still the old ones
    move_B, move_A = pair_in(unpack(updates[2].groups[EXPERTS[0]]), GATE_UP)
    by_hand = product((B[:, :1] + move_B[:, :1], A[:1] + move_A[:1])) + product((B[:, 1:], A[1:]))
    assert_close(product(pair_in(alone[EXPERTS[0]], GATE_UP)), by_hand, atol=1e-4, rtol=1e-4)


def transposed(pair: Pair) -> tuple[Tensor, Tensor]:
    """Columns of B and rows of A as first axes."""
    return pair[0].T, pair[1]


def test_a_second_round_goes_on_from_the_first() -> None:
    """Two rounds of one site are its two updates, although the factors in between are other ones."""
    start = {g: torch.zeros(LAYOUT.sizes[g]) for g in LAYOUT.groups}
    for group in EXPERTS:  # B = 0, as LoRA starts
        for place in (GATE_UP, DOWN):
            pair_in(start[group], place)[1].copy_(normal(place.rank, place.inputs, seed=place.start_A))
    first = exact_sum(uniform_plan(1.0), [update_of("a", 0)]).result(start)
    expected = start[EXPERTS[0]] + unpack(update_of("a", 0).groups[EXPERTS[0]])
    for place in (GATE_UP, DOWN):
        assert_close(
            product(pair_in(first[EXPERTS[0]], place)), product(pair_in(expected, place)), atol=1e-5, rtol=1e-5
        )
    second = exact_sum(uniform_plan(1.0), [update_of("a", 1)]).result(first)
    assert_dense(second, first, [(1.0, update_of("a", 1))])


def test_streams_have_no_exact_average() -> None:
    plan = Plan(("a",), torch.ones(1, 9), streams={"control": torch.ones(1, 9)})
    with pytest.raises(ValueError, match=r'streams control: tuning\.average = "exact" has none'):
        StreamingSum(LAYOUT, plan, {"a": torch.ones(9)}, "float32", average="exact")
    StreamingSum(LAYOUT, plan, {"a": torch.ones(9)}, "float32")


def test_bad_updates_are_refused_as_ever() -> None:
    good, old = [update_of("a", 0), update_of("b", 1)], weights_of(seed=500)
    bad = update_of("a", 0)
    bad.groups[EXPERTS[1]].values[60] = torch.nan
    norms = {u.client: torch.stack([unpack(u.groups[g]).norm() for g in LAYOUT.groups]) for u in good}
    total = StreamingSum(LAYOUT, uniform_plan(0.5, 0.5), norms, "float32", average="exact")
    failure = total.add(bad)
    assert failure is not None
    assert failure.reason == "expert[0,1]: not finite"
    assert total.add(good[1]) is None
    new = total.result(old)
    moved = pair_in(old[EXPERTS[1]] + unpack(good[1].groups[EXPERTS[1]]), DOWN)
    assert_close(product(pair_in(new[EXPERTS[1]], DOWN)), product(moved), atol=1e-4, rtol=1e-4)


# memory


def allocations(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest single allocation, and the most that was live at a time, by torch's own allocator.

    All of it counts, with the work space inside of decompositions.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    inner: Any = recorded.profiler
    changes = [event.nbytes() for event in inner.kineto_results.events() if event.name() == "[memory]"]
    return max(changes), max(accumulate(changes))


def test_the_allocator_is_really_watched() -> None:
    largest, peak = allocations(lambda: torch.zeros(300, 1000).double())
    assert largest == 2_400_000
    assert peak >= 3_600_000


WIDE, NARROW = 1024, 768


def large_layout(experts: int, rank: int) -> Layout:
    """Experts of two products each, 1024 × 768 and 768 × 1024."""
    size = rank * (WIDE + NARROW)
    up = Factors(start_A=0, start_B=rank * NARROW, rank=rank, inputs=NARROW, outputs=WIDE)
    down = Factors(start_A=size, start_B=size + rank * WIDE, rank=rank, inputs=WIDE, outputs=NARROW)
    sizes = {g: 2 * size if g.kind == "expert" else 0 for g in Layout(1, experts, {}).groups}
    return Layout(1, experts, sizes, {g: (up, down) for g in sizes if g.kind == "expert"})


@pytest.mark.parametrize(("rank", "clients"), [(4, 3), (8, 6)])
def test_an_exact_average_costs_what_the_stacked_factors_cost(rank: int, clients: int) -> None:
    """No product is ever written out; beside the factors of all clients there is work space for one product's."""
    layout, names = large_layout(experts=12, rank=rank), tuple("abcdefgh"[:clients])
    old = {group: normal(size, seed=7) for group, size in layout.sizes.items()}
    updates = [Update(c, 1, {g: pack(old[g] * i, "float32", 0) for g in layout.factors}) for i, c in enumerate(names)]
    shape = clients, len(layout.groups)
    plan = Plan(names, torch.full(shape, 1 / clients), torch.full(shape, 0.9))  # the old product keeps a tenth
    norms = {client: torch.full(shape[1:], 1e6) for client in names}

    def average() -> None:
        total = StreamingSum(layout, plan, norms, "float32", average="exact")
        assert [total.add(update) for update in updates] == [None] * clients
        total.result(old)

    average()  # what libraries set up once does not count
    largest, peak = allocations(average)
    stack = 4 * (clients + 1) * rank * (WIDE + NARROW)  # bytes of one product's factors side by side, in float32
    products = 2 * len(layout.factors)  # what is kept and the new weights: together a stack of each
    assert largest < 4 * WIDE * NARROW / 2
    assert peak <= (products + 6) * stack


def test_a_stack_may_be_empty() -> None:
    old = normal(SIZE, seed=0)
    assert torch.equal(Stack((GATE_UP, DOWN), SIZE).result(old, 1.0), old)


def outside(values: Tensor) -> Tensor:
    return torch.cat([values[start:end] for start, end in PLAIN])


def test_what_is_owed_of_a_product_is_made_up_for_and_plain_values_are_as_they_were() -> None:
    """To first order, where B has all its columns: P = b·A + B·a has no remainder in the columns of B or rows of A."""
    start, lost = normal(SIZE, seed=1), 1e-3 * normal(SIZE, seed=2)
    change = owed([GATE_UP, DOWN], start, lost)
    torch.testing.assert_close(outside(change), outside(lost), rtol=0, atol=0)
    for place in (GATE_UP, DOWN):
        (B, A), (b, a) = (tuple(one.double() for one in pair_in(values, place)) for values in (start, change))
        wanted = product(pair_in(lost, place))
        rest = wanted - (b @ A + B @ a)
        scale = float(wanted.norm())
        assert float((rest @ torch.linalg.pinv(A)).norm()) < 1e-5 * scale
        assert float((torch.linalg.pinv(B) @ rest).norm()) < 1e-5 * scale


def test_nothing_is_owed_through_a_factor_that_is_zero() -> None:
    """As B is before LoRA's first step: what is owed goes into B alone, and stays finite."""
    start, lost = normal(SIZE, seed=1), 1e-3 * normal(SIZE, seed=2)
    pair_in(start, DOWN)[0].zero_()
    b, a = pair_in(owed([DOWN], start, lost), DOWN)
    assert bool(b.any())
    assert not a.any()


def test_what_rounding_lost_of_products_is_their_difference() -> None:
    start, trained, sent = (normal(SIZE, seed=seed) for seed in (1, 2, 3))
    lost = lost_products([GATE_UP, DOWN], start, trained, sent, None)
    torch.testing.assert_close(outside(lost), outside(trained - sent))
    for place in (GATE_UP, DOWN):
        mine, theirs = (product(pair_in(start + change, place)) for change in (trained, sent))
        assert_best(pair_in(lost, place), mine - theirs, place.rank)
    more = lost_products([GATE_UP, DOWN], start, trained, sent, lost)
    torch.testing.assert_close(outside(more), outside(trained + lost - sent))
    for place in (GATE_UP, DOWN):
        assert_close(product(pair_in(more, place)), 2 * product(pair_in(lost, place)), rtol=1e-4, atol=1e-4)


def drift(feedback: str, rounds: int = 20) -> float:
    """How far a client's products that were summed are from those it trained, of their norm: int4, 20 rounds."""
    factors = [GATE_UP, DOWN]
    start, before = 0.3 * normal(SIZE, seed=0), None
    for place in factors:
        pair_in(start, place)[0].zero_()  # as LoRA begins
    trained_sum, sent_sum = ([torch.zeros(one.outputs, one.inputs).double() for one in factors] for _ in range(2))
    for number in range(rounds):
        trained = 0.02 * normal(SIZE, seed=1 + number)
        delta = trained
        if before is not None:
            delta = trained + (owed(factors, start, before) if feedback == "products" else before)
        sent = unpack(pack(delta, "int4", number))
        if feedback == "products":
            before = lost_products(factors, start, trained, sent, before)
        elif feedback == "values":
            before = delta - sent
        new = start.clone()
        for place, all_trained, all_sent in zip(factors, trained_sum, sent_sum, strict=True):
            old = product(pair_in(start, place))
            all_trained.add_(product(pair_in(start + trained, place)) - old)
            all_sent.add_(product(pair_in(start + sent, place)) - old)
            pair = pair_in(start + sent, place)
            for into, best in zip(pair_in(new, place), best_factors([(1.0, pair)], pair[1]), strict=True):
                into.copy_(best)
        start = new
    lost = sum(float((a - b).square().sum()) for a, b in zip(trained_sum, sent_sum, strict=True))
    whole = sum(float(a.square().sum()) for a in trained_sum)
    return math.sqrt(lost / whole)


def test_feedback_of_products_keeps_their_sum() -> None:
    """Factors that were lost are of no use a round later: the server has made others of the product meanwhile."""
    assert drift("products") < 0.6 * drift("none")
    assert drift("products") < 0.6 * drift("values")
