"""Sites behind Flower whose sums are masked: who is summed with whom, and what has arrived, outlive the coordinator.

A site answers for one thing at most twice, the second time among fewer. So it is written down among whom a sum is asked
for, with the keys of these sites, before it is; and what a site has sent stays on disk until the round is complete. A
coordinator that is started again goes on with the same sums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fedalign.config.run import FederationConfig
from fedalign.federation.flower.carrier import Cargo, Place, read
from fedalign.federation.flower.link import Link
from fedalign.federation.flower.sites import Agreement, FlowerFederation
from fedalign.federation.flower.talks import Ask, Talk
from fedalign.federation.masked_site import fingerprint_of
from fedalign.federation.messages import VERBS, Message, encode
from fedalign.federation.transfer import Entry
from fedalign.files import folder_name, write_text
from fedalign.protocol import (
    Begun,
    Broadcast,
    Concealed,
    Failure,
    ParameterGroup,
    Recount,
    Stage,
    Sum,
    Totals,
    parse_group,
)
from fedalign.server.masked import SCORE_RESIDUES, Residues, share_residues

Kind = Literal["counts", "scores", "shares", "shares-again"]
Talking = Mapping[str, Talk[Concealed | Failure]]  # by site


class MaskedFlowerFederation(FlowerFederation):
    """A `protocol.MaskedFederation` of Flower nodes.

    Args:
        link: messages over Flower's grid.
        policy: minimum of sites, timeouts, what becomes of late ones.
        agreement: what sites must have in common.
        cargo: the weights and updates that travel.
        counts: shape and type of what a client counts, concealed.
        pause: seconds between two looks at what has arrived, at most.
    """

    def __init__(
        self,
        link: Link,
        policy: FederationConfig,
        agreement: Agreement,
        cargo: Cargo,
        counts: Mapping[str, Residues],
        pause: float = 0.5,
    ) -> None:
        super().__init__(link, policy, agreement, cargo, pause)
        self.cargo, self.counts = cargo, counts

    def begun(self, round: int) -> Begun:
        """How far the sums of a round have come, as it is written down."""
        noted = self._noted(round)
        groups = map(parse_group, noted.get("groups", ()))
        broken = map(parse_group, noted.get("broken", ()))
        counted, left, scored = (tuple(noted.get(name, ())) for name in ("counted", "left", "scored"))
        return Begun(counted, left, tuple(groups), tuple(broken), bool(noted.get("score")), scored)

    def count(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Concealed | Failure]:
        """Local training at all of them at once, and their counts, concealed; replies as they come."""
        self._begin(broadcast.round, clients)
        self._note(broadcast.round, score=broadcast.score)
        for answer in self._tell("train", broadcast, clients):
            if answer.client not in self.sites:  # what it sent before an interruption is here still
                pass
            elif isinstance(answer, Concealed):
                self.sites[answer.client].missed = 0
            else:
                self._count_missed(answer.client)
            yield answer

    def score(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterator[Concealed | Failure]:
        """Scores of the weights at all of them at once, concealed; replies as they come."""
        self._round = broadcast.round
        yield from self._tell("evaluate", broadcast, clients)

    def recount(self, round: int, left: Sequence[str], stage: Stage) -> Iterator[Concealed | Failure]:
        """Counts or scores, concealed once more, of those that are left."""
        keys = self._agree(round, left, stage)
        talks = self._ask_all("count", Recount(round, keys), left, 0)
        yield from self._hold(stage, talks, self._counted(round, keys, stage))

    def _tell(
        self, verb: Literal["train", "evaluate"], broadcast: Broadcast, clients: Sequence[str]
    ) -> Iterator[Concealed | Failure]:
        """Broadcast weights, and hear what clients count of them, concealed among `clients`."""
        keys = self._agree(broadcast.round, clients, verb)
        there = [name for name in clients if name in self.sites]
        talks = dict(self._carrier.broadcast(verb, replace(broadcast, keys=keys), there, Concealed))
        yield from self._hold(verb, talks, self._counted(broadcast.round, keys, verb))

    def _counted(self, round: int, keys: Mapping[str, str], stage: Stage) -> list[Place]:
        return (
            self._places(round, keys, "scores", SCORE_RESIDUES)
            if stage == "evaluate"
            else self._places(round, keys, "counts", self.counts)
        )

    def conceal(
        self, totals: Totals, among: Sequence[str], groups: Sequence[ParameterGroup]
    ) -> Iterator[Concealed | Failure]:
        """Shares of the sums, of a few sites at a time; of a site that is lost what has arrived, and why not more."""
        again = tuple(among) != totals.among
        if again:
            self._note(totals.round, left=[*among], groups=[str(group) for group in groups])
        keys = self._keys(totals.round, among)
        asked = Sum(totals.round, totals.among, totals.counts, keys, tuple(groups))
        about = {"totals": fingerprint_of(totals.counts, *totals.among)}
        kind: Kind = "shares-again" if again else "shares"
        places = self._places(totals.round, keys, kind, share_residues(self.cargo.sizes, groups), about)
        talks = self._ask_all("conceal", asked, among, totals.nbytes)
        lost = set[str]()
        for answer in self._hold("update", talks, places, self.policy.in_flight):
            if isinstance(answer, Failure):
                lost.add(answer.client)
            yield answer
        if not again:
            names = {name for place in places if place.client in lost for name in place.broken()}
            noted = self._noted(totals.round)
            before = noted.get("broken", ()) if "groups" in noted else ()  # without a second sum all are asked for anew
            self._note(totals.round, broken=sorted(({str(group) for group in groups} & names).union(before)))

    def _hold(
        self, stage: Stage, talks: Talking, places: Sequence[Place], at_once: int | None = None
    ) -> Iterator[Concealed | Failure]:
        """Hold talks whose answers are concealed; what has arrived already is not asked for."""
        every = (
            (one.client, self._carrier.concealed(talks.get(one.client, _gone(one.client, stage)), one, stage))
            for one in places
        )
        for _, (concealed, failure) in self._talks.hold(every, at_once):
            if concealed is not None and (failure is None or stage == "update"):  # counts are of use as a whole alone
                yield concealed
            if failure is not None:
                yield failure

    def _ask_all(self, verb: str, message: Message, clients: Sequence[str], nbytes: int) -> Talking:
        parcel = encode(message)

        def talk(name: str) -> Talk[Concealed | Failure]:
            _, reply = yield [Ask(verb, parcel, nbytes)]
            answer: Concealed | Failure = read(name, VERBS[verb].stage, reply, Concealed, self.policy.timeout_seconds)
            return answer

        return {name: talk(name) for name in clients if name in self.sites}

    def _places(
        self,
        round: int,
        keys: Mapping[str, str],
        kind: Kind,
        residues: Mapping[str, Residues],
        about: Mapping[str, str] | None = None,
    ) -> list[Place]:
        """Where the messages of these sites lie, one for each; under other keys they would be others."""
        entries = {name: Entry(dtype, shape) for name, (shape, dtype) in residues.items()}
        among, folder = tuple(keys), self._folder(round)
        public = [key.partition(" ")[0] for key in keys.values()]  # a signature is another each time
        about = {"keys": " ".join(public), **(about or {})}
        return [
            Place(name, round, among, folder / f"{folder_name(name)}.{kind}.safetensors", entries, about)
            for name in keys
        ]

    def _agree(self, round: int, clients: Sequence[str], stage: Stage) -> dict[str, str]:
        """The keys of clients whose counts or scores are to be summed; it is written down who they are."""
        keys = self._keys(round, clients)
        named = {"scored" if stage == "evaluate" else "counted": [*clients]}
        self._note(round, **named, keys=self._noted(round).get("keys", {}) | keys)
        return keys

    def _keys(self, round: int, clients: Sequence[str]) -> dict[str, str]:
        """Mask keys and signatures; of a site that has not joined since the coordinator was started, as it had them."""
        noted: dict[str, str] = self._noted(round).get("keys", {})
        hellos = {name: site.hello for name, site in self.sites.items()}
        now = {name: f"{hello.mask_key} {hello.mask_signature}".strip() for name, hello in hellos.items()}
        return {name: (noted | now)[name] for name in clients}

    def _folder(self, round: int) -> Path:
        return self.cargo.folder / f"round-{round:05d}"

    def _noted(self, round: int) -> dict[str, Any]:
        file = self._folder(round) / "sums.json"
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}

    def _note(self, round: int, **more: Any) -> None:
        """Return when the disk has it."""
        noted = self._noted(round) | more
        self._folder(round).mkdir(parents=True, exist_ok=True)
        write_text(self._folder(round) / "sums.json", json.dumps(noted))


def _gone(name: str, stage: Stage) -> Talk[Concealed | Failure]:
    """A talk with a site that has not joined: it is over at once."""
    yield from ()
    return Failure(name, stage, "not connected")
