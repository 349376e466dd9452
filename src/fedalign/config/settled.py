"""The part of a run's configuration that stays as it began: all but what may change on resume."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fedalign.config.run import Config, FederationConfig

RESUMABLE = (  # may change on resume
    "run.rounds",
    "run.patience",
    "run.device",
    "run.threads",
    "run.workers",
    "run.check",
    "evaluation.answers",
    "evaluation.best",
    "evaluation.leaving",
    "tracking.loggers",
    "wire.piece_mb",
    "server.min_clients",
    "server.memory_gb",
    *(f"federation.{key}" for key in FederationConfig.model_fields if key != "engine"),
)
SINCE = {  # keys that came later, and the value that changes nothing: as if absent
    "algorithm.vocabulary_half_life": 0.0,
}


def settled(config: Config) -> dict[str, Any]:
    """The tables of a configuration without what may change, for JSON."""
    tables = config.model_dump(mode="json")
    for key in RESUMABLE:
        section, name = key.split(".")
        del tables[section][name]
    for key, value in SINCE.items():
        section, name = key.split(".")
        if tables[section].get(name) == value:
            del tables[section][name]
    return tables


def sha256_of(config: Config) -> str:
    """Of what is settled, whole: whoever writes two configurations must not find two that share it."""
    return hashlib.sha256(json.dumps(settled(config), sort_keys=True).encode()).hexdigest()
