"""A coordinator that asks a site for whatever it likes, as its messages arrive there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.federation.flower.client_app import site_answer
from fedalign.federation.messages import MESSAGES, Parcel, decode, encode
from fedalign.maths.rounding import pack
from fedalign.moe.model import MoEModel
from fedalign.protocol import PROTOCOL, Broadcast, Failure, Fetch
from tests.conftest import changed, make_site, rows, write_jsonl
from tests.federation.test_messages import travel

VERBS = ("hello", "start", "train", "update", "evaluate")


@dataclass
class Coordinator:
    """Asks one site; `config` is what it sends along, each time another if it likes."""

    site: SiteFolder
    config: Config
    broadcast: Broadcast

    def ask(self, verb: str, run: str = "night", **data: Any) -> Any:
        """The answer as it arrives; `data` is changed in the section of that name."""
        config = changed(self.config, "data", **data) if data else self.config
        return self.ask_with(config, verb, run)

    def ask_with(self, config: Config, verb: str, run: str = "night") -> Any:
        contents = {
            "train": encode(self.broadcast),
            "evaluate": encode(self.broadcast),
            "update": encode(Fetch(self.site.config.name, 1, ("shared",), 0, 1 << 40)),
        }
        nothing = Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})
        parcel = travel(contents.get(verb, nothing))
        return decode(travel(site_answer(self.site, config.to_toml(), run, verb, parcel)), tuple(MESSAGES.values()))

    def refused(self, verb: str, run: str = "night", **data: Any) -> str:
        """The reason of a message that is not answered."""
        answer = self.ask(verb, run, **data)
        assert isinstance(answer, Failure), answer
        return answer.reason


Attack = Callable[..., Coordinator]


@pytest.fixture
def attack(site_config: Config, olmoe: Path, tmp_path: Path) -> Attack:
    """`attack(rows, limits)`: a coordinator of a site with these rows, whose site.toml names its model and limits."""
    moe = MoEModel.load(olmoe)
    broadcast = Broadcast(1, {group: pack(value.cpu(), "float32", 0) for group, value in moe.read().items()})

    def make(lines: list[dict[str, str]] | None = None, limits: str = "", model: bool = True) -> Coordinator:
        folder = tmp_path / "ward"
        folder.mkdir(exist_ok=True)
        write_jsonl(folder / "data.jsonl", rows() if lines is None else lines)
        own = f'[model]\npath = "{olmoe}"\n' if model else ""
        toml = f'name = "ward"\n[data]\ntrain = "data.jsonl"\n{own}'
        site = make_site(folder, f"{toml}[limits]\n{limits}\n" if limits else toml)
        return Coordinator(site, changed(site_config, "data", max_train=0), broadcast)

    return make
