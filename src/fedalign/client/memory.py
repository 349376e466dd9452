"""A client's memory on its own disk: the update that was not yet handed over, and the state between rounds."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedalign import parallel
from fedalign.config.run import ClientLimits
from fedalign.errors import TrainingFailedError, UserError
from fedalign.files import KEPT_BY_CLIENTS, damage, fingerprint, forget_old, replacing, rounds_in
from fedalign.maths.rounding import SCALE, bytes_of, cut_out
from fedalign.maths.tensor_file import Named, apart, create
from fedalign.protocol import (
    DEALT,
    Consent,
    Fetch,
    Packed,
    ParameterGroup,
    Piece,
    Request,
    Update,
    Weights,
    parse_group,
)

if TYPE_CHECKING:  # handing over an update needs neither a model nor data
    from fedalign.client.evaluation import TestSet
    from fedalign.client.losses import Labels
    from fedalign.client.spent import Privacy
    from fedalign.data.encode import Encoded

logger = logging.getLogger(__name__)
UPDATE, KEPT, DIGESTS = "update.safetensors", "kept.safetensors", "digests.json"
ROUND = "round"  # in the head of an update: which it is of
START = "start"  # a folder: what the first round starts from, where the server has to fetch it
BY_GROUP = ("private", "lost", "own", "fitted", "unfitted")  # parts of `Kept`
CONCEALED = "concealed"  # a folder: what was last concealed in a masked run, where the server has to fetch it


@dataclass(frozen=True)
class Kept:
    """A client's state from its last round, to resume from; empty before its first."""

    prob_L_E: Tensor | None = None  # its own routing distribution
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)  # `fit.dump_optimizer`'s
    private: Weights = field(default_factory=dict)  # groups that it does not take from the server
    algorithm: Mapping[str, Tensor] = field(default_factory=dict)  # what `Algorithm.end` kept
    lost: Weights = field(default_factory=dict)  # by rounding to wire precision
    own: Weights = field(default_factory=dict)  # its own model of a mixture ...
    mixer: Mapping[str, Tensor] = field(default_factory=dict)  # ... and what mixes it with the server's
    fitted: Weights = field(default_factory=dict)  # router rows of its own experts, as last fitted to its text ...
    unfitted: Weights = field(default_factory=dict)  # ... and as it had received them

    @property
    def personal(self) -> Weights:
        """Values that a client's own model has in place of the server's."""
        return {**self.private, **self.own}

    def save(self, file: Path) -> None:
        """Write all of it; a tensor's name is its field's, a slash, and its own."""
        parts = {**vars(self), "prob_L_E": {} if self.prob_L_E is None else {"": self.prob_L_E}}
        tensors = {f"{part}/{key}": value for part, values in parts.items() for key, value in values.items()}
        save_file(apart(tensors), file)

    @classmethod
    def load(cls, file: Path) -> Kept:
        """The inverse of `save`."""
        parts: dict[str, Any] = {part.name: {} for part in fields(cls)}
        for name, tensor in load_file(file).items():
            part, _, key = name.partition("/")
            parts[part][parse_group(key) if part in BY_GROUP else key] = tensor
        return cls(**parts | {"prob_L_E": parts["prob_L_E"].get("")})


class Keeping:
    """A round that is being kept; in a process that does not write, nothing is."""

    def __init__(self, folder: Path | None, tensors: Iterable[Named], round: int = 0) -> None:
        self._folder, self._digests = folder, dict[str, str]()
        self._places = {} if folder is None else create(folder / UPDATE, tensors, {ROUND: str(round)})

    def put(self, group: object, packed: Packed) -> None:
        """Write a packed tensor, and note its digest: they are handed over one by one."""
        if self._folder is None:
            return
        self._places[str(group)].copy_(packed.values)
        if packed.scale is not None:
            self._places[f"{group}{SCALE}"].copy_(packed.scale)
        self._digests[str(group)] = fingerprint(part.numpy().data for part in bytes_of(packed))

    def save(self, kept: Kept) -> None:
        """Write what the next round starts from."""
        if self._folder is not None:
            kept.save(self._folder / KEPT)

    def close(self) -> None:
        """All of it is written."""
        if self._folder is not None:
            (self._folder / DIGESTS).write_text(json.dumps(self._digests), encoding="utf-8")


class ClientMemory:
    """A client's memory on its own disk: the update that was not yet handed over, and the state between rounds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def keeping(self, round: int, tensors: Iterable[Named]) -> Iterator[Keeping]:
        """Keep a round: its update in wire precision, group by group, and what the client's next round starts from.

        Args:
            round: which.
            tensors: of the update's file, as of `rounding.shapes_of`.
        """
        if parallel.is_first():
            with replacing(self.folder / f"round-{round:05d}") as folder:
                keeping = Keeping(folder, tensors, round)
                yield keeping
                keeping.close()
            forget_old(self.folder, KEPT_BY_CLIENTS)
        else:
            yield Keeping(None, ())
        parallel.wait()

    @parallel.by_the_first
    def keep_start(self, values: Iterable[tuple[str, Tensor]], tensors: Iterable[Named]) -> None:
        """Keep what the first round starts from, to be handed over in pieces as the update of round 0."""
        self._keep_to_hand_over(START, 0, values, tensors)

    def keep_concealed(self, round: int, values: Iterable[tuple[str, Tensor]], tensors: Iterable[Named]) -> None:
        """Keep what a masked round's message holds, to be handed over in pieces in place of an update."""
        self._keep_to_hand_over(CONCEALED, round, values, tensors)

    def _keep_to_hand_over(
        self, name: str, round: int, values: Iterable[tuple[str, Tensor]], tensors: Iterable[Named]
    ) -> None:
        with replacing(self.folder / name) as folder:
            keeping = Keeping(folder, tensors, round)
            for key, value in values:
                keeping.put(key, Packed(value))
            keeping.close()

    def forget_start(self) -> None:
        """Free the disk of what the first round started from."""
        (self.folder / START / UPDATE).unlink(missing_ok=True)

    def hand_over(self, client: str, request: Request) -> Update:
        """Read the asked groups of a kept update; nothing else is loaded, no model is needed.

        Raises:
            TrainingFailedError: It keeps no such update, or a damaged one.
        """
        path = self.folder / f"round-{request.round:05d}" / UPDATE
        if not path.exists():
            raise TrainingFailedError(f"it keeps no update of round {request.round}")
        if problem := damage(path.parent, UPDATE):
            raise TrainingFailedError(f"its update of round {request.round} is damaged on its disk: {problem}")
        kept = _read(path)
        lacking = [str(group) for group in request.groups if group not in kept]
        if lacking:
            raise TrainingFailedError(f"its update of round {request.round} has no {lacking[0]}")
        return Update(client, request.round, {group: kept[group] for group in request.groups})

    def hand_piece(self, client: str, fetch: Fetch, kept_in: str = "") -> Piece:
        """Read the asked bytes of a kept update, and whether what the server has of it from before is still the same.

        Args:
            client: who hands it over.
            fetch: what is asked for.
            kept_in: the folder, if it is one for all rounds, of which it holds the last; empty: the round's own.

        Raises:
            TrainingFailedError: As of `hand_over`.
        """
        folder = self.folder / (kept_in or (f"round-{fetch.round:05d}" if fetch.round else START))
        if not (folder / UPDATE).exists():
            raise TrainingFailedError(f"it keeps no update of round {fetch.round}")
        if kept_in and (of := _round_of(folder / UPDATE)) != str(fetch.round):
            raise TrainingFailedError(f"it keeps no update of round {fetch.round}: its last is of round {of}")
        if problem := damage(folder, DIGESTS):
            raise TrainingFailedError(f"its update of round {fetch.round} is damaged on its disk: {problem}")
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        if lacking := [name for name in fetch.names if name not in digests]:
            raise TrainingFailedError(f"its update of round {fetch.round} has no {lacking[0]}")
        if len(set(fetch.names)) < len(fetch.names):
            raise TrainingFailedError(f"its update of round {fetch.round} was asked for a group twice")
        kept, parts = _mapped(folder / UPDATE), list[Tensor]()
        for name in fetch.names:
            found = bytes_of(kept[name])
            if fingerprint(part.numpy().data for part in found) != digests[name]:
                raise TrainingFailedError(f"its update of round {fetch.round} is damaged on its disk: {name}")
            parts += found
        data = cut_out(parts, fetch.start, fetch.nbytes)
        stale = tuple(name for name, digest in fetch.held.items() if digests.get(name) != digest)
        own = {name: digests[name] for name in fetch.names}
        return Piece(client, fetch.round, "", (), data, fingerprint([data.numpy().data]), own, stale)

    def last_update(self, round: int) -> dict[ParameterGroup, Packed]:
        """The update of the latest round before `round`; empty if there is none.

        Raises:
            UserError: As of `before`.
        """
        folder = self._latest(round, UPDATE)
        return {} if folder is None else _read(folder / UPDATE)

    def before(self, round: int) -> Kept:
        """The client's state from the latest round before `round`; empty if it has not taken part yet.

        Raises:
            UserError: All that it kept is damaged; of one damaged round it is told, and the one before it is used.
        """
        folder = self._latest(round, KEPT)
        return Kept() if folder is None else Kept.load(folder / KEPT)

    def _latest(self, round: int, name: str) -> Path | None:
        """The latest round before `round` that has a file which is not damaged."""
        problems: list[str] = []
        for number, folder in reversed(rounds_in(self.folder)):
            if number >= round or not (folder / name).exists():
                continue
            problem = damage(folder, name)
            if not problem:
                if problems and parallel.is_first():
                    logger.warning("%s. Round %d is used instead.", "; ".join(problems), number)
                return folder
            problems.append(f"{str(folder)!r}: damaged ({problem})")
        if problems:
            raise UserError(f"{'; '.join(problems)}. No earlier round is kept: start the run anew.")
        return None

    @parallel.by_the_first
    def forget_updates(self) -> None:
        """Free the disk that kept updates take, once a run is complete.

        The last one stays where the algorithm keeps something: a run that goes on for more rounds may read both.
        """
        rounds = [folder for _, folder in rounds_in(self.folder)]
        if rounds and _keeps_for_algorithm(rounds[-1] / KEPT):
            rounds.pop()
        for folder in (self.folder / START, self.folder / CONCEALED, *rounds):
            (folder / UPDATE).unlink(missing_ok=True)


def _keeps_for_algorithm(kept: Path) -> bool:
    """Whether what is kept of a round holds tensors of the algorithm; also if it cannot be read."""
    try:
        with safe_open(kept, "pt") as file:
            return any(name.startswith("algorithm/") for name in file.keys())  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError):
        return True


def _round_of(update: Path) -> str:
    """The round that a kept update is of, as it says itself; one that earlier versions kept does not."""
    try:
        with safe_open(update, "pt") as file:
            return str((file.metadata() or {}).get(ROUND, "unknown"))
    except (OSError, SafetensorError):
        return "unknown"


def _mapped(update: Path) -> dict[str, Packed]:
    """All tensors of a kept update; the file is mapped, so values are read when they are used."""
    tensors = load_file(update)
    names = [name for name in tensors if not (name.endswith(SCALE) and name.removesuffix(SCALE) in tensors)]
    return {name: Packed(tensors[name], tensors.get(f"{name}{SCALE}")) for name in names}


def _read(update: Path) -> dict[ParameterGroup, Packed]:
    return {parse_group(name): packed for name, packed in _mapped(update).items()}


@dataclass(frozen=True)
class ClientData:
    """One client's data and limits. They never leave it."""

    name: str
    train: Sequence[Encoded]
    held_out: TestSet | None
    memory: ClientMemory
    limits: ClientLimits = field(default_factory=ClientLimits)
    seed: int | None = None  # of every draw on these examples; None: the run's
    most_steps: int = 0  # of a round; 0: any number
    consent: Consent = DEALT
    privacy: Privacy | None = None  # None: the run has none
    labels: Labels | None = None  # None: the loss does not read them

    @property
    def told(self) -> int:
        """How many examples it says that it has: with noise in a private run."""
        return self.examples if self.privacy is None else self.privacy.told(self.examples)

    @property
    def examples(self) -> int:
        """How many it trains on: a chat may be several sequences, and is one example."""
        return len({one.example for one in self.train})
