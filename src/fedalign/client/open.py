"""Clients opened: model and data loaded, at a site that has its own or for a simulation that deals them out."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from fedalign.client.memory import ClientData
from fedalign.client.trainer import OpenClient
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.data.deal import split_among_clients
from fedalign.data.encode import text_hash, tokenizer_hash
from fedalign.data.formats import load_examples
from fedalign.errors import DataError, UserError
from fedalign.files import folder_name
from fedalign.protocol import PROTOCOL, Hello


def open_site(folder: SiteFolder, config: Config, run: str) -> OpenClient:
    """Load the model and the site's data.

    Args:
        folder: the site.
        config: the coordinator's configuration.
        run: the run's key; what the site remembers is kept by run.

    Raises:
        UserError: The model cannot be loaded.
        DataError: The data does not fit the configuration.
    """
    local = folder.localise(config)
    bench = Workbench.load(local)
    try:
        examples = load_examples(local.data.train, local.data, "train", local.run.seed)
        client = bench.client(folder.config.name, examples, range(len(examples)), folder.memory(run))
    except UserError as error:
        raise DataError(str(error)) from None
    client = replace(client, limits=folder.client_limits(config), consent=folder.consent)
    return OpenClient(bench.trainer(), client, lambda: describe(bench, client, bench.moe.weights_hash()))


class DealtClients:
    """Clients of a simulation: the configured data, dealt to them as in one process; one model for all of them."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.bench = Workbench.load(config)
        self.weights = self.bench.moe.weights_hash()  # before any of them trains
        self.folder = folder
        self.examples, self.parts = split_among_clients(config)
        self.names = list(self.parts)
        self.bench.check_limits(self.names)

    def open(self, name: str) -> OpenClient:
        """One of them."""
        client = self.bench.client(name, self.examples, self.parts[name], self.folder / folder_name(name))
        return OpenClient(self.bench.trainer(), client, lambda: describe(self.bench, client, self.weights))


def describe(bench: Workbench, client: ClientData, weights: str) -> Hello:
    """What must agree before a site may take part."""
    return Hello(
        client=client.name,
        protocol=PROTOCOL,
        version=version("fedalign-moe"),
        architecture=bench.moe.fingerprint(),
        weights=weights,
        tokenizer=tokenizer_hash(bench.tokenizer),
        chat_template=text_hash(str(bench.tokenizer.chat_template or "")),
        layers=bench.moe.layout.layers,
        experts=bench.moe.layout.experts,
        examples=client.examples,
        held_out=len(client.held_out) if client.held_out else 0,
        token_counts=client.consent.token_counts,
        embeddings=client.consent.embeddings,
    )
