"""One file per paper: a plan, and maybe a penalty.

To add one: a file here with a frozen dataclass whose fields are its options, and a line in `ALGORITHMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedalign.algorithms.centralised import Centralised
from fedalign.algorithms.fc_moe import FCMoE
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.fedavg import FedAvg
from fedalign.algorithms.fedprox import FedProx
from fedalign.algorithms.local import Local
from fedalign.algorithms.pfl_moe import PFLMoE
from fedalign.algorithms.scaffold import Scaffold
from fedalign.errors import UserError, unknown
from fedalign.protocol import Algorithm

ALGORITHMS: dict[str, type[Algorithm]] = {
    "centralised": Centralised,
    "fc_moe": FCMoE,
    "fedalign_moe": FedAlignMoE,
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "local": Local,
    "pfl_moe": PFLMoE,
    "scaffold": Scaffold,
}


def make(name: str, options: Mapping[str, Any]) -> Algorithm:
    """The algorithm `name` with the given options, the rest at their defaults.

    Args:
        name: a key of `ALGORITHMS`.
        options: the keys of the configuration's `[algorithm]` table without `name`.

    Raises:
        UserError: an unknown name or option, or a value of the wrong type or outside its range.

    >>> make("fedprox", {"mu": 0.1})
    FedProx(mu=0.1)
    """
    if name not in ALGORITHMS:
        raise unknown("algorithm.name", name, ALGORITHMS)
    kind = ALGORITHMS[name]
    known: dict[str, Field[Any]] = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]  # all are dataclasses: a test holds them to it
    hints = get_type_hints(kind)
    for key, value in options.items():
        if key not in known:
            raise _unknown_option(name, key, value, known)
        _check_type(f"algorithm.{key}", value, hints[key])
    try:
        return kind(**options)
    except ValueError as error:
        raise UserError(f"algorithm.{error}") from None


def _unknown_option(name: str, key: str, value: object, known: Mapping[str, Field[Any]]) -> UserError:
    defaults = ", ".join(f"{field.name} = {field.default!r}" for field in known.values())
    choices = f"Its options and defaults: {defaults}." if defaults else "It has no options."
    return UserError(f"algorithm.{key} = {value!r}: {name} has no such option. {choices}")


def _check_type(key: str, value: object, hint: Any) -> None:
    """Options are bool, int, float (an int will do) or one of a few strings."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown(key, value, get_args(hint))
        return
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{key} = {value!r}: must be {_NAMES[hint]}.")


_NAMES = {bool: "true or false", int: "a whole number", float: "a number"}
