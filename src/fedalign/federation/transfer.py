"""Transfers in pieces: a safetensors file that arrives byte by byte, in any order, and survives whoever is killed.

The file is as large from the start as it will be. Its stream is what travels: of one tensor after another the packed
values, then their scales. A piece is some ranges of the stream; a journal beside the file says which are there. So a
broken connection costs the piece that was on its way, and nothing that is there travels again. Nothing is forced to the
disk: whoever uses the file holds its tensors against their digests first, which tells what a power cut has left.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedalign.files import fingerprint, whole_lines, write_text
from fedalign.maths.rounding import SCALE, TORCH_DTYPE, bytes_of, scales, stored
from fedalign.maths.tensor_file import ABOUT, CODES, Named, Range, head
from fedalign.protocol import Packed, WireDtype

FIRST = 32_000_000  # bytes of the first piece that goes to or comes from a site; what is smaller is not cut
MOST_EDGES = 20_000  # of ranges that a site says at once that it lacks
MOST_AXES, MOST_VALUES = 64, 1 << 48  # of a tensor: of more no file can be read
Part = tuple[Range, ...]  # that travels as one piece


@dataclass(frozen=True)
class Entry:
    """One tensor of a transfer, packed."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    scales: int | None = None  # float32; None: it has none

    @property
    def values_nbytes(self) -> int:
        """Bytes of the values alone."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the stream."""
        return self.values_nbytes + 4 * (self.scales or 0)


def entry_for(packed: Packed) -> Entry:
    """The entry of a packed tensor."""
    return Entry(packed.values.dtype, tuple(packed.values.shape), None if packed.scale is None else len(packed.scale))


def digest(packed: Packed) -> str:
    """Of a packed tensor's bytes."""
    return fingerprint(part.numpy().data for part in bytes_of(packed))


def entries_of(sizes: Mapping[str, int], dtype: WireDtype) -> dict[str, Entry]:
    """The entries of groups of these sizes in wire precision."""
    lengths = {name: (stored(size, dtype), scales(size, dtype)) for name, size in sizes.items()}
    return {name: Entry(TORCH_DTYPE[dtype], (values,), scales) for name, (values, scales) in lengths.items()}


CONSTANT = "constant/"  # begins the name of what is never trained, in what the first round starts from


def described(value: Tensor | Named) -> str:
    """A tensor's type and shape, in a word.

    >>> described(torch.zeros(2, 3)), entry_of("float32[2,3]")
    ('float32[2,3]', Entry(dtype=torch.float32, shape=(2, 3), scales=None))
    """
    return f"{str(value.dtype).removeprefix('torch.')}[{','.join(map(str, value.shape))}]"


def entry_of(description: str) -> Entry:
    """The inverse of `described`.

    Raises:
        ValueError: It describes no tensor that can travel.
    """
    name, _, shape = description.removesuffix("]").partition("[")
    dtype = next((dtype for dtype in CODES if str(dtype) == f"torch.{name}"), None)
    lengths = tuple(int(length) for length in shape.split(",") if shape)
    possible = len(lengths) <= MOST_AXES and math.prod(max(length, 1) for length in lengths) <= MOST_VALUES
    if dtype is None or min(lengths, default=0) < 0 or not possible:
        raise ValueError(f"no tensor: {description!r:.40}")
    return Entry(dtype, lengths)


class Transfer:
    """A file that arrives in pieces.

    Args:
        file: where it lies; the journal lies beside it.
        entries: the tensors, in the order of the stream.
        about: is kept in the file's head. A file with another head is begun anew.
    """

    def __init__(self, file: Path, entries: Mapping[str, Entry], about: Mapping[str, str] | None = None) -> None:
        self.file, self.entries, self.about = file, dict(entries), dict(about or {})
        ends = list(accumulate(entry.nbytes for entry in self.entries.values()))
        self.nbytes = ends[-1] if ends else 0
        self.starts = dict(zip(self.entries, [0, *ends], strict=False))
        self._names, self._edges = list(self.starts), list(self.starts.values())
        self._head, self._places = _head(self.entries, self.about)
        self.identity = hashlib.sha256(self._head).hexdigest()[:32]
        self._held: list[Range] = []
        self.digests: dict[str, str] = {}  # of tensors, as whoever sends them says

    @classmethod
    def load(cls, file: Path, *, whole: bool = False) -> Self | None:
        """The transfer of a file that was begun earlier, or of one that is `whole` already; None: there is none."""
        try:
            with file.open("rb") as opened:
                table = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            about = table.pop(ABOUT, {})
            types = {code: dtype for dtype, code in CODES.items()}
            entries = {
                name: Entry(
                    types[one["dtype"]],
                    tuple(one["shape"]),
                    table[name + SCALE]["shape"][0] if name + SCALE in table else None,
                )
                for name, one in table.items()
                if not (name.endswith(SCALE) and name.removesuffix(SCALE) in table)
            }
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError):
            return None
        found = cls(file, entries, about)
        if not whole:
            return found.begin()
        found._hold([(0, found.nbytes)])
        return found if file.stat().st_size == len(found._head) + found.nbytes else None

    @property
    def journal(self) -> Path:
        """The file that says what is there."""
        return self.file.with_name(f"{self.file.name}.journal")

    def begin(self) -> Self:
        """Make the file, or go on with it if it is the same; what is there stays."""
        try:
            with self.file.open("rb") as opened:
                mine = opened.read(len(self._head)) == self._head
            first, *lines = whole_lines(self.journal) or [""]
            if mine and first == self.identity and self.file.stat().st_size == len(self._head) + self.nbytes:
                every = [json.loads(line) for line in lines]
                self._hold([(start, stop) for start, stop, _ in every])
                self.digests |= {name: found for _, _, digests in every for name, found in digests.items()}
                return self
        except (OSError, ValueError):
            pass
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.journal.unlink(missing_ok=True)
        with self.file.open("wb") as made:
            made.write(self._head)
            made.truncate(len(self._head) + self.nbytes)
        self._held, self.digests = [], {}
        write_text(self.journal, f"{self.identity}\n")
        return self

    def _hold(self, ranges: Iterable[Range]) -> None:
        self._held = merged([*self._held, *ranges])

    @property
    def lacking(self) -> list[Range]:
        """The ranges that are not there yet."""
        return gaps(self._held, self.nbytes)

    def cut(self, most: int, ranges: Iterable[Range]) -> Iterator[Part]:
        """Ranges in pieces of at most `most` bytes: whole tensors, but for those that are larger."""
        return cut(ranges, self._edges, most)

    def names_in(self, start: int, stop: int) -> list[str]:
        """The tensors of which a range has a part."""
        first = max(bisect_right(self._edges, start) - 1, 0)
        some = self._names[first : bisect_left(self._edges, stop)]
        return [n for n in some if self.starts[n] < stop and self.starts[n] + self.entries[n].nbytes > start]

    def write(self, part: Part, data: Tensor, digests: Mapping[str, str] | None = None) -> None:
        """Take a piece: the bytes of these ranges, one behind the other. The same piece may come again.

        Raises:
            ValueError: It does not lie within the stream, or has more bytes or fewer.
        """
        if len(data) != size_of(part) or not within(edges_of(part), self.nbytes):
            raise ValueError(f"{len(data)} bytes, for {part!r:.60} of {self.nbytes}")
        places = [start for start, _ in part]
        self._take(zip(places, data.split([stop - start for start, stop in part]), strict=True), digests or {})

    def _take(self, parts: Iterable[tuple[int, Tensor]], digests: Mapping[str, str]) -> None:
        """Write parts of the stream, and then into the journal that they are there."""
        came: list[Range] = []
        with self.file.open("r+b", buffering=0) as opened:
            for start, data in parts:
                self._put(opened.fileno(), start, data)
                came.append((start, start + len(data)))
        came = merged(came)
        lines = [json.dumps([*one, digests if one is came[0] else {}]) for one in came]
        with self.journal.open("a", encoding="utf-8") as journal:
            journal.write("".join(f"{line}\n" for line in lines))
        self._hold(came)
        self.digests |= digests

    def _put(self, descriptor: int, start: int, data: Tensor) -> None:
        """Write a part of the stream to its places in the file."""
        stop = start + len(data)
        for name in self.names_in(start, stop):
            at = self.starts[name]
            for place, nbytes in self._places[name]:
                begin, end = max(start, at), min(stop, at + nbytes)
                if begin < end:
                    _write(descriptor, data[begin - start : end - start], place + begin - at)
                at += nbytes

    def forget(self, names: Iterable[str]) -> None:
        """Count tensors as lacking that have proved to be others, or damaged."""
        gone = set(names)
        lacking = [*self.lacking, *((self.starts[n], self.starts[n] + self.entries[n].nbytes) for n in gone)]
        self._held = gaps(merged(lacking), self.nbytes)
        self.digests = {name: found for name, found in self.digests.items() if name not in gone}
        digests = [self.digests, *[{}] * len(self._held)]  # once: there may be thousands of both
        lines = [self.identity, *(json.dumps([*held, d]) for held, d in zip(self._held, digests, strict=False))]
        write_text(self.journal, "".join(f"{line}\n" for line in lines))

    def held_names(self) -> list[str]:
        """The tensors that are there, at least in part."""
        return [name for start, stop in self._held for name in self.names_in(start, stop)]

    def whole_names(self) -> list[str]:
        """The tensors that are there as a whole, and whose digest is known."""
        partly = {name for start, stop in self.lacking for name in self.names_in(start, stop)}
        return [name for name in self.entries if name in self.digests and name not in partly]

    def read(self) -> dict[str, Packed]:
        """All tensors, mapped: their values are read when they are used, and take no memory of their own."""
        tensors = load_file(self.file)
        return {name: Packed(tensors[name], tensors.get(name + SCALE)) for name in self.entries}

    def take_from(
        self, other: Mapping[str, Packed], names: Iterable[str], digests: Mapping[str, str] | None = None
    ) -> None:
        """Copy tensors of another file that are here under the same name."""
        self.take_all(((name, other[name]) for name in names), digests)

    def take_all(self, tensors: Iterable[tuple[str, Packed]], digests: Mapping[str, str] | None = None) -> None:
        """Copy tensors, one after another, by their names."""
        self._take(
            (
                (self.starts[name] + at, part)
                for name, packed in tensors
                for at, part in zip((0, self.entries[name].values_nbytes), bytes_of(packed), strict=False)
            ),
            digests or {},
        )

    def move(self, file: Path) -> None:
        """Give it another name."""
        self.journal.replace(file.with_name(f"{file.name}.journal"))
        self.file = self.file.rename(file)

    def remove(self) -> None:
        """Forget it."""
        self.file.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)


def _write(descriptor: int, data: Tensor, place: int) -> None:
    view = data.numpy().data
    while view:
        written = os.pwrite(descriptor, view, place)
        view, place = view[written:], place + written


def _head(entries: Mapping[str, Entry], about: Mapping[str, str]) -> tuple[bytes, dict[str, list[Range]]]:
    """The head of a safetensors file, and of each tensor where in the file its values and scales lie, with lengths."""
    every = [Named(name, entry.dtype, entry.shape) for name, entry in entries.items()]
    every += [Named(n + SCALE, torch.float32, (one.scales,)) for n, one in entries.items() if one.scales is not None]
    found, offsets = head(every, about)
    parts = {name: (name, name + SCALE) if entry.scales is not None else (name,) for name, entry in entries.items()}
    places = {
        name: [(offsets[part][0], offsets[part][1] - offsets[part][0]) for part in both] for name, both in parts.items()
    }
    return found, places


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in as few ranges as possible.

    >>> merged([(4, 6), (0, 2), (2, 4), (9, 9)])
    [(0, 6)]
    """
    found: list[Range] = []
    for start, stop in sorted(one for one in ranges if one[0] < one[1]):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def gaps(ranges: Iterable[Range], nbytes: int) -> list[Range]:
    """The parts of so many bytes that are in none of these ranges, which are merged.

    >>> gaps([(0, 2), (4, 6)], 10)
    [(2, 4), (6, 10)]
    """
    edges = [0, *(edge for one in ranges for edge in one), nbytes]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]


def minus(ranges: Iterable[Range], others: Iterable[Range]) -> list[Range]:
    """The parts of some ranges, one behind the other, that are in none of the others.

    There may be thousands of both: each is looked at once.

    >>> minus([(0, 10), (20, 30)], [(8, 22), (2, 4), (5, 5)])
    [(0, 2), (4, 8), (22, 30)]
    """
    taken, at = merged(others), 0
    found: list[Range] = []
    for begin, stop in ranges:
        start = begin
        while at < len(taken) and taken[at][0] < stop:
            first, after = taken[at]
            found.append((start, first))
            start = max(start, after)
            if after > stop:
                break  # it may reach into the next range
            at += 1
        found.append((start, stop))
    return [one for one in found if one[0] < one[1]]


def size_of(ranges: Iterable[Range]) -> int:
    """Bytes in ranges."""
    return sum(stop - start for start, stop in ranges)


def edges_of(ranges: Iterable[Range]) -> tuple[int, ...]:
    """Firsts and lasts of ranges, as they travel.

    >>> edges_of([(0, 2), (4, 5)]), ranges_of((0, 2, 4, 5))
    ((0, 2, 4, 5), ((0, 2), (4, 5)))
    """
    return tuple(edge for one in ranges for edge in one)


def ranges_of(edges: Sequence[int]) -> Part:
    """The inverse of `edges_of`."""
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def within(edges: Sequence[int], nbytes: int) -> bool:
    """Whether these are firsts and lasts of ranges that lie one behind the other within so many bytes.

    >>> within([0, 2, 4, 5], 5), within([4, 5, 0, 2], 5), within([0, 9], 5), within([1], 5)
    (True, False, False, False)
    """
    every = [0, *edges, nbytes]
    return len(edges) % 2 == 0 and len(edges) <= MOST_EDGES and every == sorted(every)


def cut(ranges: Iterable[Range], starts: Sequence[int], most: int) -> Iterator[Part]:
    """Ranges in pieces of at most `most` bytes, cut where a tensor starts unless one is larger.

    >>> list(cut([(0, 30)], [0, 4, 8, 20], 10))
    [((0, 8),), ((8, 18),), ((18, 20),), ((20, 30),)]
    >>> list(cut([(0, 4), (8, 10), (24, 30)], [0, 4, 8, 20], 10))
    [((0, 4), (8, 10)), ((24, 30),)]
    """
    piece, room = list[Range](), most
    for start, stop in _within_tensors(ranges, starts, most):
        if stop - start > room:
            yield tuple(merged(piece))
            piece, room = [], most
        piece.append((start, stop))
        room -= stop - start
    if piece:
        yield tuple(merged(piece))


def _within_tensors(ranges: Iterable[Range], starts: Sequence[int], most: int) -> Iterator[Range]:
    """The same bytes in ranges of at most `most` that lie in one tensor each."""
    for start, stop in ranges:
        at = start
        while at < stop:
            after = bisect_right(starts, at)
            end = min(at + most, stop, *starts[after : after + 1])
            yield at, end
            at = end
