"""A site's trainer on its local socket: who may talk to it, and what becomes of a message when it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalign.config.site import SiteFolder
from fedalign.errors import UserError
from fedalign.federation.flower import serve as on_duty
from fedalign.federation.flower.warm import ask, meeting_file, receive, send, serve
from fedalign.federation.messages import Parcel, decode, encode
from fedalign.federation.service import Service
from fedalign.files import LOCK, locked
from fedalign.protocol import PROTOCOL, SHARED, Broadcast, Failure, Packed
from tests.conftest import make_site
from tests.federation.test_messages import DTYPES, every_message, same

NOTHING = Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})
STOP = "stop"  # as a run's key: Ctrl-C


@pytest.fixture(autouse=True)
def _log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fedalign"), "propagate", True)


@pytest.fixture
def site(tmp_path: Path) -> SiteFolder:
    return make_site(tmp_path / "site", 'name = "ward"\n[data]\ntrain = "x"\n')


class Told:
    """A service that answers with what it was asked."""

    def __init__(self, config: str, run: str) -> None:
        self.key = (config, run)
        self.closed = False

    def answer(self, verb: str, parcel: Parcel, *, scores: bool = True) -> Parcel:
        if parcel.head["kind"] == "nothing":
            unscored = "" if scores else ", unscored"
            return encode(Failure("ward", "join", f"{verb} of {self.key}{unscored}"))
        return parcel

    def close(self) -> None:
        self.closed = True


class Trainer:
    """`serve` in a thread, and the services that it opened."""

    def __init__(self, site: SiteFolder, opens: Callable[[str, str], Any] = Told) -> None:
        self.site = site
        self.opened: list[Any] = []
        self._opens = opens
        self._ready = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self._ready.wait(10)

    def _open(self, config: str, run: str) -> Service:
        if run == STOP:
            raise KeyboardInterrupt
        self.opened.append(self._opens(config, run))
        service: Service = self.opened[-1]
        return service

    def _run(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            serve(self.site, self._open, self._ready.set)

    def stop(self) -> None:
        if self.thread.is_alive():
            with connect(self.site) as connection:
                connection.send_bytes(json.dumps({"config": "", "run": STOP, "verb": ""}).encode())
                self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def trainer(site: SiteFolder) -> Iterator[Trainer]:
    trainer = Trainer(site)
    yield trainer
    trainer.stop()


def connect(site: SiteFolder) -> Connection:
    about = json.loads(meeting_file(site).read_text())
    return Client(about["address"], authkey=bytes.fromhex(about["secret"]))


def reason(site: SiteFolder, verb: str = "hello", run: str = "night", config: str = "") -> str:
    answer = ask(site, config, run, verb, NOTHING)
    assert answer is not None
    text = decode(answer, Failure).reason
    assert isinstance(text, str)
    return text


# ------------------------------------------------------------------------------------------------------ in good order


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_message_goes_there_and_back(site: SiteFolder, trainer: Trainer, dtype: Any) -> None:
    for message in every_message(dtype):
        answer = ask(site, "", "night", "train", encode(message))
        assert answer is not None
        assert same(decode(answer, type(message)), message)


def test_whether_it_may_score_is_told_with_the_message(site: SiteFolder, trainer: Trainer) -> None:
    answer = ask(site, "", "night", "train", NOTHING, scores=False)
    assert answer is not None
    assert decode(answer, Failure).reason == "train of ('', 'night'), unscored"
    assert reason(site, "train") == "train of ('', 'night')"


def test_a_site_toml_that_says_something_else_holds_from_the_next_message_on(
    site: SiteFolder, trainer: Trainer
) -> None:
    """Consent that was taken back, above all."""
    reason(site)
    reason(site)
    assert len(trainer.opened) == 1
    (site.path / "site.toml").write_text('name = "ward"\n[data]\ntrain = "x"\n[consent]\nembeddings = true\n')
    reason(site)
    reason(site)
    assert [service.closed for service in trainer.opened] == [True, False]


def test_large_arrays_in_several_pieces_and_empty_ones_arrive(site: SiteFolder, trainer: Trainer) -> None:
    pieces = [torch.randn(size) for size in (3_000_001, 0, 1, 2_000_000)]
    flags = torch.tensor([True, False])
    parcel = Parcel({"kind": "large"}, {"a": tuple(pieces), "none": (torch.empty(0).half(),), "flags": (flags,)})
    answer = ask(site, "", "night", "train", parcel)
    assert answer is not None
    assert answer.head == parcel.head
    assert torch.equal(answer.arrays["a"][0], torch.cat(pieces))
    assert [answer.arrays[name][0].dtype for name in ("none", "flags")] == [torch.float16, torch.bool]
    assert answer.arrays["flags"][0].tolist() == [True, False]


def test_what_arrives_may_be_written_to(site: SiteFolder, trainer: Trainer) -> None:
    update = Broadcast(1, {SHARED: Packed(torch.ones(4))})
    answer = ask(site, "", "night", "update", encode(update))
    assert answer is not None
    decode(answer, Broadcast).weights[SHARED].values.add_(1)


def test_a_run_keeps_its_service_and_another_run_gets_another(site: SiteFolder, trainer: Trainer) -> None:
    assert reason(site, "hello") == "hello of ('', 'night')"
    assert reason(site, "train") == "train of ('', 'night')"
    assert len(trainer.opened) == 1
    assert reason(site, run="day") == "hello of ('', 'day')"
    assert reason(site, run="day", config="[run]") == "hello of ('[run]', 'day')"
    assert [service.closed for service in trainer.opened] == [True, True, False]  # one model at a time


def test_only_the_sites_user_can_read_where_it_is(site: SiteFolder, trainer: Trainer) -> None:
    file = meeting_file(site)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    about = json.loads(file.read_text())
    assert about["pid"] == os.getpid()
    assert len(bytes.fromhex(about["secret"])) == 32
    assert stat.S_IMODE(Path(about["address"]).parent.stat().st_mode) == 0o700
    assert [path.name for path in site.path.iterdir() if path.name != "site.toml"] == ["trainer.json"]
    trainer.stop()
    assert not file.exists()
    assert not Path(about["address"]).exists()


def test_a_file_that_was_open_to_all_is_replaced_not_written_into(site: SiteFolder) -> None:
    """And two trainers never have one secret."""
    file = meeting_file(site)
    file.write_text("old")
    file.chmod(0o666)
    reader = file.open()
    first = Trainer(site)
    secret = json.loads(file.read_text())["secret"]
    assert reader.read() == "old"
    reader.close()
    first.stop()
    second = Trainer(site)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(file.read_text())["secret"] != secret
    second.stop()


def test_a_trainer_that_ends_leaves_the_file_of_another(site: SiteFolder, trainer: Trainer) -> None:
    mine = meeting_file(site).read_text()
    other = json.dumps({"address": "/nowhere", "secret": "00", "pid": 1})
    meeting_file(site).write_text(other)
    meeting_file(site).with_name("mine").write_text(mine)
    about = json.loads(mine)
    with Client(about["address"], authkey=bytes.fromhex(about["secret"])) as connection:
        connection.send_bytes(json.dumps({"config": "", "run": STOP, "verb": ""}).encode())
        trainer.thread.join(10)
    assert meeting_file(site).read_text() == other


# ------------------------------------------------------------------------------------------- who is refused, who dies


def test_without_a_trainer_there_is_no_answer_and_no_fuss(site: SiteFolder, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(site, "", "night", "hello", NOTHING) is None
    assert caplog.text == ""


def test_a_wrong_secret_is_refused_and_the_trainer_goes_on(
    site: SiteFolder, trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    right = meeting_file(site).read_text()
    meeting_file(site).write_text(json.dumps({**json.loads(right), "secret": "00" * 32}))
    assert ask(site, "", "night", "hello", NOTHING) is None
    assert "no warm trainer (AuthenticationError): loading the model for this message" in caplog.text
    meeting_file(site).write_text(right)
    assert reason(site) == "hello of ('', 'night')"


def test_a_trainer_that_does_not_know_the_secret_is_not_believed(site: SiteFolder) -> None:
    """Whoever got hold of the address cannot play the trainer."""

    def play() -> None:
        with contextlib.suppress(Exception), Listener(authkey=b"guess") as listener:
            addresses.append(str(listener.address))
            heard.set()
            listener.accept()

    addresses: list[str] = []
    heard = threading.Event()
    thread = threading.Thread(target=play)
    thread.start()
    assert heard.wait(10)
    meeting_file(site).write_text(json.dumps({"address": addresses[0], "secret": "00" * 32}))
    assert ask(site, "", "night", "hello", NOTHING) is None
    thread.join(10)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"address": "/nowhere/socket", "secret": "00"}),
        json.dumps({"address": "/nowhere/socket", "secret": "no hex"}),
        json.dumps({"address": 7, "secret": "00"}),
        json.dumps({"secret": "00"}),
        json.dumps(["address", "secret"]),
        "{",
        "",
        "\udcff",
    ],
)
def test_a_file_that_is_stale_or_damaged_means_no_trainer(
    site: SiteFolder, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    meeting_file(site).write_bytes(text.encode(errors="surrogateescape"))
    assert ask(site, "", "night", "hello", NOTHING) is None
    assert "loading the model for this message" in caplog.text


def test_a_socket_that_nobody_listens_on_means_no_trainer(site: SiteFolder, trainer: Trainer, tmp_path: Path) -> None:
    """As a trainer leaves it that was killed."""
    right = meeting_file(site).read_text()
    dead = Listener(str(tmp_path / "dead"), family="AF_UNIX")
    dead._listener._unlink = None  # type: ignore[attr-defined] # private
    dead.close()
    meeting_file(site).write_text(json.dumps({**json.loads(right), "address": str(tmp_path / "dead")}))
    assert ask(site, "", "night", "hello", NOTHING) is None
    meeting_file(site).write_text(right)


@pytest.mark.parametrize("after", ["accepting", "asking", "receiving", "half an answer", "half an array", "nonsense"])
def test_a_trainer_that_dies_in_the_middle_means_no_trainer(
    site: SiteFolder, caplog: pytest.LogCaptureFixture, after: str
) -> None:
    def play() -> None:
        with Listener(authkey=b"\0") as listener:
            meeting_file(site).write_text(json.dumps({"address": listener.address, "secret": "00"}))
            heard.set()
            with listener.accept() as connection:
                if after == "accepting":
                    return
                connection.recv_bytes()
                if after == "asking":
                    return
                receive(connection)
                if after == "nonsense":
                    connection.send_bytes(b'[{"arrays": 7}]')
                if after.startswith("half"):
                    index = {"a": ["float32", [8, 8]]}
                    connection.send_bytes(json.dumps({"head": {}, "arrays": index}).encode())
                    connection.send_bytes(bytes(8 if after == "half an answer" else 12))

    heard = threading.Event()
    thread = threading.Thread(target=play)
    thread.start()
    assert heard.wait(10)
    large = Broadcast(1, {SHARED: Packed(torch.zeros(3_000_000))})  # more than a socket holds back
    assert ask(site, "", "night", "train", encode(large)) is None
    assert "loading the model for this message" in caplog.text
    thread.join(10)


@pytest.mark.parametrize("until", ["accepted", "asked", "head", "some", "all", "nonsense", "no index", "too much"])
def test_a_client_that_goes_away_in_the_middle_leaves_the_trainer_alive(
    site: SiteFolder, trainer: Trainer, until: str
) -> None:
    about = {"config": "", "run": "night", "verb": "train"}
    parcel = encode(Broadcast(1, {SHARED: Packed(torch.zeros(3_000_000))}))
    with connect(site) as connection:
        if until == "nonsense":
            connection.send_bytes(b"\xff[")
        elif until != "accepted":
            connection.send_bytes(json.dumps(about).encode())
        if until == "no index":
            connection.send_bytes(json.dumps({"head": {}, "arrays": {"a": ["no dtype", [4]]}}).encode())
        if until == "too much":
            connection.send_bytes(json.dumps({"head": {}, "arrays": {"a": ["int8", [4]]}}).encode())
            connection.send_bytes(bytes(5))
        if until in ("head", "some"):
            index = {"a": ["float32", [8, 8]]}
            connection.send_bytes(json.dumps({"head": {}, "arrays": index}).encode())
        if until == "some":
            connection.send_bytes(bytes(8))
        if until == "all":
            send(connection, parcel)  # and does not stay for the answer
    assert reason(site, run="next") == "hello of ('', 'next')"


def test_a_service_that_cannot_be_opened_leaves_the_trainer_alive(site: SiteFolder) -> None:
    def opens(config: str, run: str) -> Told:
        if config == "broken":
            raise RuntimeError("no")
        return Told(config, run)

    trainer = Trainer(site, opens)
    assert reason(site) == "hello of ('', 'night')"
    assert ask(site, "broken", "night", "hello", NOTHING) is None
    assert reason(site) == "hello of ('', 'night')"
    trainer.stop()


PROGRAM = """
import contextlib, sys, time
from pathlib import Path
from fedalign.federation.messages import encode
from fedalign.protocol import Broadcast
from fedalign.config.site import SiteFolder
from fedalign.federation.flower.warm import serve
class Slow:
    def answer(self, verb, parcel, scores):
        print("asked", flush=True)
        if verb == "train":
            time.sleep(60)
        return encode(Broadcast(1, {}))
    def close(self): pass
with contextlib.suppress(KeyboardInterrupt):
    serve(SiteFolder.load(Path(sys.argv[1])), lambda *_: Slow(), lambda: print("ready", flush=True))
"""


@contextlib.contextmanager
def a_process(site: SiteFolder) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(site.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_trainer_that_is_killed_while_it_trains_means_no_trainer_and_another_may_come(site: SiteFolder) -> None:
    with a_process(site) as process:
        assert ask(site, "", "night", "hello", NOTHING) is not None
        assert process.stdout is not None
        process.stdout.readline()
        answers: list[Parcel | None] = []
        asking = threading.Thread(target=lambda: answers.append(ask(site, "", "night", "train", NOTHING)))
        asking.start()
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGKILL)
        asking.join(10)
        assert answers == [None]
    assert meeting_file(site).exists()  # what it left behind misleads nobody
    assert ask(site, "", "night", "hello", NOTHING) is None
    trainer = Trainer(site)
    assert reason(site) == "hello of ('', 'night')"
    trainer.stop()


def test_a_trainer_that_is_interrupted_goes_in_good_order(site: SiteFolder) -> None:
    with a_process(site) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert not meeting_file(site).exists()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log stays as the tests have it."""
    monkeypatch.setattr(on_duty, "log_to_stderr", lambda: None)


@pytest.mark.usefixtures("quiet")
def test_a_site_is_served_once(site: SiteFolder) -> None:
    with locked(site.path / LOCK, "a trainer"), pytest.raises(UserError, match=r"a trainer is at work there \(process"):
        on_duty.serve_site(site, supernode=False, insecure_anywhere=False, tell=print)


@pytest.mark.usefixtures("quiet")
def test_what_a_killed_trainer_has_left_is_in_nobodys_way(site: SiteFolder) -> None:
    meeting_file(site).write_text(json.dumps({"pid": os.getpid()}))  # its number is another process's by now
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if "ready" in text:
            raise KeyboardInterrupt

    on_duty.serve_site(site, supernode=False, insecure_anywhere=False, tell=tell)
    assert told[-1] == "the trainer of ward is ready; Ctrl-C ends it"


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("consent", "said"),
    [
        (
            "",
            "ward, [consent]: embeddings and head stay frozen here, so no row of them and no count of tokens leaves; ",
        ),
        (
            "embeddings = true\ntoken_counts = true\n",
            "ward, [consent]: embeddings and head are trained here if the coordinator has them trained: which of their "
            "rows moved shows nearly every token of this site, rare names too; how often each stands here, and how "
            "many examples each label has, is sent if asked for",
        ),
    ],
)
def test_before_a_site_answers_it_says_what_would_leave(tmp_path: Path, consent: str, said: str) -> None:
    site = make_site(tmp_path / "site", f'name = "ward"\n[data]\ntrain = "x"\n[consent]\n{consent}')

    def tell(text: str) -> None:
        assert text.startswith(said)
        raise KeyboardInterrupt  # with the first line

    with pytest.raises(KeyboardInterrupt):
        on_duty.serve_site(site, supernode=False, insecure_anywhere=False, tell=tell)
