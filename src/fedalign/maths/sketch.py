"""Seeded random projections whose cosines estimate the cosines of updates.

The plan needs D_ij = cos(Δ_i, Δ_j) [P] before any update has travelled [O: the sketch]. A count sketch (Charikar, Chen
and Farach-Colton 2002) adds each value, with a random sign, to one of `width` buckets: y[h(i)] += s(i) · x[i]. Inner
products of sketches are unbiased, with variance at most (‖x‖²‖y‖² + ⟨x,y⟩²) / width: cosines are off by about
1/√width.

That bound asks of the buckets only that two values meet with probability at most 1/width. So values are laid out in
rows of `width` and each row is rotated by a hashed offset: values of one row never meet, of two rows with probability
1/width. Rows are then added whole, at a fraction of the price of scattering single values. One hashed word gives the
signs of 32 rows of a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedalign.hashing import words
from fedalign.maths.routing import full

BITS = 32  # rows that share one word of signs
CHUNK = 1 << 18  # values worked on at a time
SIGN_BIT, ONE = -(1 << 31), 0x3F80_0000  # of an IEEE float32


@dataclass(frozen=True)
class Sketch:
    """A linear map from tensors of any length to vectors of `width`.

    Same seed, width and length: same projection on every machine, device and library version (up to the rounding of
    its sums: float32 on CPU in a fixed order, float64 on accelerators, where the order is not fixed).

    >>> sketch = Sketch(width=4, seed=0)
    >>> x, y = torch.arange(6.0), torch.ones(6)
    >>> torch.equal(sketch.project(x + 2 * y), sketch.project(x) + 2 * sketch.project(y))
    True
    """

    width: int
    seed: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width = {self.width}: must be at least 1")

    def project(self, flat: Tensor) -> Tensor:
        """Sketch a tensor (read as flat) into a vector [width], float32 (float64 for float64). Memory is O(width²)."""
        flat = flat.detach().reshape(-1)
        dtype = torch.float64 if flat.dtype == torch.float64 or flat.is_cuda else torch.float32
        sum_O_W = torch.zeros(self.width, self.width, dtype=dtype, device=flat.device)  # one row for each offset
        tile = BITS * self.width
        tiles = max(1, CHUNK // tile)
        signed = torch.empty(tiles * BITS, self.width, dtype=dtype, device=flat.device)
        for first in range(0, -(-len(flat) // tile), tiles):
            chunk = flat[first * tile : (first + tiles) * tile]
            rows = -(-len(chunk) // self.width)
            signed.view(-1)[: len(chunk)].copy_(chunk)
            signed.view(-1)[len(chunk) : rows * self.width].zero_()
            sign, offset = _pattern(self.width, self.seed, first, -(-rows // BITS), flat.device)
            sum_O_W.index_add_(0, offset[:rows], signed[:rows].mul_(sign[:rows]))
        return sum_O_W.gather(1, _rotation(self.width, flat.device)).sum(dim=0).to(full(flat[:0]).dtype)


@lru_cache(
    maxsize=8
)  # a round projects many tensors of one size: 8 MB save those of up to 2 million values the hashing
def _pattern(width: int, seed: int, first: int, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Signs (±1, [rows, width]) and offsets ([rows]) of the rows of some tiles.

    Bit 31 - k of a column's word is the sign of row k of the tile.
    """
    word = words(first * width, tiles * width, seed, stream=0, device=device)
    word = word.bitwise_xor_(0x8000_0000).sub_(0x8000_0000).to(torch.int32).view(tiles, 1, width)
    shift = torch.arange(BITS, dtype=torch.int32, device=device).view(1, BITS, 1)
    sign = torch.bitwise_left_shift(word, shift).bitwise_and_(SIGN_BIT).bitwise_or_(ONE).view(torch.float32)
    return sign.view(-1, width), words(first * BITS, tiles * BITS, seed, stream=1, device=device) % width


@lru_cache(maxsize=4)
def _rotation(width: int, device: torch.device) -> Tensor:
    """Where row o finds its values after it is rotated by o places, [width, width]."""
    place = torch.arange(width, device=device)
    return (place - place.unsqueeze(1)) % width
