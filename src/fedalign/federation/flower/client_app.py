"""The ClientApp: what Flower starts at a site, or for a client of a simulation, to answer a message.

A SuperNode names its site with ``--node-config 'site="/path/to/site.toml"'``. A node without one is a client of a
simulation: its partition id says which. In a deployment Flower starts this process anew for each message, so nothing
is imported before it is needed; a simulation keeps the process and what it has loaded.
"""

from __future__ import annotations

import logging
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedalign.config.site import SiteFolder
from fedalign.config.toml import read_config
from fedalign.errors import UserError
from fedalign.federation.flower.link import RunAbout, from_records, to_records
from fedalign.federation.masked_service import MaskedService, Masking
from fedalign.federation.messages import VERBS, MessageError, Parcel, encode, stage_of
from fedalign.federation.service import SEE_LOG, Service, log_to_stderr
from fedalign.federation.site import answer_at, service_of
from fedalign.files import folder_name
from fedalign.protocol import Failure

if TYPE_CHECKING:
    from fedalign.client.open import DealtClients
    from fedalign.client.trainer import OpenClient

app = ClientApp()
log = logging.getLogger("fedalign")


def _reply(verb: str, message: Message, context: Context) -> Message:
    log_to_stderr()
    try:
        answer = _answer(verb, from_records(message.content), RunAbout.of(message), context)
    except (MessageError, UserError) as error:
        answer = encode(Failure("", "join", str(error)))
    return Message(to_records(answer), reply_to=message)


def _answer(verb: str, parcel: Parcel, run: RunAbout, context: Context) -> Parcel:
    site = context.node_config.get("site")
    if site is None and "partition-id" not in context.node_config:
        raise UserError("this node names no site. Start it with: flower-supernode --node-config 'site=\"...\"'")
    if site is None:
        folder = Path(run.out) / "clients"
        partition = int(context.node_config["partition-id"])
        return _dealt_service(partition, run.config, folder, run.key).answer(verb, parcel)
    try:
        mine = SiteFolder.load(Path(str(site)))
    except UserError as error:
        log.error("%s", error)
        raise UserError(f"its site.toml cannot be read; {SEE_LOG}") from None
    return site_answer(mine, run.config, run.key, verb, parcel)


def site_answer(folder: SiteFolder, config: str, run: str, verb: str, parcel: Parcel) -> Parcel:
    """A site's answer, within its limits and written down."""
    return answer_at(folder, run, verb, parcel, partial(_site_answer, folder, config, run, verb))


def _site_answer(folder: SiteFolder, config: str, run: str, verb: str, parcel: Parcel, scores: bool) -> Parcel:
    """From the site's warm trainer where the model is needed and the trainer is there, else from here."""
    try:
        service = service_of(folder, read_config(config), run, lambda: _open_site(folder, config, run))
    except (UserError, ValueError, RecursionError) as error:  # the last two: it is no TOML
        reason = str(error) if isinstance(error, UserError) else "the run's configuration cannot be read"
        return encode(Failure(folder.config.name, stage_of(verb), reason))
    if VERBS[verb].needs_model:
        from fedalign.federation.flower.warm import ask

        answer = ask(folder, config, run, verb, parcel, scores=scores)
        if answer is not None:
            return answer
    return service.answer(verb, parcel, scores=scores)


def _open_site(folder: SiteFolder, config: str, run: str) -> OpenClient:
    from fedalign.client.open import open_site
    from fedalign.moe.load import quiet

    quiet()
    return open_site(folder, read_config(config), run)


@cache
def _dealt_service(partition: int, config: str, folder: Path, run: str) -> Service:
    clients, settings = _dealt(config, folder), read_config(config)
    if partition >= len(clients.names):
        raise MessageError(f"partition {partition}: the configuration deals data to {len(clients.names)} clients alone")
    name = clients.names[partition]
    memory = folder / folder_name(name)
    if settings.privacy.masked:
        return MaskedService(name, memory, lambda: clients.open(name), Masking(run, settings))
    return Service(name, memory, lambda: clients.open(name))


@lru_cache(maxsize=1)
def _dealt(config: str, folder: Path) -> DealtClients:
    from fedalign.client.open import DealtClients
    from fedalign.moe.load import quiet

    quiet()
    return DealtClients(read_config(config), folder)


OWN = {"train": app.train, "evaluate": app.evaluate}  # verbs that Flower has, too
for verb in VERBS:
    registered = OWN[verb]() if verb in OWN else app.query(verb)
    registered(partial(_reply, verb))
