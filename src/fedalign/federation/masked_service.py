"""A client's answers to messages in a masked run: nothing leaves it but residues, and why it has none.

Each message may be answered by another process, two of them at the same time: what was concealed stands on the disk
(`masks.Once`), and is read, held against what is asked, and written under a lock.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedalign.client.memory import CONCEALED
from fedalign.config.run import Config
from fedalign.config.settled import sha256_of
from fedalign.errors import TrainingFailedError
from fedalign.federation.masked_site import MaskedSite, Terms, seen_of
from fedalign.federation.masks import Masks, Once, public_key, signed, verify
from fedalign.federation.messages import Message, MessageError, Parcel, decode
from fedalign.federation.service import Service, log
from fedalign.federation.transfer import FIRST
from fedalign.files import LOCK, locked, write_text
from fedalign.maths.fixed_point import MOST_CLIENTS
from fedalign.maths.rounding import unpack_weights
from fedalign.maths.tensor_file import Named
from fedalign.protocol import (
    CLIPPED,
    HELD_OUT,
    SCORED,
    Broadcast,
    Concealed,
    Fetch,
    Hello,
    Lacking,
    Layout,
    Recount,
    Sum,
    TokenRows,
    parse_group,
)

if TYPE_CHECKING:
    from fedalign.client.trainer import OpenClient

RECORD, COUNTS, LAYOUT = "masks.jsonl", "counts.safetensors", "layout.json"
LONGEST_KEY = 400  # hex digits of a mask key and its signature
PATIENCE = 600.0  # seconds for which one answer waits for another that is at work


@dataclass(frozen=True)
class Masking:
    """The facts that a client of a masked run knows beside its data.

    Args:
        run: a text that no other run has.
        config: the run's.
        sign: of its node key; None: it has none, and its mask key is not signed.
        known: public node keys of other clients, by name; empty: it cannot check whose mask keys it is handed.
    """

    run: str
    config: Config
    sign: Callable[[bytes], bytes] | None = None
    known: Mapping[str, str] = field(default_factory=dict)


class MaskedService(Service):
    """Answers for one client of a masked run.

    Args:
        name: the client.
        memory: what the client keeps on disk for this run.
        open_client: loads the model and the client's data.
        masking: of the run.
    """

    def __init__(self, name: str, memory: Path, open_client: Callable[[], OpenClient], masking: Masking) -> None:
        super().__init__(name, memory, open_client)
        self.masking = masking

    def _hello(self, parcel: Parcel) -> Message:
        hello = super()._hello(parcel)
        assert isinstance(hello, Hello)
        with self._locked():
            key = public_key(self._once().key)
        sign = self.masking.sign
        signature = signed(self.masking.run, self.name, key, sign) if sign else b""
        return replace(hello, examples=0, held_out=0, mask_key=key.hex(), mask_signature=signature.hex())

    def _train(self, parcel: Parcel, *, scores: bool) -> Message:
        broadcast = self._asked(parcel)
        if isinstance(broadcast, Lacking):
            return broadcast
        self.memory.forget_start()
        among, seen = tuple(broadcast.keys), seen_of(broadcast)
        with self._site(broadcast.keys) as site:
            if site.has(broadcast.round, seen):  # trained before the coordinator was started again
                return self._counted(site.recount(broadcast.round, among))
        client, self._as_loaded = self.client, False
        # unscored it adds zeros, as one that holds nothing out; its masks stay those of all who were asked for scores
        asked = replace(broadcast, keys={}, score=broadcast.score and scores)
        report = client.trainer.train(client.data, asked)
        with self._site(broadcast.keys) as site:
            return self._counted(site.count(report, seen, among))

    def _evaluate(self, parcel: Parcel) -> Message:
        broadcast = self._asked(parcel, scores=True)
        if isinstance(broadcast, Lacking):
            return broadcast
        among, seen = tuple(broadcast.keys), seen_of(broadcast)
        with self._site(broadcast.keys) as site:
            if site.has(broadcast.round, seen, SCORED):
                return self._counted(site.recount(broadcast.round, among))
        client, self._as_loaded = self.client, False
        score = client.trainer.evaluate(client.data, unpack_weights(broadcast.weights), broadcast.round)
        with self._site(broadcast.keys) as site:
            return self._counted(site.score(broadcast.round, score, seen, among))

    def _asked(self, parcel: Parcel, *, scores: bool = False) -> Broadcast | Lacking:
        """Weights to train or to score, if the run's configuration has scores of clients at all."""
        broadcast = self._broadcast(parcel)
        if isinstance(broadcast, Lacking):
            return broadcast
        if (scores or broadcast.score) and HELD_OUT not in self.masking.config.tells:
            raise MessageError("it is asked for a score, and this run has none of clients (evaluation.clients)")
        if not self.masking.known:
            log.warning("%s: whose mask keys these are is the coordinator's word (site.toml: node_keys)", self.name)
        self._write_layout()
        return broadcast

    def _count(self, parcel: Parcel) -> Message:
        recount: Recount = decode(parcel, Recount)
        with self._site(recount.keys) as site:
            return self._counted(site.recount(recount.round, tuple(recount.keys)))

    def _conceal(self, parcel: Parcel) -> Message:
        asked: Sum = decode(parcel, Sum)
        among, sizes = tuple(asked.keys), self._layout().sizes
        if foreign := [str(group) for group in asked.groups if not sizes.get(group)]:
            raise MessageError(f"a sum of {min(foreign)}, which this model does not train")
        tensors = [Named(str(group), torch.int16, (sizes[group],)) for group in asked.groups]
        tensors += [Named(f"{CLIPPED}{group}", torch.int64, (1,)) for group in asked.groups]
        with self._site(asked.keys) as site:
            told = site.conceal(asked.totals, among, asked.groups)
            return self._leaving(asked.round, among, tensors, chain.from_iterable(one.residues.items() for one in told))

    def _update(self, parcel: Parcel) -> Message:
        fetch: Fetch = decode(parcel, Fetch)  # of round 0: the model as it was loaded
        return self.memory.hand_piece(self.name, fetch, CONCEALED if fetch.round else "")

    def _finish(self, parcel: Parcel) -> Message:
        heard = super()._finish(parcel)  # updates go even where the record of what was concealed cannot be read
        with self._locked():
            (self.memory.folder / COUNTS).unlink(missing_ok=True)
            if began_masked(self.memory.folder):
                self._once().forget()
        return heard

    def _counted(self, told: Concealed) -> Concealed:
        tensors = [Named(name, value.dtype, tuple(value.shape)) for name, value in told.residues.items()]
        return self._leaving(told.round, told.among, tensors, told.residues.items())

    def _leaving(
        self, round: int, among: Sequence[str], tensors: Sequence[Named], values: Iterable[tuple[str, Tensor]]
    ) -> Concealed:
        """A message with all that is concealed; an empty one where that is larger than a piece, and is kept."""
        nbytes = sum(one.dtype.itemsize * torch.Size(one.shape).numel() for one in tensors)
        if nbytes <= min(FIRST, self.masking.config.wire.piece_nbytes):
            return Concealed(self.name, round, tuple(among), dict(values))
        self.memory.keep_concealed(round, values, tensors)
        return Concealed(self.name, round, tuple(among), {})

    @contextmanager
    def _site(self, keys: Mapping[str, str]) -> Iterator[MaskedSite]:
        """The client as it is on disk, with the keys of those whose sum is made; nobody else answers meanwhile.

        Raises:
            TrainingFailedError: Keys are none, not signed as they have to be, or too many.
        """
        config, shares = self.masking.config, self.masking.config.algorithm.build().shares
        assert shares is not None  # the configuration was refused else
        least, settings = config.privacy.masked_min_holders, sha256_of(config)
        terms = Terms(self._layout(), shares, least, config.tells, config.run.seed, settings)
        with self._locked():
            once = self._once()
            masks = Masks(self.name, self.masking.run, once.key, terms.least)
            try:
                masks.meet(self._verified(keys))
            except ValueError as error:
                raise TrainingFailedError(str(error)) from None
            yield MaskedSite(self.name, self.memory, terms, masks, once, self.memory.folder / COUNTS)

    def _verified(self, keys: Mapping[str, str]) -> dict[str, bytes]:
        """Mask keys of all clients of a sum; of others than oneself by their node keys, where those are known."""
        if len(keys) > MOST_CLIENTS:
            raise TrainingFailedError(f"mask keys of {len(keys)} clients: a sum is of {MOST_CLIENTS} at most")
        found = dict[str, tuple[bytes, bytes]]()
        for name, text in keys.items():
            key, _, signature = text.partition(" ")
            try:
                if len(text) > LONGEST_KEY:
                    raise ValueError
                found[name] = bytes.fromhex(key), bytes.fromhex(signature)
            except ValueError:
                raise TrainingFailedError(f"mask key of {name!r:.80}: not written as one") from None
        others = {name: both for name, both in found.items() if name != self.name}
        if self.masking.known:
            verify(self.masking.run, others, self.masking.known)
        return {name: key for name, (key, _) in found.items()}

    def _once(self) -> Once:
        least = self.masking.config.privacy.masked_min_holders
        return Once(self.name, self.masking.run, least, MOST_CLIENTS, self.memory.folder / RECORD)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with locked(self.memory.folder / f".{RECORD}{LOCK}", "an answer", patience=PATIENCE):
            yield

    def _write_layout(self) -> None:
        """Write down where values lie, so that what comes after training needs no model."""
        layout = self.client.trainer.moe.layout
        about = {"layers": layout.layers, "experts": layout.experts}
        rows = [asdict(rows) for rows in layout.token_rows]
        sizes = {str(group): size for group, size in layout.sizes.items()}
        write_text(self.memory.folder / LAYOUT, json.dumps({**about, "sizes": sizes, "token_rows": rows}))

    def _layout(self) -> Layout:
        file = self.memory.folder / LAYOUT
        if not file.exists():
            raise TrainingFailedError("nothing was counted in this run")
        about = json.loads(file.read_text(encoding="utf-8"))
        sizes = {parse_group(name): size for name, size in about["sizes"].items()}
        return Layout(
            about["layers"],
            about["experts"],
            sizes,
            token_rows=tuple(TokenRows(**rows) for rows in about["token_rows"]),
        )


def began_masked(memory: Path) -> bool:
    """Whether what a client keeps of a run began as a masked one."""
    return (memory / RECORD).exists()
