"""The families that the matrix covers, what is known of each, and docs/models.md made of that and of what came out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from fedalign.moe.families import REFUSED
from fedalign.moe.lora import FAILS_UPSTREAM
from fedalign.moe.model import MoEModel
from tests.moe import tiny

QUICK = ("olmoe", "deepseek_v3", "switch_transformers")  # of each layout one, in `make test` too
EVERY = sorted(tiny.CONFIGS)
CASES = [
    pytest.param(family, kind, marks=() if family in QUICK else pytest.mark.families)
    for family in EVERY
    for kind in ("full", "lora")
    if kind == "full" or family not in FAILS_UPSTREAM
]

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
COLUMNS = ("family", "found by", "router", "scoring", "experts", "shared experts", "full", "lora", "why not")
WORKS = "saved, loaded and equal"
OWN_CODE = {"deepseek": "deepseek, code of the checkpoint"}
INTRODUCTION = """# Models

Families of Mixture-of-Experts models in Hugging Face transformers, and what works with each. This page is generated
from the tests (`make models` writes it, `make test-families` checks it): of every family a tiny model with random
weights is tuned whole (`full`) and by adapters on attention and experts (`lora`). "Saved, loaded and equal" means:

- what routers choose is captured as the experts compute it, in training and in evaluation, and is a distribution over
  all experts;
- every trained value belongs to exactly one parameter group, and a change of one expert's group changes the output of
  that expert's tokens and of no others;
- a round of FedAlign-MoE with two clients runs, and plain transformers (for `lora` plain peft) load the model that it
  leaves and compute the same.

"Found by" says how routers and experts are known: from a table, or by a search, and how sure that is. The search starts
from what transformers itself records of routers ("recorder"), or from the shapes of weights beside each other
("shapes"), and watches one run over a few tokens. Families that are not in this list are searched in the same way:
`fedalign inspect MODEL` tells what it found.

Of multimodal checkpoints the text is tuned, towers of pictures and sound are kept and saved with it, and adapters load
on the whole checkpoint by plain peft. Tested so, full and lora:
COMPOSITES.
Families of such checkpoints for which transformers has no class that answers text are refused.
""".replace("COMPOSITES", ", ".join(tiny.COMPOSITES))


def described(family: str) -> dict[str, str]:
    """The columns that need no run."""
    moe = MoEModel.wrap(tiny.build(family))
    about = moe.describe()
    layout = {slot.owners.axis is None for slot in moe.slots if slot.kind == "expert"}
    return {
        "family": OWN_CODE.get(family, family),
        "found by": _shortly(about.found),
        "router": _inner(about.routers),
        "scoring": " and ".join(about.scoring),
        "experts": _inner(about.expert_modules) + (", a module each" if True in layout else ""),
        "shared experts": _inner(path.partition(" ")[0] for path in about.shared_experts) or "none",
    }


def refused(family: str) -> dict[str, str]:
    """The row of a family that is not to be used."""
    return dict.fromkeys(COLUMNS, "") | {"family": family, "full": "no", "lora": "no", "why not": REFUSED[family]}


def render(failed: Mapping[tuple[str, str], Sequence[str]]) -> str:
    """The page; `failed` names the tests that failed, an empty list for what works, by family and kind."""
    rows = [described(family) | _outcome(family, failed) for family in EVERY] + [refused(f) for f in sorted(REFUSED)]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([row[column] for column in COLUMNS] for row in rows)]
    return INTRODUCTION + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _outcome(family: str, failed: Mapping[tuple[str, str], Sequence[str]]) -> dict[str, str]:
    cells: dict[str, str] = {}
    why: list[str] = []
    for kind in ("full", "lora"):
        if kind == "lora" and family in FAILS_UPSTREAM:
            cells[kind] = "attention only"
            why.append(f"lora of experts is refused: {FAILS_UPSTREAM[family]}")
        else:
            names = failed[family, kind]
            cells[kind] = "no" if names else WORKS
            why += [f"{kind}: {name} fails" for name in names]
    return cells | {"why not": "; ".join(why)}


def read(page: str) -> dict[str, dict[str, str]]:
    """The rows of the page, by the family's name in them."""
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] + [""] * (len(COLUMNS) - len(line)) for line in lines[2:]]
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in cells}


def _shortly(found: str) -> str:
    return found.removeprefix("autodetected: routers by ").replace("transformers' ", "").replace(" in a trial run", "")


def _inner(paths: Iterable[str]) -> str:
    """Module paths within a layer, each once."""
    return ", ".join(dict.fromkeys(f"`{re.split(r'[.][0-9]+[.]', path)[-1]}`" for path in paths))
