"""The door of a site: every message passes here, is counted against the site's limits, and written down.

What a coordinator may ask for how often, and that a run was withdrawn from, is decided before anything is loaded and
once more before the answer leaves.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedalign.client.log import Entry, SiteLog
from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.errors import UserError
from fedalign.federation.masked_service import MaskedService, Masking, began_masked
from fedalign.federation.masks import signer
from fedalign.federation.messages import Parcel, encode, stage_of
from fedalign.federation.service import SEE_LOG, Service
from fedalign.files import folder_name, for_its_owner
from fedalign.protocol import LONGEST_NAME, Failure, is_name
from fedalign.units import shown

if TYPE_CHECKING:
    from fedalign.client.trainer import OpenClient

WITHDREW = "this site withdrew from the run"
WITHDRAWN = "withdrawn"  # a file in what is kept of a run, after which nothing else is
log = logging.getLogger("fedalign")


def service_of(folder: SiteFolder, config: Config, run: str, open_client: Callable[[], OpenClient]) -> Service:
    """The service that answers for a site in a run: one that conceals where the run is masked.

    Raises:
        UserError: It is not, and this site, or what it keeps of the run, demands that.
    """
    folder.check_masked(config)
    name, memory = folder.config.name, folder.memory(run)
    if not config.privacy.masked:
        if began_masked(memory):
            raise UserError(
                "privacy.masked = false: this run began with masked sums, and what is kept of it is not told."
            )
        return Service(name, memory, open_client)
    key = folder.path / folder.config.coordinator.key
    sign = partial(_sign, key) if key.exists() else None
    return MaskedService(name, memory, open_client, Masking(run, config, sign, folder.config.privacy.node_keys))


def _sign(key: Path, text: bytes) -> bytes:
    """A text signed with a node key, which is read when it is needed."""
    return signer(key)(text)


def answer_at(
    folder: SiteFolder, run: str, verb: str, parcel: Parcel, answer: Callable[[Parcel, bool], Parcel]
) -> Parcel:
    """A site's answer to a message, or its refusal; either is in its log before it leaves.

    What the site keeps of it is for its owner's eyes alone. A call for training that asks for a score as well counts as
    both. Where the site has scored all that it will, it trains and does not score.

    Args:
        folder: the site.
        run: the run's key, as the coordinator says it.
        verb: what is asked for.
        parcel: the message.
        answer: makes the answer to the message that it is given, and is told whether it may score beside training.
    """
    with for_its_owner():
        _close(folder.memory(run).parent)
        return _answer_at(folder, run, verb, parcel, answer)


def _close(runs: Path) -> None:
    """Let nobody else see what the site keeps of runs."""
    if runs.exists():
        runs.chmod(0o700)


def _answer_at(
    folder: SiteFolder, run: str, verb: str, parcel: Parcel, answer: Callable[[Parcel, bool], Parcel]
) -> Parcel:
    lines = SiteLog(folder.path)
    reason = _refusal(folder, lines, run, verb)
    if not reason and verb == "offer" and (spent := _refusal(folder, lines, run, "train")):
        reason = spent if _refusal(folder, lines, run, "evaluate") else ""  # weights for nothing are not taken
    scores = _scores(verb, parcel)
    if not reason and scores and (spent := _refusal(folder, lines, run, "evaluate")):
        log.warning("%s: not scored: %s", folder.config.name, spent)
        scores = False
    begun = not reason
    reply = answer(parcel, scores) if begun else None
    try:
        with lines.held():
            if reply is not None:
                asked = (verb, "evaluate") if scores else (verb,)
                reason = _refusal(folder, lines, run, *asked)  # another process may have answered meanwhile
            if reason or reply is None:
                reply = encode(Failure(folder.config.name, stage_of(verb), reason))
            reply = _without_places(folder, verb, reply)
            nothing_done = reply.head.get("kind") == "lacking"  # it has not the weights that it is asked about
            counted = begun and not nothing_done
            lines.append(_entry(run, verb, parcel, reply, counted=counted, scored=counted and scores))
    except (OSError, ValueError, UserError) as error:
        log.error("%s: %s: nothing leaves that is not written down", lines.file, error)
        reply = encode(Failure(folder.config.name, stage_of(verb), "it cannot keep its own log"))
    if (folder.memory(run) / WITHDRAWN).exists():
        _forget(folder.memory(run))
    return reply


def withdraw(folder: SiteFolder, run: str) -> None:
    """End a site's part in a run: what it kept for it is gone, and all that the run asks from now on is refused.

    Raises:
        UserError: The site knows no such run.
    """
    lines = SiteLog(folder.path)
    known = sorted({entry.run for entry in lines.entries()} | {path.name for path in folder.path.glob("runs/*")})
    if run not in known and folder_name(run) not in known:
        raise UserError(
            f"--run {run!r}: this site knows no such run. Choose one of: {', '.join(map(shown, known)) or 'none yet'}."
        )
    kept = folder.memory(run)
    with lines.held():
        kept.mkdir(parents=True, exist_ok=True)
        (kept / WITHDRAWN).touch()
        _forget(kept)
        lines.append(Entry(run, "withdraw"))


def _forget(kept: Path) -> None:
    for path in kept.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != WITHDRAWN:
            path.unlink(missing_ok=True)  # a piece that is taken meanwhile renames it


def _scores(verb: str, parcel: Parcel) -> bool:
    """Whether a call for training asks for a score as well."""
    return verb == "train" and parcel.head.get("score") is True


def _refusal(folder: SiteFolder, lines: SiteLog, run: str, *verbs: str) -> str:
    """Why a message that asks for these is not answered; "" if it is."""
    limits = folder.config.limits
    if not is_name(run):
        return f"the run's key must be 1 to {LONGEST_NAME} printable characters"
    if (folder.memory(run) / WITHDRAWN).exists():
        return WITHDREW
    counted = {
        "train": ("rounds", limits.rounds, limits.all_rounds),
        "evaluate": ("evaluations", limits.evaluations, limits.all_evaluations),
    }
    for verb in filter(counted.get, verbs):
        name, most, most_of_all = counted[verb]
        try:
            runs = lines.counted(verb)
        except OSError as error:
            log.error("%s: %s", lines.file, error)
            return "it cannot read its own log"
        except ValueError:
            log.error("%s: holds a line that is not ours; mend it, since limits are counted by it", lines.file)
            return "it cannot read its own log"
        if runs.count(run) >= most:
            return f"it has answered all that it will in this run (limits.{name} = {most} in its site.toml)"
        if len(runs) >= most_of_all:
            return f"it has answered all that it will in any run (limits.all_{name} = {most_of_all} in its site.toml)"
    return ""


def _without_places(folder: SiteFolder, verb: str, reply: Parcel) -> Parcel:
    """The same, unless it is a failure whose reason says where on this machine the site is."""
    reason = str(reply.head.get("reason", ""))
    if str(folder.path) not in reason:
        return reply
    log.error("%s: %s", verb, reason)
    return encode(Failure(folder.config.name, stage_of(verb), f"something at the site is not in order; {SEE_LOG}"))


def _entry(run: str, verb: str, asked: Parcel, reply: Parcel, *, counted: bool, scored: bool) -> Entry:
    number, examples = asked.head.get("round"), reply.head.get("examples")
    return Entry(
        run=run[:LONGEST_NAME],
        verb=verb,
        round=number if type(number) is int else None,
        refused=shown(str(reply.head.get("reason", ""))),
        fields=reply.filled,
        bytes=reply.nbytes,
        examples=examples if type(examples) is int else None,
        counted=counted,
        scored=scored,
    )
