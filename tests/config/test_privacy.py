"""What a private run cannot have is refused in one line, which says what to choose."""

import pytest

from fedalign.config.run import NOISED, Config
from fedalign.config.toml import load_config
from fedalign.errors import UserError

PRIVATE = ["algorithm.name=fedavg", "evaluation.clients=false", "privacy.epsilon=4"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["algorithm.name=fedalign_moe"], 'algorithm.name = "fedalign_moe": with [privacy] its statistics would need'),
        (["algorithm.name=scaffold"], "Choose one of: fedavg, fedprox, by_use."),
        (
            ["algorithm.name=by_use"],
            'by_use asks for tokens, which has no noise. Choose algorithm.vocabulary = "average"',
        ),
        (["algorithm.name=by_use", "algorithm.vocabulary=average", "algorithm.gate=rows"], "which has no noise"),
        (["tracking.health=full"], "fedavg asks for centroids, directions, which has no noise"),
        (["evaluation.clients=true"], "evaluation.clients = true: with [privacy] sites send no scores. Choose false"),
        (["privacy.noise_multiplier=1"], "privacy.noise_multiplier = 1.0: privacy.epsilon = 4.0 decides the noise"),
        (["privacy.seed=1", "federation.engine=flower", 'data.labels=["a","b"]'], "privacy.seed = 1: sites draw their"),
        (["tuning.kind=qlora"], 'tuning.kind = "qlora": not with [privacy]'),
        (["run.device=split"], 'run.device = "split": not with [privacy]'),
        (["clients.limits.a.max_experts=2"], "clients.limits.a.max_experts = 2: which experts they are would tell"),
        (["privacy.epsilon=0"], "privacy.epsilon = 0"),
        (["privacy.delta=1"], "privacy.delta = 1"),
        (["privacy.max_grad_norm=1e-44"], "privacy.max_grad_norm = 1e-44"),  # noise would be rounded to nothing
        (["privacy.max_grad_norm=1e30"], "privacy.max_grad_norm = 1e+30"),
    ],
)
def test_what_has_no_noise_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(None, [*PRIVATE, *settings])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NOISED)
def test_what_has_noise_is_taken(name: str) -> None:
    more = ["algorithm.vocabulary=average"] if name == "by_use" else []
    config = load_config(None, [*PRIVATE, f"algorithm.name={name}", *more])
    assert config.privacy.on
    assert config.sends_loads == (name == "by_use")


def test_it_is_off_by_default() -> None:
    assert not Config().privacy.on
    assert Config().sends_loads
    with pytest.raises(UserError, match=r"privacy.seed = 1: there is no noise"):
        load_config(None, ["privacy.seed=1"])
