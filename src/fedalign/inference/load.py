"""From a run, an exported folder or any model to one that answers, with the task that it was tuned for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedalign.client.workbench import Workbench
from fedalign.config.run import Config
from fedalign.config.toml import as_texts, overridden, read_config
from fedalign.errors import UserError
from fedalign.export.card import CARD, settings_of
from fedalign.export.write import ADAPTER, Base, base_of, find_snapshot, open_model, with_classes
from fedalign.moe.load import pick_device
from fedalign.server.results import RunFolder

BASE = "--set model.path=BASE"  # says where the base of an adapter is


@dataclass(frozen=True)
class Source:
    """Which model is asked."""

    place: str  # a run's folder, an exported folder, any model's folder, or a hub id
    best: bool = False  # of a run: the best round instead of the last
    start: bool = False  # of a run: what it started from
    device: str = "auto"
    settings: Sequence[str] = ()  # section.key=value, over what the run or the card says


def configured(source: Source) -> Config:
    """The configuration to answer with; no model is loaded.

    Raises:
        UserError: It cannot be read, or a setting is wrong.
    """
    folder = RunFolder(Path(source.place).expanduser())
    if folder.config.is_file():
        config = with_classes(folder.read_config("fedalign"), folder)
        return _config(config, source, config.model.path)
    return _config(_of_card(folder.path), source, source.place)


def load(source: Source) -> Workbench:
    """The model with its tokenizer, and the configuration that it was tuned with.

    Raises:
        UserError: There is no such model, or no such round of a run.
    """
    folder = RunFolder(Path(source.place).expanduser())
    if source.best and source.start:
        raise UserError("--best and --start: the best round, or what the run started from? Give one of them.")
    if folder.config.is_file():
        return _of_run(source, folder)
    if source.best or source.start:
        option = "--best" if source.best else "--start"
        raise UserError(f"{option}: {source.place!r} is no run's folder, and holds one model. Leave it out.")
    adapter = folder.path / ADAPTER
    if not adapter.is_file():
        return Workbench.load(configured(source))
    about = json.loads(adapter.read_text(encoding="utf-8"))
    config = configured(source)
    moved = config.model.path != source.place
    place = config.model.path if moved else about["base_model_name_or_path"]
    moe = Base(place, None if moved else about.get("revision"), config, BASE).open(folder.path)
    moe.model.to(pick_device(source.device))
    return Workbench.around(moe, config)


def _of_run(source: Source, folder: RunFolder) -> Workbench:
    config = configured(source)
    if source.start:
        return Workbench.load(config)
    snapshot = find_snapshot(folder.path, source.best)
    moved = config.model.path != snapshot.config.model.path
    base = base_of(snapshot, config.model.path if moved else None)
    moe = open_model(snapshot, base and replace(base, option=BASE))
    if snapshot.weights is not None:
        moe.write(snapshot.weights)
    moe.model.to(pick_device(source.device))
    return Workbench.around(moe, config)


def _of_card(folder: Path) -> Config:
    """The settings that the card of an export tells, or those of the run that a model lies in; else the defaults."""
    card, run = folder / CARD, RunFolder(folder.parent)
    settings = settings_of(card.read_text(encoding="utf-8")) if card.is_file() else None
    if settings is None and folder in (run.model, run.best) and run.config.is_file():
        return with_classes(run.read_config("fedalign"), run)
    return read_config(settings) if settings else Config()


def _config(config: Config, source: Source, path: str) -> Config:
    """The configuration to answer with: on the wanted device, of the model at `path`."""
    tables = config.model_dump(mode="json", exclude_none=True)
    own = as_texts({"model.path": path, "run.device": source.device})
    return overridden(tables, [*own, *source.settings])
