"""Wire precision: how a group's values are rounded before they travel, the same on each machine [O].

float32 travels as it is, bfloat16 is rounded to nearest even. int8 has one float32 scale for each block of 256 values
and rounds stochastically: E[unpack(pack(x))] = x, so what many clients send does not drift in one direction. The
random numbers are a seeded hash of the index, so every engine gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fedalign.maths.hashing import words
from fedalign.protocol import Packed, ParameterGroup, Weights, WireDtype

BLOCK = 256  # int8 values that share a scale
LEVELS = 127  # int8 values lie in [-127, 127]
CHUNK = 1 << 17  # values packed at a time: they stay in cache
TORCH_DTYPE: dict[WireDtype, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def broadcast_dtype(dtype: WireDtype) -> WireDtype:
    """The dtype of weights on the wire when updates travel in `dtype`.

    Eight bits a block are enough for an update, whose errors average out over clients, not for the weights that all
    of them start from: int8 runs broadcast bfloat16.
    """
    return "bfloat16" if dtype == "int8" else dtype


def packed_nbytes(size: int, dtype: WireDtype) -> int:
    """Bytes on the wire of a group of `size` values.

    >>> packed_nbytes(257, "int8")
    265
    """
    values, scales = packed_lengths(size, dtype)
    return values * TORCH_DTYPE[dtype].itemsize + 4 * (scales or 0)


def packed_lengths(size: int, dtype: WireDtype) -> tuple[int, int | None]:
    """Lengths of `Packed.values` and `Packed.scale` of a group of `size` values.

    >>> packed_lengths(257, "int8"), packed_lengths(257, "bfloat16")
    ((257, 2), (257, None))
    """
    return size, math.ceil(size / BLOCK) if dtype == "int8" else None


def pack(flat: Tensor, dtype: WireDtype, seed: int) -> Packed:
    """Round a flat float32 tensor [N] to wire precision. float32 is passed on as it is, not copied.

    Non-finite values stay non-finite (in int8 with their whole block), so that the receiver sees them. `seed` drives
    the rounding of int8 alone; give each client, round and group its own.
    """
    if dtype != "int8":
        return Packed(flat.to(TORCH_DTYPE[dtype]))
    values = torch.empty(len(flat), dtype=torch.int8, device=flat.device)
    scale = torch.empty(math.ceil(len(flat) / BLOCK), dtype=torch.float32, device=flat.device)
    for start in range(0, len(flat), CHUNK):
        chunk = flat[start : start + CHUNK]
        blocks = functional.pad(chunk, (0, -len(chunk) % BLOCK)).view(-1, BLOCK)
        first = start // BLOCK
        rounded, scale[first : first + len(blocks)] = _round_blocks(blocks, first, seed)
        values[start : start + CHUNK] = rounded.view(-1)[: len(chunk)]
    return Packed(values, scale)


def unpack(packed: Packed) -> Tensor:
    """The flat float32 tensor [N] that the receiver works with (the packed values themselves if they are float32)."""
    flat = packed.values.float()
    if packed.scale is not None:
        scale_into(flat, packed.scale)
    return flat


def unpack_weights(weights: Mapping[ParameterGroup, Packed]) -> Weights:
    """Wire precision to float32, group by group."""
    return {group: unpack(packed) for group, packed in weights.items()}


def bytes_of(packed: Packed) -> list[Tensor]:
    """A packed group as it travels, uint8: its values, then its scales. Nothing is copied."""
    return [one.contiguous().view(-1).view(torch.uint8) for one in (packed.values, packed.scale) if one is not None]


def cut_out(parts: Iterable[Tensor], start: int, nbytes: int) -> Tensor:
    """So many bytes from `start` on of byte tensors that follow one another.

    >>> cut_out([torch.tensor([1, 2]), torch.tensor([3, 4])], 1, 2)
    tensor([2, 3])
    """
    found, at = [], 0
    for part in parts:
        first, stop = max(start - at, 0), min(start + nbytes - at, len(part))
        if first < stop:
            found.append(part[first:stop])
        at += len(part)
    return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0, dtype=torch.uint8)


def scale_into(flat: Tensor, scale: Tensor) -> None:
    """Multiply int8 levels, held as float32 [n], by the scales of their blocks, in place."""
    whole = len(flat) // BLOCK
    flat[: whole * BLOCK].view(-1, BLOCK).mul_(scale[:whole].unsqueeze(1))
    if whole < len(scale):
        flat[whole * BLOCK :].mul_(scale[whole])


def _round_blocks(blocks: Tensor, first: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stochastically rounded levels, as float32 [blocks, BLOCK], and scales [blocks] of blocks first, first + 1, ..."""
    scale = blocks.abs().amax(dim=1) / LEVELS
    finite = scale.isfinite()
    divisor = scale.where(finite & (scale > 0), torch.ones_like(scale)).unsqueeze(1)
    noise = _uniform(first, len(blocks), seed, blocks.device)
    levels = (blocks / divisor + noise).floor_().clamp_(-LEVELS, LEVELS)
    # NaN times any level is NaN: the receiver sees that the block was not finite
    return levels.masked_fill_(~finite.unsqueeze(1), 0), scale.where(finite, torch.full_like(scale, torch.nan))


def _uniform(first: int, blocks: int, seed: int, device: torch.device) -> Tensor:
    """Multiples of 2^-16 in [0, 1), float32 [blocks, BLOCK]: the halves of hashed words, two blocks a word."""
    pair, pairs = first // 2, (first + blocks + 1) // 2 - first // 2
    word = words(pair * BLOCK, pairs * BLOCK, seed, device=device).view(pairs, 1, BLOCK)
    halves = torch.cat([word & 0xFFFF, word >> 16], dim=1).view(-1, BLOCK)
    return halves[first % 2 : first % 2 + blocks].float() / (1 << 16)
