"""The streaming sum: textbook numbers, what arrived, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.maths import average as module
from fedalign.maths.average import StreamingSum
from fedalign.maths.rounding import pack, unpack
from fedalign.protocol import (
    EMBEDDINGS,
    HEAD,
    SHARED,
    Layout,
    Packed,
    ParameterGroup,
    Plan,
    TokenRows,
    Update,
    WireDtype,
)

GATE, EXPERT = ParameterGroup("gate"), ParameterGroup("expert")
LAYOUT = Layout(1, 1, {SHARED: 600, EMBEDDINGS: 0, HEAD: 0, GATE: 0, EXPERT: 300})  # the rest is frozen


def normal(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def plan_of(*rows: Sequence[float], clip: Tensor | None = None) -> Plan:
    """Of each client, its weight in shared, gate and expert."""
    return Plan(tuple("abcdefgh"[: len(rows)]), table(tensor(rows)), clip)


def table(weight_C_3: Tensor) -> Tensor:
    shared_C, gate_C, expert_C = weight_C_3.unbind(1)
    return LAYOUT.table(shared_C, gate_C[:, None, None], expert_C[:, None, None])


def update_of(client: str, seed: int, dtype: WireDtype = "float32", expert: bool = True) -> Update:
    groups = {SHARED: pack(normal(600, seed), dtype, seed)}
    if expert:
        groups[EXPERT] = pack(normal(300, seed + 100), dtype, seed)
    return Update(client, 1, groups)


def norms_of(updates: Sequence[Update]) -> dict[str, Tensor]:
    def norm(update: Update, group: ParameterGroup) -> float:
        return float(unpack(update.groups[group]).norm()) if group in update.groups else 0.0

    return {u.client: tensor([norm(u, group) for group in LAYOUT.groups]) for u in updates}


def old_weights() -> dict[ParameterGroup, Tensor]:
    return {group: torch.empty(0) for group in LAYOUT.groups} | {SHARED: normal(600, 50), EXPERT: normal(300, 51)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both groups are then more than one chunk, and none a whole number of them."""
    monkeypatch.setattr(module, "CHUNK", 256)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("bfloat16", 1e-6), ("int8", 1e-6), ("int4", 1e-6)])
def test_fedavg_is_the_textbook_weighted_mean(dtype: WireDtype, rounding: float) -> None:
    share = torch.tensor([5, 1, 2, 12], dtype=torch.float64) / 20
    updates = [update_of(client, seed, dtype) for seed, client in enumerate("abcd")]
    total = StreamingSum(LAYOUT, plan_of(*[[float(s)] * 3 for s in share]), norms_of(updates), dtype)
    assert [total.add(update) for update in updates] == [None] * 4
    old = old_weights()
    new = total.result(old)
    for group in (SHARED, EXPERT):
        mean = sum(s * unpack(u.groups[group]).double() for s, u in zip(share, updates, strict=True))
        assert_close(new[group], (old[group].double() + mean).float(), atol=rounding, rtol=rounding)
    assert new[GATE] is old[GATE]
    assert total.unchanged() == []


def test_a_lost_client_is_made_up_for_by_those_that_arrived() -> None:
    updates = [update_of("a", 0), update_of("b", 1), update_of("c", 2)]
    plan = plan_of([0.5, 0, 0.2], [0.25, 0, 0.2], [0.25, 0, 0.6])
    total, other = (StreamingSum(LAYOUT, plan, norms_of(updates), "float32") for _ in range(2))
    for update in updates[:2]:
        total.add(update)
        other.add(update)
    old = old_weights()
    new = total.result(old)
    assert_close(new[SHARED], old[SHARED] + (0.5 * normal(600, 0) + 0.25 * normal(600, 1)) / 0.75)
    assert new[EXPERT] is old[EXPERT]  # only 0.4 of it arrived
    assert total.unchanged() == [EXPERT]
    assert total.unchanged(min_arrived=0.4) == []
    assert_close(other.result(old, 0.4)[EXPERT], old[EXPERT] + (normal(300, 100) + normal(300, 101)) / 2)


def test_exactly_half_is_enough_and_nothing_never_is() -> None:
    updates = [update_of("a", 0), update_of("b", 1)]
    total = StreamingSum(LAYOUT, plan_of([0.5, 0, 0.0], [0.5, 0, 1.0]), norms_of(updates), "float32")
    total.add(update_of("a", 0, expert=False))
    assert total.unchanged(0.5) == [EXPERT]
    assert total.unchanged(0.0) == [EXPERT]


def test_clip_factors_shorten_and_never_enter_the_normaliser() -> None:
    updates = [update_of("a", 0), update_of("b", 1)]
    clip = table(tensor([[1.0, 1.0, 0.1], [1.0, 1.0, 1.0]]))
    plan = plan_of([0.5, 0.0, 0.5], [0.5, 0.0, 0.5], clip=clip)
    old = old_weights()
    total = StreamingSum(LAYOUT, plan, norms_of(updates), "float32")
    for update in updates:
        total.add(update)
    assert_close(total.result(old)[EXPERT], old[EXPERT] + 0.05 * normal(300, 100) + 0.5 * normal(300, 101))
    alone = StreamingSum(LAYOUT, plan, norms_of(updates), "float32")
    alone.add(updates[0])
    assert_close(alone.result(old)[EXPERT], old[EXPERT] + 0.1 * normal(300, 100))


def test_a_group_nobody_is_asked_for_stays() -> None:
    update = update_of("a", 0, expert=False)
    total = StreamingSum(LAYOUT, plan_of([1.0, 1.0, 0.0]), norms_of([update]), "float32")
    assert total.add(update) is None
    old = old_weights()
    assert total.result(old)[EXPERT] is old[EXPERT]
    assert total.unchanged() == []


def test_inputs_are_left_alone() -> None:
    update, old = update_of("a", 0), old_weights()
    total = StreamingSum(LAYOUT, plan_of([1.0, 1.0, 1.0]), norms_of([update]), "float32")
    total.add(update)
    total.result(old)
    assert_close(update.groups[SHARED].values, normal(600, 0), atol=0, rtol=0)
    assert_close(old[SHARED], normal(600, 50), atol=0, rtol=0)
    with pytest.raises(RuntimeError, match="asked for once"):  # the sums are no more
        total.result(old)


def broken(values: Tensor, group: ParameterGroup = EXPERT, scale: Tensor | None = None) -> Update:
    good = update_of("a", 0)
    return replace(good, groups={**good.groups, group: Packed(values, scale)})


def spoilt(size: int, value: float) -> Tensor:
    values = normal(size, 0 if size == 600 else 100)
    values[size - 1] = value
    return values


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (update_of("x", 0), "not a client of this round's plan"),
        (update_of("a", 0, expert=False), "expert[0,0]: requested but missing"),
        (broken(torch.empty(0), GATE), "gate[0,0]: sent but not requested"),
        (broken(torch.zeros(299)), "expert[0,0]: shape [299], expected [300]"),
        (broken(torch.zeros(300, 1)), "expert[0,0]: shape [300, 1], expected [300]"),
        (broken(torch.zeros(300).double()), "expert[0,0]: dtype torch.float64, expected torch.float32"),
        (broken(torch.zeros(300), scale=torch.ones(2)), "expert[0,0]: a scale with dtype torch.float32"),
        (broken(spoilt(600, torch.nan), SHARED), "shared: not finite"),
        (broken(spoilt(600, torch.inf), SHARED), "shared: not finite"),
        (broken(torch.full((600,), 1e30), SHARED), "shared: norm inf, but its statistics said 24.9079"),
        (broken(1.03 * normal(600, 0), SHARED), "shared: norm 25.6552, but its statistics said 24.9079"),
    ],
)
def test_what_is_refused_says_why_and_leaves_the_sum_alone(update: Update, reason: str) -> None:
    good = [update_of("a", 0), update_of("b", 1)]
    total = StreamingSum(LAYOUT, plan_of([0.5, 0, 0.5], [0.5, 0, 0.5]), norms_of(good), "float32")
    failure = total.add(update)
    assert failure is not None
    assert (failure.client, failure.stage) == (update.client, "update")
    assert failure.reason.startswith(reason)
    assert total.add(good[1]) is None
    old = old_weights()
    clean = StreamingSum(LAYOUT, plan_of([0.5, 0, 0.5], [0.5, 0, 0.5]), norms_of(good), "float32")
    clean.add(good[1])
    assert torch.equal(total.result(old)[SHARED], clean.result(old)[SHARED])


def test_a_bad_group_ends_its_client_but_not_what_came_before() -> None:
    good = [update_of("a", 0), update_of("b", 1)]
    total = StreamingSum(LAYOUT, plan_of([0.5, 0, 0.5], [0.5, 0, 0.5]), norms_of(good), "float32")
    failure = total.add(broken(spoilt(300, torch.nan)))
    assert failure is not None
    assert failure.reason == "expert[0,0]: not finite"
    total.add(good[1])
    new, old = total.result(old_weights()), old_weights()
    assert_close(new[SHARED], old[SHARED] + 0.5 * normal(600, 0) + 0.5 * normal(600, 1))
    assert_close(new[EXPERT], old[EXPERT] + normal(300, 101))


def test_a_second_update_of_a_client_is_refused() -> None:
    update = update_of("a", 0)
    total = StreamingSum(LAYOUT, plan_of([1.0, 1.0, 1.0]), norms_of([update]), "float32")
    total.add(update)
    failure = total.add(update)
    assert failure is not None
    assert failure.reason == "handed over its update twice"


@pytest.mark.parametrize("claimed", [torch.nan, torch.inf, 0.0])
def test_a_claim_that_is_no_length_covers_nothing(claimed: float) -> None:
    total = StreamingSum(LAYOUT, plan_of([1.0, 1.0, 1.0]), {"a": torch.full((5,), claimed)}, "float32")
    assert total.add(update_of("a", 0)) is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_wire_rounding_does_not_make_a_liar(dtype: WireDtype) -> None:
    for seed in range(20):
        values = normal(300, seed) ** 3
        values[7] = 50 * (seed % 2)  # now and then one value dwarfs its block
        update = Update("a", 1, {EXPERT: pack(values, dtype, seed)})
        norm = {"a": tensor([0.0] * 4 + [float(values.norm())])}
        assert StreamingSum(LAYOUT, plan_of([0.0, 0.0, 1.0]), norm, dtype).add(update) is None


def test_int8_must_bring_its_scales() -> None:
    good = update_of("a", 0, "int8")
    for scale, reason in [
        (None, "expert[0,0]: no scale with dtype torch.int8"),
        (torch.ones(3), "expert[0,0]: scale torch.float32 [3], expected torch.float32 [2]"),
    ]:
        bad = replace(good, groups={**good.groups, EXPERT: Packed(good.groups[EXPERT].values, scale)})
        total = StreamingSum(LAYOUT, plan_of([1.0, 1.0, 1.0]), norms_of([good]), "int8")
        failure = total.add(bad)
        assert failure is not None
        assert failure.reason == reason


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_packed_values_that_are_not_finite_are_seen(dtype: WireDtype) -> None:
    update = Update("a", 1, {EXPERT: pack(spoilt(300, torch.nan), dtype, 0)})
    total = StreamingSum(LAYOUT, plan_of([0.0, 0.0, 1.0]), {"a": torch.full((5,), 1e9)}, dtype)
    failure = total.add(update)
    assert failure is not None
    assert failure.reason == "expert[0,0]: not finite"
    old = old_weights()
    assert total.result(old)[EXPERT] is old[EXPERT]


READ, ANSWERED = TokenRows(30, tokens=10, width=30), TokenRows(0, tokens=9, width=5, answers=True)
WORDS = {EMBEDDINGS: 400, HEAD: 47}  # with values before and after the rows
BY_TOKEN = Layout(1, 1, {**LAYOUT.sizes, **WORDS}, token_rows=(READ, ANSWERED))


def words_of(client: str, seed: int, dtype: WireDtype = "float32") -> Update:
    update = update_of(client, seed, dtype)
    words = {group: pack(normal(size, seed + 200), dtype, seed) for group, size in WORDS.items()}
    return replace(update, groups={**update.groups, **words})


def old_words() -> dict[ParameterGroup, Tensor]:
    return old_weights() | {group: normal(size, 52) for group, size in WORDS.items()}


def token_plan(weight_C_M_V: Tensor, clip: Tensor | None = None) -> Plan:
    return replace(plan_of([0.5, 0, 0.5], [0.5, 0, 0.5], clip=clip), token_weight_C_M_V=weight_C_M_V)


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_token_rows_have_weights_of_their_own(dtype: WireDtype) -> None:
    updates = [words_of("a", 0, dtype), words_of("b", 1, dtype)]
    share_M_V = torch.linspace(0, 1, 20).view(2, 10)
    plan = token_plan(torch.stack([share_M_V, 1 - share_M_V]))
    total = StreamingSum(BY_TOKEN, plan, norms_of(updates), dtype)
    assert [total.add(update) for update in updates] == [None, None]
    weight = {group: torch.full((size,), 0.5) for group, size in BY_TOKEN.sizes.items()}
    weight[EMBEDDINGS][30:330] = share_M_V[0].repeat_interleave(30)
    weight[HEAD][:45] = share_M_V[1, :9].repeat_interleave(5)
    old = old_words()
    new = total.result(old)
    for group in (SHARED, EMBEDDINGS, HEAD, EXPERT):
        a, b = (unpack(update.groups[group]) for update in updates)
        assert_close(new[group], old[group] + weight[group] * a + (1 - weight[group]) * b)


def test_rows_of_a_lost_client_stay_and_those_it_shared_are_made_up_for() -> None:
    updates = [words_of("a", 0), words_of("b", 1)]
    of_a_M_V = torch.full((2, 10), 0.5)
    of_a_M_V[0, 3], of_a_M_V[0, 4], of_a_M_V[0, 5] = 0.0, 1.0, 0.4
    plan = token_plan(torch.stack([of_a_M_V, 1 - of_a_M_V]))
    total, other = (StreamingSum(BY_TOKEN, plan, norms_of(updates), "float32") for _ in range(2))
    total.add(updates[0])
    other.add(updates[0])
    old = old_words()
    change_V_H = (total.result(old)[EMBEDDINGS] - old[EMBEDDINGS])[30:330].view(10, 30)
    rows_V_H = normal(400, 200)[30:330].view(10, 30)
    for stays in (3, 5):  # nothing arrived, or less than half
        assert not change_V_H[stays].any()
    others = [row for row in range(10) if row not in (3, 5)]
    assert_close(change_V_H[others], rows_V_H[others])
    assert_close(other.result(old, 0.4)[EMBEDDINGS][180:210], old[EMBEDDINGS][180:210] + rows_V_H[5])


def test_a_stream_has_no_weight_of_tokens() -> None:
    updates = [words_of("a", 0), words_of("b", 1)]
    plan = replace(token_plan(torch.full((2, 2, 10), 0.5)), streams={"twice": torch.full((2, 5), 2.0)})
    plan.token_weight_C_M_V[0] = 1.0  # type: ignore[index] # token_plan has set it
    plan.token_weight_C_M_V[1] = 0.0  # type: ignore[index] # token_plan has set it
    total = StreamingSum(BY_TOKEN, plan, norms_of(updates), "float32")
    for update in updates:
        total.add(update)
    assert_close(total.streams()["twice"][EMBEDDINGS], 2 * (normal(400, 200) + normal(400, 201)))
    assert total.came()[EMBEDDINGS] == 2
    assert_close(total.result(old_words())[EMBEDDINGS][30:330], (old_words()[EMBEDDINGS] + normal(400, 200))[30:330])


def test_a_clip_shortens_token_rows_too() -> None:
    updates = [words_of("a", 0), words_of("b", 1)]
    clip = torch.ones(2, 5)
    clip[0, 1] = 0.1  # a's embeddings
    plan = token_plan(torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 10), clip)
    total = StreamingSum(BY_TOKEN, plan, norms_of(updates), "float32")
    assert [total.add(update) for update in updates] == [None, None]
    change = total.result(old_words())[EMBEDDINGS] - old_words()[EMBEDDINGS]
    assert_close(change[30:330], 0.1 * normal(400, 200)[30:330], atol=1e-6, rtol=1e-5)


def test_a_client_that_froze_its_words_counts_for_nothing_in_their_rows() -> None:
    weight_C_M_V = torch.tensor([0.2, 0.8])[:, None, None].expand(2, 2, 10).clone()
    weight_C_M_V[:, 0, 3] = torch.tensor([0.0, 1.0])  # a row that b alone met
    plan = token_plan(weight_C_M_V).without({"b": (EMBEDDINGS,)}, BY_TOKEN)
    assert plan.token_weight_C_M_V is not None
    alone = torch.ones(10)
    alone[3] = 0
    assert_close(plan.token_weight_C_M_V[:, 0], torch.stack([alone, torch.zeros(10)]))
    assert_close(plan.token_weight_C_M_V[:, 1], weight_C_M_V[:, 1])  # of the head, which it trains
    assert_close(plan.weight_C_G[:, 1:3], tensor([[1.0, 0.5], [0.0, 0.5]]))
    asked = {request.client: set(request.groups) for request in plan.requests(1, BY_TOKEN)}
    assert asked == {"a": {SHARED, EMBEDDINGS, HEAD, EXPERT}, "b": {SHARED, HEAD, EXPERT}}


# ------------------------------------------------------------------------------------------------------- centred rows

ROWS = [ParameterGroup("gate", layer, expert) for layer in range(2) for expert in range(3)]
ROUTERS = Layout(
    2, 3, {group: 300 if group in ROWS else 1 for group in Layout(2, 3, {}).groups}, softmax_L=(True, False)
)  # layer 0 has a softmax, layer 1 a sigmoid; a row is more than one chunk
HALF = torch.full((2, len(ROUTERS.groups)), 0.5)


def rows_of(client: str) -> dict[ParameterGroup, Tensor]:
    """Rows whose mean over experts is far from zero."""
    return {row: 3 + normal(300, 10 * ord(client) + i) for i, row in enumerate(ROWS)}


def routers_plan(weight_C_G: Tensor, centred: bool = True) -> Plan:
    return Plan(("a", "b"), weight_C_G, centred=centred)


def sent(plan: Plan, dtype: WireDtype = "float32") -> list[Update]:
    updates = []
    for request in plan.requests(1, ROUTERS):
        values = {group: torch.ones(1) for group in ROUTERS.groups} | rows_of(request.client)
        updates.append(Update(request.client, 1, {g: pack(values[g], dtype, 0) for g in request.groups}))
    return updates


def routers_sum(plan: Plan, dtype: WireDtype = "float32") -> StreamingSum:
    norms = {c: torch.stack([rows_of(c).get(g, torch.ones(1)).norm() for g in ROUTERS.groups]) for c in plan.clients}
    return StreamingSum(ROUTERS, plan, norms, dtype)


def moved(total: StreamingSum, min_arrived: float = 0.5) -> dict[ParameterGroup, Tensor]:
    return total.result({group: torch.zeros(size) for group, size in ROUTERS.sizes.items()}, min_arrived)


def centred_by_hand(client: str, row: ParameterGroup, dtype: WireDtype = "float32") -> Tensor:
    """A client's row less the mean of the rows of its router, if that is a softmax."""
    rows = {row: unpack(pack(value, dtype, 0)).double() for row, value in rows_of(client).items()}
    mean = sum(rows[other] for other in ROWS if other.layer == row.layer) / 3
    return (rows[row] - mean if row.layer == 0 else rows[row]).float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_each_clients_rows_are_centred_before_they_are_summed(dtype: WireDtype) -> None:
    gate = tensor([[0.25, 1.0, 0.5, 0.25, 1.0, 0.5], [0.75, 0.0, 0.5, 0.75, 0.0, 0.5]])
    plan = routers_plan(torch.cat([HALF[:, :3], gate, HALF[:, 9:]], 1))
    total = routers_sum(plan, dtype)
    assert [total.add(update) for update in sent(plan, dtype)] == [None, None]
    new = moved(total)
    for i, row in enumerate(ROWS):
        a, b = gate[:, i].tolist()
        expected = a * centred_by_hand("a", row, dtype) + b * centred_by_hand("b", row, dtype)
        assert_close(new[row], expected, atol=1e-5, rtol=1e-5)
    as_sent = routers_plan(plan.weight_C_G, centred=False)
    total = routers_sum(as_sent, dtype)
    assert [total.add(update) for update in sent(as_sent, dtype)] == [None, None]
    a, b = (unpack(pack(rows_of(client)[ROWS[0]], dtype, 0)) for client in "ab")
    assert_close(moved(total)[ROWS[0]], 0.25 * a + 0.75 * b, atol=1e-5, rtol=1e-5)


def test_whoever_counts_in_one_row_is_asked_for_all_of_that_softmax_router() -> None:
    weight_C_G = HALF.clone()
    weight_C_G[:, 3:9] = tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 6])
    plan = routers_plan(weight_C_G)
    first, second = sent(plan)
    assert [group for group in first.groups if group in ROWS] == [*ROWS[:3], ROWS[4]]
    assert not set(second.groups) & set(ROWS)
    total = routers_sum(plan)
    assert [total.add(update) for update in (first, second)] == [None, None]
    new = moved(total)
    assert_close(new[ROWS[1]], centred_by_hand("a", ROWS[1]))
    assert_close(new[ROWS[4]], rows_of("a")[ROWS[4]])
    assert all(not new[row].any() for row in ROWS if row not in (ROWS[1], ROWS[4]))  # sent for the mean alone
    assert total.unchanged() == []
    assert [group for group in sent(routers_plan(weight_C_G, centred=False))[0].groups if group in ROWS] == [
        ROWS[1],
        ROWS[4],
    ]


@pytest.mark.parametrize(("value", "reason"), [(torch.nan, "not finite"), (1e6, "norm 1e+06, but its statistics said")])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_one_bad_row_keeps_all_of_its_softmax_router_out(bad: int, value: float, reason: str) -> None:
    plan = routers_plan(HALF)
    good, spoilt = sent(plan)
    values = rows_of("b")[ROWS[bad]]
    values[299] = value
    total = routers_sum(plan)
    assert total.add(good) is None
    failure = total.add(replace(spoilt, groups={**spoilt.groups, ROWS[bad]: Packed(values)}))
    assert failure is not None
    assert failure.reason.startswith(f"gate[0,{bad}]: {reason}")
    new = moved(total)
    for row in ROWS:  # of b nothing, neither the good rows of that router nor what comes after it
        assert_close(new[row], centred_by_hand("a", row))
    assert_close(new[SHARED], torch.ones(1))  # what came before counts


def test_a_bad_row_of_a_sigmoid_router_ends_its_client_there() -> None:
    plan = routers_plan(HALF)
    good, spoilt = sent(plan)
    total = routers_sum(plan)
    assert total.add(good) is None
    failure = total.add(replace(spoilt, groups={**spoilt.groups, ROWS[4]: Packed(torch.full((300,), torch.nan))}))
    assert failure is not None
    assert failure.reason == "gate[1,1]: not finite"
    new = moved(total)
    for row in ROWS[:4]:
        assert_close(new[row], (centred_by_hand("a", row) + centred_by_hand("b", row)) / 2, atol=1e-5, rtol=1e-5)
    for row in ROWS[4:]:
        assert_close(new[row], rows_of("a")[row])


def test_centring_is_the_same_in_streams() -> None:
    plan = replace(routers_plan(HALF), streams={"twice": torch.full_like(HALF, 2.0)})
    total = routers_sum(plan)
    assert [total.add(update) for update in sent(plan)] == [None, None]
    new, stream = moved(total), total.streams()["twice"]
    for row in ROWS:
        assert_close(stream[row], 4 * new[row], atol=1e-5, rtol=1e-5)  # of two, each with half the weight


def test_threads_never_wait_for_each_other_in_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [update_of("a", 0), update_of("b", 1)]
    total = StreamingSum(LAYOUT, plan_of([0.5, 0.0, 0.5], [0.5, 0.0, 0.5]), norms_of(updates), "float32")
    seen, norm, before = [], torch.linalg.vector_norm, torch.get_num_threads()

    def watched(values: Tensor) -> Any:
        seen.append(torch.get_num_threads())
        if len(seen) > 5:
            raise MemoryError
        return norm(values)

    monkeypatch.setattr(torch.linalg, "vector_norm", watched)
    torch.set_num_threads(2)
    try:
        assert total.add(updates[0]) is None
        assert torch.get_num_threads() == 2
        with pytest.raises(MemoryError):
            total.add(updates[1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 6


@pytest.mark.parametrize(
    ("values", "scale", "reason"),
    [
        (torch.full((151,), 0x88, dtype=torch.uint8), torch.ones(5), "expert[0,0]: shape [151], expected [150]"),
        (
            torch.zeros(150, dtype=torch.int8),
            torch.ones(5),
            "expert[0,0]: dtype torch.int8, expected torch.uint8",
        ),
        (torch.full((150,), 0x88, dtype=torch.uint8), None, "expert[0,0]: no scale with dtype torch.uint8"),
        (torch.full((150,), 0x88, dtype=torch.uint8), torch.ones(2), "expert[0,0]: scale torch.float32 [2], expected"),
        (torch.full((150,), 0x08, dtype=torch.uint8), torch.ones(5), "expert[0,0]: 299 values, expected 300"),
        (torch.full((150,), 0x88, dtype=torch.uint8), torch.tensor([torch.nan] * 5), "expert[0,0]: not finite"),
        (
            torch.full((150,), 0xFF, dtype=torch.uint8),
            torch.ones(5),
            "expert[0,0]: norm 121.244, but its statistics said",
        ),
    ],
)
def test_int4_that_is_not_what_was_asked_for_is_refused(values: Tensor, scale: Tensor | None, reason: str) -> None:
    good = update_of("a", 0, "int4")
    total = StreamingSum(LAYOUT, plan_of([1.0, 1.0, 1.0]), norms_of([good]), "int4")
    failure = total.add(replace(good, groups={**good.groups, EXPERT: Packed(values, scale)}))
    assert failure is not None
    assert failure.reason.startswith(reason)
