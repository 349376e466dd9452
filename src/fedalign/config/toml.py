"""Configuration as text: read TOML, apply overrides, explain what is wrong, write it with what each key means.

``python -m fedalign.config.toml`` prints examples/every_key.toml.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedalign.algorithms import ALGORITHMS, described, make
from fedalign.config.run import CHAT_TEMPLATES, AlgorithmConfig, Config, Section, is_template
from fedalign.demo import DEMO
from fedalign.errors import UserError, unknown

S = TypeVar("S", bound=Section)

# ------------------------------------------------------------------------------------------------------- reading

Source = str | os.PathLike[str] | Mapping[str, Any] | Config
Overrides = Sequence[str] | Mapping[str, object]


def load_config(source: Source | None = None, overrides: Overrides = ()) -> Config:
    """Read a TOML file and apply ``section.key=value`` overrides in order.

    Values are TOML (``2e-5``, ``true``, ``["a", "b"]``); what is not valid TOML is taken as a string. Choosing
    another algorithm by an override drops the options that the file gives to its own.

    Args:
        source: a path, "demo", tables, or a whole configuration; None: the defaults.
        overrides: texts, or a mapping of ``section.key`` to values.

    Raises:
        UserError: The file is missing or not TOML, or a key or value is wrong.
    """
    return overridden(_tables(source), overrides)


def stem(source: Source) -> str:
    """The name of its runs."""
    return Path(source).stem if isinstance(source, str | os.PathLike) else "run"


def as_texts(overrides: Overrides) -> list[str]:
    """Overrides as the command line has them.

    >>> as_texts({"run.seed": 1, "data.train": "a.jsonl"})
    ['run.seed=1', 'data.train="a.jsonl"']

    Raises:
        UserError: A value that TOML cannot hold on one line.
    """
    if not isinstance(overrides, Mapping):
        return [overrides] if isinstance(overrides, str) else list(overrides)
    texts = [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in overrides.items()]
    for text in texts:
        key, _, written = text.partition("=")
        if _parse_override(text)[1] != json.loads(written):
            raise UserError(
                f"{key} = {written}: give text, a number, true, false or a list; of a table each key by itself."
            )
    return texts


def overridden(tables: dict[str, Any], overrides: Overrides) -> Config:
    """The configuration of `tables` with overrides, as in `load_config`; `tables` is written to."""
    parsed = [(*_parse_override(text), text) for text in as_texts(overrides)]
    named = [value for keys, value, _ in parsed if keys == ["algorithm", "name"]]
    given = tables.get("algorithm", {})
    if named and isinstance(given, dict) and named[-1] != given.get("name", AlgorithmConfig().name):
        tables["algorithm"] = {}
    for keys, value, override in parsed:
        _place(tables, keys, value, override)
    return _with_chat_template(parse_config(tables))


def _with_chat_template(config: Config) -> Config:
    """With the text of the file that data.chat_template names: a run keeps it, and sites read no file of another's."""
    named = config.data.chat_template
    if named in CHAT_TEMPLATES or is_template(named):
        return config
    try:
        text = Path(named).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        raise UserError(
            f"data.chat_template = {named!r}: no file that can be read. Choose one of: {', '.join(CHAT_TEMPLATES)}, or "
            "a file that holds a template."
        ) from None
    if not is_template(text):
        raise UserError(f"data.chat_template = {named!r}: holds no Jinja template: nothing in it stands in braces.")
    return config.model_copy(update={"data": config.data.model_copy(update={"chat_template": text})})


def parse_config(tables: Mapping[str, Any]) -> Config:
    """Check a whole configuration; every problem is told, one line each."""
    return checked(Config, tables)


def read_config(text: str) -> Config:
    """The inverse of `Config.to_toml`."""
    return parse_config(_parse(text))


def flat(table: Mapping[str, Any], joint: str) -> dict[str, Any]:
    """Nested tables as one, names joined.

    >>> flat({"run": {"seed": 0}, "name": "a"}, ".")
    {'run.seed': 0, 'name': 'a'}
    """
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= (
            {f"{name}{joint}{key}": item for key, item in flat(value, joint).items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
    return found


def _tables(source: Source | None) -> dict[str, Any]:
    """A copy of all that `source` sets."""
    if source is None:
        return {}
    if isinstance(source, Config):
        return source.model_dump(mode="json", exclude_none=True)
    if isinstance(source, Mapping):
        copy: dict[str, Any] = json.loads(json.dumps(source, default=str))
        return copy
    path = Path(source).expanduser()
    return read_tables(DEMO if path == Path("demo") and not path.exists() else path, "config file")


def checked(kind: type[S], tables: Mapping[str, Any], where: str = "") -> S:
    """A section of `tables`.

    Raises:
        UserError: A key or value is wrong; a line for each, which begins with `where`.
    """
    try:
        return kind.model_validate(tables)
    except ValidationError as error:
        raise UserError("\n".join(where + _explain(problem, kind) for problem in error.errors())) from None


def read_tables(path: Path, what: str) -> dict[str, Any]:
    """The tables of a TOML file; editors may have put a byte order mark before them.

    Raises:
        UserError: It cannot be read; `what` says what it is.
    """
    try:
        return _parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{what} {str(path)!r}: no such file. Give the path of a TOML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {str(path)!r}: cannot be read ({error}). Give the path of a TOML file.") from None
    except ValueError as error:
        raise UserError(f"{what} {str(path)!r}: not valid TOML: {error}") from None


def _parse(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("arrays or tables are nested too deeply") from None


def _parse_override(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    keys = _parts(key)
    if not equals or len(keys) < 2 or not all(keys):
        raise UserError(f"--set {override!r}: write section.key=value, for example training.learning_rate=2e-5")
    try:
        parsed = _parse(f"value = {text}")
    except ValueError:
        return keys, _unescaped(text.strip()) if keys[-1] == "template" else text.strip()
    if len(parsed) > 1:
        raise UserError(f"--set {override!r}: sets more than one key. Write --set section.key=value for each.")
    return keys, parsed["value"]


def _parts(key: str) -> list[str]:
    """The names of a dotted key; one in quotes may hold dots, as that of a file.

    >>> _parts('data.files."north.csv".encoding')
    ['data', 'files', 'north.csv', 'encoding']
    """
    if '"' not in key:
        return [part.strip() for part in key.split(".")]
    try:
        table: Any = _parse(f"{key} = 0")
    except ValueError:
        return []
    parts = []
    while isinstance(table, dict) and len(table) == 1:
        [(name, table)] = table.items()
        parts.append(name)
    return parts if table == 0 else []


def _unescaped(text: str) -> str:
    r"""A template as it is typed on a command line: \n is a line break, \t a tab, \\ a backslash.

    >>> _unescaped(r"{text}\nLabel:")
    '{text}\nLabel:'
    """
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t"}.get(found[1], "\\"), text)


def _place(tables: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        tables = tables.setdefault(key, {})
        if not isinstance(tables, dict):
            raise UserError(f"--set {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    tables[keys[-1]] = value


def _explain(problem: ErrorDetails, root: type[BaseModel]) -> str:
    """One pydantic error of a `root` as `key = value: rule. Choices.`."""
    location, value = [part for part in problem["loc"] if isinstance(part, str)], problem["input"]
    key = ".".join(part if part.isprintable() else json.dumps(part) for part in location)
    rule = f"{problem['msg'][0].lower()}{problem['msg'][1:]}."
    match problem["type"]:
        case "extra_forbidden":
            return str(unknown("key" if len(location) > 1 else "section", key, _known(location[:-1], root)))
        case "missing":
            return f"{key}: missing. Give it a value."
        case "literal_error":
            return str(
                unknown(key, value, problem["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", "))
            )
        case "value_error":
            rule = str(problem["ctx"]["error"])
        case "model_type" | "dict_type":
            rule = f"must be a table. Write [{key}], and its keys below."
    return f"{key} = {json.dumps(value, default=str)}: {rule}"


def _known(location: Iterable[str], root: type[BaseModel]) -> list[str]:
    """The keys of a section, written in full."""
    kind: Any = root
    for name in location:
        kind = get_args(kind)[1] if get_origin(kind) is dict else kind.model_fields[name].annotation
    return [".".join((*location, name)) for name in kind.model_fields]


# ------------------------------------------------------------------------------------------------------- writing

COLUMN, WIDTH = 33, 120  # where meanings begin, and where lines end
HEAD = """\
# Every key there is, with its default; all of them may be left out. What has no default stands behind a #.
# On the command line: fedalign run my.toml --set section.key=value
"""


def every_key() -> str:
    """examples/every_key.toml."""
    return HEAD + explained(Config())


def explained(section: Section) -> str:
    """A section as TOML with what each key means; a key without a value stands behind a #, with an example."""
    return "\n".join(_lines(section)) + "\n"


def _lines(section: Section, path: str = "", asleep: bool = False) -> Iterator[str]:
    tables: list[tuple[str, Section, bool]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        unset = value is None or value == {}
        unset = unset or (section.writes_what_is_set and name not in section.model_fields_set)
        shown, sleeps = field.examples[0] if unset and field.examples else value, asleep or unset
        if isinstance(shown, Section):
            tables.append((f"{path}{name}", shown, sleeps))
        elif isinstance(shown, dict) and all(isinstance(table, Section) for table in shown.values()):
            tables += [(f"{path}{name}.{tomli_w.dumps({k: {}})[1:-2]}", table, sleeps) for k, table in shown.items()]
        else:
            yield _line(name, shown, field.annotation, field.description or "", sleeps)
    if isinstance(section, AlgorithmConfig):
        yield from _options(section)
    for name, table, sleeps in tables:
        yield "\n" + _commented(f"[{name}]", " ".join((type(table).__doc__ or "").split()), sleeps)
        yield from _lines(table, f"{name}.", sleeps)


def _options(section: AlgorithmConfig) -> Iterator[str]:
    """The algorithm's own; then, behind a #, those of each other algorithm that are not the same."""
    chosen = described(section.build())
    yield from (_line(*option) for option in chosen)
    for name in sorted({*ALGORITHMS} - {section.name}):
        its_own = described(make(name, {}))
        if others := [option for option in its_own if option not in chosen]:
            inherits = {option[0] for option in chosen} <= {option[0] for option in its_own}
            means = "or this one, with the options above but" if inherits else "or this one, with"
            yield _commented(f"name = {_toml(name)}", means, asleep=True)
            yield from (_line(*option, asleep=True) for option in others)


def _line(name: str, value: Any, hint: Any, means: str, asleep: bool = False) -> str:
    choices = " | ".join(_choices(hint))
    return _commented(f"{name} = {_toml(value)}", ": ".join(part for part in (choices, means) if part), asleep)


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _toml(value: Any) -> str:
    """A value on one line, which tomli_w does not write of an array."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{tomli_w.dumps({k: 0})[:-5]} = {_toml(one)}' for k, one in value.items())} }}"
    return tomli_w.dumps({"": value}).removeprefix('"" = ').rstrip()


def _commented(text: str, comment: str, asleep: bool) -> str:
    head = f"{'# ' * asleep}{text}"
    return "\n".join(
        textwrap.wrap(
            comment,
            max(WIDTH, len(head) + WIDTH // 2),
            initial_indent=f"{head:<{COLUMN - 1}} # ",
            subsequent_indent=f"{'':<{COLUMN}}# ",
            break_on_hyphens=False,
        )
        or [head]
    )


if __name__ == "__main__":
    print(every_key(), end="")
