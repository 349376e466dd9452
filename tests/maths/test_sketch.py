"""Sketches: linear, reproducible, and as good as theory says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.hashing import words
from fedalign.maths import sketch as module
from fedalign.maths.sketch import Sketch


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
