"""Make a site: a folder with its configuration and its own pair of keys."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fedalign.config.run import Columns, DataConfig, choice_columns
from fedalign.config.site import FILE, SiteConfig, SiteFolder
from fedalign.config.toml import checked
from fedalign.data.sources import read_rows
from fedalign.errors import UserError, unknown
from fedalign.federation.flower.invitation import Invitation
from fedalign.federation.flower.keys import make_node_key
from fedalign.files import check_new, write_text

FIRST_ROWS = 10
INVITED = "ca.crt"  # of the site's folder: the certificates that came with the invitation


@dataclass(frozen=True)
class Wishes:
    """The user's choices for a new site; None leaves the default."""

    data: Path
    model: str | None = None
    device: str | None = None
    columns: Mapping[str, str] | None = None
    superlink: str | None = None
    root_certificates: Path | None = None
    invitation: Invitation | None = None  # in place of the last two


def init_site(name: str, folder: Path, wishes: Wishes) -> SiteFolder:
    """Make the folder; nothing that is there is changed, and nothing is made if something is wrong.

    Raises:
        UserError: A value is wrong, the data cannot be read, or the folder holds a site.
    """
    config = configure(name, wishes)
    files = (FILE, config.coordinator.key, f"{config.coordinator.key}.pub", INVITED)
    check_new(f"site {name!r}", [folder / file for file in files], "Choose another folder with --dir.")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # a run's updates are kept here
    except OSError as error:
        raise UserError(f"site {name!r}: {folder} cannot be made ({error.strerror}). Choose another --dir.") from None
    make_node_key(folder / config.coordinator.key)
    if wishes.invitation and wishes.invitation.certificates:
        write_text(folder / INVITED, wishes.invitation.certificates)
    write_text(folder / FILE, config.to_toml())
    return SiteFolder.load(folder)


def configure(name: str, wishes: Wishes) -> SiteConfig:
    """The checked configuration of a new site; paths are absolute, so that the folder can be moved."""
    if not wishes.data.expanduser().exists():
        raise UserError(f"--data {str(wishes.data)!r}: no such file or folder.")
    tables = {
        "name": name,
        "data": {"train": _absolute(wishes.data), "columns": dict(wishes.columns or {})},
        "model": _given({"path": wishes.model and _model(wishes.model)}),
        "limits": _given({"device": wishes.device, "seed": secrets.randbits(62)}),
        "coordinator": _given(_link(wishes)),
    }
    config = checked(SiteConfig, tables)
    check_first_rows(config)
    there = _first_columns(config)
    default = {role: name for role, name in Columns().model_dump(exclude={"client"}).items() if name in there}
    columns = default | dict(wishes.columns or {})  # what is not there now is not read later, either
    return checked(SiteConfig, tables | {"data": {"train": _absolute(wishes.data), "columns": columns}})


def _link(wishes: Wishes) -> dict[str, Any]:
    if wishes.invitation is not None:
        if wishes.superlink or wishes.root_certificates:
            raise UserError("--invite: says where the coordinator is. Leave out --superlink and --root-certificates.")
        return {
            "superlink": wishes.invitation.superlink,
            "root_certificates": INVITED if wishes.invitation.certificates else None,
        }
    if wishes.root_certificates is not None:
        _check_certificates(wishes.root_certificates)
    return {"superlink": wishes.superlink, "root_certificates": _absolute(wishes.root_certificates)}


def _check_certificates(path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path.expanduser())
    except OSError as error:  # also what ssl raises
        flaw = "no such file" if isinstance(error, FileNotFoundError) else "holds no certificate in PEM form"
        raise UserError(f"--root-certificates {str(path)!r}: {flaw}. Give the coordinator's ca.crt.") from None


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """The columns of `--column role=name`.

    >>> parse_columns(["text=body", "label=topic"])
    {'text': 'body', 'label': 'topic'}

    Raises:
        UserError: Not written so, or no such role.
    """
    columns = {}
    for pair in pairs:
        role, equals, name = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--column {pair!r}: write ROLE=NAME, for example text=body.")
        if role not in Columns.model_fields:
            raise unknown("--column", role, Columns.model_fields)
        columns[role] = name
    return columns


def readable_columns(config: SiteConfig) -> list[str]:
    """The columns of the first rows that a coordinator can have read."""
    columns, there = config.data.columns.read, _first_columns(config)
    named = [*columns.model_dump(exclude={"client"}).values(), *choice_columns(columns.choices)]
    return [column for column in named if column in there]


def _first_columns(config: SiteConfig) -> set[str]:
    data = DataConfig(train=config.data.train, **config.data.own)
    return {column for row in islice(read_rows(data.train, data, "train"), FIRST_ROWS) for column in row.values}


def check_first_rows(config: SiteConfig) -> None:
    """The first rows can be read, and hold the columns that were named; what they say is not told.

    Raises:
        UserError: They cannot, or do not.
    """
    data = DataConfig(train=config.data.train, **config.data.own)
    for row in islice(read_rows(data.train, data, "train"), FIRST_ROWS):
        for role in config.data.columns.model_fields_set:
            name = getattr(data.columns, role)
            for column in choice_columns(name) if role == "choices" and name not in row.values else [name]:
                row.get(column)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().resolve())


def _model(text: str) -> str:
    """A folder that is there as an absolute path; anything else is a hub id, or "demo"."""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.is_dir() else text
