"""How weights get to sites and updates back: in pieces, each acknowledged, none twice unless a line broke with it.

What is small travels with the message that needs it, or as one answer. What is larger than a piece is offered first: a
site says which bytes it lacks, and gets those. A site that was away goes on where it was; so does a coordinator that
was started again, since what has arrived lies on its disk until the round is complete.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fedalign.federation.flower.link import Reply
from fedalign.federation.flower.talks import PATIENCE, SLOWEST, Ask, Meter, Talk
from fedalign.federation.ledger import Ledger
from fedalign.federation.messages import VERBS, MessageError, Parcel, decode, encode
from fedalign.federation.received import about_differences, about_whole
from fedalign.federation.transfer import (
    CONSTANT,
    FIRST,
    Entry,
    Part,
    Transfer,
    digest,
    edges_of,
    entries_of,
    entry_for,
    entry_of,
    merged,
    minus,
    ranges_of,
    size_of,
    within,
)
from fedalign.files import fingerprint, folder_name, remove, rounds_in
from fedalign.maths.rounding import bytes_of, cut_out, wire_dtype
from fedalign.maths.tensor_file import Range
from fedalign.protocol import (
    PROTOCOL,
    Broadcast,
    Concealed,
    Failure,
    Fetch,
    Lacking,
    Offer,
    Packed,
    ParameterGroup,
    Piece,
    Request,
    Stage,
    Start,
    Update,
    WireDtype,
    parse_group,
)
from fedalign.server.results import ARRIVED, OF_A_ROUND
from fedalign.units import size

T = TypeVar("T")
NOTHING = Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})
START = "start.safetensors"  # what the first round starts from, as a site sent it
LONGEST_REASON = 500  # characters of what a site says in a failure
AHEAD = 2  # pieces on their way to or from a site: one that it works on, one that waits for it
LEAST = (
    1_000_000  # bytes of the smallest: pieces grow while one takes less than BRIEF, shrink if more than LONG or if lost
)
BRIEF, LONG = 10.0, 40.0  # seconds
TRIES = 5  # times in a row that a site may fail in the midst of a transfer, and times that what arrived may prove wrong
AWAY = 180.0  # seconds that it may then be away: Flower refuses the key of a SuperNode killed a minute ago


@dataclass(frozen=True)
class Place:
    """Where one concealed message of a client lies at the coordinator."""

    client: str
    round: int
    among: tuple[str, ...]  # whose sum it is for
    file: Path
    entries: Mapping[str, Entry]
    about: Mapping[str, str]  # what it was asked about: of anything else nothing is taken over

    def transfer(self) -> Transfer:
        """The file, with what has arrived of it."""
        return taken_over(Transfer(self.file, self.entries, {"among": json.dumps(self.among), **self.about}))

    def flaw(self, answer: Concealed, stage: Stage) -> Failure | None:
        """Why an answer is none to what was asked, or None; one without residues says that they are to be fetched."""
        told = {name: (value.dtype, tuple(value.shape)) for name, value in answer.residues.items()}
        expected = {name: (entry.dtype, entry.shape) for name, entry in self.entries.items()}
        if (answer.round, answer.among) != (self.round, self.among):
            return Failure(self.client, stage, "its masked numbers are of another sum than was asked for")
        if told and told != expected:
            wrong = min(name for name in {**told, **expected} if told.get(name) != expected.get(name))
            return Failure(self.client, stage, f"its masked numbers of {wrong!r:.40} are not those asked for")
        return None

    def read(self, transfer: Transfer) -> Concealed | None:
        """As much of it as is here and sound, mapped from the disk; None: nothing."""
        found, names = transfer.read(), transfer.whole_names()
        sound = {name: found[name].values for name in names if digest(found[name]) == transfer.digests[name]}
        return Concealed(self.client, self.round, self.among, sound) if sound else None

    def broken(self) -> set[str]:
        """The names of which a part is here, or all of it and damaged."""
        transfer = self.transfer()
        found = self.read(transfer)
        return {*transfer.held_names()} - {*(found.residues if found else ())}


@dataclass(frozen=True)
class Cargo:
    """The weights and updates that travel."""

    folder: Path  # what has arrived, until its round is complete
    sizes: Mapping[ParameterGroup, int]  # values of each group
    dtype: WireDtype  # of updates
    most: int  # bytes of a piece
    constants: int = 0  # bytes that the model may have beside its groups


class Carrier:
    """Talks about weights and updates.

    Args:
        cargo: what travels.
        timeout: seconds of silence, as it is told.
        node_of: the node that a site was last seen as.
        where: the node of a site, if it is connected now.
    """

    def __init__(
        self, cargo: Cargo, timeout: float, node_of: Callable[[str], int], where: Callable[[str], int | None]
    ) -> None:
        self.cargo, self.timeout, self.node_of, self.where = cargo, timeout, node_of, where
        self.ledger = Ledger(cargo.folder / "moved.jsonl")
        self.tell: Callable[[str], None] = lambda _: None
        self._known: dict[str, Mapping[str, str]] = {}  # site -> digests of the groups that it was last sent
        self._same: set[tuple[str, int]] = set()  # site, round: what it has sent is known to be of its present update
        self._sizes = defaultdict[str, int](lambda: min(FIRST, cargo.most))  # bytes of a piece, by site

    def _say(self, line: str) -> None:
        self.tell(line)

    def forget(self) -> None:
        """The run is complete: free the disk."""
        remove(self.cargo.folder, ARRIVED)

    # ------------------------------------------------------------------------------------------------------------ down

    def broadcast(
        self, verb: str, broadcast: Broadcast, clients: Sequence[str], expected: type[T]
    ) -> Iterator[tuple[str, Talk[T | Failure]]]:
        """A talk with each client: it has the weights, or gets them, and answers."""
        if verb == "train":
            for number, folder in rounds_in(self.cargo.folder):
                if number < broadcast.round:
                    remove(folder, OF_A_ROUND)
            for file in self.cargo.folder.glob(f"{START}*"):  # its journal, too; a checkpoint holds it
                file.unlink()
        freight = Freight(broadcast)
        meter = Meter("down", self._say)
        for name in clients:
            yield name, self._broadcast(name, verb, freight, expected, meter)

    def _broadcast(self, name: str, verb: str, freight: Freight, expected: type[T], meter: Meter) -> Talk[T | Failure]:
        stage = VERBS[verb].stage
        for _ in range(2):
            lacks = freight.lacked(self._known.get(name, {}))
            if freight.weighs(lacks) > self._sizes[name]:
                failure = yield from self._deliver(name, stage, freight, meter)
                if failure is not None:
                    return failure
                self._known[name], lacks = freight.digests, Lacks()
            self.ledger.count(freight.round, "down", name, freight.weighs(lacks) + freight.state_nbytes)
            _, reply = yield [Ask(verb, freight.parcel(lacks), freight.weighs(lacks))]
            answer = read(name, stage, reply, (expected, Lacking), self.timeout)
            if isinstance(answer, expected):
                self._known[name] = freight.digests
                return answer
            self._known.pop(name, None)
            if isinstance(answer, Failure):
                return answer
        return Failure(name, stage, "it does not keep the weights that it was sent")

    def _deliver(self, name: str, stage: Stage, freight: Freight, meter: Meter) -> Talk[Failure | None]:
        """Bring weights to a site's disk; why that failed, or None."""
        return self._carry(
            name, stage, Download(freight), meter, lambda n: self.ledger.count(freight.round, "down", name, n)
        )

    # -------------------------------------------------------------------------------------------------------------- up

    def update(self, request: Request) -> tuple[str, Talk[Update | Failure]]:
        """A talk with a client that hands over its update."""
        return request.client, self._update(request)

    def _update(self, request: Request) -> Talk[Update | Failure]:
        name, number = request.client, request.round
        file = self.cargo.folder / f"round-{number:05d}" / f"{folder_name(name)}.update.safetensors"
        sizes = {str(group): self.cargo.sizes[group] for group in request.groups}
        upload = Upload(
            name, number, taken_over(Transfer(file, entries_of(sizes, self.cargo.dtype))), self._sizes[name]
        )
        failure = yield from self._fetch(upload, "update")
        if failure is not None:
            return failure
        return Update(name, number, {parse_group(key): packed for key, packed in upload.transfer.read().items()})

    def start(self, name: str) -> Talk[Start | Failure]:
        """A talk with a client that sends the weights that the first round starts from."""
        _, reply = yield [Ask("start", NOTHING)]
        start: Start | Failure = read(name, "join", reply, Start, self.timeout)
        if isinstance(start, Failure) or not start.kept:
            return start
        try:
            entries = {key: entry_of(text) for key, text in start.kept.items()}
        except ValueError as error:
            return Failure(name, "join", str(error))
        weights = {key: entry for key, entry in entries.items() if not key.startswith(CONSTANT)}
        if weights != entries_of({str(group): size for group, size in self.cargo.sizes.items()}, "float32"):
            return Failure(name, "join", "the weights that it would send do not fit the model")
        rest = sum(entry.nbytes for entry in entries.values()) - sum(entry.nbytes for entry in weights.values())
        if rest > self.cargo.constants:
            return Failure(name, "join", f"it would send {rest} bytes beside the weights, the model has fewer")
        transfer = taken_over(Transfer(self.cargo.folder / START, entries))
        upload = Upload(name, 0, transfer, self._sizes[name])
        failure = yield from self._fetch(upload, "join")
        if failure is not None:
            return failure
        every = upload.transfer.read()
        return Start(
            name,
            {parse_group(key): every[key] for key in weights},
            {key.removeprefix(CONSTANT): every[key].values for key in every if key not in weights},
        )

    def concealed(
        self, talk: Talk[Concealed | Failure], place: Place, stage: Stage
    ) -> Talk[tuple[Concealed | None, Failure | None]]:
        """A talk whose answer is concealed: what of it is here and sound, and why not all of it is.

        It is kept on disk until the round is complete, however it came, so that a round that is interrupted goes on
        with what has arrived.
        """
        upload = Upload(place.client, place.round, place.transfer(), self._sizes[place.client])
        failure: Failure | None = None
        if not upload.is_whole:
            answer = yield from talk
            failure = answer if isinstance(answer, Failure) else place.flaw(answer, stage)
            if isinstance(answer, Concealed) and failure is None:
                if answer.residues:
                    packed = {name: Packed(value) for name, value in answer.residues.items()}
                    upload.transfer.take_all(packed.items(), {name: digest(one) for name, one in packed.items()})
                else:
                    meter = Meter("up", self._say)
                    failure = yield from self._carry(place.client, stage, upload, meter, lambda _: None)
        return place.read(upload.transfer), failure

    def _fetch(self, upload: Upload, stage: Stage) -> Talk[Failure | None]:
        """Bring what a site keeps to this machine's disk; why that failed, or None."""
        key = upload.client, upload.round
        if key in self._same:
            upload.unsure = False
        meter = Meter("up", self._say)
        failure = yield from self._carry(
            upload.client, stage, upload, meter, lambda n: self.ledger.count(upload.round, "up", upload.client, n)
        )
        if failure is None:
            self._same.add(key)
        return failure

    # ------------------------------------------------------------------------------------------------------ either way

    def _carry(
        self, name: str, stage: Stage, way: Download | Upload, meter: Meter, count: Callable[[int], None]
    ) -> Talk[Failure | None]:
        """Move what is lacking, a few pieces ahead of what is acknowledged; why that failed, or None.

        A site that has begun may go away and come back; one that was away from the start is gone. All of it may take
        `timeout` seconds and what the slowest line would need: a site that drips is not waited for.
        """
        longest = self.timeout + PATIENCE * way.nbytes / SLOWEST
        over = time.monotonic() + longest
        flying: list[Part | None] = []  # None: the question what is lacking
        fails, begun, node, heard = 0, way.is_long, 0, time.monotonic()
        loss: Failure | None = None  # why the site was lost, until it is back
        since = 0.0
        meter.expect(size_of(way.left))
        while fails <= TRIES:
            asks: list[Ask] | None = None
            if loss is not None:
                now = self.where(name)
                if now is None and time.monotonic() - since > min(AWAY, self.timeout):
                    return loss
                if now is not None and (not flying or now != node):  # what was under way to it, it may still answer
                    loss, flying = None, []
                    way.unsure = way.unsure or isinstance(way, Download)
            if loss is None:
                asks = self._asks(name, way, flying, count)
                if not flying:
                    return None
                node = self.node_of(name) if asks else node
            tag, reply = yield asks
            if tag not in flying:
                continue
            flying.remove(tag)
            answer = read(name, stage, reply, way.expected, self.timeout)
            if isinstance(answer, Failure):
                if not begun or (reply is not None and not isinstance(reply.content, str)):
                    return answer  # the site says so itself, or it was gone from the start
                loss, since, fails = answer, time.monotonic(), fails + 1
                if tag is not None:
                    self._shrink(name, 4)  # on a line that became slow none so large may ever arrive
                continue
            before = size_of(way.left)
            sound, came = way.take(tag, answer), len(answer.data) if isinstance(answer, Piece) else 0
            del reply, answer  # a piece's bytes, until the next one has come
            if time.monotonic() > over and way.left:
                told = f"its transfer of {size(way.nbytes)} took longer than {longest:g} s: federation.timeout_seconds"
                return Failure(name, stage, f"{told}, and {size(SLOWEST / PATIENCE)} a second")
            if way.undone > TRIES:
                return Failure(name, stage, f"{way.undone} times it took back what it had acknowledged or sent")
            begun, fails = True, 0 if sound and tag is not None else fails + (not sound)
            if isinstance(way, Upload):
                count(came)
            if tag is None:
                meter.expect(size_of(way.left) - before)
            elif sound:
                meter.moved(size_of(tag))
                self._resize(name, size_of(tag), time.monotonic() - heard)
            heard = time.monotonic()
        return loss or Failure(name, stage, f"{TRIES + 1} pieces in a row did not arrive as they were sent")

    def _resize(self, name: str, nbytes: int, seconds: float) -> None:
        """Make a site's pieces larger or smaller: each costs seconds of its own, and all of it if a line breaks."""
        size = self._sizes[name]
        if not size < 2 * nbytes <= 2 * size:  # it was asked for before they changed, or is what was left
            return
        if seconds < BRIEF:
            self._sizes[name] = min(2 * size, self.cargo.most)
        elif seconds > LONG:
            self._shrink(name, 2)

    def _shrink(self, name: str, times: int) -> None:
        """Make a site's pieces smaller, as far as that helps."""
        size = self._sizes[name]
        self._sizes[name] = min(size, max(size // times, LEAST))

    def _asks(
        self, name: str, way: Download | Upload, flying: list[Part | None], count: Callable[[int], None]
    ) -> list[Ask]:
        """The next thing to ask; it counts as under way from now on."""
        if way.unsure:
            if flying:
                return []
            flying.append(None)
            return [way.question()]
        left = minus(way.left, [one for part in flying for one in part or ()])
        pieces = list(islice(way.cut(self._sizes[name], left), AHEAD - len(flying)))
        flying += pieces
        if isinstance(way, Download):
            count(sum(map(size_of, pieces)))
        return [way.ask(piece) for piece in pieces]


@dataclass(frozen=True)
class Lacks:
    """The groups that a site has not, and those of which it has what their difference is added to."""

    whole: tuple[ParameterGroup, ...] = ()
    differences: tuple[ParameterGroup, ...] = ()


class Freight:
    """A broadcast as it is brought to many sites: digests, messages and pieces are made once."""

    def __init__(self, broadcast: Broadcast) -> None:
        self.broadcast, self.round = broadcast, broadcast.round
        self.groups = tuple(broadcast.weights)
        self.differing = tuple(group for group in self.groups if group in broadcast.differences)
        self.state_nbytes = sum(tensor.nbytes for tensor in broadcast.state.values())
        self.digests = {str(group): digest(packed) for group, packed in broadcast.weights.items()}
        self._parcels: dict[Lacks, Parcel] = {}
        self._pieces = WeakValueDictionary[tuple[str, Part], Parcel]()  # on their way, since other sites want the same

    def lacked(self, known: Mapping[str, str]) -> Lacks:
        """The part of it that is to be sent to a site that holds groups with these digests."""
        broadcast = self.broadcast
        lacking = [group for group in self.groups if known.get(str(group)) != self.digests[str(group)]]
        held = {name for name, before in broadcast.before.items() if known.get(name) == before}
        differ = tuple(group for group in lacking if group in broadcast.differences and str(group) in held)
        return Lacks(tuple(group for group in lacking if group not in frozenset(differ)), differ)

    def weighs(self, lacks: Lacks) -> int:
        """Bytes of these groups."""
        weights, differences = self.broadcast.weights, self.broadcast.differences
        return sum(weights[g].nbytes for g in lacks.whole) + sum(differences[g].nbytes for g in lacks.differences)

    def parcel(self, lacks: Lacks) -> Parcel:
        """The broadcast for a site that has all but these groups."""
        if lacks not in self._parcels:
            weights = {group: self.broadcast.weights[group] for group in lacks.whole}
            differences = {group: self.broadcast.differences[group] for group in lacks.differences}
            kept = {str(group): self.digests[str(group)] for group in self.groups if group not in weights}
            message = replace(self.broadcast, weights=weights, kept=kept, differences=differences, before={})
            self._parcels[lacks] = encode(message)
        return self._parcels[lacks]

    @cached_property
    def transfer(self) -> Transfer:
        """The file that a site makes of the weights."""
        return _file(self.broadcast.weights, about_whole(self.digests))

    @cached_property
    def differences(self) -> Transfer:
        """The file that a site makes of the differences, if it can add them; it is sent that in place of the other."""
        about = about_differences(self.digests, self._before, self._dtype(self.broadcast.weights))
        return _file({group: self.broadcast.differences[group] for group in self.differing}, about)

    @property
    def offer(self) -> Parcel:
        """A description, for a site to say which part it lacks."""
        weights, differences = self.broadcast.weights, self.broadcast.differences
        return encode(Offer(self.round, self._dtype(weights), self.digests, self._dtype(differences), self._before))

    def piece(self, transfer: Transfer, part: Part) -> Parcel:
        """A message with these bytes of one of the files."""
        key = transfer.identity, part
        made = self._pieces.get(key)
        if made is None:
            tensors = self.broadcast.weights if transfer is self.transfer else self.broadcast.differences
            found = [_bytes(tensors, transfer, *one) for one in part]
            data = found[0] if len(found) == 1 else torch.cat(found)
            piece = Piece(None, self.round, transfer.identity, edges_of(part), data, fingerprint([data.numpy().data]))
            made = self._pieces[key] = encode(piece)
        return made

    @property
    def _before(self) -> dict[str, str]:
        return {str(group): self.broadcast.before[str(group)] for group in self.differing}

    def _dtype(self, groups: Mapping[ParameterGroup, Packed]) -> str:
        return wire_dtype(next(iter(groups.values()))) if groups else ""


def _file(groups: Mapping[ParameterGroup, Packed], about: Mapping[str, str]) -> Transfer:
    return Transfer(Path(), {str(group): entry_for(packed) for group, packed in groups.items()}, about)


def _bytes(tensors: Mapping[ParameterGroup, Packed], transfer: Transfer, start: int, stop: int) -> Tensor:
    names = transfer.names_in(start, stop)
    parts = [one for name in names for one in bytes_of(tensors[parse_group(name)])]
    return cut_out(parts, start - transfer.starts[names[0]], stop - start)


class Download:
    """Weights on their way to one site. What it lacks is not known before it has said so."""

    expected = Lacking

    def __init__(self, freight: Freight) -> None:
        self.freight, self.left, self.unsure = freight, list[Range](), True
        self.transfer = freight.transfer  # until the site has said that it can add differences
        self.nbytes = freight.transfer.nbytes
        self._whole = False
        self._acknowledged: list[Range] = []
        self.undone = 0  # times that a site said that it lacks what it had acknowledged
        self.is_long = False  # before the site has answered once

    def question(self) -> Ask:
        """The question which part it lacks."""
        return Ask("offer", self.freight.offer)

    def cut(self, most: int, ranges: Sequence[Range]) -> Iterator[Part]:
        """Ranges in pieces of at most `most` bytes."""
        return self.transfer.cut(most, ranges)

    def ask(self, piece: Part) -> Ask:
        """The message with a piece."""
        return Ask("piece", self.freight.piece(self.transfer, piece), size_of(piece), piece)

    def take(self, piece: Part | None, answer: Lacking) -> bool:
        """Note what the site says that it lacks; whether the piece, if this answers one, has arrived.

        What others of its answers say is older or younger: only what this piece has become is taken from it.
        """
        if piece is None:
            self._choose(answer.transfer)
        transfer = self.transfer
        if answer.transfer != transfer.identity or not within(answer.ranges, transfer.nbytes):
            self.unsure = True
            return False
        ranges = list(ranges_of(answer.ranges))
        self._whole = not ranges or (self._whole and piece is not None)
        if piece is None:
            before, self._acknowledged = self._acknowledged, minus(self._acknowledged, ranges)
            self.undone += self._acknowledged != before
            self.left, self.unsure = ranges, False
            return True
        if minus(piece, ranges) != list(piece):
            return False
        self.left = minus(self.left, piece)
        self._acknowledged = merged([*self._acknowledged, *piece])
        self.unsure = not self.left and not self._whole  # all was sent, and something proved to be other than it was
        return True

    def _choose(self, identity: str) -> None:
        """Send the weights or their differences, as the site asks; of the other it has nothing then."""
        freight = self.freight
        other = freight.differences if self.transfer is freight.transfer else freight.transfer
        if freight.differing and identity == other.identity:
            self.undone += bool(self._acknowledged)
            self.transfer, self._acknowledged = other, []


class Upload:
    """An update that a site keeps, on its way here. Bytes from before a restart may be of another update."""

    expected = Piece

    def __init__(self, client: str, round: int, transfer: Transfer, piece: int) -> None:
        self.client, self.round, self.transfer = client, round, transfer
        self.nbytes = self.transfer.nbytes
        self.unsure = bool(self.transfer.held_names())
        self.undone = 0  # times that its digests did not agree with what had arrived
        self.is_long = self.transfer.nbytes > piece

    @property
    def left(self) -> list[Range]:
        """The part that is not here yet."""
        return self.transfer.lacking

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here, and sound."""
        return not self.transfer.lacking and not self._forget_wrong()

    def question(self) -> Ask:
        """Is what is here still the same?"""
        return Ask("update", encode(Fetch(self.client, self.round, (), 0, 0, self.transfer.digests)))

    def cut(self, most: int, ranges: Sequence[Range]) -> Iterator[Part]:
        """Ranges in pieces of at most `most` bytes, each of one range."""
        return (piece for one in ranges for piece in self.transfer.cut(most, [one]))

    def ask(self, piece: Part) -> Ask:
        """The message that asks for a piece."""
        ((start, stop),) = piece
        names = self.transfer.names_in(start, stop)
        fetch = Fetch(self.client, self.round, tuple(names), start - self.transfer.starts[names[0]], stop - start)
        return Ask("update", encode(fetch), stop - start, piece, answers_with_bytes=True)

    def take(self, piece: Part | None, answer: Piece) -> bool:
        """Keep a piece; whether it is what was asked for, and sound."""
        own = self.transfer.digests
        if piece is None:
            self.transfer.forget(name for name in answer.stale if name in self.transfer.entries)
            self._forget_wrong()
            self.unsure = False
            return True
        ((start, stop),) = piece
        names = self.transfer.names_in(start, stop)
        if answer.round != self.round or len(answer.data) != stop - start or answer.digests.keys() != set(names):
            return False
        if fingerprint([answer.data.numpy().data]) != answer.digest:
            return False
        if others := [name for name in names if own.get(name, answer.digests[name]) != answer.digests[name]]:
            self.transfer.forget(others)  # it has trained anew meanwhile
            self.undone += 1
        self.transfer.write(piece, answer.data, answer.digests)
        if self.transfer.lacking:
            return True
        wrong = self._forget_wrong()
        self.undone += wrong
        return not wrong

    def _forget_wrong(self) -> bool:
        """Count whole tensors as lacking that are other than they were said to be; whether there are any."""
        found = self.transfer.read()
        own = self.transfer.digests
        wrong = [name for name in self.transfer.whole_names() if digest(found[name]) != own[name]]
        if wrong:
            self.transfer.forget(wrong)
        return bool(wrong)


def taken_over(transfer: Transfer) -> Transfer:
    """The transfer begun, with what an earlier one in its place holds of it: the same groups were asked for before.

    What is about something else is begun anew.
    """
    old = Transfer.load(transfer.file)
    if old is None or old.identity == transfer.identity or old.about != transfer.about:
        return transfer.begin()
    old.move(transfer.file.with_name(f"{transfer.file.name}.before"))
    same = [name for name in old.whole_names() if transfer.entries.get(name) == old.entries[name]]
    transfer.begin().take_from(old.read(), same, {n: old.digests[n] for n in same})
    old.remove()
    return transfer


def read(name: str, stage: Stage, reply: Reply | None, expected: Any, timeout: float) -> Any:
    """The message in a reply, or a Failure that says why there is none."""
    if reply is None:
        return Failure(name, stage, f"no reply within {timeout:g} s (federation.timeout_seconds)")
    if isinstance(reply.content, str):
        return Failure(name, stage, reply.content)
    try:
        answer = decode(reply.content, (*(expected if isinstance(expected, tuple) else (expected,)), Failure))
    except MessageError as error:
        return Failure(name, stage, str(error))
    if isinstance(answer, Failure):
        return Failure(name or answer.client, stage, answer.reason[:LONGEST_REASON])
    if name and answer.client != name:
        return Failure(name, stage, f"it answers as {answer.client!r}")
    return answer
