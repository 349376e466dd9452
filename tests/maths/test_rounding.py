"""Wire precision: sizes, exactness, unbiased rounding, and values that are not finite."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.maths import rounding as wire
from fedalign.maths.rounding import broadcast_dtype, count, pack, packed_nbytes, stored, unpack, unpack_part
from fedalign.protocol import WireDtype

every_dtype = pytest.mark.parametrize("dtype", get_args(WireDtype))


def normal(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@every_dtype
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 1000])
def test_sizes(dtype: WireDtype, size: int) -> None:
    packed = pack(normal(size), dtype, seed=1)
    assert packed.nbytes == packed_nbytes(size, dtype)
    assert unpack(packed).shape == (size,)
    assert unpack(packed).dtype == torch.float32


def test_bytes_by_hand() -> None:
    assert [packed_nbytes(1000, dtype) for dtype in get_args(WireDtype)] == [4000, 2000, 1016, 564]


def test_float32_is_exact() -> None:
    assert torch.equal(unpack(pack(normal(300), "float32", 0)), normal(300))


def test_bfloat16_rounds_to_nearest() -> None:
    assert_close(unpack(pack(normal(300), "bfloat16", 0)), normal(300), rtol=2**-8, atol=0)


def test_int8_errs_by_less_than_a_level_of_its_block() -> None:
    flat = torch.cat([normal(256), 1000 * normal(256, 1), normal(100, 2) / 1000])
    error = (unpack(pack(flat, "int8", 3)) - flat).abs()
    for start in (0, 256, 512):
        block = slice(start, start + 256)
        assert error[block].max() < flat[block].abs().max() / 127 * 1.0001


def test_int8_by_hand() -> None:
    flat = tensor([127.0, -127.0, 0.0, 64.0, 1.0])
    packed = pack(flat, "int8", 0)
    assert packed.scale is not None
    assert packed.scale.tolist() == [1.0]
    assert packed.values.tolist() == [127, -127, 0, 64, 1]


def test_int8_is_unbiased() -> None:
    flat = torch.full((4000,), 0.3)
    flat[::256] = 127.0  # scale 1 in each block
    errors = torch.stack([unpack(pack(flat, "int8", seed)) - flat for seed in range(50)])
    assert abs(errors.mean()) < 4 * (0.21 / (4000 * 50)) ** 0.5
    up = (errors > 0).float().mean(dim=0)  # each value goes up in about 30 % of the seeds
    assert (up[flat < 1] - 0.3).abs().max() < 0.35


def test_int8_blocks_of_zeros_are_exact_and_tiny_values_do_no_harm() -> None:
    assert torch.equal(unpack(pack(torch.zeros(300), "int8", 0)), torch.zeros(300))
    tiny = torch.full((300,), 1e-44)
    assert_close(unpack(pack(tiny, "int8", 0)), tiny, atol=1e-43, rtol=0)


def test_int8_rounding_is_a_function_of_seed_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = normal(2000)
    whole = pack(flat, "int8", 5)
    monkeypatch.setattr(wire, "CHUNK", 256 * 3)
    assert torch.equal(pack(flat, "int8", 5).values, whole.values)
    assert not torch.equal(pack(flat, "int8", 6).values, whole.values)
    assert whole.values[:8].tolist() == [-42, -43, -9, -17, 32, 26, -12, -79]


@every_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(dtype: WireDtype, value: float) -> None:
    flat = normal(600)
    flat[300] = value
    received = unpack(pack(flat, dtype, 0))
    assert not received[300].isfinite()
    assert received[:256].isfinite().all()
    assert received[512:].isfinite().all()


def test_weights_are_never_broadcast_in_few_bits() -> None:
    assert [broadcast_dtype(dtype) for dtype in get_args(WireDtype)] == ["float32", *["bfloat16"] * 3]


def test_int4_by_hand() -> None:
    packed = pack(tensor([7.0, -7.0, 0.0, 3.0, 1.0]), "int4", 0)
    assert packed.scale is not None
    assert packed.scale.tolist() == [1.0]
    assert packed.values.tolist() == [15 + 16 * 1, 8 + 16 * 11, 9]  # the last half stands for no value
    assert unpack(packed).tolist() == [7.0, -7.0, 0.0, 3.0, 1.0]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 300, 301])
def test_int4_errs_by_less_than_a_level_of_its_block(size: int) -> None:
    flat = normal(size) ** 3
    packed = pack(flat, "int4", 3)
    assert (count(packed), len(packed.values)) == (size, stored(size, "int4"))
    error = (unpack(packed) - flat).abs()
    for start in range(0, size, 64):
        block = slice(start, start + 64)
        assert error[block].max() < flat[block].abs().max() / 7 * 1.0001


def test_int4_is_unbiased() -> None:
    flat = torch.full((4000,), 0.3)
    flat[::64] = 7.0  # scale 1 in each block
    errors = torch.stack([unpack(pack(flat, "int4", seed)) - flat for seed in range(50)])
    assert abs(errors.mean()) < 4 * (0.21 / (4000 * 50)) ** 0.5


def test_int4_rounding_is_a_function_of_seed_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = normal(2000)
    whole = pack(flat, "int4", 5)
    monkeypatch.setattr(wire, "CHUNK", 64 * 3)
    assert torch.equal(pack(flat, "int4", 5).values, whole.values)
    assert not torch.equal(pack(flat, "int4", 6).values, whole.values)


@every_dtype
def test_a_part_is_what_the_whole_has_there(dtype: WireDtype) -> None:
    packed = pack(normal(701), dtype, 1)
    for start, end in [(0, 701), (1, 2), (63, 300), (257, 701), (700, 701)]:
        assert torch.equal(unpack_part(packed, start, end), unpack(packed)[start:end])
