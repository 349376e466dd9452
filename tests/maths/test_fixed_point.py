"""Fixed point that adds up: within a step, unbiased, and never wrapped."""

import pytest
import torch

from fedalign.maths.fixed_point import BLOCK, LEVELS, MOST_CLIENTS, decode, encode, limits, mean_squares


def test_mean_squares_by_hand() -> None:
    values = torch.cat([torch.full((BLOCK,), 0.5), torch.tensor([3.0, 4.0])])
    limit_B = limits(mean_squares(values) + mean_squares(values))
    assert limit_B.tolist() == pytest.approx([8 * 0.5**0.5, 8 * (2 * 8.0) ** 0.5])  # the second is cut to the most


def test_what_is_small_has_a_limit_and_nothing_has_none() -> None:
    assert float(limits(mean_squares(torch.full((4,), 1e-12)))[0]) > 8e-12
    assert limits(mean_squares(torch.zeros(4))).tolist() == [0.0]
    assert mean_squares(torch.zeros(0)).tolist() == []


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0])
def test_a_weighed_sum_is_within_a_step_a_client(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [scale * torch.randn(3 * BLOCK + 7, generator=generator) for _ in range(5)]
    weights = torch.rand(5, 3 * BLOCK + 7, generator=generator)
    weights /= weights.sum(0)
    limit_B = limits(torch.stack([mean_squares(update) for update in updates]).sum(0))
    total, exact = torch.zeros(3 * BLOCK + 7, dtype=torch.int16), torch.zeros(3 * BLOCK + 7, dtype=torch.float64)
    for client, (update, weight) in enumerate(zip(updates, weights, strict=True)):
        values = update * weight
        residues, clipped = encode(values, weight, limit_B, seed=client)
        assert clipped == 0
        total += residues
        exact += values.double()
    step = (limit_B / LEVELS).repeat_interleave(BLOCK)[: len(exact)]
    error = decode(total, limit_B).double() - exact
    assert bool((error.abs() <= 5 * step).all())
    assert abs(float((error / step).mean())) < 0.05  # half a step each, were it not stochastic


def test_pieces_are_rounded_as_the_whole() -> None:
    values, weight = torch.randn(2 * BLOCK), torch.ones(2 * BLOCK)
    limit_B = limits(mean_squares(values))
    whole, _ = encode(values, weight, limit_B, seed=3)
    last, _ = encode(values[BLOCK:], weight[BLOCK:], limit_B[1:], seed=3, first=BLOCK)
    assert torch.equal(whole[BLOCK:], last)


def test_even_the_worst_sum_does_not_wrap() -> None:
    """As many clients as there may be, all far beyond their limits."""
    limit_B, weight = torch.tensor([1.0], dtype=torch.float64), torch.full((4,), 1 / MOST_CLIENTS)
    total = torch.zeros(4, dtype=torch.int64)
    for client in range(MOST_CLIENTS):
        residues, clipped = encode(torch.tensor([1e9, -1e9, 0.0, 1e9]), weight, limit_B, seed=client)
        assert clipped == 3
        total += residues.long()
    assert int(total.abs().max()) <= 2**15 - 1
    assert decode(total.to(torch.int16), limit_B).tolist() == pytest.approx([1, -1, 0, 1], abs=0.02)


def test_a_block_that_nobody_moved_stays() -> None:
    residues, clipped = encode(torch.zeros(3), torch.ones(3), torch.zeros(1, dtype=torch.float64), seed=0)
    assert residues.tolist() == [0, 0, 0]
    assert clipped == 0
