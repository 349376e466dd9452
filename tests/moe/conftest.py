from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from fedalign.moe.model import MoEModel
from tests.moe import tiny


@pytest.fixture(scope="session")
def tiny_moe() -> Callable[[str], MoEModel]:
    """A tiny model of a family, built once: for tests that leave it as it is."""
    return cache(lambda family: MoEModel.wrap(tiny.build(family)))
