"""Settings that another makes void are told, each with the reason, and no others."""

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from fedalign.cli.compare import carry_out
from fedalign.compare.plan import make_design, parse_algorithms, parse_grid
from fedalign.config.run import Config
from fedalign.config.toml import flat, load_config
from fedalign.config.unused import VOID, unused
from fedalign.demo import DEMO
from tests.conftest import Command

NOISE = ("privacy.epsilon=4.0", "evaluation.clients=false", "algorithm.name=fedavg")
PULL = ("algorithm.reg_strength=0.1",)
BY_USE = ("algorithm.name=by_use", "algorithm.vocabulary=average")
SITES = ("federation.engine=flower", 'data.labels=["a", "b"]')


def said(*overrides: str) -> str:
    return "; ".join(unused(load_config(None, overrides)))


def test_of_the_defaults_nothing_is_said() -> None:
    assert unused(Config()) == []
    for name in ("demo.toml", "sites.toml"):
        assert unused(load_config(DEMO.with_name(name))) == []


def test_keys_are_keys() -> None:
    keys = flat(Config().model_dump(mode="json"), ".")
    assert {key for void in VOID for key in (*void.keys, *void.because)} <= {*keys}


@pytest.mark.parametrize(
    ("given", "void", "reason", "woken"),
    [
        (["clients.held_out=0"], "evaluation.clients = true", "clients.held_out = 0", ["evaluation.clients=false"]),
        (["evaluation.everyone=2"], "evaluation.everyone = 2", "clients.sample = 1.0", ["clients.sample=0.5"]),
        (["evaluation.leaving=3", "evaluation.clients=false"], "leaving = 3", "clients", ["evaluation.clients=true"]),
        (["evaluation.leaving=3", *SITES], "leaving = 3", '"flower"', ["federation.engine=in_process"]),
        (["evaluation.generate=true"], "evaluation.generate", 'data.kind = "classification"', ["data.kind=chat"]),
        (["evaluation.max_new_tokens=9"], "max_new_tokens = 9", "data.kind", ["data.kind=instruction"]),
        (
            ["evaluation.length_normalise=true", "data.kind=text"],
            "length_normalise = true",
            'data.kind = "text"',
            ["data.kind=multiple_choice"],
        ),
        (['data.labels=["a"]', "data.kind=chat"], 'data.labels = ["a"]', "data.kind", ["data.kind=classification"]),
        (['data.template="{text}"', "data.kind=chat"], "data.template", "data.kind", ["data.kind=text"]),
        (["data.columns.client=who"], "data.columns.client", "clients.partition", ["clients.partition=natural"]),
        (["clients.count=3", "clients.partition=files"], "clients.count = 3", "partition", ["clients.partition=iid"]),
        (["clients.alpha=1.0", "clients.partition=iid"], "alpha = 1.0", '"iid"', ["clients.partition=dirichlet"]),
        (["clients.classes=3"], "clients.classes = 3", '"dirichlet"', ["clients.partition=pathological"]),
        (["clients.size_growth=square"], "size_growth", '"dirichlet"', ["clients.partition=size"]),
        (["data.train=x.csv", *SITES], 'data.train = "x.csv"', "no data.test", ["federation.engine=simulation"]),
        (
            ["data.train=x.csv", "data.test=y.csv", *SITES],
            'data.train = "x.csv"',
            'data.kind = "classification"',
            ["data.kind=multiple_choice", "data.labels=[]"],
        ),
        *[
            ([given, *SITES], given.partition("=")[0], '"flower"', ["federation.engine=simulation", *woken])
            for given, *woken in (
                ["clients.count=3"],
                ["clients.min_examples=3"],
                ["clients.alpha=2.0"],
                ["clients.classes=3", "clients.partition=pathological"],
                ["clients.size_growth=square", "clients.partition=size"],
                ["data.columns.client=who", "clients.partition=natural"],
            )
        ],
        (["clients.partition=iid", *SITES], 'partition = "iid"', '"flower"', ["federation.engine=simulation"]),
        (["clients.held_out=0.3", *SITES], "held_out = 0.3", '"flower"', ["federation.engine=simulation"]),
        (["run.device=cpu", *SITES], 'run.device = "cpu"', "no data.test", ["data.test=test.csv"]),
        (["data.encoding=cp1252", *SITES], "data.encoding", "no data.test", ["data.test=test.csv"]),
        (["federation.in_flight=2"], "in_flight = 2", '"in_process"', list(SITES)),
        (["wire.piece_mb=1.0"], "piece_mb = 1.0", '"in_process"', list(SITES)),
        (["federation.superlink=h:1", "federation.engine=simulation"], "superlink", '"simulation"', list(SITES)),
        (["federation.workers=2", *SITES], "workers = 2", '"flower"', ["federation.engine=simulation"]),
        (["tuning.router=frozen"], 'tuning.router = "frozen"', 'tuning.kind = "full"', ["tuning.kind=lora"]),
        (
            ["statistics.update_width=8", "algorithm.name=fedavg"],
            "update_width = 8",
            'algorithm.name = "fedavg"',
            ["tracking.health=full"],
        ),
        (
            ["statistics.centroid_width=8", "algorithm.name=fedavg"],
            "centroid_width = 8",
            'algorithm.name = "fedavg"',
            ["tracking.health=full"],
        ),
        (["wire.error_feedback=on"], 'error_feedback = "on"', 'wire.dtype = "float32"', ["wire.dtype=int8"]),
        (["server.learning_rate=0.5"], "server.learning_rate = 0.5", '"average"', ["server.optimizer=sgd"]),
        (["server.momentum=0.5"], "momentum = 0.5", '"average"', ["server.optimizer=sgd"]),
        (["server.beta2=0.5", "server.optimizer=sgd"], "beta2 = 0.5", '"sgd"', ["server.optimizer=adam"]),
        (["server.epsilon=0.5", "server.optimizer=sgd"], "epsilon = 0.5", '"sgd"', ["server.optimizer=fedexp"]),
        (["server.max_norm_ratio=9", "server.robust=clip"], "max_norm_ratio = 9", '"clip"', ["server.robust=none"]),
        (["server.clip=2"], "server.clip = 2", 'server.robust = "auto"', ["server.robust=clip"]),
        (["server.radius=2", "server.robust=krum"], "radius = 2", '"krum"', ["server.robust=centered_clip"]),
        (["privacy.delta=1e-6"], "privacy.delta = 1e-06", "no privacy.epsilon", NOISE),
        (["privacy.max_grad_norm=2.0"], "privacy.max_grad_norm = 2.0", "no privacy.epsilon", NOISE),
        (["privacy.loads_noise=5"], "loads_noise = 5", "no privacy.epsilon", [*NOISE, *BY_USE]),
        (["privacy.loads_noise=5", *NOISE], "loads_noise = 5", '"fedavg"', BY_USE),
        (
            ["privacy.masked_min_holders=5", "algorithm.name=fedavg", "server.max_norm_ratio=0"],
            "masked_min_holders = 5",
            "privacy.masked = false",
            ["privacy.masked=true"],
        ),
        *[
            ([f"algorithm.{given}", *others], f"algorithm.{name}", reason, [woken])
            for given in ("vocabulary_holders=3", "vocabulary_half_life=5.0")
            for name in [given.partition("=")[0]]
            for others, reason, woken in (
                (["algorithm.vocabulary=average"], 'vocabulary = "average"', "algorithm.vocabulary=clients"),
                (["tuning.kind=lora"], 'kind = "lora"', "tuning.kind=full"),
            )
        ],
        *[
            ([f"algorithm.{given}"], f"algorithm.{given.partition('=')[0]}", "reg_strength = 0", PULL)
            for given in ("granularity=token", "form=kl", "adaptive_strength=false")
        ],
        (["algorithm.vocabulary=clients", "tuning.kind=moe"], "vocabulary = ", '"moe"', ["tuning.kind=full"]),
        (
            ["server.min_arrived=0.9", "privacy.masked=true", "server.max_norm_ratio=0", "algorithm.name=fedavg"],
            "min_arrived = 0.9",
            "privacy.masked = true",
            ["privacy.masked=false"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else None,
)
def test_what_another_setting_makes_void_is_told(
    given: Sequence[str], void: str, reason: str, woken: Sequence[str]
) -> None:
    (told,) = [line for line in unused(load_config(None, given)) if void in line]
    start, _, why = told.partition(", with ")
    assert start.startswith("no effect: ")
    assert void in start
    assert reason in why
    assert void not in said(*given, *woken).replace(f"with {void}", "")


def test_noise_has_a_bound_of_its_own() -> None:
    """Here, since an epsilon that is given cannot be taken back by another setting."""
    told = "no effect: training.max_grad_norm = 2.0, with privacy.max_grad_norm = 1.0"
    assert told in unused(load_config(None, ["training.max_grad_norm=2.0", *NOISE]))
    assert unused(load_config(None, ["training.max_grad_norm=2.0"])) == []


def test_with_noise_nothing_is_held_out() -> None:
    told = "no effect: clients.held_out = 0.3, with no privacy.noise_multiplier, privacy.epsilon = 4.0"
    assert told in unused(load_config(None, ["clients.held_out=0.3", *NOISE]))
    assert unused(load_config(None, ["clients.held_out=0.3"])) == []


def test_every_row_is_tried() -> None:
    """A row that nobody tries may say what is not so."""
    (mark,) = (mark for mark in test_what_another_setting_makes_void_is_told.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined] # pytest's own
    tried = {word.partition("=")[0] for given, _, _, woken in mark.args[1] for word in (*given, *woken)}
    tried.add("training.max_grad_norm")
    assert [void.keys for void in VOID if not {*void.keys} & tried] == []
    at_sites = next(void for void in VOID if "clients.count" in void.keys and void.because == ["federation.engine"])
    assert {*at_sites.keys} <= tried


def test_a_resolved_configuration_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(None, ["clients.held_out=0", "server.clip=2.0"])
    assert unused(load_config(config)) == unused(config)
    assert len(unused(config)) == 2


def test_a_comparison_says_it_of_all_its_runs() -> None:
    single, grid = parse_grid(["server.momentum=0.5", "clients.partition=iid", "clients.alpha=0.5,2.0"])
    design = make_design(load_config(None, single), parse_algorithms(["fedavg,fedprox"]), grid, [0], tune=False)
    told = list[str]()

    def broken_off(overwrite: bool) -> None:
        raise KeyboardInterrupt

    comparison = SimpleNamespace(design=design, folder=SimpleNamespace(path="x"), tell=told.append, run=broken_off)
    with pytest.raises(KeyboardInterrupt):
        carry_out(comparison, overwrite=False)  # type: ignore[arg-type] # one that makes no run
    assert told[1:-1] == [
        'no effect: clients.alpha = 0.5, with clients.partition = "iid"',
        'no effect: server.momentum = 0.5, with server.optimizer = "average"',
        'no effect: clients.alpha = 2.0, with clients.partition = "iid"',
    ]


def test_a_run_and_the_doctor_say_it(fedalign: Command, settings: list[str]) -> None:
    given = [word for setting in (*settings, "server.momentum=0.5") for word in ("--set", setting)]
    line = 'no effect: server.momentum = 0.5, with server.optimizer = "average"'
    code, out, err = fedalign("run", "demo", *given, "--dry-run")
    assert (code, line in out) == (0, True), err
    code, out, err = fedalign("doctor", "demo", *given)
    assert line in " ".join(out.split()), err
