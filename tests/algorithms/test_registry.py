"""The dict of algorithms, and what a user may get wrong about it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from textwrap import dedent
from typing import Any, get_type_hints

import pytest
from torch import tensor
from torch.testing import assert_close

from fedalign import algorithms
from fedalign.algorithms import ALGORITHMS, make
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.fedprox import FedProx
from fedalign.config.toml import load_config, read_config
from fedalign.errors import UserError
from fedalign.protocol import Layout
from tests.algorithms.conftest import Report, planned


def test_the_dict_is_the_folder() -> None:
    folder = {path.stem for path in Path(algorithms.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(ALGORITHMS) == folder
    assert {name: kind.__module__ for name, kind in ALGORITHMS.items()} == {
        name: f"fedalign.algorithms.{name}" for name in ALGORITHMS
    }


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_options_are_the_fields_of_a_frozen_dataclass(name: str) -> None:
    kind: Any = ALGORITHMS[name]
    assert kind.__dataclass_params__.frozen
    assert {field.name for field in fields(kind)} <= set(get_type_hints(kind))


def test_options_reach_the_algorithm() -> None:
    assert make("fedprox", {"mu": 1}) == FedProx(mu=1)
    chosen = make("fedalign_moe", {"gate": "average", "size_weighted": True, "min_holders": 3})
    assert chosen == FedAlignMoE(gate="average", size_weighted=True, min_holders=3)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "fedalgin",
            {},
            f"algorithm.name = 'fedalgin': unknown. Choose one of: {', '.join(sorted(ALGORITHMS))}.",
        ),
        ("fedavg", {"mu": 1.0}, "algorithm.mu = 1.0: fedavg has no such option. It has no options."),
        (
            "fedprox",
            {"nu": 1.0},
            "algorithm.nu = 1.0: fedprox has no such option. Its options and defaults: mu = 0.01.",
        ),
        ("fedprox", {"mu": -1.0}, "algorithm.mu = -1.0: must be at least 0 and finite"),
        ("fedprox", {"mu": math.nan}, "algorithm.mu = nan: must be at least 0 and finite"),
        ("fedprox", {"mu": "1"}, "algorithm.mu = '1': must be a number."),
        ("fedprox", {"mu": True}, "algorithm.mu = True: must be a number."),
        ("fedmoe", {"threshold": 1.0}, "algorithm.threshold = 1.0: fedmoe has no such option. It has no options."),
        ("hfedmoe", {"threshold": -0.1}, "algorithm.threshold = -0.1: must be at least 0 and finite"),
        ("hfedmoe", {"threshold": math.inf}, "algorithm.threshold = inf: must be at least 0 and finite"),
        ("hfedmoe", {"gate": "average"}, "algorithm.gate = 'average': unknown. Choose one of: rows, whole."),
        ("flame", {"temperature": math.nan}, "algorithm.temperature = nan: must be at least 0 and finite"),
        ("flame", {"temperature": -1}, "algorithm.temperature = -1: must be at least 0 and finite"),
        ("fedalign_moe", {"gate": "row"}, "algorithm.gate = 'row': unknown. Choose one of: average, local, rows."),
        ("fedalign_moe", {"size_weighted": 1}, "algorithm.size_weighted = 1: must be true or false."),
        ("fedalign_moe", {"min_holders": 2.0}, "algorithm.min_holders = 2.0: must be a whole number."),
        ("fedalign_moe", {"max_weight": 0.0}, "algorithm.max_weight = 0.0: must lie between 1e-06 and 1"),
        ("fedalign_moe", {"min_agreement": 1.5}, "algorithm.min_agreement = 1.5: must lie between 0 and 1"),
        ("fedalign_moe", {"beta": math.nan}, "algorithm.beta = nan: must lie between -100 and 100"),
    ],
)
def test_mistakes_are_told_in_one_line(
    name: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithms, "entry_points", lambda group: [])  # what else is installed is not ours to list
    with pytest.raises(UserError) as caught:
        make(name, options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


NEWCOMER = '''
    """Largest: only the client with most examples counts."""

    from dataclasses import dataclass, field

    import torch

    from fedalign.algorithms.fedavg import FedAvg
    from fedalign.protocol import Plan, Reports, State


    @dataclass(frozen=True)
    class Largest(FedAvg):
        """An option of each kind of value."""

        count: int = 1
        how: str = "examples"
        made: int = field(default=0, init=False)  # no option

        def __post_init__(self) -> None:
            if self.count < 1:
                raise ValueError(f"count = {self.count}: must be at least 1")

        def plan(self, reports: Reports, state: State) -> Plan:
            """The `count` largest clients, alike."""
            most = reports.examples_C.topk(self.count).indices
            chosen_C = torch.zeros(len(reports.of)).index_fill_(0, most, 1 / self.count)
            weight_C_G = chosen_C.unsqueeze(1).repeat(1, len(reports.layout.groups))
            return Plan(tuple(report.client for report in reports.of), weight_C_G)
'''

Package = Callable[..., None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    """`package(module, entry_points, source)`: an installed package, as pip would leave it."""
    modules = []

    def install(module: str, points: str, source: str = NEWCOMER) -> None:
        modules.append(module)
        folder = tmp_path / module
        info = folder / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fedalign.algorithms]\n{points}\n")
        monkeypatch.syspath_prepend(folder)

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def test_an_algorithm_of_another_package(package: Package, layout: Layout, report: Report) -> None:
    package("new_comer", "largest = new_comer:Largest")
    algorithm = make("largest", {"count": 1})
    nothing = ([0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [[0.0], [0.0]], [[0.0], [0.0]])
    plan = planned(algorithm, [report("a", 30, *nothing), report("b", 10, *nothing)], layout)
    assert_close(plan.weight_C_G, tensor([[1.0] * 7, [0.0] * 7]))

    config = load_config(None, ["algorithm.name=largest", "algorithm.count=2"])
    assert config.algorithm.build() == make("largest", {"count": 2})
    assert read_config(config.to_toml()) == config
    for override, told in [
        ("algorithm.count=0", "algorithm.count = 0: must be at least 1"),
        ("algorithm.count=2.0", "algorithm.count = 2.0: must be a whole number."),
        ("algorithm.how=1", "algorithm.how = 1: must be text."),
        ("algorithm.made=1", "algorithm.made = 1: largest has no such option."),
        ("algorithm.cuont=1", "largest has no such option. Its options and defaults: count = 1, how = 'examples'."),
    ]:
        with pytest.raises(UserError) as caught:
            load_config(None, ["algorithm.name=largest", override])
        assert told in str(caught.value)


def test_what_nobody_can_tell_is_not_asked(package: Package) -> None:
    asking = """
        from dataclasses import dataclass
        from fedalign.algorithms.fedavg import FedAvg
        @dataclass(frozen=True)
        class Curious(FedAvg):
            asks = frozenset({"centroid"})
    """
    package("new_comer", "curious = new_comer:Curious", asking)
    with pytest.raises(UserError) as caught:
        make("curious", {})
    assert str(caught.value).startswith(
        "algorithm.name = 'curious': asks = 'centroid': unknown. Choose one of: centroids,"
    )


def test_an_unknown_name_is_told_what_packages_offer(package: Package) -> None:
    package("new_comer", "largest = new_comer:Largest")
    with pytest.raises(UserError) as caught:
        make("larges", {})
    assert "largest, local, pfl_moe, scaffold, site_experts. Did you mean 'largest'?" in str(caught.value)


def test_a_built_in_name_cannot_be_replaced(package: Package) -> None:
    package("usurper", "fedprox = usurper:Largest")
    assert type(make("fedprox", {})) is FedProx
    assert "usurper" not in sys.modules  # not even imported


def test_a_name_of_two_packages_is_refused(package: Package) -> None:
    package("first_one", "largest = first_one:Largest")
    package("second_one", "largest = second_one:Largest")
    with pytest.raises(UserError, match=r"offered by several packages: first-one, second-one\. Uninstall all but one"):
        make("largest", {})


@pytest.mark.parametrize(
    ("points", "source", "told"),
    [
        ("bad = broken_one:Missing", NEWCOMER, "does not load (AttributeError: "),
        ("bad = not_there_at_all:Bad", NEWCOMER, "does not load (ModuleNotFoundError: "),
        ("bad = broken_one:Bad", "raise RuntimeError('two\\nlines')", "does not load (RuntimeError: two lines)"),
        ("bad = broken_one:bad", "def bad(): ...", "is not a frozen dataclass"),
        ("bad = broken_one:Bad", "class Bad: ...", "is not a frozen dataclass"),
        (
            "bad = broken_one:Bad",
            "from dataclasses import dataclass\n@dataclass\nclass Bad:\n  x: int = 1",
            "is not a frozen dataclass",
        ),
        (
            "bad = broken_one:Bad",
            "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Bad:\n  x: int = 1",
            "has no asks, private, mix, shares, shared, part, plan, begin, penalty, keep: extend",
        ),
        ("bad = broken_one:Largest", NEWCOMER.replace("count: int = 1", "count: int"), "without a default: count"),
        ("bad = broken_one:Largest", NEWCOMER.replace("count: int", "count: list"), "nor Literal: count"),
        ("bad = broken_one:Largest", NEWCOMER.replace("count: int", "count: Nowhere"), "does not load (NameError: "),
    ],
)
def test_a_broken_package_is_named(package: Package, points: str, source: str, told: str) -> None:
    package("broken_one", points, source)
    with pytest.raises(UserError) as caught:
        make("bad", {})
    message = str(caught.value)
    assert message.startswith(f"algorithm.name = 'bad': {points.split(' = ')[1]} of package broken-one ")
    assert told in message
    assert "\n" not in message
    assert message.endswith(f"or choose one of: {', '.join(sorted(ALGORITHMS))}.")
