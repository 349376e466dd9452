"""The weights that a client was last sent, on its own disk, and those that are on their way to it.

A group that has not changed is not sent again: the client knows it by its digest. Two models at most are kept: the one
last received whole, and the one that arrives.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedalign.federation.messages import MessageError
from fedalign.federation.transfer import MOST_EDGES, Transfer, digest, edges_of, entries_of, entry_for, ranges_of
from fedalign.files import fingerprint
from fedalign.maths.rounding import TORCH_DTYPE, count
from fedalign.protocol import Broadcast, Lacking, Offer, Packed, Piece, parse_group
from fedalign.units import shown

WEIGHTS, ARRIVING = "received.safetensors", "arriving.safetensors"
DIGESTS = "digests"  # in the head of a file


class Received:
    """Broadcasts as a client keeps them, in its memory's folder."""

    def __init__(self, client: str, folder: Path) -> None:
        self.client = client
        self.weights, self.arriving = folder / WEIGHTS, folder / ARRIVING

    def offered(self, offer: Offer, sizes: Mapping[str, int]) -> Lacking:
        """Make room for what is to come, take what is here already, and say what is lacking.

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
        entries = entries_of({name: sizes[name] for name in offer.digests}, dtype)
        transfer = Transfer(self.arriving, entries, {DIGESTS: json.dumps(dict(offer.digests))})
        whole = self._whole()
        if whole is not None and whole.identity == transfer.identity:
            return self._lacking(offer.round, whole)
        transfer.begin()
        if whole is not None and not transfer.held_names():
            had, kept = _digests(whole), whole.read()
            same = [n for n, d in offer.digests.items() if had.get(n) == d and whole.entries[n] == entries[n]]
            transfer.take_from(kept, same)
        self._settle(transfer)
        return self._lacking(offer.round, transfer)

    def take(self, piece: Piece) -> Lacking:
        """Keep a piece, and say what is lacking still. One that is damaged, or of something else, is not kept."""
        transfer = Transfer.load(self.arriving)
        if transfer is None or transfer.identity != piece.transfer:
            whole = self._whole()  # the last piece may come twice
            return self._lacking(piece.round, whole if whole and whole.identity == piece.transfer else transfer)
        if fingerprint([piece.data.numpy().data]) == piece.digest:
            try:
                transfer.write(ranges_of(piece.ranges), piece.data)
            except ValueError as error:
                raise MessageError(f"a piece of {error}") from None
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
        if foreign := [name for name, packed in new.items() if count(packed) != sizes.get(name)]:
            raise MessageError(shown(f"weights of {min(foreign)}, of which this model does not train so many"))
        whole = self._whole()
        had = {} if whole is None else _digests(whole)
        kept = {} if whole is None else whole.read()
        if any(had.get(n) != d or digest(kept[n]) != d for n, d in broadcast.kept.items()):
            self.forget()  # another's, or damaged
            return Lacking(self.client, broadcast.round, "", ())
        weights = {**{n: kept[n] for n in broadcast.kept}, **new}
        weights = {name: weights[name] for name in sizes if name in weights} | weights
        if new:
            self._keep(weights, broadcast.kept)
        return replace(broadcast, weights={parse_group(n): packed for n, packed in weights.items()}, kept={})

    def forget(self) -> None:
        """Free the disk."""
        for file in (self.weights, self.arriving):
            for path in (file, file.with_name(f"{file.name}.journal")):
                path.unlink(missing_ok=True)

    def _keep(self, weights: Mapping[str, Packed], digests: Mapping[str, str]) -> None:
        """Keep what came with a broadcast itself."""
        entries = {name: entry_for(packed) for name, packed in weights.items()}
        known = {name: digests.get(name) or digest(packed) for name, packed in weights.items()}
        transfer = Transfer(self.arriving, entries, {DIGESTS: json.dumps(known)}).begin()
        transfer.take_from(weights, weights)
        self._settle(transfer)

    def _settle(self, transfer: Transfer) -> None:
        """A whole file takes the place of the one before; tensors other than announced count as lacking."""
        if transfer.lacking:
            return
        announced, found = _digests(transfer), transfer.read()
        if wrong := [name for name in transfer.entries if digest(found[name]) != announced.get(name)]:
            transfer.forget(wrong)
            return
        transfer.file.replace(self.weights)
        transfer.journal.unlink()

    def _whole(self) -> Transfer | None:
        return Transfer.load(self.weights, whole=True)

    def _lacking(self, round: int, transfer: Transfer | None) -> Lacking:
        if transfer is None:
            return Lacking(self.client, round, "", ())
        lacking = edges_of(transfer.lacking)[:MOST_EDGES]  # then it is asked again
        return Lacking(self.client, round, transfer.identity, lacking)


def _digests(transfer: Transfer) -> dict[str, str]:
    found: dict[str, str] = json.loads(transfer.about.get(DIGESTS, "{}"))
    return found
