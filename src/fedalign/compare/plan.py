"""Which runs a comparison is made of: algorithms x grid points x seeds, each an ordinary configuration.

Model, data, partition, held-out parts, order of batches and sampling of clients follow from `run.seed` and from what an
algorithm may not set, so the runs of one seed differ by their algorithm alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import tomli_w
from pydantic import Field

from fedalign.algorithms import ABLATION, BASELINE
from fedalign.config.run import Config, Section
from fedalign.config.toml import flat, overridden
from fedalign.errors import UserError
from fedalign.protocol import KINDS

Texts = Annotated[tuple[str, ...], Field(strict=False)]
Point = tuple[tuple[str, str], ...]  # grid keys and one value each, as the user wrote it

SHARED = ("run", "model", "data", "clients", "evaluation", "federation")  # sections that all algorithms have in common
_WHOLE = r""""[^"]*"|'[^']*'|\[[^\]]*\]|[^"'\[\]]"""  # what is quoted or in brackets, or a letter outside
VALIDATION = 0.1  # share of the training examples that tuning looks at, where the configuration names none


class Choice(Section):
    """One line of the tables: an algorithm and what is set for it."""

    label: str
    settings: Texts  # overrides; the first names the algorithm

    @property
    def name(self) -> str:
        """The algorithm's."""
        return self.settings[0].partition("=")[2]


class Design(Section):
    """A whole comparison, fully described."""

    base: Config  # what all runs have in common
    choices: Annotated[tuple[Choice, ...], Field(strict=False)]
    grid: Mapping[str, Texts] = Field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], Field(strict=False)]
    tune: bool = False

    @property
    def points(self) -> list[Point]:
        """Every combination of grid values."""
        pairs = [[(key, value) for value in values] for key, values in self.grid.items()]
        return list(itertools.product(*pairs))

    @property
    def baseline(self) -> str:
        """The label that all others are compared with."""
        labels = [choice.label for choice in self.choices]
        return BASELINE if BASELINE in labels else labels[0]

    def to_toml(self) -> str:
        """As a file."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def read(cls, text: str) -> Design:
        """The inverse of `to_toml`; a ValueError if it is not one."""
        return cls.model_validate(tomllib.loads(text))


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    choice: Choice
    point: Point
    seed: int
    config: Config
    tried: tuple[str, ...] = ()  # settings that this run tries out; only while tuning

    @property
    def name(self) -> str:
        """Its name for people."""
        return ", ".join([line_name(self.choice.label, self.point), f"seed {self.seed}", *self.tried])

    @property
    def line(self) -> tuple[str, Point]:
        """Which line of the tables it is for."""
        return self.choice.label, self.point

    @property
    def path(self) -> str:
        """Its folder among the runs."""
        grid = [slug(",".join(f"{key}={value}" for key, value in self.point))] if self.point else []
        tried = [slug(",".join(self.tried))] if self.tried else []
        return "/".join([slug(self.choice.label), *grid, *tried, f"seed-{self.seed}"])


def line_name(label: str, point: Point) -> str:
    """An algorithm at a grid point, for people.

    >>> line_name("fedavg", (("clients.alpha", "0.1"),))
    'fedavg, clients.alpha = 0.1'
    """
    return ", ".join(filter(None, [label, point_title(point)]))


def point_title(point: Point) -> str:
    """A grid point, for people; empty without a grid."""
    return ", ".join(f"{key} = {value}" for key, value in point)


def make_design(
    base: Config,
    choices: Sequence[Choice],
    grid: Mapping[str, Sequence[str]],
    seeds: Sequence[int],
    tune: bool,
) -> Design:
    """Check that the parts fit together, down to each single run.

    Raises:
        UserError: They do not.
    """
    _refuse_repetitions("--algorithms", [choice.label for choice in choices])
    slugs = Counter(slug(choice.label).casefold() for choice in choices)
    for choice in choices:
        if slugs[slug(choice.label).casefold()] > 1:
            raise UserError(f"--algorithms {choice.label!r}: another one would have the same folder. Rename an option.")
        if doubled := [key for key in map(_key, choice.settings) if key in grid]:
            raise UserError(f"{doubled[0]}: is an option of {choice.label} and in --set as well. Leave one out.")
    if base.federation.engine != "in_process":
        raise UserError(
            f"federation.engine = {base.federation.engine!r}: compare makes all its runs on this machine, and the "
            "numbers are the same on every engine. Choose one of: in_process."
        )
    tables: dict[str, dict[str, object]] = {
        "run": {"threads": base.run.threads or 1}
    }  # so that a number does not depend on how many run at a time
    if tune:
        if "training.learning_rate" in grid:
            raise UserError("training.learning_rate: --tune chooses it. Give --set one value, or leave out --tune.")
        if base.evaluation.part != "test":
            raise UserError('evaluation.part = "validation": --tune looks at that part itself. Leave the key out.')
        tables["data"] = {"validation": base.data.validation or VALIDATION}
    sections = {name: getattr(base, name).model_copy(update=values) for name, values in tables.items()}
    design = Design(
        base=base.model_copy(update=sections),
        choices=tuple(choices),
        grid={key: tuple(values) for key, values in grid.items()},
        seeds=tuple(seeds),
        tune=tune,
    )
    for choice, point in itertools.product(design.choices, design.points):
        config = configure(design, choice, point, design.seeds[0])  # wrong values are told before anything runs
        if tune and config.algorithm.build().private >= set(KINDS):
            raise UserError(
                f"--tune: {choice.label} trains no model for all, which the validation part could score. Leave one out."
            )
        if config.run.patience:
            raise UserError(
                f"run.patience = {config.run.patience}: runs that are compared take the same rounds. "
                "Add --set run.patience=0."
            )
    return design


def configure(design: Design, choice: Choice, point: Point, seed: int, more: Iterable[str] = ()) -> Config:
    """The configuration of one run."""
    algorithm, *options = choice.settings
    grid = [f"{key}={value}" for key, value in point]
    tables = design.base.model_dump(mode="json", exclude_none=True)
    return overridden(tables, [algorithm, *grid, *options, f"run.seed={seed}", *more])


def cells(design: Design, tuned: Mapping[tuple[str, Point], tuple[str, ...]] | None = None) -> list[Cell]:
    """All runs, seed by seed, so that a comparison that is cut short is still one; with `tuned`, those it has."""
    return [
        Cell(choice, point, seed, configure(design, choice, point, seed, (tuned or {}).get((choice.label, point), ())))
        for seed in design.seeds
        for point in design.points
        for choice in design.choices
        if tuned is None or (choice.label, point) in tuned
    ]


def differences(old: Design, new: Design) -> list[str]:
    """Why runs of `old` cannot be part of `new`; nothing if `new` is the same or only asks for more."""
    before, now = flat(old.base.model_dump(mode="json"), "."), flat(new.base.model_dump(mode="json"), ".")
    found = [
        f"{key} = {before.get(key)!r}, asked for is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if old.tune != new.tune:
        found.append(f"it was made {'with' if old.tune else 'without'} --tune")
    elif old.tune and old.seeds[0] != new.seeds[0]:
        found.append(f"it was tuned on seed {old.seeds[0]}, asked for is {new.seeds[0]}")
    if set(old.grid) != set(new.grid):
        found.append(f"it varies {', '.join(old.grid) or 'nothing'}, asked for is {', '.join(new.grid) or 'nothing'}")
    else:
        lost = [f"{key} = {value}" for key in old.grid for value in old.grid[key] if value not in new.grid[key]]
        found += [f"it holds runs with {pair}" for pair in lost]
    found += [f"it holds runs of {choice.label}" for choice in old.choices if choice not in new.choices]
    found += [f"it holds runs with seed {seed}" for seed in old.seeds if seed not in new.seeds]
    return found


# ---------------------------------------------------------------------------------------------------- what users write


def parse_algorithms(texts: Sequence[str]) -> list[Choice]:
    """`fedavg,fedalign_moe:gate=average:experts=average`: names, each with options of its own.

    An option without a section is the algorithm's own; `training.`, `wire.` or `server.` reach further.

    >>> parse_algorithms(["fedavg,fedprox:mu=0.1"])[1].settings
    ('algorithm.name=fedprox', 'algorithm.mu=0.1')

    Raises:
        UserError: It is not written like that.
    """
    return [_parse_choice(text) for part in texts for text in _split(part, ",", "--algorithms")]


def ablation() -> list[Choice]:
    """The paper's rows."""
    return [
        Choice(
            label=label,
            settings=(
                f"algorithm.name={name}",
                *(f"algorithm.{key}={json.dumps(value)}" for key, value in options.items()),
            ),
        )
        for label, (name, options) in ABLATION.items()
    ]


def parse_seeds(text: str) -> tuple[int, ...]:
    """`5` is 0 to 4; `3,7,11` are those three; `7,` is 7 alone.

    >>> parse_seeds("3"), parse_seeds("3,7")
    ((0, 1, 2), (3, 7))

    Raises:
        UserError: No seeds, or the same twice, or not whole numbers.
    """
    numbers = [part.strip() for part in text.split(",")]
    if "," in text and not numbers[-1]:
        numbers.pop()
    if not numbers or not all(re.fullmatch(r"[0-9]+", number) for number in numbers):
        raise UserError(f"--seeds {text!r}: give how many (5 is 0 to 4), or which: 3,7,11. Whole numbers from 0.")
    if "," not in text:
        if not int(text):
            raise UserError("--seeds 0: no runs at all. Give at least 1; 5 is better, an interval needs at least 2.")
        return tuple(range(int(text)))
    _refuse_repetitions("--seeds", [str(int(number)) for number in numbers])
    return tuple(int(number) for number in numbers)


def parse_grid(texts: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`--set` values: overrides of one value, and keys with the several values that they take.

    A text that is TOML as a whole is one value, a list too; another one is split at its commas.

    >>> parse_grid(["clients.alpha=0.1,1.0", "run.rounds=2", 'data.labels=["a", "b"]'])
    (['run.rounds=2', 'data.labels=["a", "b"]'], {'clients.alpha': ['0.1', '1.0']})

    Raises:
        UserError: A key that has its own option, an empty or a repeated value.
    """
    single: list[str] = []
    grid: dict[str, list[str]] = {}
    own = {"run.seed": "--seeds", "algorithm.name": "--algorithms"}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        if key in own:
            raise UserError(f"--set {text!r}: {key} is what {own[key]} is for.")
        if not equals or _is_toml(values) or "," not in values:
            single.append(text)
            continue
        several = _split(values, ",", f"--set {key}")
        if len(several) == 1:
            single.append(text)
            continue
        grid[key] = several
        _refuse_repetitions(f"--set {key}", grid[key])
    return single, grid


def _parse_choice(text: str) -> Choice:
    name, *options = _split(text, ":", "--algorithms")
    settings = [f"algorithm.name={name}"]
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not (key and equals and value):
            raise UserError(
                f"--algorithms {text!r}: {option!r} is no option. Write NAME:OPTION=VALUE, for example "
                "fedalign_moe:gate=average:experts=average"
            )
        section = key.partition(".")[0]
        if "." in key and (section in SHARED or key == "algorithm.name"):
            raise UserError(
                f"--algorithms {text!r}: {key} is the same for all algorithms, or they could not be compared. "
                "Set it with --set."
            )
        settings.append(f"{key}={value}" if "." in key else f"algorithm.{key}={value}")
    _refuse_repetitions(f"--algorithms {text!r}", [_key(setting) for setting in settings])
    return Choice(label=text, settings=tuple(settings))


def _split(text: str, separator: str, what: str) -> list[str]:
    """Split outside quotes and brackets; parts are never empty."""
    parts = re.split(f"{separator}(?=(?:{_WHOLE})*$)", text)
    stripped = [part.strip() for part in parts]
    if not all(stripped):
        raise UserError(f"{what} {text!r}: has an empty part. Leave out the {separator!r} beside it.")
    return stripped


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return False
    return True


def _refuse_repetitions(what: str, values: Sequence[str]) -> None:
    repeated = [value for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"{what}: {repeated[0]!r} is given twice. Give each once.")


def _key(setting: str) -> str:
    return setting.partition("=")[0]


def slug(text: str) -> str:
    """A folder name that a person still reads.

    >>> slug("fedalign_moe:gate=average"), slug("+ adaptive strength")
    ('fedalign_moe-gate=average', 'adaptive-strength')
    """
    name = re.sub(r"[^\w.,=+-]+", "-", text).strip("-+.") or "run"
    return name if len(name) <= 100 else f"{name[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
