"""Fixed point that adds up: within a step, unbiased, and never wrapped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from fedalign.maths.fixed_point import (
    BLOCK,
    CHUNK,
    LEVELS,
    LOWEST,
    MOST_CLIENTS,
    MOST_COUNT,
    POWERS,
    counted,
    decode,
    encode,
    heights,
    highest,
    limits,
    marks,
)


def noise(blocks: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (blocks, POWERS), generator=generator).to(torch.int32)


def limit_of(updates: list[Tensor]) -> Tensor:
    """As a round has it: from the sum of what each sends."""
    told = [marks(heights(update), noise(-(-len(update) // BLOCK), seed)) for seed, update in enumerate(updates)]
    return limits(highest(torch.stack(told).sum(0, dtype=torch.int32)))


def total_of(updates: list[Tensor], weights: Tensor, limit_B: Tensor) -> tuple[Tensor, Tensor, int]:
    """Residues of the sum, the sum in float64, and how many values were clipped."""
    total, exact = torch.zeros(len(updates[0]), dtype=torch.int16), torch.zeros(len(updates[0]), dtype=torch.float64)
    cut = 0
    for client, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        residues, clipped = encode(update * weight, weight, limit_B, seed=client)
        total += residues
        cut += clipped
        exact += (update * weight).double()
    return total, exact, cut


def test_heights_by_hand() -> None:
    values = torch.cat([torch.full((BLOCK,), 0.5), torch.tensor([3.0, -4.5])])
    assert (heights(values).int() + LOWEST).tolist() == [0, 3]
    assert limits(heights(values)).tolist() == [1.0, 8.0]


def test_what_is_small_has_a_limit_and_nothing_has_none() -> None:
    assert limits(heights(torch.tensor([1e-45]))).tolist() == [2.0 ** (LOWEST + 1)]
    assert limits(heights(torch.zeros(4))).tolist() == [0.0]
    assert heights(torch.zeros(0)).tolist() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1024.0, 3e38])
def test_what_has_no_height_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="not finite, or of 1,024 or more"):
        heights(torch.tensor([0.0, value]))
    assert limits(heights(torch.tensor([1023.9, -1.0]))).tolist() == [1024.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, POWERS - 1), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0))
def test_the_sum_of_marks_tells_the_largest_height(height_C_B: list[list[int]], seed: int) -> None:
    of = [torch.tensor(height_B, dtype=torch.uint8) for height_B in height_C_B]
    total = torch.zeros(3, POWERS, dtype=torch.int32)
    for client, height_B in enumerate(of):
        total += marks(height_B, noise(3, seed % 2**40 + client))
    assert torch.equal(highest(total), torch.stack(of).amax(0))


def test_the_sum_of_marks_tells_neither_who_nor_how_many() -> None:
    """At a power that somebody reaches the sum is uniform, whether one does or all; above it is zero."""
    for holders in (1, 4):
        total = torch.zeros(BLOCK, POWERS, dtype=torch.int32)
        for client in range(4):
            tall = torch.full((BLOCK,), 20 if client < holders else 3, dtype=torch.uint8)
            total += marks(tall, noise(BLOCK, 10 * holders + client))
        assert not bool(total[:, 20:].any())
        seen = torch.bincount(total[:, 5:20].contiguous().view(torch.uint8).view(-1).long(), minlength=256).double()
        expected = seen.sum() / 256
        assert float(((seen - expected) ** 2 / expected).sum()) < 255 + 5 * math.sqrt(2 * 255)


def test_what_is_no_sum_of_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no sum of heights"):
        highest(noise(1, 0))
    of_one_block = torch.zeros(2, POWERS, dtype=torch.int32)
    of_one_block[1, -1] = 1
    with pytest.raises(ValueError, match="no sum of heights"):
        highest(of_one_block)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_a_weighed_sum_is_within_a_step_a_client(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [scale * torch.randn(3 * BLOCK + 7, generator=generator) for _ in range(5)]
    weights = torch.rand(5, 3 * BLOCK + 7, generator=generator)
    weights /= weights.sum(0)
    limit_B = limit_of(updates)
    total, exact, clipped = total_of(updates, weights, limit_B)
    assert clipped == 0
    step = (limit_B / LEVELS).repeat_interleave(BLOCK)[: len(exact)]
    error = decode(total, limit_B).double() - exact
    assert bool((error.abs() <= 5 * step).all())
    assert abs(float((error / step).mean())) < 0.05  # half a step each, were it not stochastic


@pytest.mark.parametrize(("clients", "bits"), [(3, 11), (10, 9), (50, 7)])
def test_bits_of_signal(clients: int, bits: int) -> None:
    """Root mean square of the sum by that of its error, of updates that have nothing in common: the smallest sum."""
    generator = torch.Generator().manual_seed(clients)
    updates = [torch.randn(8 * BLOCK, generator=generator) for _ in range(clients)]
    limit_B = limit_of(updates)
    total, exact, _ = total_of(updates, torch.full((clients, 1), 1 / clients).expand(-1, 8 * BLOCK), limit_B)
    assert float((exact.norm() / (decode(total, limit_B) - exact).norm()).log2()) > bits


def test_a_row_that_one_client_alone_trained_keeps_its_values() -> None:
    """Its root mean square says little of its largest value: no limit that follows from it holds that."""
    generator = torch.Generator().manual_seed(0)
    row = torch.zeros(BLOCK)
    row[:16] = torch.randn(16, generator=generator)
    updates = [row, *[torch.zeros(BLOCK)] * 3]
    limit_B = limit_of(updates)
    total, exact, clipped = total_of(updates, torch.full((4, BLOCK), 0.25), limit_B)
    assert clipped == 0
    assert float((decode(total, limit_B) - exact).norm() / exact.norm()) < 0.01


def test_pieces_are_rounded_as_the_whole() -> None:
    values, weight = torch.randn(40 * BLOCK, generator=torch.Generator().manual_seed(0)), torch.ones(40 * BLOCK)
    limit_B = limits(heights(values))
    whole, _ = encode(values, weight, limit_B, seed=3)
    for block in (1, 17):
        part, _ = encode(values[block * BLOCK :], weight[block * BLOCK :], limit_B[block:], seed=3, first=block * BLOCK)
        assert torch.equal(whole[block * BLOCK :], part)


def test_each_block_is_read_by_its_own_limit() -> None:
    """More values than are worked on at a time, and blocks that differ by a factor of a million."""
    blocks = 2 * CHUNK // BLOCK + 1
    values = torch.full((blocks * BLOCK,), 0.5)
    values[CHUNK:] *= 1e-6
    limit_B = limits(heights(values))
    residues, clipped = encode(values, torch.ones(len(values)), limit_B, seed=0)
    assert clipped == 0
    assert_close(decode(residues, limit_B), values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("clients", [2, 3, 50, 200, MOST_CLIENTS])
@pytest.mark.parametrize("sign", [1, -1])
def test_even_the_worst_sum_does_not_wrap(clients: int, sign: int) -> None:
    """All clients at their limits, those that would go beyond them, and all weight at one client."""
    limit_B = torch.tensor([0.375], dtype=torch.float64)
    for weights in (torch.full((clients,), 1 / clients), torch.eye(clients)[0]):
        total = torch.zeros(3, dtype=torch.int64)
        for client, weight in enumerate(weights):
            edge = weight * torch.tensor([0.375, 0.375, 1e9]) * sign
            residues, clipped = encode(edge, weight.expand(3), limit_B, seed=client)
            assert clipped == int(weight > 0)
            total += residues.long()
        assert int(total.abs().max()) <= 2**15 - 1
        assert int(total.abs().min()) >= LEVELS - clients
        decoded = decode(total.to(torch.int16), limit_B)
        assert decoded.tolist() == pytest.approx([0.375 * sign] * 3, abs=0.375 * clients / LEVELS)


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("clients", [2, 200, MOST_CLIENTS])
def test_even_if_all_round_away_from_zero_a_sum_does_not_wrap(
    clients: int, up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each a little above a whole step, all weight used."""
    monkeypatch.setattr(
        "fedalign.maths.fixed_point.words", lambda first, count, seed: torch.full((count,), (2**32 - 1) * up)
    )
    share = (LEVELS // clients + 1e-4) / LEVELS
    weights = torch.tensor([share] * (clients - 1) + [1 - share * (clients - 1)])
    limit_B, total = torch.ones(1, dtype=torch.float64), 0
    for weight in weights:
        residues, _ = encode(weight.view(1) * (1 if up else -1), weight.view(1), limit_B, seed=0)
        total += int(residues)
    assert LEVELS + clients - 2 < abs(total) <= 2**15 - 1


def test_a_block_that_nobody_moved_stays() -> None:
    residues, clipped = encode(torch.zeros(3), torch.ones(3), torch.zeros(1, dtype=torch.float64), seed=0)
    assert residues.tolist() == [0, 0, 0]
    assert clipped == 0


def test_counts_are_exact_or_refused() -> None:
    assert counted(torch.tensor([[1.0], [-2.0]])).tolist() == [[1], [-2]]
    most = torch.tensor([float(MOST_COUNT)])
    assert MOST_CLIENTS * int(counted(most)) < 2**63
    for value in (2.0 * MOST_COUNT, math.nan, -math.inf):
        with pytest.raises(ValueError, match="its sum could wrap"):
            counted(torch.tensor([value]))
    with pytest.raises(ValueError, match="beyond 4,294,967,296: its sum"):
        counted(torch.tensor([2.0**33]), 1 << 20)
