"""Whose expert is whose, and who trained the rest: records in the model's configuration.

Plain transformers keeps them and does not read them.

`"site_experts": {"hospital-a": [8], "hospital-b": [9]}` in config.json names each site's experts, the same in every MoE
layer. Experts that the record does not name are public.

`"shared_trained_by": ["fedavg"]` names the algorithms of all runs that trained parts which sites share, since the first
that kept this record; a run that leaves them frozen adds nothing. "unknown" is first where sites had experts before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedalign.config.run import AlgorithmConfig
from fedalign.errors import UserError, unknown
from fedalign.protocol import LONGEST_NAME, is_name

KEY = "site_experts"
TRAINED = "shared_trained_by"
UNKNOWN, MOST = "unknown", 64  # in the latter: what came before it; names
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # how configs say "experts"


def expert_count(config: Any) -> int | None:
    """E, experts of each MoE layer, as a configuration says it; None: in no way that is known."""
    text = config.get_text_config()
    found = [value for name in COUNTS if isinstance(value := getattr(text, name, None), int)]
    return found[0] if found else None


def parted(flag: str, text: str) -> list[str]:
    """Names between commas, as a user gives them to an option.

    >>> parted("--without", "hospital-a, bank b")
    ['hospital-a', 'bank b']

    Raises:
        UserError: One is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"{flag} {text!r}: has an empty name. Name sites with commas between them: {flag} NAME,NAME")
    return names


def owners(config: Any, experts: int | None = None) -> dict[str, tuple[int, ...]]:
    """Each site's experts, by the site's name; empty: all experts are public.

    Args:
        config: a transformers configuration.
        experts: E; None: as the configuration says.

    Raises:
        UserError: The record is broken.
    """
    record = getattr(config, KEY, None)
    return {} if record is None else checked(record, experts or expert_count(config))


def with_owners(config: Any, record: Mapping[str, Sequence[int]]) -> Any:
    """The same configuration, changed in place: its record says this; an empty one is left out.

    Raises:
        UserError: The record is broken.
    """
    known = checked(record, expert_count(config))
    if known:
        setattr(config, KEY, {name: list(experts) for name, experts in known.items()})
    elif hasattr(config, KEY):
        delattr(config, KEY)
    return config


def trained_by(config: Mapping[str, Any], run: AlgorithmConfig | None = None) -> list[str]:
    """The algorithms that trained parts which sites share, each once, in order; "unknown" stands for what came before.

    Args:
        config: as config.json has it.
        run: the algorithm of a run that the model went through since; None: there was none.

    Raises:
        UserError: The record is broken.

    >>> trained_by({"shared_trained_by": ["by_use"]}, AlgorithmConfig(name="fedavg"))
    ['by_use', 'fedavg']
    >>> trained_by({}), trained_by({"site_experts": {"a": [8]}})
    ([], ['unknown'])
    """
    record = config.get(TRAINED, [UNKNOWN] if config.get(KEY) else [])
    listed = isinstance(record, (list, tuple)) and len(record) <= MOST
    if not listed or not all(isinstance(name, str) and is_name(name) for name in record):
        raise UserError(
            f'{TRAINED} = {_short(record)}: must be a list of at most {MOST} algorithms\' names, such as ["fedavg"].'
        )
    added = [run.name] if run is not None and run.build().shared != "frozen" else []
    return list(dict.fromkeys([*record, *added]))


def checked(record: Any, experts: int | None) -> dict[str, tuple[int, ...]]:
    """A record, held against the number of experts.

    Args:
        record: whatever a file holds there.
        experts: E; None: not known.

    Raises:
        UserError: A name that no site can have, or an expert that is not there, or has two owners; or all have one.

    >>> checked({"a": [2], "b": [3]}, 4)
    {'a': (2,), 'b': (3,)}
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{KEY} = {_short(record)}: must be a table of sites' names and lists of experts.")
    owner: dict[int, str] = {}
    for name, mine in record.items():
        if not isinstance(name, str) or not is_name(name):
            raise UserError(f"{KEY}: {_short(name)}: a site's name must be 1 to {LONGEST_NAME} printable characters.")
        if not isinstance(mine, (list, tuple)) or not mine:
            raise UserError(f"{KEY}.{name} = {_short(mine)}: must be a list of experts, such as [8].")
        for expert in mine:
            if type(expert) is not int or expert < 0 or (experts is not None and expert >= experts):
                last = "" if experts is None else f" to {experts - 1}"
                raise UserError(f"{KEY}.{name}: {_short(expert)}: no such expert. Choose numbers from 0{last}.")
            if expert in owner:
                raise UserError(f"{KEY}.{name}: {expert}: is {owner[expert]}'s already. An expert has one owner.")
            owner[expert] = name
    if experts is not None and len(owner) == experts:
        raise UserError(f"{KEY}: all {experts} experts have an owner. At least one must be public.")
    return {name: tuple(mine) for name, mine in record.items()}


def named(option: str, sites: str | None) -> list[str]:
    """Sites that get an expert, as a user names them; none where the option is not given.

    Raises:
        UserError: A name is empty, cannot be a site's, or is given twice.

    >>> named("--join", "a, ward b")
    ['a', 'ward b']
    """
    names = [] if sites is None else parted(option, sites)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{option}: {twice!r} is named twice. Name each site once.")
    return list(checked({name: [number] for number, name in enumerate(names)}, None))


def among(flag: str, values: Sequence[str], record: Mapping[str, Sequence[int]]) -> list[str]:
    """Owners of a model's experts, as a user names them; commas part names.

    Args:
        flag: the option.
        values: what it was given, once or more; a name that has a comma stands alone.
        record: the owners.

    Raises:
        UserError: There are no owners, or a name is empty or of none.

    >>> among("--without", ["b,c"], {"a": [2], "b": [3], "c": [4]})
    ['b', 'c']
    """
    if not record:
        said = f"{flag} {','.join(values)}"
        raise UserError(f"{said}: no expert of this model belongs to a site (config.json has no {KEY}).")
    named = [name for value in values for name in ([value] if value in record else parted(flag, value))]
    if strange := [name for name in named if name not in record]:
        raise unknown(flag, strange[0], record)
    return [name for name in record if name in named]


def _short(value: object) -> str:
    return f"{value!r:.60}"
