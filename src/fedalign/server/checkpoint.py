"""Checkpoints: the server's state after each round, and the state that each client keeps for itself.

Everything is written beside its place and renamed into it, so a kill at any moment leaves the old state or the new
one, never half of either. The last two rounds stay, each with digests of its files: if the last one is damaged, a run
goes on from the one before it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedalign import parallel
from fedalign.errors import UserError
from fedalign.files import KEPT_ROUNDS, SUMS, damage, forget_old, replacing, rounds_in
from fedalign.maths.tensor_file import apart, move
from fedalign.protocol import Metrics, Packed, State, Weights, parse_group
from fedalign.server.public import PublicModel

logger = logging.getLogger(__name__)
FILES = ("state.json", "weights.safetensors", "algorithm.safetensors", "moments.safetensors")
PUBLIC = "public.safetensors"  # where broadcasts travel as differences
SCORED, LINE = "scored", "line.json"  # a folder within a round's, once its clients have scored it, and its line


@dataclass(frozen=True)
class ServerState:
    """All that the next round depends on, and the metrics of the rounds before it."""

    round: int  # rounds completed
    weights: Weights  # the fp32 master of what is trained
    algorithm: State
    history: tuple[Metrics, ...]  # one entry a round, the evaluation before round 1 first
    moments: State = field(default_factory=dict)  # of the server's optimizer
    pending: Metrics | None = None  # the entry of `round`, as long as its clients have not scored it
    public: PublicModel | None = None  # of `weights` what clients are told; None: all

    @property
    def lines(self) -> tuple[Metrics, ...]:
        """The history, and what is known of a round that is not scored yet."""
        return self.history if self.pending is None else (*self.history, self.pending)


class Checkpoints:
    """The server's checkpoints in one folder, for one model and one configuration."""

    def __init__(self, folder: Path, identity: Mapping[str, str], *, moving: bool = False) -> None:
        self.folder = folder
        self.moving = moving  # whether what is saved leaves the place where it was, for the file
        self.identity = dict(identity)  # what must agree on resume: name -> fingerprint

    @parallel.by_the_first
    def save(self, state: ServerState) -> None:
        """Write the state after a complete round; where it moves, its tensors become those of the files."""
        with replacing(self.folder / f"round-{state.round:05d}") as folder:
            self._write(state.weights, folder / "weights.safetensors")
            self._write(state.algorithm, folder / "algorithm.safetensors")
            self._write(state.moments, folder / "moments.safetensors")
            if state.public is not None:
                save_file(_tensors(state.public), folder / PUBLIC)
            about: dict[str, Any] = {"round": state.round, "identity": self.identity}
            about |= {"history": state.history, "pending": state.pending}
            about |= {"before": None if state.public is None else dict(state.public.before)}
            (folder / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        forget_old(self.folder, KEPT_ROUNDS)

    def mapped(self, state: ServerState) -> ServerState:
        """The same state, just saved, with weights that are mapped from its files: they take no memory of their own."""
        if parallel.world() > 1:  # the others may not see the file
            return state
        folder = self.folder / f"round-{state.round:05d}"
        tensors, public = load_file(folder / "weights.safetensors"), state.public
        if public is not None:
            public = _public(load_file(folder / PUBLIC), public.before)
        return replace(state, weights={group: tensors[str(group)] for group in state.weights}, public=public)

    @parallel.by_the_first
    def save_scored(self, state: ServerState) -> None:
        """Add its line to a round that was saved before it was scored."""
        with replacing(self.folder / f"round-{state.round:05d}" / SCORED) as folder:
            (folder / LINE).write_text(json.dumps(state.history[-1]), encoding="utf-8")

    def _write(self, tensors: dict[Any, Tensor], file: Path) -> None:
        if self.moving:
            move(tensors, file)
        else:
            save_file(apart({str(key): tensor for key, tensor in tensors.items()}), file)

    def load(self) -> ServerState | None:
        """The latest complete round that is not damaged, or None where there is none; what is damaged is told.

        Raises:
            UserError: All rounds that are kept are damaged, or it is of another model or configuration.
        """
        problems: list[str] = []
        for number, folder in reversed(rounds_in(self.folder)):
            problem = _damage(folder)
            if not problem:
                if problems and parallel.is_first():
                    logger.warning("%s. Going on from round %d.", "; ".join(problems), number)
                return self._read(folder)
            problems.append(f"checkpoint {str(folder)!r}: damaged ({problem})")
        if problems:
            raise UserError(f"{'; '.join(problems)}. No other round is kept: start anew with another --out.")
        return None

    def weights_after(self, round: int) -> Weights | None:
        """The weights of one round, if it is kept and not damaged."""
        folder = dict(rounds_in(self.folder)).get(round)
        return None if folder is None or _damage(folder) else self._read(folder).weights

    def _read(self, folder: Path) -> ServerState:
        try:
            about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self._check(folder, about["identity"])
            weights = {parse_group(k): w for k, w in load_file(folder / "weights.safetensors").items()}
            algorithm = load_file(folder / "algorithm.safetensors")
            moments = load_file(folder / "moments.safetensors")
            history, pending = tuple(about["history"]), about.get("pending")  # older versions scored before they saved
            if pending is not None and (folder / SCORED).exists():
                if problem := damage(folder / SCORED, LINE):
                    logger.warning("%s: damaged (%s): the round is scored again.", folder / SCORED, problem)
                else:
                    line = json.loads((folder / SCORED / LINE).read_text(encoding="utf-8"))
                    history, pending = (*history, line), None
            before = about.get("before")
            public = None if before is None else _public(load_file(folder / PUBLIC), before)
            return ServerState(about["round"], weights, algorithm, history, moments, pending, public)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"checkpoint {str(folder)!r}: made by another version ({error}).") from None

    def _check(self, folder: Path, identity: Mapping[str, str]) -> None:
        for name, mine in self.identity.items():
            if identity.get(name) != mine:
                raise UserError(
                    f"checkpoint {str(folder)!r}: made with another {name} ({identity.get(name)}, this one is {mine}). "
                    "Resume with the run's own config.toml and the version of fedalign that began it, or start anew "
                    "with another --out."
                )


def whole_rounds(folder: Path) -> list[int]:
    """The kept rounds that are as they were written, oldest first."""
    return [number for number, path in rounds_in(folder) if not _damage(path)]


def _tensors(public: PublicModel) -> State:
    """Its tensors by name: `weights/`, `differences/` or `scales/`, and the group."""
    return {
        **{f"weights/{group}": packed.values for group, packed in public.weights.items()},
        **{f"differences/{group}": packed.values for group, packed in public.differences.items()},
        **{f"scales/{group}": packed.scale for group, packed in public.differences.items() if packed.scale is not None},
    }


def _public(tensors: State, before: Mapping[str, str]) -> PublicModel:
    """The inverse of `_tensors`."""
    named: dict[str, dict[str, Tensor]] = {"weights": {}, "differences": {}, "scales": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        named[part][name] = tensor
    scales = named["scales"]
    return PublicModel(
        {parse_group(name): Packed(values) for name, values in named["weights"].items()},
        {parse_group(name): Packed(values, scales[name]) for name, values in named["differences"].items()},
        before,
    )


def _damage(folder: Path) -> str:
    sums = folder / SUMS
    has_public = sums.is_file() and PUBLIC in sums.read_text(encoding="utf-8", errors="replace")
    return damage(folder, *FILES, *((PUBLIC,) if has_public else ()))
