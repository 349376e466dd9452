"""Sketches: linear, reproducible, and as good as theory says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.maths import sketch as module
from fedalign.maths.hashing import words
from fedalign.maths.low_rank import Pair, pair_in
from fedalign.maths.sketch import Sketch
from fedalign.protocol import Factors


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def errors(a: Tensor, b: Tensor, width: int, seeds: int = 60) -> Tensor:
    """Error of the sketched cosine, once for each seed."""
    exact = torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)
    sketched = [
        torch.cosine_similarity(Sketch(width, seed).project(a), Sketch(width, seed).project(b), dim=0)
        for seed in range(seeds)
    ]
    return torch.stack(sketched) - exact


def reference(flat: Tensor, width: int, seed: int) -> Tensor:
    """The definition, value by value."""
    out = torch.zeros(width, dtype=torch.float64)
    for index, value in enumerate(flat.double().tolist()):
        row, column = divmod(index, width)
        tile, bit = divmod(row, 32)
        sign_word = int(words(tile * width + column, 1, seed, stream=0))
        offset = int(words(row, 1, seed, stream=1)) % width
        out[(column + offset) % width] += -value if sign_word >> (31 - bit) & 1 else value
    return out


@pytest.mark.parametrize(("size", "width"), [(1, 8), (7, 8), (8, 8), (300, 8), (700, 10), (0, 4), (5, 1)])
def test_project_is_the_definition(size: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1)  # one tile at a time: 300 values of width 8 then take two chunks
    flat = normal(size)
    assert_close(Sketch(width, 5).project(flat).double(), reference(flat, width, 5), atol=1e-5, rtol=1e-5)


def test_these_numbers_never_change() -> None:
    """Frozen: clients of different versions must agree on them."""
    assert words(0, 4, seed=7).tolist() == [991209114, 1707753385, 1971808888, 39364172]
    assert Sketch(4, seed=7).project(torch.arange(1.0, 13.0)).tolist() == [6.0, 1.0, -2.0, -13.0]


def test_words_look_random() -> None:
    word = words(0, 4096, seed=3)
    bits = (word.unsqueeze(1) >> torch.arange(32)) & 1
    assert word.min() >= 0
    assert word.max() < 2**32
    assert ((bits.float().mean(dim=0) - 0.5).abs() < 5 * 0.5 / 64).all()
    agree = (bits == ((words(0, 4096, seed=4).unsqueeze(1) >> torch.arange(32)) & 1)).float().mean()
    assert abs(agree - 0.5) < 0.01
    assert not words(0, 8, seed=3, stream=1).equal(word[:8])
    assert not words(0, 8, seed=3 + 2**40).equal(word[:8])
    assert words(0, 8, seed=-1).equal(words(0, 8, seed=2**64 - 1))


def test_linear() -> None:
    a, b, sketch = normal(5000), normal(5000, seed=1), Sketch(64, 3)
    assert_close(sketch.project(2 * a - b), 2 * sketch.project(a) - sketch.project(b), atol=1e-4, rtol=0)


def test_the_seed_and_the_position_matter() -> None:
    flat = normal(1000)
    assert not torch.equal(Sketch(64, 0).project(flat), Sketch(64, 1).project(flat))
    assert not torch.equal(Sketch(64, 0).project(flat), Sketch(64, 0).project(flat.flip(0)))


def test_shape_and_precision() -> None:
    flat = normal(600)
    expected = Sketch(16, 0).project(flat)
    assert_close(Sketch(16, 0).project(flat.view(20, 30).T.contiguous().T), expected)
    assert Sketch(16, 0).project(flat.bfloat16()).dtype == torch.float32
    assert Sketch(16, 0).project(flat.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="width = 0"):
        Sketch(0, 0)


def test_a_value_that_is_not_finite_shows() -> None:
    flat = normal(600)
    flat[17] = torch.nan
    assert Sketch(16, 0).project(flat).isnan().any()


@pytest.mark.parametrize("size", [400, 5000])
def test_cosines_of_correlated_vectors(size: int) -> None:
    common = normal(size)
    a, b = common + normal(size, seed=1), common + normal(size, seed=2)
    error = errors(a, b, width=256)
    assert error.std() < 1 / 16
    assert abs(error.mean()) < 3 / 16 / 60**0.5


def test_vectors_shorter_than_the_width_keep_their_cosine() -> None:
    assert errors(normal(100), normal(100, seed=1), width=128, seeds=5).abs().max() < 1e-5


@pytest.mark.parametrize("columns", [256, 96, 2048])
def test_energy_in_one_column_of_a_matrix_is_spread(columns: int) -> None:
    """Outlier features: all the values lie `columns` apart, which plain residues would put into few buckets."""
    a, b = torch.zeros(512, columns), torch.zeros(512, columns)
    a[:, 3], b[:, 3] = normal(512), normal(512, seed=1)
    error = errors(a, b, width=256)
    assert error.std() < 1.25 / 16
    assert abs(error.mean()) < 3 / 16 / 60**0.5


def test_inner_products_are_unbiased_for_vectors_with_a_mean() -> None:
    a, b = torch.ones(3000), torch.ones(3000)
    b[::2] = -1
    products = tensor([float(Sketch(64, s).project(a) @ Sketch(64, s).project(b)) for s in range(100)])
    assert abs(products.mean()) < 4 * 3000 / 8 / 10


# changes of low-rank products

UP = Factors(start_A=3, start_B=3 + 2 * 40, rank=2, inputs=40, outputs=70)
DOWN = Factors(start_A=230, start_B=230 + 3 * 35, rank=3, inputs=35, outputs=33)
PAIRS = (UP, DOWN)
SIZE = 230 + 3 * (35 + 33) + 20
PLAIN = [(0, 3), (223, 230), (434, SIZE)]


def product(pair: Pair) -> Tensor:
    B, A = pair
    return B.double() @ A.double()


def change(new: Tensor, old: Tensor) -> Tensor:
    """All that changed, written out: both products and the other values."""
    products = [product(pair_in(new, place)) - product(pair_in(old, place)) for place in PAIRS]
    plain = [(new - old)[start:end].double() for start, end in PLAIN]
    return torch.cat([part.flatten() for part in [*products, *plain]])


def without_factors(flat: Tensor) -> Tensor:
    return torch.cat([flat[start:end] for start, end in PLAIN])


def random_signs(count: int, width: int, seed: int, stream: int, tile: int) -> Tensor:
    """The definition, sign by sign: [count, width]; each pair begins a new tile of 32 rows."""
    rows = []
    for index in range(count):
        first, bit = divmod(index, 32)
        word = words((tile + first) * width, width, seed, stream)
        rows.append(1 - 2 * (word >> (31 - bit) & 1))
    return torch.stack(rows).double()


@pytest.mark.parametrize("width", [8, 10])
def test_project_change_is_the_definition(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 1)
    module._signs.cache_clear()
    new, old = normal(SIZE), normal(SIZE, seed=1)
    expected = reference(without_factors(new - old), width, 5)
    for place, above, before in [(UP, 0, 0), (DOWN, 3, 2)]:  # 70 rows took three tiles, 40 columns two
        u = random_signs(place.outputs, width, 5, stream=2, tile=above)
        v = random_signs(place.inputs, width, 5, stream=3, tile=before)
        moved = product(pair_in(new, place)) - product(pair_in(old, place))
        expected += ((u.T @ moved) * v.T).sum(dim=1) / width**0.5
    assert_close(Sketch(width, 5).project_change(new, old, PAIRS).double(), expected, atol=1e-4, rtol=1e-5)


def test_these_numbers_of_a_product_never_change() -> None:
    """Frozen: clients of different versions must agree on them."""
    place = Factors(start_A=0, start_B=3, rank=1, inputs=3, outputs=2)
    flat = tensor([1.0, 10.0, 100.0, 1.0, 2.0])
    assert Sketch(4, seed=7).project_change(flat, torch.zeros(5), [place]).tolist() == [-133.5, 166.5, -136.5, -55.5]


def test_sites_agree_whatever_their_factors() -> None:
    """The same change of the product through other factors has the same sketch."""
    new, old, turned = normal(SIZE), normal(SIZE, seed=1), normal(SIZE)
    for place in PAIRS:
        turn = normal(place.rank, place.rank, seed=9)
        B, A = pair_in(turned, place)
        B.copy_(B @ turn)
        A.copy_(torch.linalg.solve(turn, A))
    first, again, other = (Sketch(64, 3).project_change(flat, old, PAIRS) for flat in (new, new.clone(), turned))
    assert torch.equal(first, again)
    assert_close(other, first, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(Sketch(64, 4).project_change(new, old, PAIRS), first, atol=0.1)
    assert not torch.allclose(turned, new, atol=0.1)


def test_without_factors_it_is_the_sketch_of_the_update() -> None:
    new, old = normal(SIZE), normal(SIZE, seed=1)
    assert torch.equal(Sketch(16, 0).project_change(new, old, []), Sketch(16, 0).project(new - old))
    assert Sketch(16, 0).project_change(new.double(), old.double(), PAIRS).dtype == torch.float64
    assert Sketch(16, 0).project_change(new.bfloat16(), old.bfloat16(), PAIRS).dtype == torch.float32


def test_a_small_change_of_a_large_product_is_seen() -> None:
    """In float32, B'·A' and B·A would differ by rounding alone."""
    old = 100 * normal(SIZE)
    new = old * (1 + 1e-6 * normal(SIZE, seed=1))
    exact = Sketch(64, 0).project_change(new.double(), old.double(), PAIRS)
    assert_close(Sketch(64, 0).project_change(new, old, PAIRS).double(), exact, rtol=0, atol=1e-4 * float(exact.norm()))


def related(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What two sites start from, and what they end with: updates that have something in common."""
    old, common = normal(SIZE, seed=seed), normal(SIZE, seed=seed + 1)
    first, second = (old + 0.3 * common + 0.3 * normal(SIZE, seed=seed + i) for i in (2, 3))
    return old, first, second


def stated_variance(first: Tensor, second: Tensor, old: Tensor) -> float:
    """The bound in the module's docstring on the variance of inner products, times the width."""
    one, two = change(first, old), change(second, old)
    total = float(one.square().sum() * two.square().sum() + (one @ two).square())
    for place in PAIRS:
        before = product(pair_in(old, place))
        m, n = (product(pair_in(new, place)) - before for new in (first, second))
        outer = m @ n.T
        total += float(2 * (m.T @ n).square().sum() + 2 * outer.square().sum() + 2 * (outer * outer.T).sum())
    return total


@pytest.mark.parametrize("width", [64, 256])
def test_inner_products_of_changes_are_unbiased_and_as_noisy_as_stated(width: int) -> None:
    old, first, second = related(seed=20)
    exact, variance = float(change(first, old) @ change(second, old)), stated_variance(first, second, old) / width
    sketches = [Sketch(width, seed) for seed in range(200)]
    products = [s.project_change(first, old, PAIRS) @ s.project_change(second, old, PAIRS) for s in sketches]
    assert abs(float(torch.stack(products).mean()) - exact) < 4 * (variance / 200) ** 0.5
    assert 0.5 * variance < float(torch.stack(products).var()) < 1.3 * variance


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("common_A", [False, True])
def test_cosines_of_changes(rank: int, common_A: bool) -> None:
    place = Factors(0, rank * 300, rank, inputs=300, outputs=200)
    old, first, second = torch.zeros(rank * 500), normal(rank * 500, seed=1), normal(rank * 500, seed=2)
    if common_A:
        second[: rank * 300] = first[: rank * 300]
    one, two = (product(pair_in(flat, place)).flatten() for flat in (first, second))
    sketches = [Sketch(256, seed) for seed in range(60)]
    changes = torch.stack(
        [torch.stack([sketch.project_change(flat, old, [place]) for sketch in sketches]) for flat in (first, second)]
    )
    error = torch.cosine_similarity(changes[0], changes[1], dim=1) - torch.cosine_similarity(one, two, dim=0)
    stated = (1 + 2 / rank * common_A) ** 0.5 / 16
    assert 0.75 * stated < error.std() < 1.25 * stated
    assert abs(error.mean()) < 3 * stated / 60**0.5


def test_two_products_of_a_group_are_told_apart() -> None:
    """The same change in one or in the other of two equal pairs: orthogonal, and not the same."""
    places = [Factors(0, 80, 2, inputs=40, outputs=40), Factors(160, 240, 2, inputs=40, outputs=40)]
    old, pair = torch.zeros(320), normal(160)
    first, second = torch.cat([pair, old[:160]]), torch.cat([old[:160], pair])
    sketch = Sketch(1024, 0)
    cosine = torch.cosine_similarity(
        sketch.project_change(first, old, places), sketch.project_change(second, old, places), dim=0
    )
    assert abs(cosine) < 4 / 32
