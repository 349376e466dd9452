"""Which runs are made of what the user wrote."""

import pytest

from fedalign.algorithms import ABLATION, ALGORITHMS, BASELINE, STRENGTHS
from fedalign.algorithms.fedalign_moe import FedAlignMoE
from fedalign.algorithms.fedalign_paper import FedAlignPaper
from fedalign.algorithms.fedavg import FedAvg
from fedalign.compare.plan import (
    Cell,
    Design,
    ablation,
    cells,
    differences,
    make_design,
    parse_algorithms,
    parse_grid,
    parse_seeds,
)
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from tests.compare.conftest import Ask


def test_every_algorithm_meets_every_seed_and_grid_point(ask: Ask) -> None:
    design = ask("fedavg,fedprox:mu=0.5", "3,7", ["clients.alpha=0.1,1.0", "training.epochs=2"])
    planned = cells(design)
    assert [(cell.choice.label, cell.point, cell.seed) for cell in planned] == [
        (label, (("clients.alpha", alpha),), seed)
        for seed in (3, 7)
        for alpha in ("0.1", "1.0")
        for label in ("fedavg", "fedprox:mu=0.5")
    ]
    last = planned[-1].config
    assert (last.run.seed, last.clients.alpha, last.training.epochs) == (7, 1.0, 2)
    assert last.algorithm.build() == ALGORITHMS["fedprox"](mu=0.5)  # type: ignore[call-arg] # the table's type is Algorithm, which has no options
    assert planned[-1].path == "fedprox-mu=0.5/clients.alpha=1.0/seed-7"
    assert planned[-1].name == "fedprox:mu=0.5, clients.alpha = 1.0, seed 7"
    assert len({cell.path for cell in planned}) == len(planned)


def test_runs_of_a_seed_differ_by_the_algorithm_alone(ask: Ask) -> None:
    def without_algorithm(cell: Cell) -> Config:
        return cell.config.model_copy(update={"algorithm": None})

    first, second = [cell for cell in cells(ask("fedavg,fedalign_moe")) if cell.seed == 1]
    assert without_algorithm(first) == without_algorithm(second)
    assert first.config.run.threads == 1  # numbers do not depend on how many runs go side by side


def test_an_algorithm_may_reach_beyond_its_own_options(ask: Ask) -> None:
    design = ask('fedavg,fedavg:training.weight_decay=0.1:wire.dtype="int8"')
    plain, other = [cell.config for cell in cells(design) if cell.seed == 0]
    assert (plain.training.weight_decay, other.training.weight_decay) == (0.0, 0.1)
    assert other.wire.dtype == "int8"


def test_options_of_the_file_stay_with_its_algorithm() -> None:
    base = load_config(None, ["algorithm.name=fedalign_moe", "algorithm.beta=0.25"])
    design = make_design(base, parse_algorithms(["fedavg,fedalign_moe,fedalign_moe:beta=1.0"]), {}, (0,), False)
    built = [cell.config.algorithm.build() for cell in cells(design)]
    assert built == [ALGORITHMS["fedavg"](), FedAlignMoE(beta=0.25), FedAlignMoE(beta=1.0)]


def test_the_ablation_adds_one_part_a_row() -> None:
    design = make_design(load_config(), ablation(), {}, (0,), False)
    rows = [cell.config.algorithm.build() for cell in cells(design)]
    assert rows == [
        FedAvg(),
        FedAlignPaper(gate_weights="uniform", adaptive_strength=False, experts="average"),
        FedAlignPaper(adaptive_strength=False, experts="average"),
        FedAlignPaper(experts="average"),
        FedAlignPaper(),
    ]
    assert design.baseline == next(iter(ABLATION)) == "parameter average"


def test_the_baseline_is_fedavg_or_what_comes_first(ask: Ask) -> None:
    assert ask("fedprox,fedavg").baseline == BASELINE == "fedavg"
    assert ask("fedprox,fedalign_moe").baseline == "fedprox"


def test_strengths_are_options_with_values_that_the_algorithms_take() -> None:
    for name, (option, values) in STRENGTHS.items():
        for value in values:
            assert getattr(ALGORITHMS[name](**{option: value}), option) == value


def test_a_request_survives_its_file(ask: Ask) -> None:
    design = ask("fedavg,fedalign_moe:gate=average", "3,7", ["clients.alpha=0.1,1.0", 'data.labels=["a", "b"]'])
    assert Design.read(design.to_toml()) == design


@pytest.mark.parametrize(
    ("text", "single", "grid"),
    [
        ("clients.alpha=0.1,1.0", None, {"clients.alpha": ["0.1", "1.0"]}),
        ("clients.alpha = 0.1, 1.0", None, {"clients.alpha": ["0.1", "1.0"]}),
        ("data.labels=['a', 'b']", "data.labels=['a', 'b']", {}),
        ("data.labels=['a'],['b', 'c']", None, {"data.labels": ["['a']", "['b', 'c']"]}),
        ('data.template="{text}, so:"', 'data.template="{text}, so:"', {}),
        ('data.template="{text}, so:","{text}:"', None, {"data.template": ['"{text}, so:"', '"{text}:"']}),
        ("clients.partition=dirichlet,iid", None, {"clients.partition": ["dirichlet", "iid"]}),
        ("data.train=a.jsonl", "data.train=a.jsonl", {}),
    ],
)
def test_a_comma_makes_a_grid_unless_it_is_quoted(text: str, single: str | None, grid: dict[str, list[str]]) -> None:
    assert parse_grid([text]) == ([single] if single else [], grid)


def test_seeds_are_counted_or_named() -> None:
    assert parse_seeds("5") == (0, 1, 2, 3, 4)
    assert parse_seeds("11, 3") == (11, 3)
    assert parse_seeds("7,") == (7,)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0", "--seeds 0: no runs at all"),
        ("3,7,3", "--seeds: '3' is given twice"),
        ("3,03", "--seeds: '3' is given twice"),
        ("-1", "--seeds '-1': give how many"),
        ("many", "--seeds 'many'"),
        ("1,,2", "--seeds '1,,2'"),
        ("", "--seeds ''"),
        (",", "--seeds ','"),
    ],
)
def test_bad_seeds(text: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_seeds(text)
    assert str(caught.value).startswith(told)


@pytest.mark.parametrize(
    ("algorithms", "sets", "told"),
    [
        ("fedavg,fedalgin", [], "algorithm.name = 'fedalgin': unknown. Choose one of: "),
        ("fedavg,fedavg", [], "--algorithms: 'fedavg' is given twice"),
        ("fedavg,", [], "--algorithms 'fedavg,': has an empty part"),
        ("fedprox:mu", [], "--algorithms 'fedprox:mu': 'mu' is no option. Write NAME:OPTION=VALUE"),
        ("fedprox:mu=-1", [], "algorithm.mu = -1"),
        ("fedprox:nu=1", [], "algorithm.nu = 1: fedprox has no such option"),
        ("fedprox:mu=1:mu=2", [], "--algorithms 'fedprox:mu=1:mu=2': 'algorithm.mu' is given twice"),
        ("fedavg:data.max_train=5", [], "--algorithms 'fedavg:data.max_train=5': data.max_train is the same for all"),
        ("fedavg:algorithm.name=fedprox", [], "--algorithms 'fedavg:algorithm.name=fedprox': algorithm.name is"),
        ("fedprox:mu=1,fedprox:mu=+1", [], None),
        ("fedavg", ["run.seed=1,2"], "--set 'run.seed=1,2': run.seed is what --seeds is for"),
        ("fedavg", ["algorithm.name=fedavg,fedprox"], "--set 'algorithm.name=fedavg,fedprox': algorithm.name is what"),
        ("fedavg", ["clients.alpha=0.1,0.1"], "--set clients.alpha: '0.1' is given twice"),
        ("fedavg", ["clients.alpha=0.1,,1"], "--set clients.alpha '0.1,,1': has an empty part"),
        ("fedavg", ["clients.alpha=0.1,-1"], "clients.alpha = -1: input should be greater than 0"),
        ("fedavg", ["algorithm.mu=1,2"], "algorithm.mu = 1: fedavg has no such option"),
        (
            "fedavg:training.epochs=2",
            ["training.epochs=1,2"],
            "training.epochs: is an option of fedavg:training.epochs=2 and in --set as well",
        ),
        ("fedavg", ["federation.engine=flower"], "federation.engine = 'flower': compare makes all its runs"),
    ],
)
def test_bad_requests(ask: Ask, algorithms: str, sets: list[str], told: str | None) -> None:
    if told is None:
        assert len(cells(ask(algorithms, sets=sets))) == 4
        return
    with pytest.raises(UserError) as caught:
        ask(algorithms, sets=sets)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


def test_labels_that_would_share_a_folder_are_refused(ask: Ask) -> None:
    with pytest.raises(UserError, match="another one would have the same folder"):
        ask("fedprox:mu=1,fedprox: mu=1")


def test_more_of_the_same_is_the_same_comparison(ask: Ask) -> None:
    old = ask("fedavg,fedprox", "2", ["clients.alpha=0.1,1.0"])
    assert differences(old, old) == []
    assert differences(old, ask("fedprox,fedavg,fedmoe", "3", ["clients.alpha=10,1.0,0.1"])) == []


@pytest.mark.parametrize(
    ("algorithms", "seeds", "sets", "told"),
    [
        ("fedavg", "2", ["clients.alpha=0.1,1.0"], "it holds runs of fedprox"),
        ("fedavg,fedprox", "1", ["clients.alpha=0.1,1.0"], "it holds runs with seed 1"),
        ("fedavg,fedprox", "2", ["clients.alpha=0.1,2.0"], "it holds runs with clients.alpha = 1.0"),
        ("fedavg,fedprox", "2", [], "it varies clients.alpha, asked for is nothing"),
        (
            "fedavg,fedprox",
            "2",
            ["clients.alpha=0.1,1.0", "training.epochs=5"],
            "training.epochs = 1, asked for is 5",
        ),
    ],
)
def test_another_comparison_is_told_by_what_differs(
    ask: Ask, algorithms: str, seeds: str, sets: list[str], told: str
) -> None:
    old = ask("fedavg,fedprox", "2", ["clients.alpha=0.1,1.0"])
    assert differences(old, ask(algorithms, seeds, sets)) == [told]


def test_tuning_belongs_to_the_comparison(ask: Ask) -> None:
    tuned = ask("fedavg", tune=True)
    assert "it was made without --tune" in differences(ask("fedavg"), tuned)
    assert differences(tuned, ask("fedavg", "1,0", tune=True)) == ["it was tuned on seed 0, asked for is 1"]


def test_compared_runs_take_the_same_rounds() -> None:
    base = load_config(None, ["run.patience=2"])
    with pytest.raises(UserError, match=r"run.patience = 2: runs that are compared take the same rounds"):
        make_design(base, parse_algorithms(["fedavg"]), {}, [0], tune=False)
