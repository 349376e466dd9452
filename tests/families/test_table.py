"""docs/models.md against what can be known without a run."""

from fedalign.moe.families import FAMILIES, REFUSED
from fedalign.moe.lora import FAILS_UPSTREAM
from tests.families.table import (
    COLUMNS,
    DOCUMENT,
    EVERY,
    INTRODUCTION,
    OWN_CODE,
    WORKS,
    described,
    read,
    refused,
    render,
)


def test_the_page_lists_every_family_and_what_it_is() -> None:
    rows = read(DOCUMENT.read_text(encoding="utf-8"))
    assert list(rows) == [*(OWN_CODE.get(family, family) for family in EVERY), *sorted(REFUSED)]
    for family in EVERY:
        row = rows[OWN_CODE.get(family, family)]
        known = described(family)
        assert {column: row[column] for column in known} == known
        assert row["full"] == WORKS
        assert row["lora"] == ("attention only" if family in FAILS_UPSTREAM else WORKS)
        assert bool(row["why not"]) == (family in FAILS_UPSTREAM)
    for family in REFUSED:
        assert rows[family] == refused(family)


def test_every_family_of_the_table_is_in_the_matrix() -> None:
    assert FAMILIES.keys() <= set(EVERY)
    assert not REFUSED.keys() & set(EVERY)


def test_the_page_begins_as_it_is_told() -> None:
    assert DOCUMENT.read_text(encoding="utf-8").startswith(INTRODUCTION)


def test_a_page_names_the_tests_that_failed() -> None:
    failed: dict[tuple[str, str], list[str]] = {(family, kind): [] for family in EVERY for kind in ("full", "lora")}
    failed["mixtral", "lora"] = ["test_a", "test_b"]
    rows = read(render(failed))
    assert tuple(rows["mixtral"]) == COLUMNS
    assert (rows["mixtral"]["full"], rows["mixtral"]["lora"]) == (WORKS, "no")
    assert rows["mixtral"]["why not"] == "lora: test_a fails; lora: test_b fails"
    assert rows["dbrx"]["lora"] == "attention only"
    assert not rows["olmoe"]["why not"]
