"""Configuration as text: read TOML, apply overrides, explain what is wrong, write it with comments."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedalign.config.run import AlgorithmConfig, Config, Section
from fedalign.errors import UserError, unknown

if TYPE_CHECKING:
    from fedalign.config.site import SiteConfig


def load_config(path: Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides in order.

    Values are TOML (``2e-5``, ``true``, ``["a", "b"]``); what is not valid TOML is taken as a string. Choosing
    another algorithm by an override drops the options that the file gives to its own.

    Raises:
        UserError: The file is missing or not TOML, or a key or value is wrong.
    """
    return overridden(_read(path) if path else {}, overrides)


def overridden(tables: dict[str, Any], overrides: Sequence[str]) -> Config:
    """The configuration of `tables` with overrides, as in `load_config`; `tables` is written to."""
    named_by_file = tables.get("algorithm", {}).get("name", AlgorithmConfig().name) if tables else None
    for override in overrides:
        keys, value = _parse_override(override)
        if keys == ["algorithm", "name"] and value != named_by_file:
            tables["algorithm"] = {}
        _place(tables, keys, value, override)
    return parse_config(tables)


def parse_config(tables: Mapping[str, Any]) -> Config:
    """Check a whole configuration; every problem is told, one line each."""
    try:
        return Config.model_validate(tables)
    except ValidationError as error:
        raise UserError("\n".join(explain(problem) for problem in error.errors())) from None


def read_config(text: str) -> Config:
    """The inverse of `Config.to_toml`."""
    return parse_config(tomllib.loads(text))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {str(path)!r}: no such file. Give the path of a TOML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {str(path)!r}: cannot be read ({error}). Give the path of a TOML file.") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"config file {str(path)!r}: not valid TOML: {error}") from None


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    keys = [part.strip() for part in key.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        raise UserError(f"--set {override!r}: write section.key=value, for example training.learning_rate=2e-5")
    try:
        return keys, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, text.strip()


def _place(tables: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        tables = tables.setdefault(key, {})
        if not isinstance(tables, dict):
            raise UserError(f"--set {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    tables[keys[-1]] = value


def explain(problem: ErrorDetails, root: type[BaseModel] = Config) -> str:
    """One pydantic error of a `root` as `key = value: rule. Choices.`."""
    location, value = [str(part) for part in problem["loc"]], problem["input"]
    if problem["type"] == "value_error" and "error" in problem.get("ctx", {}):
        return str(problem["ctx"]["error"])  # our own message, whole
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return str(unknown("key" if len(location) > 1 else "section", key, _known(location[:-1], root)))
    if problem["type"] == "missing":
        return f"{key}: missing. Give it a value."
    shown = json.dumps(value, default=str)
    if problem["type"] == "literal_error":
        return str(unknown(key, value, _choices(problem["ctx"]["expected"])))
    return f"{key} = {shown}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _choices(expected: str) -> list[str]:
    return [part.strip("'") for part in expected.replace(" or ", ", ").split(", ")]


def _known(location: Iterable[str], root: type[BaseModel]) -> list[str]:
    """The keys of a section, written in full."""
    section, prefix = root, ""
    for name in location:
        annotation = section.model_fields[name].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section, prefix = annotation, f"{prefix}{name}."
    return [prefix + field for field in section.model_fields]


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
    "data.columns.tools": "chat: the tools that it may call; may be empty",
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
