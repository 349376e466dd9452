"""What survives a crash: the server's state after each round, and what each client keeps for itself.

Everything is written beside its place and renamed into it, so a kill at any moment leaves the old state or the new
one, never half of either. The last two rounds stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedalign import parallel
from fedalign.errors import UserError
from fedalign.files import forget_old, replacing, rounds_in
from fedalign.protocol import Metrics, State, Weights, parse_group


@dataclass(frozen=True)
class ServerState:
    """All that the next round depends on, and the metrics of the rounds before it."""

    round: int  # rounds completed
    weights: Weights  # the fp32 master of what is trained
    algorithm: State
    history: tuple[Metrics, ...]  # one entry a round, the evaluation before round 1 first
    moments: State = field(default_factory=dict)  # of the server's optimizer


class Checkpoints:
    """The server's checkpoints in one folder, for one model and one configuration."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self.identity = dict(identity)  # what must agree on resume: name -> fingerprint

    @parallel.by_the_first
    def save(self, state: ServerState) -> None:
        """Write the state after a complete round."""
        with replacing(self.folder / f"round-{state.round:05d}") as folder:
            save_file({str(g): w.contiguous() for g, w in state.weights.items()}, folder / "weights.safetensors")
            save_file({name: t.contiguous() for name, t in state.algorithm.items()}, folder / "algorithm.safetensors")
            save_file({name: t.contiguous() for name, t in state.moments.items()}, folder / "moments.safetensors")
            about = {"round": state.round, "identity": self.identity, "history": state.history}
            (folder / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        forget_old(self.folder)

    def load(self) -> ServerState | None:
        """The latest complete round, or None where there is none.

        Raises:
            UserError: The checkpoint is damaged, or of another model or configuration.
        """
        kept = rounds_in(self.folder)
        if not kept:
            return None
        folder = kept[-1][1]
        try:
            about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            self._check(folder, about["identity"])
            weights = {parse_group(k): w for k, w in load_file(folder / "weights.safetensors").items()}
            algorithm = load_file(folder / "algorithm.safetensors")
            moments = load_file(folder / "moments.safetensors")
            return ServerState(about["round"], weights, algorithm, tuple(about["history"]), moments)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(
                f"checkpoint {str(folder)!r}: damaged ({error}). Delete that folder to resume from the round before it."
            ) from None

    def _check(self, folder: Path, identity: Mapping[str, str]) -> None:
        for name, mine in self.identity.items():
            if identity.get(name) != mine:
                raise UserError(
                    f"checkpoint {str(folder)!r}: made with another {name} ({identity.get(name)}, this one is {mine}). "
                    f"Resume with the run's own config.toml, or start anew with another --out."
                )
