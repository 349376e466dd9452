"""The ClientApp as Flower calls it, at a site and in a simulation."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.config.toml import load_config
from fedalign.federation.flower import client_app
from fedalign.federation.flower.link import RUN, from_records, to_records
from fedalign.federation.flower.warm import meeting_file, receive, send
from fedalign.federation.messages import MESSAGES, Parcel, decode, encode
from fedalign.maths.rounding import pack
from fedalign.moe.model import MoEModel
from fedalign.protocol import (
    PROTOCOL,
    Broadcast,
    Evaluation,
    Failure,
    Fetch,
    Hello,
    Lacking,
    Piece,
    Start,
    Statistics,
)

NOTHING = Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})


@pytest.fixture(autouse=True)
def _in_a_process_of_flowers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(client_app, "log_to_stderr", lambda: None)
    yield
    client_app._dealt.cache_clear()
    client_app._dealt_service.cache_clear()


class Node:
    """A node of Flower's: every message meets a ClientApp."""

    def __init__(self, config: Config | str, out: Path, **about: Any) -> None:
        self.config, self.out, self.about = config, out, about

    def ask(self, kind: str, parcel: Parcel, **run: str) -> Any:
        text = self.config if isinstance(self.config, str) else self.config.to_toml()
        records = to_records(parcel)
        records[RUN] = ConfigRecord({"config": text, "key": "night", "out": str(self.out), **run})
        return self.answer(kind, records)

    def answer(self, kind: str, records: RecordDict) -> Any:
        context = Context(run_id=1, node_id=2, node_config=self.about, state=RecordDict(), run_config={})
        reply = client_app.app(Message(records, 2, kind), context)
        assert not reply.has_error()
        return decode(from_records(reply.content), tuple(MESSAGES.values()))


def broadcast(model: str, round: int = 1) -> Parcel:
    weights = {group: pack(value, "float32", 0) for group, value in MoEModel.load(model).read().items()}
    return encode(Broadcast(round, weights))


def test_a_site_answers_every_message(site_config: Config, ward: SiteFolder, tmp_path: Path) -> None:
    node = Node(site_config, tmp_path, site=str(ward.path / "site.toml"))
    hello = node.ask("query.hello", NOTHING)
    assert isinstance(hello, Hello)
    assert hello.client == "ward 3"
    assert isinstance(node.ask("query.start", NOTHING), Start)
    assert isinstance(node.ask("train", broadcast(site_config.model.path)), Statistics)
    assert (ward.memory("night") / "round-00001").is_dir()
    assert isinstance(node.ask("query.update", encode(Fetch("ward 3", 1, ("shared",), 0, 8))), Piece)
    assert isinstance(node.ask("evaluate", broadcast(site_config.model.path)), Evaluation)
    assert isinstance(node.ask("query.finish", NOTHING), Lacking)
    other = node.ask("query.update", encode(Fetch("ward 3", 1, ("shared",), 0, 8)), key="another")
    assert other == Failure("ward 3", "update", "it keeps no update of round 1")


def test_a_node_that_names_no_site_is_told_how_to(site_config: Config, tmp_path: Path) -> None:
    failure = Node(site_config, tmp_path).ask("query.hello", NOTHING)
    assert failure.reason.startswith("this node names no site. Start it with: flower-supernode --node-config")


def test_a_site_file_that_is_wrong_is_told_at_the_site(
    site_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("fedalign"), "propagate", True)
    node = Node(site_config, tmp_path, site=str(tmp_path / "nowhere"))
    reason = "its site.toml cannot be read; the reason is in the client's own log"
    assert node.ask("query.hello", NOTHING).reason == reason
    assert "no site.toml there" in caplog.text
    (tmp_path / "site.toml").write_text("name = 3")
    failure = Node(site_config, tmp_path, site=str(tmp_path)).ask("train", broadcast(site_config.model.path))
    assert failure.reason == reason
    assert "data: missing" in caplog.text


@pytest.mark.parametrize("config", ["[run]\nseed = -1\n", "[nonsense]\n", "not = = toml", "[model]\npath = '/nowhere'"])
def test_a_configuration_that_does_not_fit_is_a_failure_not_a_crash(
    config: str, ward: SiteFolder, tmp_path: Path
) -> None:
    assert isinstance(Node(config, tmp_path, site=str(ward.path)).ask("query.hello", NOTHING), Failure)


def test_what_is_no_message_of_ours_is_a_failure(site_config: Config, ward: SiteFolder, tmp_path: Path) -> None:
    node = Node(site_config, tmp_path, site=str(ward.path))
    assert node.answer("train", RecordDict()).reason.startswith("not a message of FedAlign-MoE")
    assert node.answer("train", to_records(NOTHING)).reason.startswith("not a message of FedAlign-MoE: no 'run'")


def test_clients_of_a_simulation_share_a_model_and_keep_to_their_parts(settings: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*settings, "training.epochs=1", "federation.engine=simulation"])
    nodes = [Node(config, tmp_path, **{"partition-id": number, "num-partitions": 4}) for number in range(4)]
    parcel = broadcast(config.model.path)
    first = nodes[0].ask("train", parcel)
    assert first.client == "client-00"
    hellos = [node.ask("query.hello", NOTHING) for node in nodes]  # after one of them has trained
    assert [hello.client for hello in hellos[:3]] == ["client-00", "client-01", "client-02"]
    assert {hello.weights for hello in hellos[:3]} == {MoEModel.load(config.model.path).weights_hash()}
    assert hellos[3].reason.startswith("partition 3: the configuration deals data to 3 clients alone")
    assert client_app._dealt.cache_info().misses == 1
    assert [path.parent.name for path in (tmp_path / "clients").glob("*/round-*")] == ["client-00"]
    update = nodes[0].ask("query.update", encode(Fetch("client-00", 1, ("shared",), 0, 8)))
    assert isinstance(update, Piece)


def test_a_warm_trainer_answers_what_needs_the_model_and_nothing_else(
    site_config: Config, ward: SiteFolder, tmp_path: Path
) -> None:
    heard: list[tuple[str, str, bool]] = []

    def play() -> None:
        with Listener(authkey=b"\0") as listener:
            meeting_file(ward).write_text(json.dumps({"address": listener.address, "secret": "00"}))
            ready.set()
            for _ in range(4):
                with listener.accept() as connection:
                    about = json.loads(connection.recv_bytes())
                    receive(connection)
                    heard.append((about["verb"], about["run"], about["config"] == site_config.to_toml()))
                    send(connection, encode(Failure("warm", "join", about["verb"])))

    ready = threading.Event()
    thread = threading.Thread(target=play)
    thread.start()
    assert ready.wait(10)
    node = Node(site_config, tmp_path, site=str(ward.path))
    assert node.ask("query.update", encode(Fetch("ward 3", 1, (), 0, 0))).reason == "it keeps no update of round 1"
    assert isinstance(node.ask("query.finish", NOTHING), Lacking)
    for kind in ("query.hello", "query.start", "train", "evaluate"):
        assert node.ask(kind, NOTHING).client == "warm"
    thread.join(10)
    assert heard == [(verb, "night", True) for verb in ("hello", "start", "train", "evaluate")]
    assert isinstance(node.ask("query.hello", NOTHING), Hello)  # it is gone: the model is loaded here
