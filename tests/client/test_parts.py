"""The key of a row: what can be read of it, and the same in every release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalign.client.open import open_site, parts_file
from fedalign.client.parts import row_keys
from fedalign.config.run import Columns, Config
from fedalign.config.site import SiteFolder
from fedalign.data.sources import Row, read_rows

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def keys(*rows: dict[str, Any], columns: Columns | None = None, **more: Any) -> list[str]:
    numbered = [Row(row, "a.jsonl", number) for number, row in enumerate(rows, 1)]
    return row_keys(numbered, columns or Columns(), 7, **more)


def test_keys_are_those_of_the_first_release_that_kept_parts() -> None:
    """As commit 8234549 made them, with the seed 7."""
    text, choice = {"text": "well", "label": "food"}, {"question": "Grass?", "choices": ["red", "green"], "answer": 1}
    as_then = [
        "4235d52a4ab0767227329c4da14f70f8",
        "6988edd9addaea13bc0e350b7a2ca692",
        "54bec691c155a9a641be28188812f648",
    ]
    assert keys({**text, "note": "x"}, text, choice) == as_then
    assert keys({**text, "system": None}, text, {**choice, "input": float("nan")}) == as_then
    assert keys(CHAT | {"system": "Be brief."}, roles=()) == keys(CHAT)  # which was not read then
    assert keys(*[text] * 3, CHAT)[-1] == "09b0f5a2562fd014e3fc2e5e4fb31648"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"question": "?", "answer": "B", "A": "red", "B": "green"}, {"A": "blue"}),
        ({"text": "well", "system": "Be brief."}, {"system": "Be long."}),
        ({"prompt": "Sum up.", "input": "Fever."}, {"input": "Rain."}),
        ({**CHAT, "history": [{"role": "user", "content": "Rain?"}]}, {"history": []}),
        ({"text": "well", "system": "x"}, {"input": "x", "system": None}),
    ],
)
def test_a_key_is_that_of_its_row_wherever_it_stands(one: dict[str, Any], other: dict[str, Any]) -> None:
    rows = [one, {**one, **other}]
    columns = Columns(choices="A, B")
    found = keys(*rows, columns=columns)
    assert keys(*reversed(rows), columns=columns) == [*reversed(found)]
    assert keys(rows[1], columns=columns) == [found[1]]


def test_a_split_of_before_there_were_such_roles_is_not_drawn_anew(site_config: Config, ward: SiteFolder) -> None:
    """Its rows have a column that was not read then and can be now."""
    data = Path(ward.config.data.train)
    lines = data.read_text().splitlines()
    data.write_text("".join(json.dumps(json.loads(line) | {"input": "x"}) + "\n" for line in lines))
    every = row_keys(read_rows(str(data), site_config.data, "train"), ward.config.data.columns, ward.seed, roles=())
    held, train = every[-9:], every[:-9]
    parts_file(ward).write_text(json.dumps({"share": 0.1, "held_out": held, "train": train}))
    open_site(ward, site_config, "night")
    open_site(ward, site_config, "day")  # as the first has left it
    kept = json.loads(parts_file(ward).read_text())
    assert (kept["held_out"], kept["train"]) == (held, train)
