"""What a client keeps: what it hands over, and what it goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedalign.client.memory import KEPT, UPDATE, ClientMemory, Kept
from fedalign.errors import TrainingFailedError, UserError
from fedalign.protocol import SHARED, Packed, ParameterGroup, Request
from tests.conftest import keep_round
from tests.server.test_checkpoint import flip

EXPERT = ParameterGroup("expert", 1, 2)
WHOLE = Kept(
    prob_L_E=torch.tensor([[0.25, 0.75]]),
    optimizer={"0.exp_avg": torch.ones(2, 3).t(), "11.step": torch.tensor(7.0)},
    private={ParameterGroup("gate", 0, 1): torch.arange(3.0)},
    algorithm={"received.expert[1,2]": torch.zeros(1), "a/b": torch.ones(1)},
    lost={EXPERT: torch.tensor([0.5])},
    own={SHARED: torch.tensor([4.0]), EXPERT: torch.empty(0)},
    mixer={"weight": torch.ones(1, 4), "bias": torch.zeros(1)},
)


def prob_L_E(memory: ClientMemory, round: int) -> list[float]:
    found = memory.before(round).prob_L_E
    assert found is not None
    return found.tolist()


@pytest.mark.parametrize("kept", [WHOLE, Kept()])
def test_what_is_kept_comes_back_field_by_field(kept: Kept, tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    keep_round(memory, 1, {}, kept)
    found = vars(memory.before(2))
    assert list(found) == list(vars(kept))
    for name, value in vars(kept).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_what_is_personal_is_the_own_model_over_private_groups() -> None:
    gate = ParameterGroup("gate", 0, 1)
    assert list(WHOLE.personal) == [gate, SHARED, EXPERT]
    assert not Kept(torch.ones(1, 2), {"0.step": torch.ones(1)}, algorithm={"control": torch.ones(1)}).personal


@pytest.mark.parametrize("kept", [WHOLE, Kept()])
def test_of_a_complete_run_the_last_update_stays_where_the_algorithm_kept_something(kept: Kept, tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    for round in (1, 2):
        keep_round(memory, round, {SHARED: Packed(torch.full((2,), float(round)))}, kept)
    memory.forget_updates()
    assert len(list(tmp_path.rglob(UPDATE))) == bool(kept.algorithm)
    assert [packed.values.tolist() for packed in memory.last_update(3).values()] == [[2.0, 2.0]] * bool(kept.algorithm)


def test_a_client_hands_over_only_what_is_asked(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    int8 = Packed(torch.tensor([1, -2], dtype=torch.int8), torch.tensor([0.5]))
    keep_round(memory, 3, {SHARED: Packed(torch.ones(2)), EXPERT: int8}, Kept(torch.ones(1)))
    update = memory.hand_over("a", Request("a", 3, (EXPERT,))).groups
    assert list(update) == [EXPERT]
    assert update[EXPERT].values.tolist() == [1, -2]
    assert update[EXPERT].scale is not None
    assert memory.hand_over("a", Request("a", 3, (SHARED,))).groups[SHARED].scale is None


def test_a_repeated_round_starts_from_the_round_before_it(tmp_path: Path) -> None:
    memory = ClientMemory(tmp_path)
    assert memory.before(1) == Kept()
    for round in (2, 5):
        keep_round(memory, round, {}, Kept(torch.tensor([float(round)])))
    assert prob_L_E(memory, 5) == [2.0]
    assert prob_L_E(memory, 6) == [5.0]
    memory.forget_updates()
    assert prob_L_E(memory, 6) == [5.0]
    assert not list(tmp_path.rglob("update.safetensors"))


def test_a_flipped_bit_is_noticed_and_the_round_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = ClientMemory(tmp_path)
    for round in (1, 2):
        keep_round(memory, round, {SHARED: Packed(torch.full((8,), float(round)))}, Kept(torch.tensor([float(round)])))
    flip(tmp_path / "round-00002" / KEPT)
    assert prob_L_E(memory, 3) == [1.0]
    flip(tmp_path / "round-00002" / UPDATE)
    assert memory.last_update(3)[SHARED].values.tolist() == [1.0] * 8
    told = [record.getMessage() for record in caplog.records]
    for name, line in zip((KEPT, UPDATE), told, strict=True):
        assert f"({name} is not what was written). Round 1 is used instead." in line
    with pytest.raises(TrainingFailedError, match=r"its update of round 2 is damaged on its disk: update"):
        memory.hand_over("a", Request("a", 2, (SHARED,)))
    flip(tmp_path / "round-00001" / KEPT)
    with pytest.raises(UserError, match=r"round-00002': damaged .*round-00001': damaged .*No earlier round is kept"):
        memory.before(3)
    assert memory.before(1) == Kept()  # it had not taken part
