"""The weights that a client was last sent, on its own disk, and those that are on their way to it.

A group that has not changed is not sent again: the client knows it by its digest. Where broadcasts travel as
differences, whoever holds what they are added to is sent those, and adds them; all that comes out has the digest that
the server announced. Two models at most are kept, the one last received whole and the one that arrives, and differences
until they are added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedalign.federation.messages import MessageError
from fedalign.federation.transfer import MOST_EDGES, Transfer, digest, edges_of, entries_of, entry_for, ranges_of
from fedalign.files import fingerprint
from fedalign.maths.rounding import BLOCKS, TORCH_DTYPE, advanced, broadcast_dtype, count
from fedalign.protocol import Broadcast, Lacking, Offer, Packed, Piece, parse_group
from fedalign.units import shown

WEIGHTS, ARRIVING, ADDED = "received.safetensors", "arriving.safetensors", "differences.safetensors"
DIGESTS, BEFORE, DTYPE = "digests", "before", "dtype"  # in the head of a file; the last two where it holds differences


def about_whole(digests: Mapping[str, str]) -> dict[str, str]:
    """The head of a file of whole weights with these digests."""
    return {DIGESTS: json.dumps(dict(digests))}


def about_differences(digests: Mapping[str, str], before: Mapping[str, str], dtype: str) -> dict[str, str]:
    """The head of a file of differences that make such weights, in `dtype`, of those with the digests `before`."""
    return {DIGESTS: json.dumps(dict(digests)), BEFORE: json.dumps(dict(before)), DTYPE: dtype}


class Received:
    """Broadcasts as a client keeps them, in its memory's folder."""

    def __init__(self, client: str, folder: Path) -> None:
        self.client = client
        self.weights, self.arriving, self.added = folder / WEIGHTS, folder / ARRIVING, folder / ADDED

    def offered(self, offer: Offer, sizes: Mapping[str, int]) -> Lacking:
        """Make room for what is to come, take what is here already, and say what is lacking.

        That is of differences, if they can be added to what is here; else of the weights themselves.

        Args:
            offer: the server's.
            sizes: how many values each group of the client's own model trains: it makes room for no others.

        Raises:
            MessageError: It is not of this model.
        """
        if foreign := offer.digests.keys() - sizes.keys():
            raise MessageError(shown(f"an offer of {min(foreign)}, which this model does not train"))
        dtype = next((name for name in TORCH_DTYPE if name == offer.dtype), None)
        if dtype is None:
            raise MessageError(shown(f"an offer in {offer.dtype}: must be one of {', '.join(TORCH_DTYPE)}"))
        difference = next((name for name in BLOCKS if name == offer.difference), None)
        can_differ = difference is not None and dtype == broadcast_dtype(difference)
        if offer.before and not (can_differ and offer.before.keys() <= offer.digests.keys()):
            raise MessageError(shown(f"an offer of differences in {offer.difference} to weights in {offer.dtype}"))
        entries = entries_of({name: sizes[name] for name in offer.digests}, dtype)
        transfer = Transfer(self.arriving, entries, about_whole(offer.digests))
        whole = self._whole()
        if whole is not None and whole.identity == transfer.identity:
            return self._lacking(offer.round, whole)
        if whole is not None and difference is not None and offer.before:
            fits = all(whole.entries.get(name) == entry for name, entry in entries.items())
            if fits and _holds(whole, {**offer.digests, **offer.before}):
                smaller = entries_of({name: sizes[name] for name in offer.digests if name in offer.before}, difference)
                about = about_differences(offer.digests, offer.before, dtype)
                return self._lacking(offer.round, self._advance(Transfer(self.added, smaller, about).begin()))
        transfer.begin()
        if whole is not None and not transfer.held_names():
            had, kept = _digests(whole), whole.read()
            same = [n for n, d in offer.digests.items() if had.get(n) == d and whole.entries[n] == entries[n]]
            transfer.take_from(kept, same)
        self._settle(transfer)
        return self._lacking(offer.round, transfer)

    def take(self, piece: Piece) -> Lacking:
        """Keep a piece, and say what is lacking still. One that is damaged, or of something else, is not kept."""
        begun = [found for file in (self.arriving, self.added) if (found := Transfer.load(file)) is not None]
        transfer = next((one for one in begun if one.identity == piece.transfer), begun[0] if begun else None)
        if transfer is None or transfer.identity != piece.transfer:
            whole = self._whole()  # the last piece may come twice
            return self._lacking(piece.round, whole if whole and whole.identity == piece.transfer else transfer)
        if fingerprint([piece.data.numpy().data]) == piece.digest:
            try:
                transfer.write(ranges_of(piece.ranges), piece.data)
            except ValueError as error:
                raise MessageError(f"a piece of {error}") from None
            if transfer.file == self.added:
                return self._lacking(piece.round, self._advance(transfer))
            self._settle(transfer)
        return self._lacking(piece.round, transfer)

    def completed(self, broadcast: Broadcast, sizes: Mapping[str, int]) -> Broadcast | Lacking:
        """A broadcast with all its weights, those that the client holds already mapped from its disk.

        Args:
            broadcast: as it came.
            sizes: as of `offered`; weights are given in their order.

        Raises:
            MessageError: It is not of this model.
        """
        new = {str(group): packed for group, packed in broadcast.weights.items()}
        differences = {str(group): packed for group, packed in broadcast.differences.items()}
        if foreign := [n for n, packed in (*new.items(), *differences.items()) if count(packed) != sizes.get(n)]:
            raise MessageError(shown(f"weights of {min(foreign)}, of which this model does not train so many"))
        if unknown := differences.keys() - broadcast.kept.keys():
            raise MessageError(shown(f"a difference of {min(unknown)}, and no digest of what it makes"))
        whole = self._whole()
        had = {} if whole is None else _digests(whole)
        kept = {} if whole is None else whole.read()
        for name in [n for n, found in broadcast.kept.items() if had.get(n) != found and n in kept]:
            if name in differences and kept[name].values.dtype == TORCH_DTYPE["bfloat16"]:
                kept[name] = advanced(kept[name], differences[name])
                had.pop(name)
        if any(had.get(n, d) != d or n not in kept or digest(kept[n]) != d for n, d in broadcast.kept.items()):
            self.forget()  # another's, or damaged
            return Lacking(self.client, broadcast.round, "", ())
        weights = {**{n: kept[n] for n in broadcast.kept}, **new}
        if missing := [name for name, size in sizes.items() if size and name not in weights]:
            raise MessageError(shown(f"a broadcast without {missing[0]}, which this model trains"))
        weights = {name: weights[name] for name in sizes if name in weights} | weights
        if new or any(name not in had for name in broadcast.kept):
            self._keep(weights, broadcast.kept)
        whole_weights = {parse_group(name): packed for name, packed in weights.items()}
        return replace(broadcast, weights=whole_weights, kept={}, differences={})

    def forget(self) -> None:
        """Free the disk."""
        for file in (self.weights, self.arriving, self.added):
            for path in (file, _journal(file)):
                path.unlink(missing_ok=True)

    def _keep(self, weights: Mapping[str, Packed], digests: Mapping[str, str]) -> None:
        """Keep what came with a broadcast itself."""
        entries = {name: entry_for(packed) for name, packed in weights.items()}
        known = {name: digests.get(name) or digest(packed) for name, packed in weights.items()}
        transfer = Transfer(self.arriving, entries, about_whole(known)).begin()
        transfer.take_from(weights, weights)
        self._settle(transfer)

    def _settle(self, transfer: Transfer) -> bool:
        """A whole file takes the place of the one before; tensors other than announced count as lacking."""
        if transfer.lacking:
            return False
        announced, found = _digests(transfer), transfer.read()
        if wrong := [name for name in transfer.entries if digest(found[name]) != announced.get(name)]:
            transfer.forget(wrong)
            return False
        transfer.file.replace(self.weights)
        for path in (transfer.journal, self.added, _journal(self.added)):
            path.unlink(missing_ok=True)
        return True

    def _advance(self, differences: Transfer) -> Transfer | None:
        """Add differences that are all there; None: what they are added to is not here, or proved to be damaged.

        If damaged, it is forgotten, and of what came out that which is as announced is kept.
        """
        if differences.lacking:
            return differences
        whole, digests = self._whole(), _digests(differences)
        if whole is None or not _holds(whole, {**digests, **json.loads(differences.about[BEFORE])}):
            differences.remove()  # a kill left them behind
            return None
        base, added = whole.read(), differences.read()
        entries = {name: whole.entries[name] for name in digests}
        arriving = Transfer(self.arriving, entries, about_whole(digests)).begin()
        arriving.take_all((n, advanced(base[n], added[n]) if n in added else base[n]) for n in digests)
        if self._settle(arriving):
            return differences
        differences.remove()
        self.weights.unlink()
        return None

    def _whole(self) -> Transfer | None:
        return Transfer.load(self.weights, whole=True)

    def _lacking(self, round: int, transfer: Transfer | None) -> Lacking:
        if transfer is None:
            return Lacking(self.client, round, "", ())
        lacking = edges_of(transfer.lacking)[:MOST_EDGES]  # then it is asked again
        return Lacking(self.client, round, transfer.identity, lacking)


def _journal(file: Path) -> Path:
    return file.with_name(f"{file.name}.journal")


def _holds(whole: Transfer, digests: Mapping[str, str]) -> bool:
    """Whether tensors with these digests are in a file, as it says."""
    had = _digests(whole)
    return all(had.get(name) == digest for name, digest in digests.items())


def _digests(transfer: Transfer) -> dict[str, str]:
    found: dict[str, str] = json.loads(transfer.about.get(DIGESTS, "{}"))
    return found
