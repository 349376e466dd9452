"""Clients opened: model and data loaded, at a site that has its own or for a simulation that deals them out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import snapshot_download

from fedalign.client.memory import ClientData
from fedalign.client.parts import TOO_FEW, Least, Parts, roles_of, row_keys
from fedalign.client.spent import PrivacyLedger
from fedalign.client.trainer import OpenClient
from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.site import NO_MODEL, SiteFolder
from fedalign.data.deal import split_among_clients
from fedalign.data.encode import text_hash, tokenizer_hash
from fedalign.data.formats import load_examples
from fedalign.data.sources import read_rows
from fedalign.errors import DataError, ModelError, UserError
from fedalign.files import LOCK, folder_name, locked, write_private
from fedalign.moe.load import hardware, pick_device
from fedalign.protocol import PROTOCOL, Hello

HUB = "hub"  # in a site's folder: models that a coordinator has named
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.py", "*.safetensors", "*.tiktoken", "*.txt"]
DEMO, PARTS, READINGS = "demo", "parts.json", "readings.json"
log = logging.getLogger("fedalign")


def open_site(folder: SiteFolder, config: Config, run: str) -> OpenClient:
    """Load the model and the site's data.

    Args:
        folder: the site.
        config: the coordinator's configuration.
        run: the run's key; what the site remembers is kept by run.

    Raises:
        UserError: The configuration asks for what the site does not do, its rows were read in too many ways, or there
            are too few examples; the message tells nothing of what is here.
        ModelError: The site's own model cannot be loaded.
        DataError: The data does not fit the configuration.
    """
    if config.federation.engine != "flower":
        raise UserError(f'federation.engine = "{config.federation.engine}": a site takes part in runs of "flower".')
    local = folder.localise(config)
    if config.privacy.on:
        local = leaving_out(local)
    bench = _own_model(local) if folder.config.model.path else _model_of_the_hub(local, folder.path / HUB)
    if not config.privacy.on:
        _note_reading(folder, config)
    client, parts = site_client(folder, bench, config, run)
    parts.save(parts_file(folder))
    device = pick_device(local.run.device)
    log.info("%s: the model is on %s: %s", folder.config.name, device, hardware(device))
    return OpenClient(bench.trainer(), client, lambda: describe(bench, client, bench.moe.weights_hash()))


def _note_reading(folder: SiteFolder, config: Config) -> None:
    """Count a way to read the rows that no run has asked for yet: its answer says whether all of them fit.

    Asked in enough ways that would say which labels there are, and how long the longest text is.

    Raises:
        UserError: There have been as many as this site's limit allows.
    """
    file, most = folder.path / READINGS, folder.config.limits.readings
    asked = [
        config.data.model_dump(mode="json"),
        None if folder.config.model.path else config.model.model_dump(mode="json"),
    ]
    way = text_hash(json.dumps(asked, sort_keys=True))
    with locked(file.with_name(f".readings{LOCK}"), "another message", patience=60):
        known: list[str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        if way in known:
            return
        if len(known) >= most:
            raise UserError(
                f"its rows have been read in as many ways as they will be (limits.readings = {most} in its site.toml)"
            )
        write_private(file, json.dumps([*known, way]).encode())


def leaving_out(local: Config) -> Config:
    """A private run leaves out rows that cannot be read, and examples that are too long, and tells this site alone.

    As an error they would tell whether there is one such row: of a class, say, that is not among `data.labels`.
    """
    too_long = "truncate" if local.data.too_long == "truncate" else "drop"
    data = local.data.model_copy(update={"on_bad_row": "skip", "too_long": too_long})
    return local.model_copy(update={"data": data})


def parts_file(folder: SiteFolder) -> Path:
    """Where a site keeps which of its rows are held out."""
    return folder.path / PARTS


def site_client(folder: SiteFolder, bench: Workbench, config: Config, run: str) -> tuple[ClientData, Parts]:
    """The site's training and evaluation data in this run, and the parts that it was taken from.

    Raises:
        UserError: There are too few examples; the message does not say how many.
        DataError: The data does not fit the configuration.
    """
    budget, private = folder.config.privacy, config.privacy.on
    name, limits, data = folder.config.name, folder.config.limits, bench.config.data.model_copy(update={"max_train": 0})
    least, seed = Least(limits.min_train, limits.min_held_out), folder.seed
    try:
        rows = list(read_rows(data.train, data, "train"))
        keys = row_keys(rows, folder.config.data.columns, seed, roles_of(parts_file(folder)))
        examples = load_examples(data.train, data, "train", seed, may_be_none=private)
    except UserError as error:
        raise DataError(str(error)) from None
    parts = Parts.of(parts_file(folder), keys, limits.held_out, seed, name, least)
    key_of = dict(zip((row.where for row in rows), keys, strict=True))
    # with noise all rows: nothing is scored, and one row more would move others across a line, or halve a beginning
    trained = frozenset(keys) if private else parts.trained(config.data.max_train, least.train)
    held = frozenset[str]() if private else frozenset(parts.held_out)
    try:
        client = bench.client_of(
            name,
            [example for example in examples if key_of[example.where] in trained],
            [example for example in examples if key_of[example.where] in held],
            folder.memory(run),
            folder.client_limits(config),
            PrivacyLedger(folder.path, budget.epsilon_total, budget.delta),
            run,
        )
    except UserError as error:
        raise DataError(str(error)) from None
    there = len(keys) if private else client.examples  # whatever the run reads of the rows
    if there < least.train or (held and len(client.held_out or ()) < least.held_out):
        raise UserError(TOO_FEW)
    _tell_difference(config, limits.held_out, len(trained))
    return replace(client, seed=seed, most_steps=limits.steps, consent=folder.consent), parts


def _tell_difference(config: Config, share: float, trained: int) -> None:
    """Say where the coordinator asked for other sizes than it gets."""
    if config.clients.held_out != share:
        log.info("clients.held_out = %s: this site's is %s (limits.held_out)", config.clients.held_out, share)
    if config.data.max_train and config.data.max_train != trained:
        log.info(
            "data.max_train = %d: this site trains on %d, which is one of its sizes", config.data.max_train, trained
        )


def _own_model(local: Config) -> Workbench:
    try:
        return Workbench.load(local)
    except UserError as error:
        if local.model.path not in str(error):
            raise
        raise ModelError(str(error)) from None


def _model_of_the_hub(local: Config, kept: Path) -> Workbench:
    """As anybody gets it, kept in a folder of its own: its weights are sent on.

    So neither a folder that is called alike is ever opened, nor a model that this machine's account may read and others
    may not, from the Hub or from what is here of it already.
    """
    name = local.model.path
    if name == DEMO:
        return Workbench.load(local)
    try:
        folder = snapshot_download(
            name, revision=local.model.revision, allow_patterns=HUB_FILES, token=False, cache_dir=kept
        )
    except Exception as error:  # the library raises dozens of kinds, and what they say tells of this machine
        log.error("model.path = %r: %s", name, error)
        raise UserError(NO_MODEL) from None
    try:
        return Workbench.load(
            local.model_copy(update={"model": local.model.model_copy(update={"path": folder, "revision": None})})
        )
    except UserError as error:
        raise UserError(str(error).replace(folder, name)) from None


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
    """Versions and hashes that must agree before a site may take part, and what it has of each label if it consents."""
    told = bench.config.training.loss == "label_shift" and client.consent.token_counts
    labels = client.labels if told else None
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
        examples=client.told,
        held_out=len(client.held_out) if client.held_out else 0,
        token_counts=client.consent.token_counts,
        embeddings=client.consent.embeddings,
        labels=() if labels is None else labels.told(bench.config.statistics.min_examples),
    )
