"""What one client keeps on its own disk: the update it has not handed over, and its state between rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedalign import parallel
from fedalign.errors import TrainingFailedError, UserError
from fedalign.files import KEPT_ROUNDS, folder_name, forget_old, replacing, rounds_in
from fedalign.protocol import Packed, ParameterGroup, Request, Update, Weights, parse_group

if TYPE_CHECKING:  # handing over an update needs neither a model nor data
    from fedalign.client.evaluation import TestSet
    from fedalign.data.encode import Encoded

PRIVATE, KEPT, MIXTURE = "private.", "kept.", "mixture."  # in the names of what a client remembers
GATE, OWN = ("gate.weight", "gate.bias"), "own."  # of a mixture: what mixes, and the client's own model


class ClientMemory:
    """What one client keeps on its own disk: the update it has not handed over, and its state between rounds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @parallel.by_the_first
    def keep(self, round: int, update: Mapping[ParameterGroup, Packed], state: Mapping[str, Tensor]) -> None:
        """Keep a round's update in wire precision, and the state that the client's next round starts from."""
        arrays: dict[str, Tensor] = {}
        for group, packed in update.items():
            arrays[str(group)] = packed.values
            if packed.scale is not None:
                arrays[f"{group}.scale"] = packed.scale
        with replacing(self.folder / f"round-{round:05d}") as folder:
            save_file(arrays, folder / "update.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "state.safetensors")
        forget_old(self.folder)

    def hand_over(self, client: str, request: Request) -> Update:
        """Read the asked groups of a kept update; nothing else is loaded, no model is needed.

        Raises:
            TrainingFailedError: It keeps no such update.
        """
        path = self.folder / f"round-{request.round:05d}" / "update.safetensors"
        if not path.exists():
            raise TrainingFailedError(f"it keeps no update of round {request.round}")
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            lacking = [str(group) for group in request.groups if str(group) not in names]
            if lacking:
                raise TrainingFailedError(f"its update of round {request.round} has no {lacking[0]}")

            def read(group: ParameterGroup) -> Packed:
                scale = f"{group}.scale"
                return Packed(file.get_tensor(str(group)), file.get_tensor(scale) if scale in names else None)

            return Update(client, request.round, {group: read(group) for group in request.groups})

    def last_update(self, round: int) -> dict[ParameterGroup, Packed]:
        """The update of the latest round before `round`; empty if there is none."""
        earlier = [(number, path) for number, path in rounds_in(self.folder) if number < round]
        if not earlier or not (earlier[-1][1] / "update.safetensors").exists():
            return {}
        with safe_open(earlier[-1][1] / "update.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith(".scale")]  # noqa: SIM118 - not a dict
        groups = tuple(parse_group(name) for name in names)
        return dict(self.hand_over("", Request("", earlier[-1][0], groups)).groups)

    def before(self, round: int) -> dict[str, Tensor]:
        """The state of the latest round before `round`; empty for a client that has not taken part yet."""
        earlier = [path for number, path in rounds_in(self.folder) if number < round]
        return load_file(earlier[-1] / "state.safetensors") if earlier else {}

    @parallel.by_the_first
    def forget_updates(self) -> None:
        """Free the disk that kept updates take, once a run is complete."""
        for _, folder in rounds_in(self.folder):
            (folder / "update.safetensors").unlink(missing_ok=True)


@dataclass(frozen=True)
class ClientData:
    """What one client holds. It never leaves."""

    name: str
    train: Sequence[Encoded]
    held_out: TestSet | None
    memory: ClientMemory

    @property
    def examples(self) -> int:
        """What it trains on: a chat may be several sequences, and is one example."""
        return len({one.example for one in self.train})


def private_weights(remembered: Mapping[str, Tensor]) -> Weights:
    """What a client remembers of its private groups."""
    names = [name for name in remembered if name.startswith(PRIVATE)]
    return {parse_group(name.removeprefix(PRIVATE)): remembered[name] for name in names}


@dataclass(frozen=True)
class Personal:
    """What a client has of its own."""

    weights: Weights
    gate: Mapping[str, Tensor]  # that mixes its model with the server's; empty: there is none


def personal_parts(clients: Path, round: int, name: str) -> Path | None:
    """The file with what a client had of its own after a round; None: nothing.

    Raises:
        UserError: It has forgotten, or what it kept is damaged.
    """
    folder = clients / folder_name(name)
    rounds = sorted(path for path in folder.glob("round-*") if path.is_dir())
    before = [path for path in rounds if int(path.name.removeprefix("round-")) <= round]
    if len(rounds) >= KEPT_ROUNDS and not before:
        raise UserError(
            f"--clients: clients keep what is personal of their last {KEPT_ROUNDS} rounds, and {name!r} took part in "
            f"as many after round {round}. Leave out --best or --clients."
        )
    if not before:
        return None
    file = before[-1] / "state.safetensors"
    try:
        with safe_open(file, framework="pt") as kept:
            return file if any(key.startswith((PRIVATE, f"{MIXTURE}{OWN}")) for key in kept.keys()) else None  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{str(file)!r}: damaged: {error}. Leave out --clients.") from None


def read_personal(file: Path) -> Personal:
    """Read what a client has of its own."""
    kept = load_file(file)
    mixture = {key.removeprefix(MIXTURE): value for key, value in kept.items() if key.startswith(MIXTURE)}
    own = {parse_group(key.removeprefix(OWN)): value for key, value in mixture.items() if key.startswith(OWN)}
    return Personal({**private_weights(kept), **own}, {key: mixture[key] for key in GATE if key in mixture})
