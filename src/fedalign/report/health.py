"""How the experts are used and shared, from the files in `DIR/health`: one representative run for each algorithm.

Tables are sent to the page as bytes: 0 to 254 stands for 0 to the layer's largest value, 255 for a client that was not
there. Rounds, then layers, are thinned evenly until everything fits.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedalign.report.figures import CLIENTS, Json, label_index, point_index, representatives, thinned
from fedalign.report.material import Material, Run
from fedalign.server.health import DamagedError, Floats, Round, read_round

Bytes = NDArray[np.uint8]
BUDGET = 2_400_000  # bytes of all tables together, before they are made text of
MISSING = 255
OCTAVES = 5  # of load that are told apart, up and down from an even share


@dataclass
class ExpertFigures:
    """The part of health that the page shows, and why it cannot show the rest."""

    runs: list[Json] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def health(material: Material, budget: int = BUDGET) -> ExpertFigures:
    """For each grid point and algorithm its first seed with such files, a finished run if there is one."""
    found = ExpertFigures()
    chosen = [
        (point_index(material, point), label_index(material, label), run)
        for (point, label), run in representatives(material, lambda run: run.health).items()
    ]
    for point, label, run in chosen:
        rounds = _read_all(run, found.problems)
        if rounds:
            about = {"point": point, "label": label, "seed": run.cell.seed}
            found.runs.append(about | _packed(rounds, budget // len(chosen)))
    return found


def _read_all(run: Run, problems: list[str]) -> list[Round]:
    rounds: list[Round] = []
    for path in run.health:
        try:
            one = read_round(path)
            if rounds and one.tables["prob_C_L_E"].shape[1:] != rounds[0].tables["prob_C_L_E"].shape[1:]:
                raise DamagedError("its layers and experts are not those of the first round")
        except DamagedError as error:
            problems.append(f"{path}: left out ({error}).")
            continue
        rounds.append(one)
    return rounds


def _packed(rounds: Sequence[Round], budget: int) -> Json:
    everyone = sorted({name for one in rounds for name in one.clients})
    names = thinned(everyone, CLIENTS)
    similar = all("similarity_L_E_C_C" in one.tables for one in rounds)
    layers, experts = rounds[0].tables["prob_C_L_E"].shape[1:]
    cell = len(names) * 3 + 1 + similar * len(names) * (len(names) - 1) // 2  # bytes of one expert in one round
    kept_rounds = thinned(rounds, max(2, min(len(rounds), budget // (cell * layers * experts))))
    kept_layers = thinned(range(layers), max(1, budget // (cell * experts * len(kept_rounds))))
    tables = {
        name: _stacked(kept_rounds, names, kept_layers, f"{name}_C_L_E")
        for name in ("prob", "gate_weight", "expert_weight")
    }
    packed = {name: _to_bytes(table_R_L_C_E) for name, table_R_L_C_E in tables.items()}
    return {
        "rounds": [one.number for one in kept_rounds],
        "of_rounds": len(rounds),
        "layers": list(kept_layers),
        "of_layers": layers,
        "experts": experts,
        "clients": names,
        "of_clients": len(everyone),
        **{name: {"bytes": _text(table), "largest": largest} for name, (table, largest) in packed.items()},
        "load": _text(_load_bytes(np.stack([one.relative_load_L_E[list(kept_layers)] for one in kept_rounds]))),
        "similarity": _text(_similarity_bytes(kept_rounds, names, kept_layers)) if similar and len(names) > 1 else None,
        "balance": [[one.number, one.dead, one.overloaded] for one in rounds],
    }


def _stacked(rounds: Sequence[Round], names: Sequence[str], layers: Sequence[int], table: str) -> Floats:
    """[R, L, C, E]; NaN where a client was not there."""
    found = []
    for one in rounds:
        place = {name: i for i, name in enumerate(one.clients)}
        table_C_L_E = one.tables[table][:, list(layers)]
        none_L_E = np.full(table_C_L_E.shape[1:], np.nan, dtype=np.float32)
        found.append(np.stack([table_C_L_E[place[name]] if name in place else none_L_E for name in names], axis=1))
    return np.stack(found)


def _to_bytes(table_R_L_C_E: Floats) -> tuple[Bytes, list[float]]:
    """Bytes, and the largest value of each layer; what is not zero never becomes zero."""
    largest_L = np.nan_to_num(table_R_L_C_E).max(axis=(0, 2, 3))
    scale_1_L_1_1 = np.where(largest_L > 0, largest_L, 1)[None, :, None, None]
    share = table_R_L_C_E / scale_1_L_1_1
    level = np.where(share > 0, np.maximum(np.rint(254 * share), 1), 0)
    return np.where(np.isnan(share), MISSING, level).astype(np.uint8), [float(f"{x:.4g}") for x in largest_L]


def _load_bytes(relative_R_L_E: Floats) -> Bytes:
    """0: no tokens; 1 to 255: the binary logarithm, from 1/32 to 32 times an even share."""
    with np.errstate(divide="ignore"):
        octave = np.clip(np.log2(relative_R_L_E), -OCTAVES, OCTAVES)
    return np.where(relative_R_L_E > 0, 1 + np.rint(254 * (octave + OCTAVES) / (2 * OCTAVES)), 0).astype(np.uint8)


def _similarity_bytes(rounds: Sequence[Round], names: Sequence[str], layers: Sequence[int]) -> Bytes:
    """[R, L, E, pairs i<j]: 0 to 254 stands for -1 to 1; 255 where one of them does not hold the expert."""
    first, second = np.triu_indices(len(names), k=1)
    found = []
    for one in rounds:
        place = {name: i for i, name in enumerate(one.clients)}
        there = np.array([place.get(name, -1) for name in names])
        table_L_E_C_C = one.tables["similarity_L_E_C_C"][list(layers)]
        pairs_L_E_P = table_L_E_C_C[:, :, there[first], there[second]]
        absent_P = (there[first] < 0) | (there[second] < 0)
        pairs_L_E_P = np.where(absent_P, np.nan, pairs_L_E_P)
        level = np.rint(127 * (np.clip(np.nan_to_num(pairs_L_E_P), -1, 1) + 1))
        found.append(np.where(np.isnan(pairs_L_E_P), MISSING, level))
    return np.stack(found).astype(np.uint8)


def _text(table: Bytes) -> str:
    return base64.b64encode(table.tobytes()).decode()


def budget_text(runs: Sequence[Json]) -> str:
    """Which run stands for each algorithm and what was thinned, for the reader."""
    seeds = sorted({run["seed"] for run in runs})
    said = [
        f"One run stands for each algorithm: {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}."
    ]
    for key, what in (("rounds", "rounds"), ("layers", "layers"), ("clients", "clients")):
        if any(len(run[key]) < run[f"of_{key}"] for run in runs):
            least = min(len(run[key]) for run in runs)
            most = max(run[f"of_{key}"] for run in runs)
            said.append(f"To keep this page small it shows {least} of {most} {what}, evenly spaced.")
    said.append("Values are rounded to 1/254 of the largest one of their layer.")
    return " ".join(said)
