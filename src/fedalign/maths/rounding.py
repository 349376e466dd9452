"""Wire precision: how a group's values are rounded before they travel, the same on each machine [O].

float32 travels as it is, bfloat16 is rounded to nearest even. int8 has one float32 scale for each block of 256 values,
int4 for each of 64, two values a byte. Both round stochastically: E[unpack(pack(x))] = x, so what many clients send
does not drift in one direction. The random numbers are a seeded hash of the index, so every engine gives the same
numbers.

A byte of int4 holds its first value in its lower half. Halves are 1 to 15, of which 8 is zero; where the number of
values is odd the last half is 0, which stands for no value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from fedalign.maths.hashing import words
from fedalign.maths.lazy import LazyWeights
from fedalign.maths.tensor_file import Named
from fedalign.protocol import Packed, ParameterGroup, WireDtype


@dataclass(frozen=True)
class Blocks:
    """Blocks that share a scale."""

    values: int
    levels: int  # stand for -levels .. levels
    stored: int  # numbers that stand for the values of one


BLOCKS: dict[WireDtype, Blocks] = {"int8": Blocks(256, 127, 256), "int4": Blocks(64, 7, 32)}
SCALE = ".scale"  # ends the name of a group's scales in a file
CHUNK = 1 << 17  # values packed at a time: they stay in cache
TORCH_DTYPE: dict[WireDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
    "int4": torch.uint8,
}
SCALED = {str(TORCH_DTYPE[dtype]).removeprefix("torch."): blocks for dtype, blocks in BLOCKS.items()}  # as stored


def broadcast_dtype(dtype: WireDtype) -> WireDtype:
    """The dtype of whole weights on the wire when broadcasts travel in `dtype`.

    Few bits a block are enough for a difference, not for the weights that it is added to: these are in bfloat16.
    """
    return "bfloat16" if dtype in BLOCKS else dtype


def advanced(base: Packed, difference: Packed) -> Packed:
    """Weights in bfloat16 after a difference: the sum in float32, rounded to nearest even, the same everywhere.

    Raises:
        ValueError: It is of another number of values.
    """
    size = len(base.values)
    if count(difference) != size:
        raise ValueError(f"a difference of {count(difference)} values, the weights have {size}")
    values = torch.empty(size, dtype=torch.bfloat16)
    for start in range(0, size, CHUNK):
        part = torch.empty(min(CHUNK, size - start))
        unpack_into(part, difference, start)
        values[start : start + len(part)] = part.add_(base.values[start : start + len(part)])
    return Packed(values)


def stored(size: int, dtype: WireDtype) -> int:
    """How many numbers of the wire's type stand for `size` values.

    >>> stored(257, "int8"), stored(257, "int4")
    (257, 129)
    """
    return math.ceil(size / 2) if dtype == "int4" else size


def scales(size: int, dtype: WireDtype) -> int | None:
    """How many scales `size` values have; None: the type has none.

    >>> scales(257, "int8"), scales(257, "int4"), scales(257, "bfloat16")
    (2, 5, None)
    """
    return math.ceil(size / BLOCKS[dtype].values) if dtype in BLOCKS else None


def packed_nbytes(size: int, dtype: WireDtype) -> int:
    """Bytes on the wire of a group of `size` values.

    >>> packed_nbytes(257, "int8"), packed_nbytes(257, "int4")
    (265, 149)
    """
    return stored(size, dtype) * TORCH_DTYPE[dtype].itemsize + 4 * (scales(size, dtype) or 0)


def wire_dtype(packed: Packed) -> WireDtype:
    """The name of its precision."""
    return next(dtype for dtype, stored_as in TORCH_DTYPE.items() if stored_as == packed.values.dtype)


def count(packed: Packed) -> int:
    """How many values it holds."""
    if packed.values.dtype != torch.uint8 or not len(packed.values):
        return len(packed.values)
    return 2 * len(packed.values) - (int(packed.values[-1]) < 16)


def pack(flat: Tensor, dtype: WireDtype, seed: int) -> Packed:
    """Round a flat float32 tensor [N] to wire precision. float32 is passed on as it is, not copied.

    Non-finite values stay non-finite (in int8 and int4 with their whole block), so that the receiver sees them. `seed`
    drives the rounding of these two alone; give each client, round and group its own.
    """
    if dtype not in BLOCKS:
        return Packed(flat.to(TORCH_DTYPE[dtype]))
    block = BLOCKS[dtype]
    values = torch.empty(len(flat), dtype=torch.int8, device=flat.device)
    scale = torch.empty(math.ceil(len(flat) / block.values), dtype=torch.float32, device=flat.device)
    for start in range(0, len(flat), CHUNK):
        chunk = flat[start : start + CHUNK]
        blocks = functional.pad(chunk, (0, -len(chunk) % block.values)).view(-1, block.values)
        first = start // block.values
        rounded, scale[first : first + len(blocks)] = _round_blocks(blocks, block.levels, first, seed)
        values[start : start + CHUNK] = rounded.view(-1)[: len(chunk)]
    if dtype == "int8":
        return Packed(values, scale)
    halves = functional.pad(values + 8, (0, len(values) % 2)).view(torch.uint8)
    return Packed(halves[0::2] | halves[1::2] << 4, scale)


def unpack(packed: Packed) -> Tensor:
    """The flat float32 tensor [N] that the receiver works with (the packed values themselves if they are float32)."""
    if packed.values.dtype == torch.float32:
        return packed.values
    flat = torch.empty(count(packed), device=packed.values.device)
    unpack_into(flat, packed)
    return flat


def unpack_part(packed: Packed, start: int, end: int) -> Tensor:
    """Values start .. end - 1 in float32."""
    if packed.scale is None:
        return packed.values[start:end].float()
    first = start - start % SCALED[_name(packed)].values
    flat = torch.empty(end - first, device=packed.values.device)
    unpack_into(flat, packed, first)
    return flat[start - first :]


def unpack_into(flat: Tensor, packed: Packed, start: int = 0) -> None:
    """Fill `flat`, float32 [n], with the values from `start` on, which is where a block begins."""
    if packed.scale is None:
        flat.copy_(packed.values[start : start + len(flat)])
        return
    block = SCALED[_name(packed)]
    if packed.values.dtype == torch.uint8:
        halves = packed.values[start // 2 : math.ceil((start + len(flat)) / 2)]
        flat[0::2] = halves & 15
        flat[1::2] = (halves >> 4)[: len(flat) // 2]
        flat -= 8
    else:
        flat.copy_(packed.values[start : start + len(flat)])
    scale, whole = packed.scale[start // block.values :], len(flat) // block.values
    flat[: whole * block.values].view(-1, block.values).mul_(scale[:whole].unsqueeze(1))
    if whole * block.values < len(flat):
        flat[whole * block.values :].mul_(scale[whole])


def unpack_weights(weights: Mapping[ParameterGroup, Packed]) -> LazyWeights:
    """Wire precision to float32, a group whenever it is looked up."""
    return LazyWeights({group: partial(unpack, packed) for group, packed in weights.items()})


def shapes_of(name: str, size: int, dtype: WireDtype) -> list[Named]:
    """The tensors of a group of so many values as it is kept: its values, and its scales if the type has any."""
    values, blocks = Named(name, TORCH_DTYPE[dtype], (stored(size, dtype),)), scales(size, dtype)
    return [values] if blocks is None else [values, Named(name + SCALE, torch.float32, (blocks,))]


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


def _name(packed: Packed) -> str:
    return str(packed.values.dtype).removeprefix("torch.")


def _round_blocks(blocks: Tensor, most: int, first: int, seed: int) -> tuple[Tensor, Tensor]:
    """Stochastically rounded levels, as float32 [blocks, B], and scales [blocks] of blocks first, first + 1, ..."""
    scale = blocks.abs().amax(dim=1) / most
    finite = scale.isfinite()
    divisor = scale.where(finite & (scale > 0), torch.ones_like(scale)).unsqueeze(1)
    noise = _uniform(first, len(blocks), blocks.shape[1], seed, blocks.device)
    levels = (blocks / divisor + noise).floor_().clamp_(-most, most)
    # NaN times any level is NaN: the receiver sees that the block was not finite
    return levels.masked_fill_(~finite.unsqueeze(1), 0), scale.where(finite, torch.full_like(scale, torch.nan))


def _uniform(first: int, blocks: int, size: int, seed: int, device: torch.device) -> Tensor:
    """Multiples of 2^-16 in [0, 1), float32 [blocks, size]: the halves of hashed words, two blocks a word."""
    pair, pairs = first // 2, (first + blocks + 1) // 2 - first // 2
    word = words(pair * size, pairs * size, seed, device=device).view(pairs, 1, size)
    halves = torch.cat([word & 0xFFFF, word >> 16], dim=1).view(-1, size)
    return halves[first % 2 : first % 2 + blocks].float() / (1 << 16)
