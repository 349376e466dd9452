"""Make a site: a folder with its configuration and its own pair of keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from fedalign.config import Columns, DataConfig, Section, explain
from fedalign.data.formats import read_rows
from fedalign.errors import UserError, unknown
from fedalign.keys import make_node_key
from fedalign.site import FILE, SiteConfig, SiteFolder

FIRST_ROWS = 10
COMMENT_COLUMN = 34

HEAD = """\
# A site: what this house decides itself. How to train is the coordinator's to say.
# Look whether all is well, from this folder: fedalign doctor --site .
"""
SECTION_COMMENTS = {
    "data": "it never leaves this house",
    "data.columns": "what they are called here; without a # in front, that one is read",
    "model": "",
    "limits": "the coordinator can ask for stricter, never for less",
    "coordinator": "how this site reaches it",
}
COMMENTS = {
    "name": "what the coordinator calls this site",
    "data.train": "a .jsonl, .json, .csv or .parquet file, or a folder of them",
    "data.columns.text": "classification, text",
    "data.columns.label": "classification",
    "data.columns.prompt": "instruction",
    "data.columns.response": "instruction",
    "data.columns.messages": "chat: a list of {role, content}",
    "data.columns.question": "multiple_choice",
    "data.columns.choices": "multiple_choice: a list",
    "data.columns.answer": "multiple_choice: index, letter or text of the right choice",
    "data.columns.client": "not used at a site",
    "model.path": "this site's own copy; without it: what the coordinator names",
    "model.trust_remote_code": "run the code that comes with the model; the coordinator cannot set this",
    "limits.device": "auto | cpu | cuda | cuda:1 ... | split; auto takes a GPU if there is one, split all",
    "limits.threads": "CPU threads; 0: torch's own choice",
    "limits.batch_tokens": "tokens of a batch at most; 0: what the coordinator says",
    "limits.min_tokens": "experts that fewer tokens reached are withheld from the statistics,",
    "limits.min_examples": "and those reached from fewer examples",
    "limits.top_k": "experts that a token is sent to in training; 0: the model's own number",
    "limits.max_experts": "experts of a layer that are trained, those that your data uses most; 0: all",
    "limits.rank": "components of adapters that are trained, where the run averages products; 0: all",
    "coordinator.superlink": "where the coordinator's SuperLink listens",
    "coordinator.root_certificates": "the coordinator's ca.crt; without it: no TLS, on loopback only",
    "coordinator.key": "this site's private key; the coordinator registers its public half, key.pub",
}
EXAMPLES = {"model.path": "/models/OLMoE-1B-7B", "coordinator.root_certificates": "ca.crt"}


@dataclass(frozen=True)
class Wishes:
    """What the user says of a new site; None leaves the default."""

    data: Path
    model: str | None = None
    device: str | None = None
    columns: Mapping[str, str] | None = None
    superlink: str | None = None
    root_certificates: Path | None = None


def init_site(name: str, folder: Path, wishes: Wishes) -> SiteFolder:
    """Make the folder; nothing that is there is changed, and nothing is made if something is wrong.

    Raises:
        UserError: A value is wrong, the data cannot be read, or the folder holds a site.
    """
    config = configure(name, wishes)
    for path in (folder / FILE, folder / config.coordinator.key, folder / f"{config.coordinator.key}.pub"):
        if path.exists():
            raise UserError(f"site {name!r}: {path} is there already. Choose another folder with --dir.")
    check_first_rows(config)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # a run's updates are kept here
    except OSError as error:
        raise UserError(f"site {name!r}: {folder} cannot be made ({error.strerror}). Choose another --dir.") from None
    make_node_key(folder / config.coordinator.key)
    (folder / FILE).write_text(site_toml(config), encoding="utf-8")
    return SiteFolder.load(folder)


def configure(name: str, wishes: Wishes) -> SiteConfig:
    """The checked configuration of a new site; paths are absolute, so that the folder can be moved."""
    if not wishes.data.expanduser().exists():
        raise UserError(f"--data {str(wishes.data)!r}: no such file or folder.")
    certificates = wishes.root_certificates
    if certificates is not None and not certificates.expanduser().is_file():
        raise UserError(f"--root-certificates {str(certificates)!r}: no such file. Give the coordinator's ca.crt.")
    coordinator = {"superlink": wishes.superlink, "root_certificates": _absolute(certificates)}
    tables = {
        "name": name,
        "data": {"train": _absolute(wishes.data), "columns": dict(wishes.columns or {})},
        "model": _given({"path": wishes.model and _model(wishes.model)}),
        "limits": _given({"device": wishes.device}),
        "coordinator": _given(coordinator),
    }
    try:
        return SiteConfig.model_validate(tables)
    except ValidationError as error:
        raise UserError("\n".join(explain(problem, SiteConfig) for problem in error.errors())) from None


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


def check_first_rows(config: SiteConfig) -> None:
    """The first rows can be read, and hold the columns that were named; what they say is not told.

    Raises:
        UserError: They cannot, or do not.
    """
    data = DataConfig(train=config.data.train, columns=config.data.columns)
    for row in islice(read_rows(data.train, data, "train"), FIRST_ROWS):
        for role in config.data.columns.model_fields_set:
            row.get(getattr(data.columns, role))


def site_toml(config: SiteConfig) -> str:
    """The configuration as a commented file: every key is there, those left to their default behind a #."""
    lines = [HEAD]
    sections: list[tuple[str, Section]] = []
    for key, value in config:
        if isinstance(value, Section):
            sections.append((key, value))
        else:
            lines.append(_line(key, key, value))
    while sections:
        name, section = sections.pop(0)
        lines.append(f"\n{_commented(f'[{name}]', SECTION_COMMENTS[name])}")
        nested = []
        for key, value in section:
            if isinstance(value, Section):
                nested.append((f"{name}.{key}", value))
            else:
                lines.append(_line(f"{name}.{key}", key, value, asleep=_sleeps(name, section, key)))
        sections = nested + sections
    return "\n".join(lines) + "\n"


def _sleeps(name: str, section: Section, key: str) -> bool:
    """A column that nobody named stays behind a #; the rest is shown with its value."""
    return name == "data.columns" and key not in section.model_fields_set


def _line(path: str, key: str, value: Any, asleep: bool = False) -> str:
    asleep = asleep or value is None
    text = tomli_w.dumps({key: EXAMPLES[path] if value is None else value}).strip()
    return _commented(f"# {text}" if asleep else text, COMMENTS[path])


def _commented(text: str, comment: str) -> str:
    return f"{text:<{COMMENT_COLUMN}}# {comment}" if comment else text


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().resolve())


def _model(text: str) -> str:
    """A folder that is there as an absolute path; anything else is a hub id, or "demo"."""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.is_dir() else text
