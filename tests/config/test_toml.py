"""TOML as people write it, and the files that are written for them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel

from fedalign import algorithms
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.fedavg import FedAvg
from fedalign.config.run import AlgorithmConfig, ClientLimits, ClientsConfig, Config, FileConfig, ModelConfig
from fedalign.config.site import SiteConfig, SiteFile, SiteFolder, SitePrivacy
from fedalign.config.toml import every_key, explained, load_config
from fedalign.errors import UserError

EVERY_KEY = Path(__file__).parents[2] / "examples" / "every_key.toml"
SITE = {"name": "ward", "data": {"train": "notes.jsonl"}}
TABLES: dict[str, tuple[type[BaseModel], str]] = {
    str(dict[str, kind]): (kind, f"{name}.")  # type: ignore[valid-type] # a type is a value here
    for kind, name in ((ClientLimits, "client-00"), (FileConfig, "north.csv"), (SiteFile, "north.csv"))
}


EXAMPLES = {  # tables of any names
    str(dict[str, str]): ".text",
    str(SitePrivacy.model_fields["node_keys"].annotation): ".hospital-b",
}


def awake(text: str) -> str:
    """As if someone had removed every # in front of a key or table."""
    return re.sub(r"^# (?=\w+ = |\[)", "", text, flags=re.MULTILINE)


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """Each key in full, with its meaning."""
    for name, about in section.model_fields.items():
        kind, key = TABLES.get(str(about.annotation), (about.annotation, ""))
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.{key}")
        else:
            yield f"{prefix}{name}{EXAMPLES.get(str(about.annotation), '')}", about.description


def flat(tables: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in tables.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


# ---------------------------------------------------------------------------------------------------- the files


def test_the_example_of_every_key_is_made_from_the_fields() -> None:
    assert EVERY_KEY.read_text(encoding="utf-8") == every_key(), "write it anew with: make examples"
    assert load_config(EVERY_KEY) == Config()


@pytest.mark.parametrize("root", [Config, SiteConfig])
def test_every_key_has_a_meaning(root: type[BaseModel]) -> None:
    assert [name for name, meaning in keys(root) if not meaning] == []
    assert all(kind.__doc__ for kind in (root, *(about.annotation for about in root.model_fields.values())))


def test_every_key_is_in_the_example_and_can_be_woken() -> None:
    text = every_key()[: every_key().index("# name = ")] + every_key()[every_key().index("[wire]") :]
    options = {f"algorithm.{name}" for name in FedAlignMoE.__dataclass_fields__}
    assert set(flat(tomllib.loads(awake(text)))) == {name for name, _ in keys(Config)} | options


def test_every_key_of_a_site_is_in_its_file_and_can_be_woken() -> None:
    text = SiteConfig.model_validate(SITE).to_toml()
    assert SiteConfig.model_validate(tomllib.loads(text)) == SiteConfig.model_validate(SITE)
    assert set(flat(tomllib.loads(awake(text)))) == {name for name, _ in keys(SiteConfig)}
    assert text.startswith("# A site: what this organisation decides itself.")


def test_meanings_stand_in_a_column_and_are_folded() -> None:
    lines = every_key().splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert "seed = 0                         # of partition, client sampling, order of batches, rounding" in lines
    assert "# [clients.limits.client-00]     # Limits of a small client; 0: as everybody." in lines
    begins = {line.index("# ", 2) for line in lines[2:] if "# " in line[2:] and not line.startswith("targets")}
    assert begins == {33}
    long = "x" * 200
    first, second, *_ = explained(ModelConfig(path=long)).splitlines()
    assert first.startswith(f'path = "{long}" # a hub id, a folder, or "demo"')
    assert second.startswith(" " * 33 + "# ")


def test_what_a_user_chose_is_written_so_that_it_comes_back() -> None:
    limits = {"ward 3": ClientLimits(top_k=1), "ward.4": ClientLimits(rank=2)}
    text = explained(ClientsConfig(limits=limits))
    assert '\n[limits."ward 3"] ' in text
    assert ClientsConfig.model_validate(tomllib.loads(text)).limits == limits
    assert tomllib.loads(explained(ModelConfig(revision="")))["revision"] == ""


@dataclass(frozen=True)
class Told(FedAvg):
    """An algorithm whose options say what they mean."""

    how: Literal["a", "b"] = field(default="b", metadata={"help": "which of the two"})
    much: float = 0.5


def test_options_of_algorithms_are_told_with_choices_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(algorithms.ALGORITHMS, "told", Told)
    lines = explained(AlgorithmConfig.model_validate({"name": "told", "much": 0.25})).splitlines()
    assert "how = " + '"b"                        # a | b: which of the two' in lines
    assert "much = 0.25" in lines
    others = explained(AlgorithmConfig(name="fedprox")).splitlines()
    assert others[others.index('# name = "told"                  # or this one, with') :][1:3] == [
        '# how = "b"                      # a | b: which of the two',
        "# much = 0.5",
    ]
    assert not any("fedavg" in line for line in others if line.startswith("# name"))  # it has no options


def test_the_papers_algorithm_is_told_by_what_differs() -> None:
    lines = every_key().splitlines()
    start = lines.index('# name = "fedalign_paper"        # or this one, with the options above but')
    assert lines[start + 1].startswith("# reg_strength = 0.1             # λ of the pull")
    assert lines[start + 2].startswith('# granularity = "token"          # token | batch: ')
    assert not any(line.startswith("# beta") for line in lines)  # it is the same


# --------------------------------------------------------------------------------------------------- what is read


def test_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    for name, text in (("my.toml", "run.seed = 3"), ("site.toml", 'name = "ward"\ndata.train = "x"')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert load_config(tmp_path / "my.toml").run.seed == 3
    assert SiteFolder.load(tmp_path).config.name == "ward"


def test_a_configuration_may_lie_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.toml").write_text("run.seed = 3")
    assert load_config("~/my.toml").run.seed == 3


def test_an_override_sets_one_key() -> None:
    for text in ("run.seed=3\n[training]\nepochs = 7", "run.seed=3\nother = 7", "run.seed=3\n[value2]"):
        with pytest.raises(UserError, match=r"sets more than one key. Write --set section.key=value for each.$"):
            load_config(None, [text])
    assert load_config(None, ["data.labels=[\n'a',\n'b',\n]"]).data.labels == ("a", "b")
    assert load_config(None, ["data.template={text}\nLabel:"]).data.template == "{text}\nLabel:"


def test_options_may_be_given_before_their_algorithm() -> None:
    config = load_config(None, ["algorithm.mu=0.5", "algorithm.name=fedprox"])
    assert config.algorithm.chosen == {"mu": 0.5}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"data.labels = {'[' * 5000}{']' * 5000}", "not valid TOML: arrays or tables are nested too deeply"),
        ('algorithm = ["x"]', 'algorithm = ["x"]: must be a table. Write [algorithm], and its keys below.'),
        ('algorithm = "fedavg"', 'algorithm = "fedavg": must be a table. Write [algorithm], and its keys below.'),
        ("clients.limits = 3", "clients.limits = 3: must be a table. Write [clients.limits], and its keys below."),
        ("clients.limits.a.top = 1", "key = 'clients.limits.a.top': unknown. Choose one of: clients.limits.a.max_"),
        ('[clients.limits."a\\nb"]\ntop_k = -1', r'clients.limits."a\nb".top_k = -1: input should be greater'),
        ("run.seed = 10000000000000000000", "run.seed = 10000000000000000000: input should be less than or equal to"),
        (f"run.seed = {'9' * 5000}", "not valid TOML: Exceeds the limit"),
        ("run.threads = 1000000000", "run.threads = 1000000000: input should be less than or equal to 1024."),
        ("statistics.update_width = 1000000000000", "input should be less than or equal to 4096."),
        ("statistics.centroid_width = 1000000000", "input should be less than or equal to 4096."),
        ("tuning.rank = 1000000", "tuning.rank = 1000000: input should be less than or equal to 4096."),
        ("federation.wait_seconds = 1000000000000", "input should be less than or equal to 10000000."),
        ('federation.superlink = "junk"', 'federation.superlink = "junk": must be HOST:PORT, for example'),
        ('data.train = ""', 'data.train = "": must be a path or a name, without control characters.'),
        ('data.train = "a\\u0000b"', r'data.train = "a\u0000b": must be a path or a name, without control characters.'),
        ('data.test = " "', 'data.test = " ": must be a path or a name, without control characters.'),
        ('data.labels = ["a", "b", "a"]', 'data.labels = ["a", "b", "a"]: \'a\' is given twice. Give each once.'),
        ('data.labels = ["a", ""]', 'data.labels = ["a", ""]: \'\' must be a name without spaces around it.'),
        ('data.labels = [" b"]', "data.labels = [\" b\"]: ' b' must be a name without spaces around it."),
        ('tuning.include = ["*.q", "*.q"]', "'*.q' is given twice"),
        ('tuning.targets = ["experts", "experts"]', "'experts' is given twice"),
        ('tuning.targets = ["expert"]', "tuning.targets = 'expert': unknown. Choose one of: attention, dense, "),
        ('tracking.tensorboard = "yes"', "key = 'tracking.tensorboard': unknown."),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "my.toml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["8000", "host", "host:", ":8000", "host:port", "host:99999", "host:0", "host:²"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(UserError, match="HOST:PORT"):
        load_config(None, [f"federation.superlink='{address}'"])


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "[::1]:8000", "fl.example.org:443", "my_host:65535"])
def test_an_address_may_be_any_host(address: str) -> None:
    assert load_config(None, [f"federation.superlink='{address}'"]).federation.superlink == address


@pytest.mark.parametrize(
    "template",
    ["", "Classify:", "{}", "{0}", "{text", "text}", "{text:>9999999999}", "{text!r}", "{text.real}", "{text[0]}"],
)
def test_a_template_holds_plain_columns(template: str) -> None:
    with pytest.raises(UserError, match=r"data\.template = .*column") as caught:
        load_config(None, [f"data.template='{template}'"])
    assert "\n" not in str(caught.value)


def test_a_template_may_hold_braces_and_any_name() -> None:
    for template in ("{text}", "{{x}} {a column}", "{Größe}{q2}\n> "):
        assert load_config(None, [f"data.template='''{template}'''"]).data.template == template
