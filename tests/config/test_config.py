import tomllib
from pathlib import Path

import pytest

from fedalign.algorithms import ALGORITHMS
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.config.run import AlgorithmConfig
from fedalign.config.toml import load_config, parse_config, stem
from fedalign.demo import DEMO
from fedalign.errors import UserError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", [DEMO, *sorted(EXAMPLES.glob("*.toml"))], ids=lambda path: path.stem)
def test_every_example_loads(path: Path) -> None:
    load_config(path)


def test_toml_round_trip(tmp_path: Path) -> None:
    config = load_config(None, ["algorithm.beta=0.25", 'data.labels=["a", "b"]', "training.learning_rate=2e-5"])
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == config


def test_options_left_out_are_written_down_with_their_defaults(tmp_path: Path) -> None:
    config = load_config(None, ["algorithm.name=fc_moe", "algorithm.residual=0.25"])
    written = tomllib.loads(config.to_toml())["algorithm"]
    assert written == {"name": "fc_moe"} | vars(ALGORITHMS["fc_moe"](residual=0.25))  # type: ignore[call-arg] # the table's type is Algorithm, which has no options
    assert config.algorithm.chosen == {"residual": 0.25}


def test_overrides_are_toml_or_plain_text() -> None:
    config = load_config(None, ["training.learning_rate=2e-5", "model.path=some/folder", "run.seed=3"])
    assert config.training.learning_rate == 2e-5
    assert config.model.path == "some/folder"
    assert config.run.seed == 3


def test_another_algorithm_leaves_the_options_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('[algorithm]\nname = "fedalign_moe"\nbeta = 0.25\n')
    assert load_config(path).algorithm.build() == FedAlignMoE(beta=0.25)
    switched = load_config(path, ["algorithm.name=fedprox", "algorithm.mu=0.5"])
    assert switched.algorithm.build() == ALGORITHMS["fedprox"](mu=0.5)  # type: ignore[call-arg] # the table's type is Algorithm, which has no options
    assert load_config(path, ["algorithm.name=fedalign_moe"]).algorithm.build() == FedAlignMoE(beta=0.25)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("algorithm.name=fedalgin", ["fedalgin", "fedavg", "fedprox", "fedalign_moe"]),
        ("algorithm.betta=1", ["betta", "beta"]),
        ("algorithm.beta=high", ["beta", "high"]),
        ("clients.alpha=0", ["clients.alpha", "0", "greater than 0"]),
        ("clients.alpha=-1", ["clients.alpha", "-1"]),
        ("clients.cuont=3", ["clients.cuont", "clients.count"]),
        ("klients.count=3", ["klients", "clients"]),
        ("clients.count=0", ["clients.count", "1"]),
        ("clients.sample=1.5", ["clients.sample", "1.5"]),
        ("clients.partition=dirichlett", ["dirichlett", "pathological", "natural"]),
        ("data.kind=poems", ["data.kind", "poems", "multiple_choice"]),
        ("training.learning_rate=fast", ["training.learning_rate", "fast", "number"]),
        ("training.learning_rate=nan", ["training.learning_rate"]),
        ("training.epochs=1.5", ["training.epochs", "1.5", "integer"]),
        ("wire.dtype=int2", ["wire.dtype", "int2", "bfloat16", "int8", "int4"]),
        ("run.seed", ["run.seed", "section.key=value"]),
        ("run.seed.deep=1", ["run.seed"]),
    ],
)
def test_bad_values_name_value_rule_and_choices(override: str, told: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    for part in told:
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_every_problem_is_told() -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"clients": {"alpha": 0, "count": 0}})
    assert len(str(caught.value).splitlines()) == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config(broken)
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)


def test_the_default_algorithm() -> None:
    assert AlgorithmConfig().build() == FedAlignMoE()


def test_a_validation_part_needs_a_share_and_data_that_is_dealt() -> None:
    with pytest.raises(UserError, match=r"data\.validation = 0\.0 sets nothing aside"):
        load_config(None, ["evaluation.part=validation"])
    with pytest.raises(UserError, match=r"data\.validation = 0\.1: sites keep their data"):
        load_config(None, ["data.validation=0.1", "federation.engine=flower"])


def test_a_configuration_comes_from_a_path_tables_or_another_one(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    tables = {"run": {"seed": 3}, "data": {"train": Path("a.jsonl")}, "algorithm": {"name": "fedprox", "mu": 0.5}}
    file.write_text('run.seed = 3\ndata.train = "a.jsonl"\nalgorithm = {name = "fedprox", mu = 0.5}\n')
    config = load_config(file)
    assert load_config(str(file)) == load_config(tables) == load_config(config) == config
    assert load_config(config, {"run.seed": 4, "data.labels": ["ä, b", "true"]}).data.labels == ("ä, b", "true")
    assert load_config(config, {"algorithm.name": "fedavg"}).algorithm.model_extra == {}
    assert load_config("demo").model.path == "demo"
    assert load_config(None, "run.seed=4").run.seed == 4
    assert (stem(file), stem(tables), stem(config)) == ("a", "run", "run")


@pytest.mark.parametrize("value", [None, {"text": "t"}, float("nan"), [None]])
def test_values_that_toml_cannot_hold_are_refused(value: object) -> None:
    with pytest.raises(UserError, match=r"^data\.columns = .*: give text, a number, true, false or a list"):
        load_config(None, {"data.columns": value})
