"""`fedalign new algorithm`: a package of one file to start from."""

from __future__ import annotations

import keyword
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from fedalign.cli.terminal import say
from fedalign.errors import UserError

new_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Start something of your own: an algorithm.",
)
ALGORITHM_EXAMPLES = """
[bold]Examples[/bold]

  fedalign new algorithm by_need                    by_need/: pyproject.toml, by_need.py, test_by_need.py

  fedalign new algorithm by_need --dir plugins/by_need
"""
IMPORTED = ("FedAvg", "Plan", "Reports", "State")  # by the module, so that its class has another name
FILES = {
    "pyproject.toml": Template("""\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "$package"
version = "0.1.0"
description = "An algorithm for FedAlign-MoE."
requires-python = ">=3.11"
dependencies = ["fedalign-moe>=0.2"] # install it first: no registry has it yet

[project.entry-points."fedalign.algorithms"]
$name = "$name:$kind"

[tool.hatch.build.targets.wheel]
only-include = ["$name.py"]
"""),
    "$name.py": Template('''\
"""$kind: the paper and its equation stand here; `fedalign algorithms` prints this line."""

from dataclasses import dataclass

from fedalign.algorithms.fedavg import FedAvg, column_shares, option
from fedalign.protocol import Plan, Reports, State


@dataclass(frozen=True)
class $kind(FedAvg):
    """Experts weighted by the tokens that clients sent them, to a power."""

    power: float = option(1.0, "of the load; 0: alike among the clients that hold the expert")

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 10:
            raise ValueError(f"power = {self.power}: must lie between 0 and 10")

    def plan(self, reports: Reports, state: State) -> Plan:
        """Experts by load, everything else by data size."""
        load_C_L_E = reports.stack("load_L_E")
        return reports.plan(expert_C_L_E=column_shares(load_C_L_E.pow(self.power) * reports.held_C_L_E))
'''),
    "test_$name.py": Template('''\
"""The plan on made-up reports: no model, no data, no training."""

import math

import pytest
from fedalign import UserError
from fedalign.algorithms import make
from fedalign.testing import planned, reports
from torch.testing import assert_close

from $name import $kind


def test_experts_go_by_load_and_the_rest_by_data_size() -> None:
    seen = reports(clients=3, layers=2, experts=4)
    plan = planned($kind(), seen)
    shared_C, gate_C_L_E, expert_C_L_E = seen.layout.split(plan.weight_C_G)
    load_C_L_E = seen.stack("load_L_E")
    assert_close(expert_C_L_E, load_C_L_E / load_C_L_E.sum(0))
    assert_close(shared_C, seen.share_C)
    assert_close(gate_C_L_E, seen.share_C[:, None, None].expand_as(gate_C_L_E))


def test_an_expert_that_nobody_holds_keeps_its_weights() -> None:
    nobody = reports(clients=3, min_tokens=1000)
    _, _, expert_C_L_E = nobody.layout.split(planned($kind(), nobody).weight_C_G)
    assert not expert_C_L_E.any()


def test_fedalign_knows_it_by_name() -> None:
    assert make("$name", {"power": 0.5}) == $kind(power=0.5)


@pytest.mark.parametrize("power", [-1.0, math.nan])
def test_a_power_of_no_meaning_is_refused(power: float) -> None:
    with pytest.raises(UserError, match="power"):
        make("$name", {"power": power})
'''),
}


@new_app.callback()
def _new() -> None:
    """Keeps `algorithm` a word of its own, though it is the only one."""


@new_app.command(epilog=ALGORITHM_EXAMPLES)
def algorithm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What algorithm.name will say.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="The folder to make; without it: NAME.")
    ] = None,
) -> None:
    """Write a package of one file: an algorithm that runs, its entry point and its test."""
    place = folder.expanduser() if folder else Path(name)
    _check_name(name)
    if place.exists() or place.is_symlink():
        raise UserError(f"--dir {str(place)!r}: is there already, and nothing is overwritten. Give another folder.")
    words = {"name": name, "package": name.replace("_", "-"), "kind": _class_name(name)}
    place.mkdir(parents=True)
    for file, text in FILES.items():
        (place / Template(file).substitute(words)).write_text(text.substitute(words), encoding="utf-8")
    quoted = shlex.quote(str(place if place.is_absolute() else f"./{place}"))  # pip takes a bare word for a package
    say(f"Written to {place}. Install it, and try its plan on made-up reports:\n")
    say(f"  pip install --editable {quoted}\n  pytest {quoted}\n\nThen change the plan, and run it:\n")
    say(f"  fedalign run demo --set algorithm.name={name}")


def _check_name(name: str) -> None:
    """It will be an algorithm, a package, a module and a class; each has a say in what it may be called."""
    from fedalign.algorithms import every_name

    told = f"algorithm NAME = {name!r}"
    if not re.fullmatch("[a-z](_?[a-z0-9])*", name) or keyword.iskeyword(name):
        raise UserError(f"{told}: must be a Python name of a-z, 0-9 and single _ between them, such as by_need.")
    if name in (taken := every_name()):
        raise UserError(f"{told}: there is one already. Choose a name that is none of: {', '.join(taken)}.")
    if find_spec(name):
        raise UserError(f"{told}: a Python module is called so, and one would hide the other. Choose another name.")
    if (kind := _class_name(name)) in IMPORTED:
        raise UserError(f"{told}: its class would be called {kind}, which it needs from fedalign. Choose another name.")


def _class_name(name: str) -> str:
    """As Python spells it.

    >>> _class_name("by_need2")
    'ByNeed2'
    """
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
