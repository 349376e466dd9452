"""One file per paper: a plan, and maybe a penalty.

To add one: a file here with a frozen dataclass whose fields are its options, and a line in `ALGORITHMS`. Or, in a
package of your own, an entry point of the group "fedalign.algorithms"::

    [project.entry-points."fedalign.algorithms"]
    mine = "my_package.mine:Mine"

Options are bool, int, float, str or a Literal of strings, and have defaults. Names in `ALGORITHMS` cannot be replaced.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fedalign.algorithms.by_use import ByUse
from fedalign.algorithms.centralised import Centralised
from fedalign.algorithms.fc_moe import FCMoE
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.fedalign_paper import FedAlignPaper
from fedalign.algorithms.fedavg import FedAvg
from fedalign.algorithms.fedmoe import FedMoE
from fedalign.algorithms.fedprox import FedProx
from fedalign.algorithms.flame import FLAME
from fedalign.algorithms.hfedmoe import HFedMoE
from fedalign.algorithms.local import Local
from fedalign.algorithms.pfl_moe import PFLMoE
from fedalign.algorithms.scaffold import Scaffold
from fedalign.algorithms.site_experts import SiteExperts
from fedalign.errors import UserError, unknown
from fedalign.protocol import Algorithm, Ask

GROUP = "fedalign.algorithms"  # entry points of other packages

ALGORITHMS: dict[str, type[Algorithm]] = {
    "by_use": ByUse,
    "centralised": Centralised,
    "fc_moe": FCMoE,
    "fedalign_moe": FedAlignMoE,
    "fedalign_paper": FedAlignPaper,
    "fedavg": FedAvg,
    "fedmoe": FedMoE,
    "fedprox": FedProx,
    "flame": FLAME,
    "hfedmoe": HFedMoE,
    "local": Local,
    "pfl_moe": PFLMoE,
    "scaffold": Scaffold,
    "site_experts": SiteExperts,
}

TITLE = 20  # characters of a name before the colon of a file's first line, at most
BASELINE = "fedavg"  # what a comparison measures the others against
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {  # the option that tuning varies beside the learning rate
    "fedalign_moe": ("reg_strength", (0.0, 0.01, 0.1)),
    "fedalign_paper": ("reg_strength", (0.01, 0.1, 1.0)),
    "fedprox": ("mu", (0.001, 0.01, 0.1)),
}
_PLAIN = {"adaptive_strength": False, "experts": "average"}
ABLATION: dict[str, tuple[str, dict[str, Any]]] = {  # the paper's rows: each has one more part of the method
    "parameter average": ("fedavg", {}),
    "gate alignment": ("fedalign_paper", _PLAIN | {"gate_weights": "uniform"}),
    "+ consistency weights": ("fedalign_paper", _PLAIN),
    "+ adaptive strength": ("fedalign_paper", {"experts": "average"}),
    "+ semantic experts": ("fedalign_paper", {}),
}


def make(name: str, given: Mapping[str, Any]) -> Algorithm:
    """The algorithm `name` with the given options, the rest at their defaults.

    Args:
        name: a key of `ALGORITHMS`, or an entry point of another package.
        given: the keys of the configuration's `[algorithm]` table without `name`.

    Raises:
        UserError: an unknown name or option, a value of the wrong type or outside its range, or a broken package.

    >>> make("fedprox", {"mu": 0.1})
    FedProx(mu=0.1)
    """
    kind: type[Algorithm] = ALGORITHMS.get(name) or from_package(GROUP, "algorithm.name", name, ALGORITHMS, _flaw)
    known, hints = _options(kind), _hints(kind)
    for key, value in given.items():
        if key not in known:
            raise _unknown_option(name, key, value, known)
        _check_type(f"algorithm.{key}", value, hints[key])
    try:
        algorithm = kind(**given)
    except ValueError as error:
        raise UserError(f"algorithm.{error}") from None
    if strange := sorted(set(algorithm.asks) - {*get_args(Ask)}, key=str):
        raise unknown(f"algorithm.name = {name!r}: asks", strange[0], get_args(Ask))
    return algorithm


def every_name() -> list[str]:
    """Names that `make` takes: ours, then those that installed packages offer."""
    return sorted(ALGORITHMS) + sorted({*offered(GROUP)} - {*ALGORITHMS})


def summary(name: str) -> str:
    """An algorithm in one sentence: the first line of its file.

    >>> summary("scaffold")
    'Control variates against client drift (Karimireddy et al. 2020, arXiv 1910.06378, option II).'
    """
    kind = type(make(name, {}))
    text = sys.modules[kind.__module__].__doc__ or kind.__doc__ or ""
    line = " ".join(text.strip().partition("\n\n")[0].split())
    title, colon, rest = line.partition(": ")
    return rest[:1].upper() + rest[1:] if colon and len(title) < TITLE else line


def options(algorithm: Algorithm) -> dict[str, Any]:
    """Its options with their values, those at their defaults too.

    >>> options(make("fedprox", {"mu": 0.1}))
    {'mu': 0.1}
    """
    return {name: getattr(algorithm, name) for name in _options(type(algorithm))}


def described(algorithm: Algorithm) -> list[tuple[str, Any, Any, str]]:
    """Name, value, type and meaning of each option.

    >>> described(make("fedprox", {}))
    [('mu', 0.01, <class 'float'>, 'μ; 0: FedAvg')]
    """
    hints, means = _hints(type(algorithm)), dict[str, str]()
    for kind in reversed(type(algorithm).__mro__):  # a subclass with another default means the same
        own = getattr(kind, "__dataclass_fields__", {})
        means |= {name: field.metadata["help"] for name, field in own.items() if "help" in field.metadata}
    return [(name, value, hints[name], means.get(name, "")) for name, value in options(algorithm).items()]


def choices(hint: Any) -> tuple[str, ...]:
    """Values that an option of this type takes, or the name of the type.

    >>> choices(bool)
    ('true or false',)
    """
    return get_args(hint) if get_origin(hint) is Literal else (_NAMES[hint],)


def spans_rounds(algorithm: Algorithm) -> bool:
    """Whether clients set values of one round against those of another: not where factors are made anew each round."""
    return any(getattr(type(algorithm), hook) is not getattr(FedAvg, hook) for hook in ("begin", "keep"))


def offered(group: str) -> list[str]:
    """Names of another package's entry points of a group."""
    return sorted({entry.name for entry in entry_points(group=group)})


def from_package(group: str, key: str, name: str, ours: Iterable[str], flaw_of: Callable[[Any], str | None]) -> Any:
    """The object behind another package's entry point.

    Args:
        group: of entry points.
        key: the name stands under it, for the user.
        name: of the entry point.
        ours: names that need no package.
        flaw_of: why an object cannot be used, or None.

    Raises:
        UserError: No package offers the name, or several do, or the package is broken.
    """
    found: defaultdict[str, list[EntryPoint]] = defaultdict(list)
    for entry in entry_points(group=group):
        found[entry.name].append(entry)
    if name not in found:
        raise unknown(key, name, {*ours, *found})
    packages = _packages(found[name])
    if len(found[name]) > 1:
        raise UserError(f"{key} = {name!r}: offered by several packages: {packages}. Uninstall all but one.")
    entry = found[name][0]
    try:
        loaded = entry.load()
        flaw = flaw_of(loaded)
    except Exception as error:  # whatever another package's module does on import
        flaw = f"does not load ({type(error).__name__}: {' '.join(str(error).split())})"
    if flaw:
        raise UserError(
            f"{key} = {name!r}: {entry.value} of package {packages} {flaw}. Mend or uninstall the package, "
            f"or choose one of: {', '.join(sorted(ours))}."
        )
    return loaded


def _packages(entries: Sequence[EntryPoint]) -> str:
    return ", ".join(sorted(entry.dist.name if entry.dist else "without a name" for entry in entries))


def _flaw(kind: Any) -> str | None:
    """Why another package's object cannot be an algorithm, or None."""
    if not isinstance(kind, type) or not is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]  # undocumented, but the only way to ask
        return "is not a frozen dataclass"
    lacking = [name for name in vars(Algorithm) if not name.startswith("_") and not hasattr(kind, name)]
    if lacking:
        return f"has no {', '.join(lacking)}: extend fedalign.algorithms.fedavg.FedAvg"
    hints = _hints(kind)
    for key, field in _options(kind).items():
        if field.default is MISSING:
            return f"has an option without a default: {key}"
        if hints[key] not in _NAMES and get_origin(hints[key]) is not Literal:
            return f"has an option that is neither bool, int, float, str nor Literal: {key}"
    return None


def _hints(kind: Any) -> dict[str, Any]:
    """Types of its fields; tensors, which no option is, need not be known."""
    return get_type_hints(kind, localns={"Tensor": object})


def _options(kind: Any) -> dict[str, Field[Any]]:
    return {field.name: field for field in fields(kind) if field.init}


def _unknown_option(name: str, key: str, value: object, known: Mapping[str, Field[Any]]) -> UserError:
    defaults = ", ".join(f"{field.name} = {field.default!r}" for field in known.values())
    choices = f"Its options and defaults: {defaults}." if defaults else "It has no options."
    return UserError(f"algorithm.{key} = {value!r}: {name} has no such option. {choices}")


def _check_type(key: str, value: object, hint: Any) -> None:
    """Options are bool, int, float (an int will do), text or one of a few strings."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown(key, value, get_args(hint))
        return
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{key} = {value!r}: must be {_NAMES[hint]}.")


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
