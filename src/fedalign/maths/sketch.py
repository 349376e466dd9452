"""Seeded random projections whose cosines estimate the cosines of updates.

The plan needs D_ij = cos(Δ_i, Δ_j) [P] before any update has travelled [O: the sketch]. A count sketch (Charikar, Chen
and Farach-Colton 2002) adds each value, with a random sign, to one of `width` buckets: y[h(i)] += s(i) · x[i]. Inner
products of sketches are unbiased, with variance at most (‖x‖²‖y‖² + ⟨x,y⟩²) / width: cosines are off by about
1/√width.

That bound asks of the buckets only that two values meet with probability at most 1/width. So values are laid out in
rows of `width` and each row is rotated by a hashed offset: values of one row never meet, of two rows with probability
1/width. Rows are then added whole, at a fraction of the price of scattering single values. One hashed word gives the
signs of 32 rows of a column.

Low-rank factors are not unique, so of LoRA the products are compared [P idea, O form]: entry k of the sketch of a
matrix M is uᵀMv / √width with random signs u and v of its own, which for M = B·A is (uᵀB)(Av). A group's matrices have
different signs and are added up, and so is the count sketch of its other values. Inner products stay unbiased, with
variance at most

    (‖M‖²‖M'‖² + ⟨M,M'⟩² + 2‖MᵀM'‖² + 2‖MM'ᵀ‖² + 2 tr(MM'ᵀMM'ᵀ)) / width.

The first two terms are a count sketch's. The others vanish where M and M' have unrelated rows and columns: cosines are
off by about 1/√width. Where both have one A of rank r, as after LoRA's first round, it is √(1 + 2/r) times as much. At
worst, for equal matrices of rank one, the variance is 8 ‖M‖²‖M'‖² / width, four times a count sketch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fedalign.maths.hashing import words
from fedalign.maths.low_rank import pair_in, plain_ranges
from fedalign.maths.routing import full
from fedalign.protocol import Factors

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
        dtype = _precision(flat)
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

    def project_change(self, new: Tensor, old: Tensor, factors: Sequence[Factors]) -> Tensor:
        """Sketch by how much a group's products, and its values outside of them, changed: [width], as `project`.

        Time is O(width · rank · (inputs + outputs)) for each pair; no product is written out.

        Args:
            new: flat values [N].
            old: what they were before, [N].
            factors: where pairs lie among them.
        """
        wide = _precision(new)
        precise, new, old = full(new).dtype, new.detach().to(wide), old.detach().to(wide)
        plain = [new[start:end] - old[start:end] for start, end in plain_ranges(factors, len(new))]
        total_W = self.project(torch.cat(plain)) if plain else new.new_zeros(self.width)
        above = before = 0  # tiles that earlier pairs took
        for place in factors:
            (new_B, new_A), (old_B, old_A) = pair_in(new, place), pair_in(old, place)
            B = torch.cat([new_B - old_B, old_B], dim=1)  # B'·A' − B·A = (B' − B)·A' + B·(A' − A): nothing cancels
            A = torch.cat([new_A, new_A - old_A])
            left_R_W, right_R_W = self._probe(B.T, 2, above), self._probe(A, 3, before)
            total_W += (left_R_W * right_R_W).sum(dim=0) / self.width**0.5
            above, before = above + -(-place.outputs // BITS), before + -(-place.inputs // BITS)
        return total_W.to(precise)

    def _probe(self, rows_R_N: Tensor, stream: int, first: int) -> Tensor:
        """Inner products of rows with `width` vectors of random signs, [R, width]."""
        sum_R_W = torch.zeros(len(rows_R_N), self.width, dtype=rows_R_N.dtype, device=rows_R_N.device)
        tiles = max(1, CHUNK // (BITS * self.width))
        for tile in range(0, -(-rows_R_N.shape[1] // BITS), tiles):
            part = rows_R_N[:, tile * BITS : (tile + tiles) * BITS]
            sign = _signs(self.width, self.seed, stream, first + tile, -(-part.shape[1] // BITS), rows_R_N.device)
            sum_R_W.addmm_(part, sign[: part.shape[1]].to(part.dtype))
        return sum_R_W


def _precision(flat: Tensor) -> torch.dtype:
    """The dtype of sums: float32 on the CPU, float64 on accelerators, where their order is not fixed."""
    return torch.float64 if flat.dtype == torch.float64 or flat.is_cuda else torch.float32


@lru_cache(
    maxsize=8
)  # a round projects many tensors of one size: 8 MB save those of up to 2 million values the hashing
def _pattern(width: int, seed: int, first: int, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Signs (±1, [rows, width]) and offsets ([rows]) of the rows of some tiles."""
    offset = words(first * BITS, tiles * BITS, seed, stream=1, device=device) % width
    return _expand(width, seed, 0, first, tiles, device), offset


@lru_cache(maxsize=32)  # 1 MB each: the probes of a group of up to 32,000 rows and columns in all at width 256
def _signs(width: int, seed: int, stream: int, first: int, tiles: int, device: torch.device) -> Tensor:
    """`_expand`, remembered: a round probes many groups of the same shapes."""
    return _expand(width, seed, stream, first, tiles, device)


def _expand(width: int, seed: int, stream: int, first: int, tiles: int, device: torch.device) -> Tensor:
    """Signs (±1, [rows, width]) of the rows of some tiles.

    Bit 31 - k of a column's word is the sign of row k of the tile.
    """
    word = words(first * width, tiles * width, seed, stream, device)
    word = word.bitwise_xor_(0x8000_0000).sub_(0x8000_0000).to(torch.int32).view(tiles, 1, width)
    shift = torch.arange(BITS, dtype=torch.int32, device=device).view(1, BITS, 1)
    sign = torch.bitwise_left_shift(word, shift).bitwise_and_(SIGN_BIT).bitwise_or_(ONE).view(torch.float32)
    return sign.view(-1, width)


@lru_cache(maxsize=4)
def _rotation(width: int, device: torch.device) -> Tensor:
    """Where row o finds its values after it is rotated by o places, [width, width]."""
    place = torch.arange(width, device=device)
    return (place - place.unsqueeze(1)) % width
