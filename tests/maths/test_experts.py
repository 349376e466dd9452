"""Semantic expert aggregation against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.maths import experts as module
from fedalign.maths.experts import (
    Consensus,
    adaptive_threshold,
    bimodality,
    centred_directions,
    cosines,
    direction_consensus,
    directions,
    expert_weights,
    sampled_weights,
    semantic_similarity,
)

few = settings(deadline=None, max_examples=25)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def symmetric(*pairs: float) -> Tensor:
    """One expert's table of three clients from its pairs (0,1), (0,2), (1,2)."""
    a, b, c = pairs
    return tensor([[[1.0, a, b], [a, 1.0, c], [b, c, 1.0]]])


def test_similarity_is_centred_with_loads_over_clients_and_experts() -> None:
    # mean = (1·(4,0) + 1·(0,4) + 2·(2,2) + 0) / 4 = (2, 2): centred (2,-2), (-2,2), 0, and a client without load
    centroid = tensor([[[4.0, 0.0], [0.0, 4.0]], [[2.0, 2.0], [9.0, 9.0]]])
    similarity = semantic_similarity(centroid, tensor([[1.0, 1.0], [2.0, 0.0]]))
    assert_close(similarity, torch.eye(2).expand(2, 2, 2))


def test_similarity_by_hand() -> None:
    # mean (1, 1): centred (1, 0) and (0, 1) for expert 0, (-1, 0) and (0, -1) for expert 1
    centroid = tensor([[[2.0, 1.0], [0.0, 1.0]], [[1.0, 2.0], [1.0, 0.0]]])
    assert_close(semantic_similarity(centroid, torch.ones(2, 2)), torch.eye(2).expand(2, 2, 2))
    opposite = semantic_similarity(tensor([[[3.0]], [[1.0]]]), torch.ones(2, 1))
    assert_close(opposite, tensor([[[1.0, -1.0], [-1.0, 1.0]]]))


@pytest.mark.parametrize("common", [0.1, 3.7, 1000.0])
def test_what_is_left_of_equal_centroids_is_rounding_and_counts_as_zero(common: float) -> None:
    centroid = torch.full((5, 3, 16), common) * normal(16).sign()
    load = torch.randint(1, 1000, (5, 3), generator=torch.Generator().manual_seed(0))
    assert_close(semantic_similarity(centroid, load), torch.eye(5).expand(3, 5, 5))


def test_small_but_real_differences_count() -> None:
    centroid = 1000 + tensor([[[0.5, 0.0]], [[-0.5, 0.0]]])
    assert_close(semantic_similarity(centroid, torch.ones(2, 1)), tensor([[[1.0, -1.0], [-1.0, 1.0]]]))


def test_nothing_is_held() -> None:
    assert_close(semantic_similarity(normal(2, 3, 4), torch.zeros(2, 3)), torch.eye(2).expand(3, 2, 2))
    assert_close(semantic_similarity(normal(1, 1, 4), torch.ones(1, 1)), torch.ones(1, 1, 1))


def test_a_withheld_centroid_never_matters() -> None:
    load = tensor([[5.0, 3.0], [0.0, 2.0]])
    centroid = normal(2, 2, 4)
    spoilt = centroid.clone()
    spoilt[1, 0] = torch.nan
    assert_close(semantic_similarity(spoilt, load), semantic_similarity(centroid, load))


def test_vectors_of_clients_that_do_not_hold_an_expert_never_matter() -> None:
    """Whatever they are: their pairs are no pairs, of all clients or of some."""
    held, size = torch.ones(8, 2, dtype=torch.bool), torch.ones(8, 2)
    held[6, 0] = held[7, 1] = False
    centroid, update = directions(normal(8, 2, 6)), directions(normal(8, 2, 6, seed=1))
    spoilt, unlike = (unit.masked_fill(~held.unsqueeze(2), torch.nan) for unit in (centroid, update))
    told, expected = sampled_weights(spoilt, unlike, size, held), sampled_weights(centroid, update, size, held)
    for mine, right in zip(told, expected, strict=True):
        assert_close(mine, right)
        assert right.any()
    assert_close(bimodality(cosines(spoilt), held), bimodality(cosines(centroid), held))


def test_direction_consensus_by_hand() -> None:
    update = tensor([[[3.0, 4.0]], [[4.0, 3.0]], [[0.0, 0.0]]])
    assert_close(direction_consensus(update), symmetric(0.96, 0.0, 0.0))


@few
@given(st.floats(1e-25, 1e25), st.integers(0, 1000))
def test_cosines_do_not_depend_on_scale(scale: float, seed: int) -> None:
    update = normal(3, 2, 8, seed=seed)
    factor = torch.ones(3, 1, 1)
    factor[1] = scale
    assert_close(direction_consensus(update * factor), direction_consensus(update), atol=1e-5, rtol=0)


def test_cosines_stay_within_one_and_half_precision_is_upcast() -> None:
    update = normal(4, 3, 33).half()
    consensus = direction_consensus(update.repeat(2, 1, 1))
    assert consensus.dtype == torch.float32
    assert consensus.abs().max() <= 1
    assert_close(consensus[:, :4, 4:].diagonal(dim1=1, dim2=2), torch.ones(3, 4))
    assert direction_consensus(update.double()).dtype == torch.float64


def test_threshold_by_hand() -> None:
    similarity = symmetric(0.9, 0.3, 0.0)
    everyone = torch.ones(3, 1, dtype=torch.bool)
    # mean 0.4, population variance (0.25 + 0.01 + 0.16) / 3 = 0.14
    assert_close(adaptive_threshold(similarity, everyone), tensor([0.4 - 0.5 * 0.14**0.5]))
    assert_close(adaptive_threshold(similarity, everyone, beta=0.0), tensor([0.4]))
    pair = tensor([[True], [False], [True]])
    assert_close(adaptive_threshold(similarity, pair), tensor([0.3]))  # one pair: no deviation
    for few_holders in ([True, False, False], [False, False, False]):
        assert_close(adaptive_threshold(similarity, tensor(few_holders).unsqueeze(1)), tensor([-1.0]))


def test_weights_by_hand() -> None:
    # threshold 0.4 - 0.187 = 0.213: pairs (0,1) and (0,2) pass, (1,2) does not
    similarity, direction = symmetric(0.9, 0.3, 0.0), symmetric(0.2, -0.4, 1.0)
    size, held = tensor([[2.0], [1.0], [3.0]]), torch.ones(3, 1, dtype=torch.bool)
    # γ01 = 0.6, γ02 = 0.3; a = (0.6 + 0.9) / 4, 1.2 / 5, 0.6 / 3
    backed = tensor([2 * 0.375, 1 * 0.24, 3 * 0.2])
    weights = expert_weights(similarity, direction, size, held)
    assert_close(weights[:, 0], backed / backed.sum())
    # the bar is 0.6 · 0.375 = 0.225: the third client is below it
    selected = expert_weights(similarity, direction, size, held, min_agreement=0.6)
    assert_close(selected[:, 0], tensor([0.75, 0.24, 0.0]) / 0.99)
    # relu: γ01 = 0.2, γ02 = 0; a = 0.2 / 4, 0.4 / 5, 0
    relu = expert_weights(similarity, direction, size, held, consensus="relu")
    assert_close(relu[:, 0], tensor([0.1, 0.08, 0.0]) / 0.18)


def test_weights_without_agreement_fall_back_to_size() -> None:
    similarity, size = symmetric(0.5, 0.5, 0.5), tensor([[1.0], [2.0], [1.0]])
    opposed = symmetric(-1.0, -1.0, -1.0)
    everyone = torch.ones(3, 1, dtype=torch.bool)
    assert_close(expert_weights(similarity, opposed, size, everyone)[:, 0], tensor([0.25, 0.5, 0.25]))
    one = tensor([[False], [True], [False]])
    assert_close(expert_weights(similarity, opposed, size, one)[:, 0], tensor([0.0, 1.0, 0.0]))
    nobody = torch.zeros(3, 1, dtype=torch.bool)
    assert_close(expert_weights(similarity, opposed, size, nobody), torch.zeros(3, 1))


def test_weights_with_sizes_of_zero() -> None:
    similarity = symmetric(0.5, 0.5, 0.5)
    pair = tensor([[True], [True], [False]])
    assert_close(expert_weights(similarity, similarity, torch.zeros(3, 1), pair)[:, 0], tensor([0.5, 0.5, 0.0]))
    # only the client without data is agreed with: what is left is size
    only_first = tensor([[1.0], [0.0], [5.0]])
    assert_close(expert_weights(similarity, similarity, only_first, pair)[:, 0], tensor([1.0, 0.0, 0.0]))


def test_equal_similarities_all_pass_despite_rounding() -> None:
    similarity = symmetric(0.3, 0.3 - 3e-7, 0.3 + 3e-7)
    weights = expert_weights(similarity, symmetric(0.0, 0.0, 0.0), torch.ones(3, 1), torch.ones(3, 1), beta=0.0)
    assert_close(weights, torch.full((3, 1), 1 / 3))
    strict = expert_weights(similarity, symmetric(0.0, 0.0, 0.0), torch.ones(3, 1), torch.ones(3, 1), min_agreement=1.0)
    assert_close(strict, torch.full((3, 1), 1 / 3))


@few
@given(st.integers(0, 10**6), st.sampled_from(["half", "relu"]), st.sampled_from([0.0, 0.5, 1.0]))
def test_weights_sum_to_one_follow_permutations_and_skip_who_does_not_hold(
    seed: int, consensus: Consensus, min_agreement: float
) -> None:
    load = (normal(5, 3, seed=seed).abs() * 100).masked_fill(normal(5, 3, seed=seed + 1) < -0.3, 0)
    centroid, update, held = normal(5, 3, 6, seed=seed + 2), normal(5, 3, 6, seed=seed + 3), load > 0

    def weights(order: Tensor) -> Tensor:
        return expert_weights(
            semantic_similarity(centroid[order], load[order]),
            direction_consensus(update[order]),
            load[order],
            held[order],
            consensus=consensus,
            min_agreement=min_agreement,
        )

    straight, order = weights(torch.arange(5)), tensor([4, 2, 0, 1, 3])
    assert_close(straight.sum(dim=0), held.any(dim=0).float())
    assert (straight[~held] == 0).all()
    assert (straight >= 0).all()
    assert_close(weights(order), straight[order], atol=1e-5, rtol=0)


def test_bimodality_tells_two_roles_from_one() -> None:
    apart = torch.tensor([[0.9, 0.9, -0.9, -0.9]])  # the sides of four clients: two agree with each other, two likewise
    two_roles_C_C = (apart.T * apart).sign() * 0.9
    torch.manual_seed(0)
    one_role_C_C = 0.5 + 0.1 * torch.randn(40, 40)
    everyone = torch.ones(4, 1, dtype=torch.bool)
    # two pairs at +0.9, four at -0.9: mean -0.3, moments 0.72, 0.432, 0.7776; (0.5 + 1) / 1.5 = 1
    assert bimodality(two_roles_C_C[None], everyone).tolist() == pytest.approx([1.0], abs=1e-5)
    assert float(bimodality(one_role_C_C[None], torch.ones(40, 1, dtype=torch.bool))) < 5 / 9
    three = torch.tensor([[True], [True], [True], [False]])
    assert bimodality(two_roles_C_C[None], three).tolist() == [0.0]
    assert bimodality(torch.full((1, 4, 4), 0.3), everyone).tolist() == [0.0]


def test_a_client_with_nearly_all_data_leaves_the_others_their_weight() -> None:
    similarity = symmetric(1.0, 1.0, 1.0)
    size = tensor([[1e7], [1.0], [3.0]])
    weight = expert_weights(similarity, symmetric(0.0, 0.0, 0.0), size, torch.ones(3, 1, dtype=torch.bool))
    assert_close(weight, size / size.sum())  # all agree by half, so weights are those of the data


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float32, torch.float64])
def test_arguments_may_differ_in_precision(dtype: torch.dtype) -> None:
    held = torch.ones(3, 1, dtype=torch.bool)
    size = tensor([[1], [2], [1]])
    exact = expert_weights(symmetric(0.5, 0.5, 0.5), symmetric(0.0, 0.5, 0.0), size.float(), held)
    mixed = expert_weights(symmetric(0.5, 0.5, 0.5).double(), symmetric(0.0, 0.5, 0.0), size.to(dtype), held)
    assert mixed.dtype == torch.float64
    assert_close(mixed.float(), exact)


def roles(clients: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors, sizes and holders of two experts, each in two roles; a tenth of the clients do not hold it."""
    held = normal(clients, 2, seed=1) > -1.3
    role = normal(1, 2, 8, seed=2) * normal(clients, 2, 1, seed=3).sign() + normal(clients, 2, 8, seed=4) / 2
    update = normal(1, 2, 16, seed=5) + 3 * normal(clients, 2, 16, seed=6)
    size = (2 * normal(clients, 2, seed=7)).exp() * held
    return centred_directions(role, held.float()), directions(update * held.unsqueeze(-1)), size, held


@pytest.mark.parametrize("consensus", ["half", "relu"])
@pytest.mark.parametrize("min_agreement", [0.0, 0.5])
def test_a_sample_of_all_holders_is_all_pairs(consensus: Consensus, min_agreement: float) -> None:
    centroid, update, size, held = roles(module.PARTNERS)
    options = (0.5, consensus, min_agreement)
    weight, modes = sampled_weights(centroid, update, size, held, *options)
    assert_close(weight, expert_weights(cosines(centroid), cosines(update), size, held, *options), atol=1e-6, rtol=1e-5)
    assert_close(modes, bimodality(cosines(centroid), held), atol=1e-4, rtol=1e-4)
    assert (modes > 5 / 9).all()


@pytest.mark.parametrize("holders", [2, 40, module.PARTNERS])
def test_few_holders_among_many_clients_are_all_pairs(holders: int) -> None:
    centroid, update, size, _ = roles(400)
    held = (torch.arange(400) % 3 == 0)[:, None] & (torch.arange(400) < 3 * holders)[:, None] & (size > 0)
    centroid, update = centred_directions(centroid, held.float()), directions(update * held.unsqueeze(-1))
    some, _ = sampled_weights(centroid, update, size * held, held, min_agreement=0.5)
    assert_close(some, expert_weights(cosines(centroid), cosines(update), size * held, held, min_agreement=0.5))


def test_a_sample_leaves_out_whom_all_pairs_leave_out() -> None:
    centroid, update, size, held = roles(500)
    every = expert_weights(cosines(centroid), cosines(update), size, held, min_agreement=0.5)
    some, _ = sampled_weights(centroid, update, size, held, min_agreement=0.5)
    assert ((every == 0) & held).sum(dim=0).min() > 50
    assert torch.equal(every == 0, some == 0)
    assert (every - some).abs().sum(dim=0).max() / 2 < 0.05
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    again, _ = sampled_weights(centroid[order], update[order], size[order], held[order], min_agreement=0.5)
    assert_close(again, some[order])


def test_pairs_that_are_looked_at_grow_with_the_clients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, whole = [0], module._share

    def counted(gated: Tensor, size: Tensor, own: Tensor) -> Tensor:
        pairs[-1] += gated.numel()
        return whole(gated, size, own)

    monkeypatch.setattr(module, "_share", counted)
    for clients in (400, 800):
        sampled_weights(*roles(clients))
        pairs.append(0)
    assert 1.9 < pairs[1] / pairs[0] < 2.1


def test_a_sample_copes_with_nobody_zeros_and_one_who_holds_nearly_all() -> None:
    centroid, update, size, held = roles(300)
    nobody = torch.zeros_like(held)
    assert torch.equal(sampled_weights(centroid, update, size, nobody)[0], torch.zeros(300, 2))
    alone = nobody.clone()
    alone[7] = True
    assert_close(sampled_weights(centroid, update, size, alone)[0][7], torch.ones(2))
    silent, modes = sampled_weights(torch.zeros_like(centroid), torch.zeros_like(update), size, held)
    assert_close(silent, size / size.sum(dim=0))
    assert modes.tolist() == [0.0, 0.0]
    unsaid, _ = sampled_weights(centroid, update, torch.zeros_like(size), held)
    assert_close(unsaid, held / held.sum(dim=0))
    first = int((held.all(dim=1)).nonzero()[0])
    size[first] = 1e8
    weight, _ = sampled_weights(centroid, update, size, held)
    assert_close(weight, expert_weights(cosines(centroid), cosines(update), size, held), atol=1e-5, rtol=1e-4)
