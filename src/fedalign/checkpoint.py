"""What survives a crash: the server's state after each round, and what each client keeps for itself.

Everything is written beside its place and renamed into it, so a kill at any moment leaves the old state or the new
one, never half of either. The last two rounds stay.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedalign import parallel
from fedalign.errors import TrainingFailedError, UserError
from fedalign.messages import parse_group
from fedalign.protocol import Metrics, Packed, ParameterGroup, Request, State, Update, Weights

KEPT_ROUNDS = 2


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A fresh folder to fill; on a clean exit it takes the place of `folder` at once, after an error it is gone."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for stale in (new, old):
        shutil.rmtree(stale, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for file in new.rglob("*"):
        if file.is_file():
            _flush(file)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's whole content at once."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    _flush(new)
    new.replace(path)


def _flush(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rounds(folder: Path) -> list[tuple[int, Path]]:
    """Complete rounds kept in `folder`, oldest first."""
    return sorted((int(path.name.removeprefix("round-")), path) for path in folder.glob("round-*") if path.is_dir())


def _forget(folder: Path) -> None:
    for _, path in _rounds(folder)[:-KEPT_ROUNDS]:
        shutil.rmtree(path, ignore_errors=True)


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
        _forget(self.folder)

    def load(self) -> ServerState | None:
        """The latest complete round, or None where there is none.

        Raises:
            UserError: The checkpoint is damaged, or of another model or configuration.
        """
        kept = _rounds(self.folder)
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


def folder_name(client: str) -> str:
    """A folder for any client id: one path component, the same for no two ids.

    >>> folder_name("client-00"), folder_name("../ward 3")
    ('client-00', '%2E.%2Fward%203')
    """
    name = quote(client, safe="").replace(".", "%2E", 1) if client.startswith(".") else quote(client, safe="")
    return name if len(name) <= 100 else f"{name[:60]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"


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
        _forget(self.folder)

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
        earlier = [(number, path) for number, path in _rounds(self.folder) if number < round]
        if not earlier or not (earlier[-1][1] / "update.safetensors").exists():
            return {}
        with safe_open(earlier[-1][1] / "update.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if not name.endswith(".scale")]  # noqa: SIM118 - not a dict
        groups = tuple(parse_group(name) for name in names)
        return dict(self.hand_over("", Request("", earlier[-1][0], groups)).groups)

    def before(self, round: int) -> dict[str, Tensor]:
        """The state of the latest round before `round`; empty for a client that has not taken part yet."""
        earlier = [path for number, path in _rounds(self.folder) if number < round]
        return load_file(earlier[-1] / "state.safetensors") if earlier else {}

    @parallel.by_the_first
    def forget_updates(self) -> None:
        """Free the disk that kept updates take, once a run is complete."""
        for _, folder in _rounds(self.folder):
            (folder / "update.safetensors").unlink(missing_ok=True)
