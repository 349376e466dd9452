"""Flower's programs: a version that was not tried is refused in one line."""

from __future__ import annotations

from importlib import metadata

import pytest

from fedalign.errors import UserError
from fedalign.federation.flower.programs import require_flower

REQUIRED = ["torch>=2.11", 'flwr>=1.41,<1.43; extra == "flower"', 'flwr[simulation]>=1.41,<1.43; extra == "simulation"']


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: request.param)
    monkeypatch.setattr(metadata, "requires", lambda _: REQUIRED)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("installed", ["1.41.0", "1.42.3"], indirect=True)
def test_a_version_in_the_range_is_taken() -> None:
    require_flower("flower")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("installed", ["1.40.0", "1.43.0", "2.0.0"], indirect=True)
def test_another_version_is_refused_with_what_is_supported(request: pytest.FixtureRequest) -> None:
    version = request.node.callspec.params["installed"]
    with pytest.raises(UserError) as refused:
        require_flower("flower")
    rule = str(refused.value).split("'")[1].removeprefix("flwr")
    assert set(rule.split(",")) == {">=1.41", "<1.43"}
    assert str(refused.value).startswith(f"flwr {version} is installed, {rule} is supported. Run: pip install")
