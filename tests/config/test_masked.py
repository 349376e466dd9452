"""What masked sums cannot have is refused in one line, which says what to choose."""

import pytest

from fedalign.algorithms import ALGORITHMS, make
from fedalign.algorithms.fedavg import FedAvg
from fedalign.algorithms.fedprox import FedProx
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.protocol import Plan, Reports, Shares, State

MASKED = ["privacy.masked=true", "algorithm.name=by_use", "server.max_norm_ratio=0", "evaluation.clients=false"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["federation.engine=flower", 'data.labels=["a","b"]'],
            'server.robust = "auto", over sites "clip": needs the length',
        ),
        (["algorithm.name=fedalign_moe"], "need statistics of each client"),
        (["algorithm.gate=rows"], "need statistics of each client"),
        (["algorithm.min_holders=2"], "need statistics of each client"),
        (["algorithm.gate=local"], "clients keep parts of the model"),
        (["algorithm.name=pfl_moe"], 'algorithm.name = "pfl_moe"'),
        (["algorithm.name=site_experts"], "the update of an expert that one client owns is a sum of one"),
        (["algorithm.name=scaffold"], "Choose one of: by_use, fedavg, fedprox"),
        (["server.robust=clip"], 'server.robust = "clip": needs the length of each client\'s update'),
        (["server.max_norm_ratio=100"], "server.max_norm_ratio = 100: needs the length"),
        (["server.optimizer=fedexp"], "Choose one of: average, sgd, adam, yogi"),
        (["tuning.kind=lora", "tuning.average=exact"], "Choose one of: factors, freeze_a"),
        (["wire.dtype=int8"], "updates travel in 16 bits of their own"),
        (
            ["algorithm.vocabulary=average", "evaluation.clients=true", "privacy.epsilon=4"],
            "with [privacy] sites send no scores",
        ),
        (
            ["training.loss=label_shift", "data.kind=classification", 'data.labels=["a","b"]'],
            "each client's counts of labels",
        ),
        (["tracking.health=full"], "needs sketches of each client"),
        (["clients.limits.a.max_experts=2"], "which experts they are would tell"),
        (["privacy.masked_min_holders=1"], "privacy.masked_min_holders = 1"),
    ],
)
def test_what_needs_more_than_sums_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(None, [*MASKED, *settings])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", sorted({*ALGORITHMS} - {"by_use", "fedavg", "fedprox"}))
def test_every_other_algorithm_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"privacy\.masked"):
        load_config(None, [*MASKED, f"algorithm.name={name}"])


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["algorithm.name=fedavg"],
        ["algorithm.name=fedprox", "server.optimizer=yogi"],
        ["algorithm.vocabulary=clients", "algorithm.vocabulary_holders=2"],
        ["algorithm.vocabulary_half_life=2"],
        ["tuning.kind=lora", "tuning.average=freeze_a"],
        ["wire.down=bfloat16"],
        ["evaluation.clients=true", "run.patience=2"],
        ["algorithm.vocabulary=average", "privacy.epsilon=4"],
    ],
)
def test_ratios_of_sums_are_taken(settings: list[str]) -> None:
    assert load_config(None, [*MASKED, *settings]).privacy.masked


def test_it_is_off_by_default() -> None:
    assert not Config().privacy.masked


def test_a_plan_of_its_own_is_no_ratio_until_it_says_so() -> None:
    class Mine(FedAvg):
        def plan(self, reports: Reports, state: State) -> Plan:
            return reports.plan()

    class Near(FedProx):
        pass

    assert Mine().shares is None
    assert Near().shares == Shares()
    assert make("by_use", {}).shares == Shares(load=True, rows="tokens")
