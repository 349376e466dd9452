"""Algorithms that do more than plan: by hand where the numbers are small, by their definition on a real tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.algorithms.fc_moe import RECEIVED, FCMoE
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.local import Local
from fedalign.algorithms.scaffold import CONTROL, Scaffold, split
from fedalign.client.forward import answer_logits
from fedalign.client.memory import Kept
from fedalign.data.batches import batches
from fedalign.maths.average import StreamingSum
from fedalign.maths.rounding import pack
from fedalign.protocol import (
    KINDS,
    SHARED,
    WHOLE,
    Broadcast,
    Evaluation,
    Layout,
    LocalRound,
    Packed,
    ParameterGroup,
    Reports,
    State,
    Statistics,
    Update,
    Weights,
)
from tests.algorithms.conftest import planned
from tests.algorithms.test_rounds import federation, one_round

EXPERT = ParameterGroup("expert", 0, 0)
CELLS = [ParameterGroup(kind, 0, e) for kind in ("gate", "expert") for e in range(2)]
LAYOUT = Layout(1, 2, {**dict.fromkeys(WHOLE, 1), **dict.fromkeys(CELLS, 2)})


def report(client: str, examples: int, experts: list[list[float]], steps: int = 2) -> Statistics:
    """Statistics of a client whose experts moved by these vectors of two; sketches are the directions themselves."""
    update_E_S = tensor(experts).float()
    norm_E = update_E_S.norm(dim=1)
    return Statistics(
        client=client,
        round=1,
        examples=examples,
        tokens=100,
        steps=steps,
        learning_rate=0.5,
        loss=1.0,
        prob_L_E=tensor([[0.5, 0.5]]),
        load_L_E=tensor([[50.0, 100.0]]),
        margin_L_E=tensor([[0.1, 0.1]]),
        centroid_L_E_D=torch.zeros(1, 2, 2, dtype=torch.float16),
        centroid_scale_L=torch.ones(1),
        update_L_E_S=torch.nn.functional.normalize(update_E_S, dim=1).half()[None],
        norm_G=torch.cat([torch.ones(5), norm_E]),
        token_count_M_V=torch.zeros(0, 0),
        token_met_M_B=torch.zeros(0, 0, dtype=torch.uint8),
    )


def local_round(received: Weights, **changes: object) -> LocalRound:
    fields: dict[str, Any] = {
        "received": received,
        "start": dict(received),
        "state": {},
        "kept": {},
        "last_update": dict,
        "learning_rate": 0.5,
    }
    return LocalRound(**(fields | changes))


def test_scaffold_by_hand() -> None:
    # a: 1 example, 2 steps of rate 0.5, moved by 3;  b: 3 examples, 4 steps, moved by 1
    reports = [report("a", 1, [[1, 0], [1, 0]], steps=2), report("b", 3, [[1, 0], [1, 0]], steps=4)]
    plan = Scaffold().plan(Reports(reports, LAYOUT, members=4), {})
    assert_close(plan.weight_C_G[:, 0], tensor([0.25, 0.75]))
    total = StreamingSum(LAYOUT, plan, {r.client: torch.full((7,), 9.0) for r in reports}, "float32")
    for client, move in (("a", 3.0), ("b", 1.0)):
        groups = {group: Packed(torch.full((LAYOUT.sizes[group],), move)) for group in LAYOUT.groups}
        assert total.add(Update(client, 1, groups)) is None
    old = {group: torch.zeros(LAYOUT.sizes[group]) for group in LAYOUT.groups}
    assert_close(total.result(old)[SHARED], tensor([1.5]))  # (1 * 3 + 3 * 1) / 4
    assert plan.then is not None
    state = plan.then(total.streams(), total.came())
    # mean of 3 / (2 * .5) = 3 and 1 / (4 * .5) = .5 is 1.75; c = 0 - 2/4 * (0 + 1.75)
    assert_close(state[CONTROL], torch.full((11,), -0.875))
    again = Scaffold().plan(Reports(reports, LAYOUT, members=4), state)
    assert again.then is not None
    assert_close(again.then(total.streams(), total.came())[CONTROL], torch.full((11,), -0.875 - 0.5 * (-0.875 + 1.75)))
    assert_close(state[CONTROL], torch.full((11,), -0.875))  # what was handed over stays as it was
    arrived = {group: value for group, value in total.streams()[CONTROL].items() if group != SHARED}
    partly = split(again.then({CONTROL: arrived}, total.came())[CONTROL], LAYOUT.sizes)
    assert_close(partly[SHARED], tensor([-0.875]))  # what did not arrive keeps its control
    assert_close(partly[EXPERT], torch.full((2,), -0.875 - 0.5 * (-0.875 + 1.75)))


def test_scaffold_counts_whose_update_came() -> None:
    reports = [report("a", 1, [[1, 0], [1, 0]], steps=2), report("b", 3, [[1, 0], [1, 0]], steps=4)]
    before = {CONTROL: torch.full((11,), 0.5)}
    plan = Scaffold().plan(Reports(reports, LAYOUT, members=4), before).without({"b": (EXPERT,)}, LAYOUT)
    total = StreamingSum(LAYOUT, plan, {r.client: torch.full((7,), 9.0) for r in reports}, "float32")
    groups = {group: Packed(torch.full((LAYOUT.sizes[group],), 3.0)) for group in LAYOUT.groups}
    assert total.add(Update("a", 1, groups)) is None  # b's is lost
    assert plan.then is not None
    state = split(plan.then(total.streams(0.0), total.came(0.0))[CONTROL], LAYOUT.sizes)
    assert total.came().keys() == total.streams()[CONTROL].keys() == {EXPERT}  # of the others too little came
    for group in (SHARED, EXPERT):  # .5 - 1/4 * (.5 + 3 / (2 * .5)), whatever b's weight
        assert_close(state[group], torch.full_like(state[group], -0.375))


def test_scaffold_leaves_alone_what_a_client_does_not_train() -> None:
    local = local_round({SHARED: tensor([0.0]), EXPERT: tensor([0.0, 0.0])}, state={CONTROL: tensor([2.0, 3, 1])})
    local.steps = 4
    kept = Scaffold().keep(local, {SHARED: tensor([1.0]), EXPERT: tensor([0.0, 0.0])})
    assert_close(kept[CONTROL], tensor([0.0, 0.0, -1 - 0.5]))


def test_scaffold_on_the_client_by_hand() -> None:
    received = {SHARED: tensor([0.0]), EXPERT: tensor([0.0, 0.0])}
    local = local_round(received, state={CONTROL: tensor([2.0, 3, 1])}, kept={CONTROL: tensor([0.5, 0.5, 0.5])})
    Scaffold().begin(local)  # c - c_i, added to g; experts come first
    assert_close(local.shift[EXPERT], tensor([1.5, 2.5]))
    assert_close(local.shift[SHARED], tensor([0.5]))
    local.steps = 4
    kept = Scaffold().keep(local, {SHARED: tensor([1.0]), EXPERT: tensor([0.0, -1.0])})
    # c_i - c - update / (4 * .5)
    assert_close(kept[CONTROL], tensor([0.5 - 2 - 0, 0.5 - 3 + 0.5, 0.5 - 1 - 0.5]))
    fresh = local_round(received)
    Scaffold().begin(fresh)
    assert fresh.shift == {}  # nothing is known yet
    fresh.steps = 1
    first = Scaffold().keep(fresh, {SHARED: tensor([1.0]), EXPERT: tensor([0.0, -1.0])})
    assert_close(first[CONTROL], tensor([0.0, 2, -2]))  # -update / (1 * .5)
    late = local_round(received, state={CONTROL: tensor([2.0, 3, 1])})  # its first round, the others' second
    Scaffold().begin(late)
    assert_close(late.shift[EXPERT], tensor([2.0, 3]))
    late.steps = 1
    joined = Scaffold().keep(late, {SHARED: tensor([1.0]), EXPERT: tensor([0.0, -1.0])})
    assert_close(joined[CONTROL], tensor([0.0 - 2, 2 - 3, -2 - 1]))


def test_fc_moe_by_hand() -> None:
    # expert 0: a moved by (4, 0), b by (-1, 1); expert 1: both by (0, 2)
    reports = [report("a", 1, [[4, 0], [0, 2]]), report("b", 3, [[-1, 1], [0, 2]])]
    plan = planned(FCMoE(max_stretch=10), reports, LAYOUT)
    _, gate_C_L_E, weight_C_L_E = LAYOUT.split(plan.weight_C_G)
    assert_close(gate_C_L_E[:, 0, 0], tensor([0.25, 0.75]))
    # importance: the same frequency, so norms 4 and sqrt(2)
    share = 4 / (4 + 2**0.5)
    assert_close(weight_C_L_E[:, 0], tensor([[share, 0.5], [1 - share, 0.5]]))
    consensus = share * tensor([4.0, 0]) + (1 - share) * tensor([-1.0, 1])
    against = (1 - share) * float(tensor([-1.0, 1]) @ consensus) / float(consensus @ consensus)
    assert against < 0  # b is against the consensus
    assert plan.factor_C_G is not None
    factor_C_L_E = LAYOUT.split(plan.factor_C_G)[2]
    assert_close(factor_C_L_E[:, 0], tensor([[1 - against, 1.0], [1 - against, 1.0]]), atol=1e-3, rtol=1e-3)
    assert plan.metrics == {"expert_updates_against_consensus": 1}
    # the projected sum is the stretched consensus: by the definition, client by client
    b_projected = tensor([-1.0, 1]) - float(tensor([-1.0, 1]) @ consensus) / float(consensus @ consensus) * consensus
    assert_close((1 - against) * consensus, share * tensor([4.0, 0]) + (1 - share) * b_projected)


def test_fc_moe_stretches_only_so_far_and_unmoved_experts_not_at_all() -> None:
    opposed = [report("a", 1, [[1, 0], [0, 0]]), report("b", 1, [[-0.99, 0], [0, 0]])]
    plan = planned(FCMoE(), opposed, LAYOUT)
    assert plan.factor_C_G is not None
    assert_close(LAYOUT.split(plan.factor_C_G)[2][:, 0], tensor([[2.0, 1.0], [2.0, 1.0]]))
    assert bool((LAYOUT.split(plan.weight_C_G)[2][:, 0, 1] == 0).all())  # nobody moved it: it stays


def test_fc_moe_client_goes_on_with_half_of_its_residual() -> None:
    received = {SHARED: tensor([5.0]), EXPERT: tensor([3.0, 0.0])}
    kept = {f"{RECEIVED}{EXPERT}": tensor([1.0, 0.0])}
    local = local_round(received, kept=kept, last_update=lambda: {SHARED: tensor([-9.0]), EXPERT: tensor([-1.0, 7.0])})
    FCMoE().begin(local)  # the consensus went (2, 0); the residual is -2/4 * (2, 0) = (-1, 0)
    assert_close(local.start[EXPERT], tensor([2.5, 0.0]))
    assert_close(local.start[SHARED], tensor([5.0]))
    agreeing = local_round(received, kept=kept, last_update=lambda: {EXPERT: tensor([1.0, 7.0])})
    FCMoE().begin(agreeing)
    assert_close(agreeing.start[EXPERT], received[EXPERT])
    assert set(FCMoE().keep(local, {})) == {f"{RECEIVED}{EXPERT}"}
    assert FCMoE(residual=0).keep(local, {}) == {}


def test_local_uploads_nothing_and_keeps_everything_at_home() -> None:
    plan = planned(Local(), [report("a", 1, [[1, 0], [1, 0]])], LAYOUT)
    assert [request.groups for request in plan.requests(1, LAYOUT)] == [()]
    assert Local().private == set(KINDS)


def broadcast(weights: Weights, round: int, state: State | None = None) -> Broadcast:
    return Broadcast(round, {group: pack(value, "float32", 0) for group, value in weights.items()}, state or {})


def test_private_groups_go_on_from_the_clients_own_values(tmp_path: Path) -> None:
    engine = federation(tmp_path, "local")
    start = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    assert not isinstance(engine.trainer.train(engine.clients["a"], broadcast(start, 1)), Exception)
    first = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    engine.trainer.train(engine.clients["b"], broadcast(start, 1))
    engine.trainer.train(engine.clients["a"], broadcast(start, 2))  # the server's model has not moved
    update = engine.clients["a"].memory.last_update(3)
    second = engine.trainer.moe.read()
    for group, packed in update.items():
        assert_close(packed.values, second[group] - first[group])
    assert not torch.equal(second[SHARED], first[SHARED])


def test_local_gates_stay_local_and_are_summed_all_the_same(tmp_path: Path) -> None:
    engine = federation(tmp_path, "fedalign_moe")
    engine.trainer.algorithm = FedAlignMoE(gate="local")
    start = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    row = ParameterGroup("gate", 0, 0)
    engine.trainer.train(engine.clients["a"], broadcast(start, 1))
    own = engine.trainer.moe.read([row])[row].clone()
    local = engine.trainer._local_round(engine.clients["a"], broadcast(start, 2), engine.clients["a"].memory.before(2))
    assert torch.equal(local.start[row], own)
    assert torch.equal(local.start[SHARED], start[SHARED])
    reports, plan, new, _ = one_round(engine, 2, start, {})
    assert float(plan.weight_C_G[:, 1].sum()) == pytest.approx(1)
    assert not torch.equal(new[row], start[row])
    assert len(reports) == 3


def test_scaffold_corrections_reach_the_steps(tmp_path: Path) -> None:
    """With one step of SGD, Δ = -η (g - c_i + c): two runs whose control differs by one differ by -η everywhere."""
    moved = []
    for shift in (0.0, 1.0):
        engine = federation(tmp_path / str(shift), "scaffold")
        config = engine.trainer.config
        training = {"optimizer": "sgd", "batch_examples": 100, "max_grad_norm": 0.0}
        engine.trainer.config = config.model_copy(update={"training": config.training.model_copy(update=training)})
        start = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
        control = torch.full((sum(map(len, start.values())),), shift)
        engine.trainer.train(engine.clients["a"], broadcast(start, 1, {CONTROL: control}))
        moved.append(engine.clients["a"].memory.last_update(2)[SHARED].values)
    assert_close(moved[1] - moved[0], torch.full_like(moved[0], -config.training.learning_rate), atol=1e-5, rtol=1e-3)


def test_pooled_clients_are_one_and_scored_one_by_one(tmp_path: Path) -> None:
    engine = federation(tmp_path, "centralised")
    assert list(engine.members()) == ["pooled"]
    assert len(engine.clients["pooled"].train) == 24 + 5 + 15
    assert list(engine.scored) == ["a", "b", "c"]


def test_a_mixture_learns_beside_a_server_model_that_stays(tmp_path: Path) -> None:
    engine = federation(tmp_path, "pfl_moe")
    plain = federation(tmp_path / "plain", "fedavg")
    start = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    data, losses = engine.clients["a"], []
    for number in (1, 2, 3):
        mine = engine.trainer.train(data, broadcast(start, number))
        theirs = plain.trainer.train(plain.clients["a"], broadcast(start, number))
        assert torch.equal(mine.update_L_E_S, theirs.update_L_E_S)  # the server's part is FedAvg's
        mixture = engine.trainer._mixture(data.memory.before(number + 1), start)
        losses.append(mixture_loss(mixture.answer, engine))
        assert not torch.equal(mixture.own.read([SHARED])[SHARED], start[SHARED])
    assert losses[2] < losses[1] < losses[0]


def test_a_mixture_by_hand(tmp_path: Path) -> None:
    """g p_server + (1 - g) p_own, for a mixer that is 1/2, all the server's, all the client's own."""
    engine = federation(tmp_path, "pfl_moe")
    start = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    mixture = engine.trainer._mixture(Kept(), start)
    mixture.own.write({SHARED: start[SHARED] * 0.5})
    (batch,) = list(batches(engine.clients["a"].train[:4], 10**6, 10**6, seed=None))
    with torch.no_grad():
        engine.trainer.moe.model.eval(), mixture.own.model.eval()
        server = answer_logits(engine.trainer.moe, batch).logits_N_V.softmax(-1)
        own = answer_logits(mixture.own, batch).logits_N_V.softmax(-1)
        assert float((server - own).abs().max()) > 1e-3
        for bias, share in ((0.0, 0.5), (50.0, 1.0), (-50.0, 0.0)):
            mixture.mixer.weight.zero_()
            mixture.mixer.bias.fill_(bias)
            mixed = mixture.answer(batch)
            assert_close(mixed.logits_N_V.exp(), share * server + (1 - share) * own, atol=1e-6, rtol=1e-4)
            assert_close(mixed.nll_N, -mixed.logits_N_V.gather(1, mixed.target_N[:, None]).squeeze(1))


def mixture_loss(answer: Any, engine: Any) -> float:
    (batch,) = list(batches(engine.clients["a"].train, 10**6, 10**6, seed=None))
    with torch.no_grad():
        engine.trainer.moe.model.eval()
        nll_N: Tensor = answer(batch).nll_N
    return float(nll_N.mean())


def test_scores_of_everybody_alone_are_the_clients_own(tmp_path: Path) -> None:
    engine = federation(tmp_path, "local")
    start = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    assert [score for score in engine.evaluate(broadcast(start, 0), ["a"]) if isinstance(score, Evaluation)] == []
