"""The sequence of broadcasts that travel as differences: however long it is, it tells the truth up to one rounding."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedalign.errors import UserError
from fedalign.files import fingerprint
from fedalign.maths.rounding import BLOCKS, advanced, bytes_of, count, pack, unpack
from fedalign.protocol import EMBEDDINGS, HEAD, SHARED, Packed, Weights, WireDtype
from fedalign.server.checkpoint import Checkpoints, ServerState
from fedalign.server.public import PublicModel, first, following

SMALL: tuple[WireDtype, ...] = ("int8", "int4")
SIZES = {SHARED: 300, EMBEDDINGS: 65, HEAD: 0}


def same(tensor: Tensor) -> Tensor:
    return tensor


def walk(rounds: int, seed: int, scale: float) -> list[Weights]:
    """Masters that move by random steps; the embeddings every other time."""
    chance = torch.Generator().manual_seed(seed)
    masters: list[Weights] = [{group: torch.randn(size, generator=chance) for group, size in SIZES.items()}]
    for number in range(rounds):
        moved = dict(masters[-1])
        for group in (SHARED, *([EMBEDDINGS] if number % 2 else [])):
            moved[group] = moved[group] + scale * torch.randn(SIZES[group], generator=chance)
        masters.append(moved)
    return masters


def sequence(masters: list[Weights], dtype: WireDtype) -> list[PublicModel]:
    found = [first(masters[0], dtype, same)]
    for number, (old, new) in enumerate(itertools.pairwise(masters)):
        found.append(following(found[-1], old, new, dtype, number, same))
    return found


def one_step(difference: Packed, dtype: WireDtype, size: int) -> Tensor:
    """The distance of two neighbouring levels, for each value [N]."""
    assert difference.scale is not None
    return difference.scale.repeat_interleave(BLOCKS[dtype].values)[:size]


@pytest.mark.parametrize("dtype", SMALL)
@given(rounds=st.integers(1, 25), seed=st.integers(0, 1000), scale=st.sampled_from([1e-4, 1e-2, 1.0]))
@settings(deadline=None, max_examples=40)
def test_the_sum_of_what_was_sent_is_the_truth_up_to_one_step(
    dtype: WireDtype, rounds: int, seed: int, scale: float
) -> None:
    masters = walk(rounds, seed, scale)
    models = sequence(masters, dtype)
    sent = {group: unpack(packed) for group, packed in models[0].weights.items()}
    for model, master in zip(models[1:], masters[1:], strict=True):
        for group, difference in model.differences.items():
            sent[group] = (sent[group] + unpack(difference)).bfloat16().float()
            assert torch.equal(sent[group], unpack(model.weights[group]))
            allowed = one_step(difference, dtype, SIZES[group]) + sent[group].abs() * 2**-8  # half of bfloat16's step
            assert bool(((sent[group] - master[group]).abs() <= allowed * 1.001 + 1e-30).all())


@pytest.mark.parametrize("dtype", SMALL)
def test_a_group_whose_master_stays_has_no_difference_and_no_group_loses_its_place(dtype: WireDtype) -> None:
    models = sequence(walk(3, 0, 0.1), dtype)
    assert [[*model.differences] for model in models] == [[], [SHARED], [SHARED, EMBEDDINGS], [SHARED]]
    assert models[3].weights[EMBEDDINGS] is models[2].weights[EMBEDDINGS]
    assert all([*model.weights] == [*SIZES] for model in models)
    for last, model in itertools.pairwise(models):
        assert model.before == {
            str(group): fingerprint(part.numpy().data for part in bytes_of(last.weights[group]))
            for group in model.differences
        }


def test_a_difference_that_moves_nothing_is_not_sent() -> None:
    """Else what it makes could not be told from what it is added to."""
    master = {SHARED: torch.ones(4)}
    model = following(first(master, "int8", same), master, {SHARED: torch.ones(4) + 1e-6}, "int8", 0, same)
    assert not model.differences
    assert not model.before


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("size", [1, 64, 257, (1 << 17) + 65])
def test_weights_are_advanced_value_by_value(dtype: WireDtype, size: int) -> None:
    base = Packed(torch.randn(size).bfloat16())
    difference = pack(torch.randn(size) * 0.1, dtype, 3)
    assert count(difference) == size
    assert torch.equal(advanced(base, difference).values, (base.values.float() + unpack(difference)).bfloat16())
    with pytest.raises(ValueError, match=f"a difference of {size} values, the weights have {size + 1}"):
        advanced(Packed(torch.zeros(size + 1).bfloat16()), difference)


@pytest.mark.parametrize("dtype", SMALL)
def test_a_checkpoint_holds_what_clients_are_told(tmp_path: Path, dtype: WireDtype) -> None:
    masters = walk(2, 0, 0.1)
    *_, model = sequence(masters, dtype)
    state = ServerState(2, masters[-1], {}, ({"round": 2},), public=model)
    Checkpoints(tmp_path, {}).save(state)
    found = Checkpoints(tmp_path, {}).load()
    assert found is not None
    assert found.public is not None
    assert found.public.before == model.before
    for mine, theirs in ((model.weights, found.public.weights), (model.differences, found.public.differences)):
        assert mine.keys() == theirs.keys()
        for group, packed in mine.items():
            its = bytes_of(theirs[group])
            assert all(torch.equal(one, other) for one, other in zip(bytes_of(packed), its, strict=True))


def test_a_checkpoint_whose_broadcast_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    masters = walk(2, 0, 0.1)
    models = sequence(masters, "int8")
    for number in (1, 2):
        state = ServerState(number, masters[number], {}, ({"round": number},), public=models[number])
        Checkpoints(tmp_path, {}).save(state)
    file = tmp_path / "round-00002" / "public.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    found = Checkpoints(tmp_path, {}).load()
    assert found is not None
    assert found.round == 1
    (tmp_path / "round-00001" / "public.safetensors").unlink()
    with pytest.raises(UserError, match=r"not what was written.*public\.safetensors is missing"):
        Checkpoints(tmp_path, {}).load()


def test_few_bytes_go_down() -> None:
    size = sum(SIZES.values())
    for dtype, share in (("int8", 1 / 4), ("int4", 1 / 8)):
        *_, model = sequence(walk(2, 0, 0.1), dtype)  # type: ignore[arg-type] # both are names of types
        nbytes = sum(packed.nbytes for packed in model.differences.values())
        assert math.isclose(nbytes / (4 * size), share, rel_tol=0.2)
