"""Settings that another setting makes void, so that none is ignored without a word.

`VOID` holds keys, and why they have no effect in a configuration. Of a key at its default nothing is said, since a
resolved configuration names all keys. Contradictions that would give another run than was meant are refused in
`config.run`; what stands here changes nothing, and old runs hold it. Of an algorithm's own options only those on token
rows and on the pull are here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedalign.config.run import KINDS, NOISED, AlgorithmConfig, Config, FederationConfig
from fedalign.config.toml import flat


@dataclass(frozen=True)
class Void:
    """Keys that have no effect while something holds.

    Args:
        keys: of which those are told that are not at their defaults.
        holds: whether they have none.
        because: keys whose values are the reason.
        always: whether the keys are told at their defaults, too.
    """

    keys: Sequence[str]
    holds: Callable[[Config], bool]
    because: Sequence[str]
    always: bool = False


def _kinds(config: Config) -> set[str]:
    """Kinds of rows, of all files."""
    return {config.data.kind, *(file.kind for file in config.data.files.values() if file.kind)}


def _of_kinds(*kinds: str) -> Callable[[Config], bool]:
    """Whether all rows are of these kinds; of a package's own nothing is known."""
    return lambda config: _kinds(config) <= {*kinds}


def _steps(*optimizers: str) -> Callable[[Config], bool]:
    return lambda config: config.server.optimizer not in optimizers


def _at_sites(config: Config) -> bool:
    return config.federation.engine == "flower"


def _dealt(*ways: str) -> Callable[[Config], bool]:
    """Whether rows are dealt out here, and in no such way."""
    return lambda config: not _at_sites(config) and config.clients.partition not in ways


def _no_rows(config: Config) -> bool:
    """Whether the algorithm's weights of token rows, if it has any, are FedAvg's."""
    return getattr(config.algorithm, "vocabulary", None) == "average"


FEDERATION = [f"federation.{name}" for name in FederationConfig.model_fields if name != "engine"]
ENGINE, KIND, PARTITION = "federation.engine", "data.kind", "clients.partition"
ROBUST, OPTIMIZER = "server.robust", "server.optimizer"
ROWS = ("vocabulary", "vocabulary_holders", "vocabulary_half_life")  # options on trained embeddings
VOID = (
    Void(["evaluation.clients"], lambda c: c.evaluation.clients and not c.clients.held_out, ["clients.held_out"], True),
    Void(["evaluation.leaving"], lambda c: c.federation.engine != "in_process", [ENGINE]),
    Void(["evaluation.leaving"], lambda c: not c.evaluation.clients, ["evaluation.clients"]),
    Void(["evaluation.everyone"], lambda c: c.clients.sample == 1, ["clients.sample"]),
    Void(["evaluation.generate"], _of_kinds("classification", "multiple_choice"), [KIND]),
    Void(["evaluation.max_new_tokens"], _of_kinds("classification", "multiple_choice"), [KIND]),
    Void(["evaluation.length_normalise"], _of_kinds("instruction", "chat", "text"), [KIND]),
    Void(["data.labels"], _of_kinds(*(kind for kind in KINDS if kind != "classification")), [KIND]),
    Void(["data.template"], _of_kinds("chat"), [KIND]),
    Void(["data.columns.client"], _dealt("natural"), [PARTITION]),
    Void(["clients.count"], lambda c: c.clients.partition in ("natural", "files"), [PARTITION]),
    Void(["clients.alpha"], _dealt("dirichlet"), [PARTITION]),
    Void(["clients.classes"], _dealt("pathological"), [PARTITION]),
    Void(["clients.size_growth"], _dealt("size"), [PARTITION]),
    Void(
        ["clients.count", PARTITION, "clients.min_examples", "data.columns.client"]
        + [f"clients.{name}" for name in ("alpha", "classes", "size_growth")],
        _at_sites,
        [ENGINE],
    ),
    Void(["data.train"], lambda c: _at_sites(c) and c.data.test is None, [ENGINE, "data.test"]),
    # numbers of right choices in data.test count from 0 or 1, as those in data.train do
    Void(
        ["data.train"],
        lambda c: _at_sites(c) and c.data.test is not None and _kinds(c) <= {*KINDS} - {"multiple_choice"},
        [ENGINE, KIND],
    ),
    Void(["clients.held_out"], lambda c: _at_sites(c) and c.clients.held_out > 0, [ENGINE]),
    Void(
        ["run.device", "run.threads", "data.max_test", "data.test_split", "evaluation.answers"],
        lambda c: _at_sites(c) and c.data.test is None,
        [ENGINE, "data.test"],
    ),
    Void(
        ["data.subset", "data.train_split", "data.delimiter", "data.encoding"],
        lambda c: _at_sites(c) and c.data.test is None,
        [ENGINE, "data.test"],
    ),
    Void([*FEDERATION, "wire.piece_mb"], lambda c: c.federation.engine == "in_process", [ENGINE]),
    Void(
        ["federation.superlink", "federation.root_certificates"],
        lambda c: c.federation.engine == "simulation",
        [ENGINE],
    ),
    Void(["federation.workers"], _at_sites, [ENGINE]),
    Void(["training.max_grad_norm"], lambda c: c.privacy.on, ["privacy.max_grad_norm"]),
    Void(
        [f"tuning.{name}" for name in ("rank", "alpha", "targets", "router", "average")],
        lambda c: not c.tuning.adapts,
        ["tuning.kind"],
    ),
    Void(["statistics.update_width"], lambda c: "directions" not in c.asks, ["algorithm.name"]),
    Void(["statistics.centroid_width"], lambda c: "centroids" not in c.asks, ["algorithm.name"]),
    Void(
        ["wire.error_feedback"],
        lambda c: c.wire.error_feedback == "on" and c.wire.dtype not in ("int8", "int4"),
        ["wire.dtype"],
    ),
    Void(
        [f"algorithm.{name}" for name in ("granularity", "form", "adaptive_strength")],
        lambda c: getattr(c.algorithm, "reg_strength", None) == 0,
        ["algorithm.reg_strength"],
    ),
    Void([f"algorithm.{name}" for name in ROWS], lambda c: c.tuning.kind != "full", ["tuning.kind"]),
    Void(
        [f"algorithm.{name}" for name in ROWS[1:]],
        lambda c: c.tuning.kind == "full" and _no_rows(c),
        ["algorithm.vocabulary"],
    ),
    Void(["server.learning_rate"], _steps("sgd", "adam", "yogi"), [OPTIMIZER]),
    Void(["server.momentum"], _steps("sgd", "adam", "yogi"), [OPTIMIZER]),
    Void(["server.beta2"], _steps("adam", "yogi"), [OPTIMIZER]),
    Void(["server.epsilon"], _steps("adam", "yogi", "fedexp"), [OPTIMIZER]),
    Void(["server.min_arrived"], lambda c: c.privacy.masked, ["privacy.masked"]),
    Void(
        ["server.max_norm_ratio"],
        lambda c: c.server.max_norm_ratio > 0 and not c.norm_ratio,
        [ROBUST, "algorithm.name"],
    ),
    Void(
        [f"server.{name}" for name in ("max_share", "max_share_ratio", "clip", "hostile")],
        lambda c: c.robust == "none",
        [ROBUST, ENGINE, "algorithm.name"],
    ),
    Void(["server.radius"], lambda c: c.robust != "centered_clip", [ROBUST]),
    Void([f"privacy.{name}" for name in ("delta", "max_grad_norm")], lambda c: not c.privacy.on, ["privacy.epsilon"]),
    Void(["privacy.loads_noise"], lambda c: not c.privacy.on, ["privacy.epsilon"]),
    Void(
        ["clients.held_out"],
        lambda c: c.privacy.on and not _at_sites(c),
        ["privacy.noise_multiplier", "privacy.epsilon"],
    ),
    Void(["privacy.loads_noise"], lambda c: c.privacy.on and not NOISED.get(c.algorithm.name), ["algorithm.name"]),
    Void(["privacy.masked_min_holders"], lambda c: not c.privacy.masked, ["privacy.masked"]),
)


def unused(config: Config) -> list[str]:
    """A line for each reason why settings have no effect.

    >>> from fedalign.config.toml import load_config
    >>> unused(load_config(None, ["server.momentum=0.5", "server.learning_rate=2.0", "clients.held_out=0.0"]))
    ... # doctest: +NORMALIZE_WHITESPACE
    ['no effect: evaluation.clients = true, with clients.held_out = 0.0',
     'no effect: server.learning_rate = 2.0, server.momentum = 0.5, with server.optimizer = "average"']
    """
    usual = Config(algorithm=AlgorithmConfig(name=config.algorithm.name))
    values, defaults = (flat(one.model_dump(mode="json"), ".") for one in (config, usual))
    found: dict[str, list[str]] = {}
    for void in VOID:
        if void.holds(config):
            reason = ", ".join(_shown(key, values) for key in void.because)
            there = [key for key in void.keys if key in values]  # an algorithm has not all options of `VOID`
            told = [key for key in there if void.always or values[key] != defaults[key]]
            found.setdefault(reason, []).extend(told)
    return [
        f"no effect: {', '.join(_shown(key, values) for key in dict.fromkeys(keys))}, with {reason}"
        for reason, keys in found.items()
        if keys
    ]


def _shown(key: str, values: dict[str, object]) -> str:
    return f"no {key}" if values[key] is None else f"{key} = {json.dumps(values[key], ensure_ascii=False)}"
