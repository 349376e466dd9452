from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest

from fedalign.moe.model import MoEModel
from tests.moe import tiny


@pytest.fixture(scope="session", autouse=True)
def modules_of_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers puts the code that a checkpoint brings along, instead of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session")
def tiny_moe() -> Callable[[str], MoEModel]:
    """A tiny model of a family, built once: for tests that leave it as it is."""
    return cache(lambda family: MoEModel.wrap(tiny.build(family)))
