"""What a client answers: to each message, when something is wrong, and after it has trained."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalign.client.memory import ClientData, Kept
from fedalign.client.open import open_site
from fedalign.client.trainer import OpenClient, Trainer
from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.errors import DataError, TrainingFailedError, UserError
from fedalign.federation import service as module
from fedalign.federation.messages import Message, Parcel, decode, encode
from fedalign.federation.service import Service
from fedalign.maths.rounding import pack, unpack_weights
from fedalign.moe.model import MoEModel
from fedalign.protocol import (
    PROTOCOL,
    SHARED,
    Broadcast,
    Evaluation,
    Failure,
    Fetch,
    Hello,
    Lacking,
    Packed,
    Piece,
    Request,
    Start,
    Statistics,
)
from tests.conftest import changed, keep_round, make_site, site_toml
from tests.federation.test_messages import same, travel

NOTHING = Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})
SECRET = "penicillin"


@pytest.fixture(autouse=True)
def _log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fedalign"), "propagate", True)


@pytest.fixture
def opened(site_config: Config, ward: SiteFolder) -> Service:
    return serve(ward, site_config)


def serve(site: SiteFolder, config: Config) -> Service:
    return Service(site.config.name, site.memory("night"), lambda: open_site(site, config, "night"))


def ask(service: Service, verb: str, message: Message | Parcel = NOTHING) -> Any:
    """The answer, as it arrives."""
    parcel = message if isinstance(message, Parcel) else encode(message)
    return decode(travel(service.answer(verb, travel(parcel))), tuple(module.Message.__args__))  # type: ignore[attr-defined] # a union has them


def broadcast(moe: MoEModel, round: int = 1, shift: float = 0.0) -> Broadcast:
    return Broadcast(round, {group: pack(value + shift, "float32", 0) for group, value in moe.read().items()})


def fails(service: Service, verb: str, message: Message | Parcel = NOTHING) -> Failure:
    answer = ask(service, verb, message)
    assert isinstance(answer, Failure), answer
    return answer


# ------------------------------------------------------------------------------------------------- in good order


def test_a_whole_round(opened: Service, site_config: Config, ward: SiteFolder, olmoe: Path) -> None:
    moe = MoEModel.load(olmoe)
    hello = ask(opened, "hello")
    assert isinstance(hello, Hello)
    assert hello.weights == moe.weights_hash()
    report = ask(opened, "train", broadcast(moe))
    assert isinstance(report, Statistics)
    assert (report.client, report.round, report.examples) == ("ward 3", 1, hello.examples)
    names = (str(SHARED), str(moe.layout.groups[9]))
    piece = ask(opened, "update", Fetch("ward 3", 1, names, 0, 1 << 40))
    assert isinstance(piece, Piece)
    assert tuple(piece.digests) == names
    values = piece.data.view(torch.float32)
    size = moe.layout.sizes[SHARED]
    assert len(values) == size + moe.layout.sizes[moe.layout.groups[9]]
    assert torch.equal(values[:size].norm(), report.norm_G[0])
    assert torch.equal(ask(opened, "update", Fetch("ward 3", 1, names, 8, 40)).data, piece.data[8:48])
    twice = fails(opened, "update", Fetch("ward 3", 1, names[:1] * 2, 0, 1 << 40))  # else any number of times as much
    assert twice.reason == "its update of round 1 was asked for a group twice"
    score = ask(opened, "evaluate", broadcast(moe))
    assert isinstance(score, Evaluation)
    assert (score.client, score.examples) == ("ward 3", hello.held_out)

    alone = open_site(ward, site_config, "another")  # the client step without any service
    expected = alone.trainer.train(alone.data, broadcast(moe))
    assert same(ask(opened, "train", broadcast(moe)).update_L_E_S, expected.update_L_E_S)
    assert same(
        alone.data.memory.hand_over("ward 3", Request("ward 3", 1, (SHARED,))).groups[SHARED].values, values[:size]
    )
    assert alone.trainer.evaluate(alone.data, unpack_weights(broadcast(moe).weights), 1) == score


def test_what_the_first_round_starts_from(opened: Service, olmoe: Path) -> None:
    start = ask(opened, "start")
    assert isinstance(start, Start)
    moe = MoEModel.load(olmoe)
    assert same(start.weights, {group: Packed(value) for group, value in moe.read().items()})
    assert start.constants == moe.constants() == {}


def test_at_the_end_updates_are_forgotten(opened: Service, olmoe: Path) -> None:
    ask(opened, "train", broadcast(MoEModel.load(olmoe)))
    assert list(opened.memory.folder.rglob("update.safetensors"))
    assert ask(opened, "finish") == Lacking("ward 3", 0, "", ())
    assert not list(opened.memory.folder.rglob("update.safetensors"))
    assert fails(opened, "update", Fetch("ward 3", 1, (), 0, 0)).reason == "it keeps no update of round 1"


@pytest.mark.parametrize("before", [["train"], ["evaluate"], ["hello", "train"], ["train", "evaluate", "start"]])
def test_what_is_said_of_the_model_is_said_of_the_one_that_was_loaded(
    opened: Service, olmoe: Path, before: list[str]
) -> None:
    """A site that stays warm, or a coordinator that resumes: hello may come after training."""
    moe = MoEModel.load(olmoe)
    for verb in before:
        assert not isinstance(ask(opened, verb, broadcast(moe, shift=0.1)), Failure)
    assert ask(opened, "hello").weights == moe.weights_hash()
    start = ask(opened, "start")
    assert same(start.weights, {group: Packed(value) for group, value in moe.read().items()})


def test_the_model_is_loaded_when_it_is_needed_and_once(site_config: Config, ward: SiteFolder, olmoe: Path) -> None:
    loaded = []

    def load() -> OpenClient:
        loaded.append(1)
        return open_site(ward, site_config, "night")

    moe = MoEModel.load(olmoe)
    service = Service("ward 3", ward.memory("night"), load)
    ask(service, "finish")
    fails(service, "update", Fetch("ward 3", 1, (str(SHARED),), 0, 1))
    assert not loaded
    for verb in ("hello", "start", "train", "evaluate", "train", "hello"):
        assert not isinstance(ask(service, verb, broadcast(moe)), Failure)
    assert len(loaded) == 1


def test_a_service_that_is_closed_frees_its_model(opened: Service, olmoe: Path) -> None:
    ask(opened, "train", broadcast(MoEModel.load(olmoe)))
    model = weakref.ref(opened.client.trainer.moe.model)
    gc.disable()  # what is freed by and by does not count
    try:
        opened.close()
        assert model() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------- out of order


@pytest.mark.parametrize("verb", ["train", "evaluate", "update"])
@pytest.mark.parametrize(
    ("parcel", "reason"),
    [
        (NOTHING, "unexpected message 'nothing'"),
        (Parcel({}, {}), "it speaks protocol None"),
        (encode(Failure("x", "train", "no")), "unexpected message 'failure'"),
        (
            Parcel({"protocol": PROTOCOL, "kind": "broadcast", "round": 1}, {}),
            ("a damaged broadcast", "unexpected message"),
        ),
    ],
)
def test_what_is_not_the_message_it_should_be_is_a_failure(
    opened: Service, verb: str, parcel: Parcel, reason: str | tuple[str, ...]
) -> None:
    failure = fails(opened, verb, parcel)
    assert failure.reason.startswith(reason)
    assert (failure.client, failure.stage) == ("ward 3", verb)


@pytest.mark.parametrize("verb", ["lunch", "", "client", "_class__", "open_client"])
def test_what_nobody_may_ask_is_a_failure(opened: Service, verb: str) -> None:
    assert fails(opened, verb).stage == "join"


@pytest.mark.parametrize(
    ("verb", "stage"),
    [("hello", "join"), ("start", "join"), ("train", "train"), ("evaluate", "evaluate")],
)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(f"cannot reshape {SECRET}"), "RuntimeError; the reason is in the client's own log"),
        (KeyError(SECRET), "KeyError; the reason is in the client's own log"),
        (MemoryError(), "MemoryError; the reason is in the client's own log"),
        (DataError(f"row 3: {SECRET}"), "its data cannot be used; the reason is in the client's own log"),
        (UserError("model.path = 'x': no such folder"), "model.path = 'x': no such folder"),
    ],
)
def test_a_client_that_cannot_be_opened_is_a_failure_of_its_stage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, verb: str, stage: str, error: Exception, reason: str
) -> None:
    def load() -> OpenClient:
        raise error

    failure = fails(Service("ward", tmp_path, load), verb, Broadcast(1, {}))
    assert failure == Failure("ward", stage, reason)  # type: ignore[arg-type] # pytest's parameters are words of that kind
    assert (SECRET in caplog.text) == (SECRET in str(error))


def test_a_client_that_could_not_be_opened_is_tried_again(site_config: Config, ward: SiteFolder) -> None:
    attempts = iter([DataError("no"), None])

    def load() -> OpenClient:
        error = next(attempts)
        if error is not None:
            raise error
        return open_site(ward, site_config, "night")

    service = Service("ward 3", ward.memory("night"), load)
    fails(service, "hello")
    assert isinstance(ask(service, "hello"), Hello)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TrainingFailedError("its loss is nan at step 2"), "its loss is nan at step 2"),
        (RuntimeError(SECRET), "RuntimeError; the reason is in the client's own log"),
    ],
)
def test_training_that_fails_is_a_failure_and_the_next_round_is_as_good_as_ever(
    opened: Service, olmoe: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    moe = MoEModel.load(olmoe)
    good = ask(opened, "train", broadcast(moe))
    with monkeypatch.context() as patch:

        def fail(trainer: Trainer, _: ClientData, received: Broadcast) -> Statistics:
            trainer.moe.write({group: torch.full_like(value, 7.0) for group, value in trainer.moe.read().items()})
            raise error

        patch.setattr(Trainer, "train", fail)
        assert fails(opened, "train", broadcast(moe)) == Failure("ward 3", "train", reason)
    again = ask(opened, "train", broadcast(moe))
    assert torch.equal(again.norm_G, good.norm_G)
    assert ask(opened, "hello").weights == moe.weights_hash()


def test_weights_of_another_model_are_a_failure(opened: Service) -> None:
    odd = Broadcast(1, {SHARED: Packed(torch.zeros(3))})
    for verb in ("train", "evaluate"):
        assert fails(opened, verb, odd).reason == "weights of shared, of which this model does not train so many"


def test_a_client_that_holds_nothing_out_says_so(site_config: Config, ward: SiteFolder, olmoe: Path) -> None:
    none = make_site(ward.path, (ward.path / "site.toml").read_text() + "held_out = 0.0\n")
    service = serve(none, site_config)
    assert ask(service, "hello").held_out == 0
    failure = fails(service, "evaluate", broadcast(MoEModel.load(olmoe)))
    assert failure == Failure("ward 3", "evaluate", "it holds nothing out to be scored on")


# ---------------------------------------------------------------------------------------- what never leaves a site

GOOD = [json.dumps({"text": f"word {i}", "label": ["animals", "food"][i % 2]}) for i in range(40)]


@pytest.mark.parametrize(
    ("bad", "more"),
    [
        (json.dumps({"text": "a word", "label": SECRET}), {}),
        (json.dumps({"text": "a word", "label": [SECRET]}), {}),
        (json.dumps({"text": "a word", SECRET: "food"}), {}),
        (json.dumps([SECRET]), {}),
        (json.dumps({"text": f"{SECRET} " * 200, "label": "food"}), {"max_length": 64}),
    ],
)
def test_a_failure_never_quotes_the_data(
    site_config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    olmoe: Path,
    bad: str,
    more: dict[str, Any],
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([*GOOD, bad, *GOOD]))
    site = make_site(tmp_path / "site", site_toml("ward", data, olmoe))
    asked = changed(site_config, "data", max_train=0, **more)
    for verb, message in (("hello", NOTHING), ("train", Broadcast(1, {}))):
        caplog.clear()
        failure = fails(serve(site, asked), verb, message)
        assert failure.reason == "its data cannot be used; the reason is in the client's own log"
        assert SECRET in caplog.text
        assert re.search(r"(line|example) \d+", caplog.text)


UPDATE = """
import json, sys, time
from pathlib import Path
before = set(sys.modules)
from fedalign.federation.flower.client_app import site_answer
from fedalign.federation.messages import Parcel, decode, encode
from fedalign.protocol import Fetch
from fedalign.config.site import SiteFolder
folder = SiteFolder.load(Path(sys.argv[1]))
answer = site_answer(folder, "", "night", "update", encode(Fetch("ward", 2, ("shared",), 0, 8)))
heavy = [name for name in ("transformers", "datasets", "flwr_datasets", "fedalign.client.trainer",
                           "fedalign.client.workbench")
         if name in sys.modules]
print(json.dumps([answer.head, {name: [p.tolist() for p in pieces] for name, pieces in answer.arrays.items()}, heavy]))
"""


def test_handing_over_an_update_loads_no_model_and_imports_nothing_for_one(tmp_path: Path) -> None:
    site = make_site(tmp_path, 'name = "ward"\n[data]\ntrain = "nowhere.jsonl"\n[model]\npath = "nowhere"\n')
    service = Service("ward", site.memory("night"), lambda: pytest.fail("nothing to open"))
    keep_round(service.memory, 2, {SHARED: Packed(torch.tensor([1.0, 2.5]))}, Kept())
    command = [sys.executable, "-W", "ignore", "-c", UPDATE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ))
    head, arrays, heavy = json.loads(done.stdout)
    answer = decode(
        Parcel(head, {name: tuple(torch.tensor(one, dtype=torch.uint8) for one in p) for name, p in arrays.items()}),
        Piece,
    )
    assert answer.data.view(torch.float32).tolist() == [1.0, 2.5]
    assert (answer.client, answer.round) == ("ward", 2)
    assert heavy == []
