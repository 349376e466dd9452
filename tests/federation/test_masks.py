"""Masks: they cancel in the sum of all, and in no other."""

import hashlib
import hmac

import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from fedalign.federation.masks import Masks

NAMES = ("a", "b", "c", "d")


def met(run: str = "run") -> dict[str, Masks]:
    masks = {name: Masks(name, run) for name in NAMES}
    for one in masks.values():
        one.meet({name: other.public for name, other in masks.items()})
    return masks


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_they_cancel_in_the_sum_of_all(dtype: torch.dtype) -> None:
    values = {name: torch.arange(6).view(2, 3).to(dtype) * turn for turn, name in enumerate(NAMES)}
    masks = met()
    told = {name: masks[name].mask(values[name], (1, "load"), NAMES) for name in NAMES}
    assert torch.equal(
        sum(told.values(), torch.zeros(2, 3, dtype=dtype)), sum(values.values(), torch.zeros(2, 3, dtype=dtype))
    )
    for name in NAMES:
        assert not torch.equal(told[name], values[name])
        rest = sum((told[other] for other in NAMES if other != name), torch.zeros(2, 3, dtype=dtype))
        assert not torch.equal(rest, sum(values.values(), torch.zeros(2, 3, dtype=dtype)) - values[name])


@pytest.mark.parametrize(
    ("about", "among"), [((2, "load"), NAMES), ((1, "rows"), NAMES), ((1, "load"), ("a", "b", "c"))]
)
def test_who_masks_anything_else_does_not_cancel(about: tuple[object, ...], among: tuple[str, ...]) -> None:
    masks, zeros = met(), torch.zeros(8, dtype=torch.int64)
    told = [masks[name].mask(zeros, (1, "load"), NAMES) for name in NAMES[1:]]
    assert not torch.equal(sum(told, masks["a"].mask(zeros, about, among)), zeros)


def test_the_stream_is_that_of_the_standards() -> None:
    """HKDF-SHA256 (RFC 5869) written out, and ChaCha20 of its key."""
    masks, zeros = met(), torch.zeros(4, dtype=torch.int64)
    secret = masks["a"]._shared["b"]
    assert secret == masks["b"]._shared["a"]
    info = b'["run", ["1", "load"], ["a", "b"]]'
    key = hmac.digest(hmac.digest(bytes(32), secret, hashlib.sha256), info + b"\x01", hashlib.sha256)
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(32))
    expected = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    assert torch.equal(masks["a"].mask(zeros, (1, "load"), ("a", "b")), expected)
    assert torch.equal(masks["b"].mask(zeros, (1, "load"), ("a", "b")), -expected)


def test_a_long_tensor_is_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, zeros = met(), torch.zeros(1000, dtype=torch.int16)
    whole = masks["a"].mask(zeros, ("x",), NAMES)
    monkeypatch.setattr("fedalign.federation.masks.CHUNK", 128)
    assert torch.equal(masks["a"].mask(zeros, ("x",), NAMES), whole)
