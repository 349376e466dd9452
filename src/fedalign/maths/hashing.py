"""Seeded integer hashes of an index: random numbers that are the same on every machine, device and library version.

All arithmetic is on non-negative int64: both factors of the mixer are below 2^31, so no product of a 32-bit word
overflows and right shifts are logical. The mixer is one of C. Wellons' hash prospector (public domain), applied twice
with a key in between.
"""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch
from torch import Tensor

Word = TypeVar("Word", int, Tensor)
MASK = 0xFFFF_FFFF
GOLDEN = 0x9E37_79B9  # keeps seed 0 and stream 0 away from the mixer's fixed point 0


def words(first: int, count: int, seed: int, stream: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Hash the indices first .. first + count - 1 into 32-bit words.

    Args:
        first: the first index, below 2^32.
        count: how many.
        seed: any integer; its low 64 bits count.
        stream: numbers of different streams are independent.
        device: where to compute.

    Returns:
        int64 [count], values in [0, 2^32).

    >>> words(0, 3, seed=1).equal(words(1, 3, seed=1))
    False
    >>> words(0, 3, seed=1)[1:].equal(words(1, 2, seed=1))
    True
    """
    key = stream & MASK
    for part in (seed & MASK, (seed >> 32) & MASK):
        key = _mix(key ^ part ^ GOLDEN)
    index = torch.arange(first, first + count, dtype=torch.int64, device=device)
    return _mix((_mix(index) + key) & MASK)


def _mix(x: Word) -> Word:
    """Replace 32-bit words, tensors in place, by a bijection in which each input bit flips each output bit or not."""
    x ^= x >> 16
    x *= 0x21F0_AAAD
    x &= MASK
    x ^= x >> 15
    x *= 0x735A_2D97
    x &= MASK
    x ^= x >> 15
    return x


def derive_seed(*parts: object) -> int:
    """A 63-bit seed for one purpose, the same on every machine.

    >>> derive_seed(0, 1, "client-00") == derive_seed(0, 1, "client-00") != derive_seed(0, 2, "client-00")
    True
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
