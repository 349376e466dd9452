"""The server's own step, two rounds of each rule by hand."""

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from fedalign.config.run import ServerConfig
from fedalign.maths.server_step import server_step
from fedalign.protocol import SHARED, ParameterGroup, State, Weights

OTHER = ParameterGroup("expert", 0, 0)


def two_rounds(rule: str, **options: float) -> tuple[Tensor, State]:
    """From 1, summed updates of +2 and then -1."""
    config = ServerConfig.model_validate({"optimizer": rule} | options)
    weights: Weights = {SHARED: tensor([1.0])}
    moments: State = {}
    for step in (2.0, -1.0):
        weights, moments = server_step(config, weights, {SHARED: weights[SHARED] + step}, moments, spread=0.0)
    return weights[SHARED], moments


def test_sgd_with_momentum() -> None:
    # m: 2, .5 * 2 - 1 = 0; w: 1 + .1 * 2, + .1 * 0
    assert_close(two_rounds("sgd", momentum=0.5, learning_rate=0.1)[0], tensor([1.2]))


def test_sgd_with_rate_one_and_no_momentum_is_the_average() -> None:
    assert_close(two_rounds("sgd", momentum=0.0)[0], tensor([2.0]))


def test_adam() -> None:
    # m: 1, 0; v: .5 * 4 = 2, 1 + .5 = 1.5
    first = 1 + 0.1 * 1 / (2**0.5 + 1)
    assert_close(two_rounds("adam", momentum=0.5, beta2=0.5, learning_rate=0.1, epsilon=1.0)[0], tensor([first]))


def test_yogi() -> None:
    # v: 0 + .5 * 4 * sign(4 - 0) = 2, then 2 + .5 * 1 * sign(1 - 2) = 1.5
    found, moments = two_rounds("yogi", momentum=0.0, beta2=0.5, learning_rate=0.1, epsilon=1.0)
    assert_close(moments["second.shared"], tensor([1.5]))
    assert_close(found, tensor([1 + 0.1 * 2 / (2**0.5 + 1) - 0.1 * 1 / (1.5**0.5 + 1)]))


@pytest.mark.parametrize(("spread", "stretch"), [(40.0, 4.0), (1.0, 1.0)])
def test_fedexp(spread: float, stretch: float) -> None:
    # sum moved by (1, 2): length² 5; 40 / (2 * 5) = 4, and never less than one
    config = ServerConfig(optimizer="fedexp", epsilon=1e-12)
    old: Weights = {SHARED: tensor([0.0]), OTHER: tensor([0.0])}
    new, moments = server_step(config, old, {SHARED: tensor([1.0]), OTHER: tensor([2.0])}, {}, spread)
    assert_close(new[OTHER], tensor([2 * stretch]))
    assert moments == {}


@pytest.mark.parametrize("rule", ["sgd", "adam", "yogi", "fedexp"])
def test_groups_that_nobody_sent_stay_and_so_do_their_moments(rule: str) -> None:
    config = ServerConfig.model_validate({"optimizer": rule})
    old: Weights = {SHARED: tensor([1.0]), OTHER: tensor([5.0])}
    moments: State = {"first.expert[0,0]": tensor([3.0]), "second.expert[0,0]": tensor([3.0])}
    new, after = server_step(config, old, {SHARED: tensor([2.0]), OTHER: old[OTHER]}, moments, 1.0)
    assert new[OTHER] is old[OTHER]
    assert torch.equal(after["first.expert[0,0]"], tensor([3.0]))
    assert not torch.equal(new[SHARED], old[SHARED])
