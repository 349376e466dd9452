"""A coordinator and real clients, but for Flower between them: the same run as in one process, bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch

from fedalign.client.open import DealtClients, open_site
from fedalign.config.run import Config
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.flower import carrier, talks
from fedalign.federation.flower import sites as federation
from fedalign.federation.flower.coordinator import Coordinator
from fedalign.federation.flower.link import Reply
from fedalign.federation.in_process import prepare
from fedalign.federation.messages import MESSAGES, Parcel, decode, encode
from fedalign.federation.service import Service
from fedalign.federation.transfer import digest
from fedalign.files import fingerprint
from fedalign.maths.heap import Heap
from fedalign.maths.rounding import packed_nbytes
from fedalign.moe.model import MoEModel
from fedalign.moe.part import grown
from fedalign.protocol import PROTOCOL, SHARED, WORDS, Packed, ParameterGroup, Piece, Start, WireDtype
from fedalign.server.results import RunFolder
from fedalign.server.run import execute
from tests.conftest import SUBJECTS, changed, make_site, rows, save_tokenizer, write_jsonl
from tests.federation.flower.scripted import Clock
from tests.federation.test_messages import travel
from tests.server.test_run import Silent, metrics, model_bytes

SITES = ("east", "lab", "ward")


class Answers(Protocol):
    def answer(self, verb: str, parcel: Parcel) -> Parcel: ...


class Direct:
    """A `Link` whose nodes are services; each answers when it is looked for."""

    def __init__(self, services: dict[str, Answers]) -> None:
        self.services = list(services.values())
        self.away: set[int] = set()
        self.asked: list[tuple[str, int]] = []
        self._waiting: dict[str, tuple[str, Parcel, int]] = {}

    def nodes(self) -> Mapping[int, str | None]:
        return {node: None for node in range(len(self.services)) if node not in self.away}

    def ask(self, kind: str, parcel: Parcel, nodes: Sequence[int]) -> dict[str, int]:
        self.asked += [(kind, node) for node in nodes]
        numbers = range(len(self.asked) - len(nodes), len(self.asked))
        asked = {str(number): node for number, node in zip(numbers, nodes, strict=True) if node not in self.away}
        self._waiting |= {number: (kind, parcel, node) for number, node in asked.items()}
        return asked

    def replies(self, messages: Sequence[str]) -> Iterator[Reply]:
        for message in messages[::-1]:  # not in the order of asking
            if message in self._waiting:
                kind, parcel, node = self._waiting.pop(message)
                answer = self.services[node].answer(kind, travel(parcel))
                yield Reply(message, travel(answer))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in (federation, talks, carrier):
        monkeypatch.setattr(module, "time", clock)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each site, and one for testing."""
    folder = tmp_path_factory.mktemp("house")
    (folder / "train").mkdir()
    every = rows()
    for number, site in enumerate(SITES):
        write_jsonl(folder / "train" / f"{site}.jsonl", every[number::4])
    write_jsonl(folder / "test.jsonl", every[3::4])
    return folder


def as_coordinator(olmoe: Path, *overrides: str) -> Config:
    """A run's configuration by one who has neither data nor weights; two rounds."""
    return load_config(
        None,
        [
            f"model.path={olmoe}",
            f"data.labels={json.dumps(sorted(SUBJECTS))}",
            "training.learning_rate=1e-2",
            "statistics.min_tokens=4",
            "run.rounds=2",
            "tracking.loggers=[]",
            "federation.engine=flower",
            "clients.partition=files",
            *overrides,
        ],
    )


@pytest.fixture
def coordinated(olmoe: Path, house: Path) -> Callable[..., Config]:
    """`coordinated(*overrides)`: as `as_coordinator`."""
    return partial(as_coordinator, olmoe)


ALL = "token_counts = true\nembeddings = true\n"


def sites(folder: Path, house: Path, config: Config, consents: Mapping[str, str] | None = None) -> dict[str, Answers]:
    """A service for each site; each with its own copy of nothing but its own data. All consent, unless said."""
    services: dict[str, Answers] = {}
    for name in SITES:
        data = house / "train" / f"{name}.jsonl"
        limits = f"seed = {config.run.seed}\nheld_out = {config.clients.held_out}\nmin_train = 4\nmin_held_out = 1"
        toml = (
            f'name = "{name}"\n[data]\ntrain = "{data}"\n[model]\npath = "{config.model.path}"\n'
            f"[limits]\nmin_tokens = 4\nmin_examples = 4\n{limits}\n"
        )
        toml += f"[consent]\n{ALL if consents is None else consents.get(name, '')}"
        site = make_site(folder / name, toml)
        services[name] = Service(name, site.memory("run"), lambda site=site: open_site(site, config, "run"))  # type: ignore[misc] # mypy infers no lambda with defaults
    return services


def run(out: Path, link: Direct, config: Config, resume: bool = False) -> dict[str, Any]:
    folder = RunFolder(out)
    if not resume:
        folder.begin(config)
    return execute(Coordinator.connect(link, config, folder), folder, Silent())


@pytest.mark.parametrize(
    ("consents", "more", "told"),
    [
        (
            {},
            (),
            "of 3 sites 0 consent to train embeddings and head, which stay as they were, 0 to send counts of tokens: ",
        ),
        (
            {"lab": "embeddings = true\n", "ward": "token_counts = true\n"},
            (),
            "of 3 sites 1 consent to train embeddings and head, 0 to send counts of tokens: rows are averaged as under "
            'algorithm.vocabulary = "average"',
        ),
        (
            {"lab": ALL, "ward": "embeddings = true\n"},
            (),
            "of 3 sites 2 consent to train embeddings and head, 1 to send counts of tokens",
        ),
        ({"lab": ALL}, ("algorithm.name=fedavg",), "of 3 sites 1 consent to train embeddings and head"),
        ({"lab": ALL}, ("tuning.kind=moe",), ""),
    ],
)
def test_a_run_goes_on_with_those_who_consent_and_says_how_many(
    tmp_path: Path,
    house: Path,
    coordinated: Callable[..., Config],
    consents: dict[str, str],
    more: tuple[str, ...],
    told: str,
) -> None:
    config = coordinated("run.rounds=1", *more)
    link, folder = Direct(sites(tmp_path, house, config, consents)), RunFolder(tmp_path / "run")
    folder.begin(config)
    coordinator = Coordinator.connect(link, config, folder)
    said = coordinator.consents()
    assert said.startswith(told)
    assert said.endswith('"average"') == (": rows" in said)
    summary = execute(coordinator, folder, Silent())
    assert summary["failures"] == []
    start = MoEModel.load(config.model.path).read(WORDS)
    new = MoEModel.load(folder.path / "model").read(WORDS)
    trained = any("embeddings" in consent for consent in consents.values()) and "tuning.kind=moe" not in more
    assert all(torch.equal(new[group], start[group]) != trained for group in WORDS)
    sent = metrics(folder.path)[-1]["bytes_up_by_client"]
    assert (max(sent.values()) > 1.2 * min(sent.values())) == trained  # who does not consent sends less


def test_the_first_lines_say_how_many_sites_tell_their_labels(
    tmp_path: Path, house: Path, coordinated: Callable[..., Config]
) -> None:
    config = coordinated("run.rounds=1", "tuning.kind=lora", "training.loss=label_shift")
    services = sites(tmp_path, house, config, {"lab": "token_counts = true\n"})
    link, folder = Direct(services), RunFolder(tmp_path / "run")
    folder.begin(config)
    coordinator = Coordinator.connect(link, config, folder)
    told = "1 of 3 sites consent to tell how many examples each label has; 2 train as with training.loss = "
    assert coordinator.consents() == f'{told}"plain"'
    assert coordinator.federation.labels() == coordinator.federation.sites["lab"].hello.labels
    assert sum(coordinator.federation.labels()) > 0
    assert execute(coordinator, folder, Silent())["failures"] == []


def in_process(out: Path, house: Path, config: Config) -> dict[str, Any]:
    folder = RunFolder(out)
    here = changed(changed(config, "federation", engine="in_process"), "data", train=str(house / "train"))
    here = changed(here, "server", robust=config.robust)  # an engine has its own, if nobody says
    prepared = prepare(here, folder.clients)
    folder.begin(here)
    return execute(prepared, folder, Silent())


def same_runs(one: Path, other: Path, *, resumed: bool = False) -> None:
    """The same numbers, models and summaries. In one that was `resumed` something may have travelled once more."""
    lines, others = metrics(one), metrics(other)
    for line, same in zip(lines, others, strict=True):
        for way in ("bytes_down", "bytes_up") if resumed else ():
            assert same.pop(way) <= line.pop(way)
            assert same.pop(f"{way}_by_client", {}).keys() == line.pop(f"{way}_by_client", {}).keys()
        assert line == same
    for kind in ("model", "best"):
        files, same_files = model_bytes(one / kind), model_bytes(other / kind)
        for name in ("round.json", "SHA256SUMS") if resumed else ():  # the bytes that travelled stand there
            assert (files.pop(name, b"") == b"") == (same_files.pop(name, b"") == b"")
        assert files == same_files
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, other)]
    for summary in summaries:
        del summary["seconds"], summary["versions"], summary["checked"]  # a coordinator has no weights to compute with
        if resumed:
            del summary["bytes_down"], summary["bytes_up"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize(
    "wire",
    [
        ("wire.dtype=float32",),
        ("wire.dtype=bfloat16",),
        ("wire.dtype=int8",),
        ("wire.down=int4", "clients.sample=0.7", "run.rounds=4"),
        ("wire.dtype=int8", "wire.down=bfloat16", "algorithm.name=by_use"),
        ("training.loss=label_shift", "algorithm.name=by_use"),
        ("training.loss=fedlc", "algorithm.name=fedavg"),
    ],
    ids=" ".join,
)
def test_a_run_over_sites_is_the_run_in_one_process(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, wire: tuple[str, ...]
) -> None:
    config = coordinated(*wire)
    link = Direct(sites(tmp_path / "sites", house, config))
    summary = run(tmp_path / "sites-run", link, config)
    in_process(tmp_path / "here", house, config)
    same_runs(tmp_path / "sites-run", tmp_path / "here")
    assert summary["failures"] == []
    assert summary["final_accuracy"] is not None
    assert summary["accuracy_of"].startswith("clients' held-out parts")
    assert [kind for kind, _ in link.asked if kind == "start"] == ["start"]
    assert not list((tmp_path / "sites").rglob("update.safetensors"))  # forgotten at the end


@pytest.mark.parametrize(
    "tuning",
    [
        ["tuning.kind=lora", "tuning.rank=4", "tuning.average=exact"],
        ["tuning.kind=lora", "tuning.rank=4", "tuning.average=exact", "wire.dtype=int4", "run.rounds=3"],
        ["tuning.kind=lora", "tuning.average=freeze_a"],
        ["tuning.kind=moe", "tuning.dtype=bfloat16"],
    ],
    ids=["exact", "exact int4", "freeze_a", "moe"],
)
def test_however_it_is_tuned(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, tuning: list[str]
) -> None:
    config = coordinated(*tuning)
    run(tmp_path / "sites-run", Direct(sites(tmp_path / "sites", house, config)), config)
    in_process(tmp_path / "here", house, config)
    same_runs(tmp_path / "sites-run", tmp_path / "here")


def test_with_a_test_set_the_coordinator_scores_too(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = coordinated(f"data.test={house / 'test.jsonl'}")
    link = Direct(sites(tmp_path / "sites", house, config))
    summary = run(tmp_path / "sites-run", link, config)
    in_process(tmp_path / "here", house, config)
    same_runs(tmp_path / "sites-run", tmp_path / "here")
    assert summary["accuracy_of"] == "global test set"
    assert "start" not in {kind for kind, _ in link.asked}  # it has the weights itself


@pytest.mark.parametrize("options", [(), ("frozen",), ("average",)], ids=" ".join)
def test_a_simulation_is_the_run_in_one_process(
    settings: list[str], olmoe: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    words = [*settings, "run.rounds=2", "training.epochs=1", "federation.engine=simulation"]
    out = tmp_path / "simulated"
    if options:
        names = DealtClients(load_config(None, words), out / "clients").names
        grown(MoEModel.load(olmoe), names).model.save_pretrained(tmp_path / "owned")
        save_tokenizer(tmp_path / "owned")
        words += [f"model.path={tmp_path / 'owned'}", "algorithm.name=site_experts"]
        words += [f"algorithm.shared={shared}" for shared in options]
    config = load_config(None, words)
    dealt = DealtClients(config, out / "clients")
    services: dict[str, Answers] = {
        name: Service(name, dealt.open(name).data.memory.folder, lambda name=name: dealt.open(name))  # type: ignore[misc] # mypy infers no lambda with defaults
        for name in dealt.names
    }
    run(out, Direct(services), config)
    here = changed(config, "federation", engine="in_process")
    folder = RunFolder(tmp_path / "here")
    here = changed(here, "server", robust=config.robust)  # an engine has its own, if nobody says
    prepared = prepare(here, folder.clients)
    folder.begin(here)
    execute(prepared, folder, Silent())
    same_runs(out, tmp_path / "here")


@pytest.fixture(scope="module")
def owned(olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in which each site has an expert of its own."""
    folder = tmp_path_factory.mktemp("owned")
    grown(MoEModel.load(olmoe), SITES).model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_a_lone_site_cannot_say_what_the_experts_of_others_are(
    coordinated: Callable[..., Config], house: Path, owned: Path, tmp_path: Path
) -> None:
    start, alone = MoEModel.load(owned), ("federation.min_sites=1", 'clients.only=["lab"]')
    config = partial(coordinated, f"model.path={owned}", "algorithm.name=site_experts", "run.rounds=1")
    services = sites(tmp_path / "sites", house, config())
    for words in ((*alone,), alone[:1]):
        link, others = Direct(services), "east, ward" if words == alone else "east, lab, ward"
        with pytest.raises(UserError, match=rf"^federation.min_sites = 1: .* the experts of {others} are\. Set model"):
            run(tmp_path / "refused", link, config(*words))
        assert not link.asked
    for number, known in enumerate((f"model.weights_hash={start.weights_hash()}", f"data.test={house / 'test.jsonl'}")):
        run(tmp_path / str(number), Direct(services), config(*alone, known))
        trained = MoEModel.load(tmp_path / str(number) / "model").read()
        own = {group for group, value in start.read().items() if not torch.equal(trained[group], value)}
        assert {group.expert for group in own} == {*start.layout.owners["lab"]}


def test_a_lone_owner_says_what_its_expert_is(
    coordinated: Callable[..., Config], house: Path, olmoe: Path, tmp_path: Path
) -> None:
    grown(MoEModel.load(olmoe), ["lab"]).model.save_pretrained(tmp_path / "owned")
    save_tokenizer(tmp_path / "owned")
    alone = ("federation.min_sites=1", 'clients.only=["lab"]', "algorithm.name=site_experts", "run.rounds=1")
    config = coordinated(f"model.path={tmp_path / 'owned'}", *alone)
    summary = run(tmp_path / "run", Direct(sites(tmp_path / "sites", house, config)), config)
    assert {(failure["client"], failure["stage"]) for failure in summary["failures"]} == {
        ("east", "join"),
        ("ward", "join"),
    }


def test_an_encoder_decoder_model_goes_over_sites_too(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    config = coordinated(f"model.path={model_folder('switch_transformers')}", "run.rounds=1")
    run(tmp_path / "sites-run", Direct(sites(tmp_path / "sites", house, config)), config)
    in_process(tmp_path / "here", house, config)
    same_runs(tmp_path / "sites-run", tmp_path / "here")


def test_a_family_with_frozen_parts_is_saved_with_them(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    config = coordinated(f"model.path={model_folder('ernie4_5_moe')}", "run.rounds=1")
    run(tmp_path / "sites-run", Direct(sites(tmp_path / "sites", house, config)), config)
    in_process(tmp_path / "here", house, config)
    same_runs(tmp_path / "sites-run", tmp_path / "here")


# ------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize(("round", "stage"), [(0, "completed"), (1, "summing"), (2, "training"), (2, "evaluating")])
def test_a_coordinator_that_breaks_off_resumes_to_the_same_bytes(
    coordinated: Callable[..., Config],
    house: Path,
    finished: Path,
    tmp_path: Path,
    round: int,
    stage: str,
    warm: bool,
) -> None:
    config = coordinated()
    services = sites(tmp_path / "sites", house, config)
    folder = RunFolder(tmp_path / "run")
    folder.begin(config)
    first = Coordinator.connect(Direct(services), config, folder)
    with pytest.raises(KeyboardInterrupt):
        execute(first, folder, Silent(lambda *where: where[:2] == (round, stage) and where[2] > 0))
    link = Direct(services if warm else sites(tmp_path / "sites", house, config))
    run(tmp_path / "run", link, config, resume=True)
    same_runs(tmp_path / "run", finished, resumed=True)
    assert "start" not in {kind for kind, _ in link.asked}  # what it starts from is in the checkpoint


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, olmoe: Path, house: Path) -> Path:
    """The run that was not broken off."""
    out = tmp_path_factory.mktemp("finished")
    overrides = [f"model.path={olmoe}", f"data.labels={json.dumps(sorted(SUBJECTS))}", "training.learning_rate=1e-2"]
    overrides += ["statistics.min_tokens=4", "run.rounds=2", "tracking.loggers=[]", "clients.partition=files"]
    in_process(out / "run", house, load_config(None, [*overrides, "server.robust=clip"]))
    return out / "run"


# ------------------------------------------------------------------------------------------------- who does not fit


class Tampering:
    """A site that changes what it says."""

    def __init__(self, inner: Answers, verb: str, change: Callable[[Any], Any]) -> None:
        self.inner, self.verb, self.change = inner, verb, change

    def answer(self, verb: str, parcel: Parcel) -> Parcel:
        answer = self.inner.answer(verb, parcel)
        if verb != self.verb:
            return answer
        said = decode(travel(answer), tuple(MESSAGES.values()))
        if isinstance(said, Piece) and isinstance(self.inner, Service):
            return encode(packed_again(said, self.inner.sizes, self.change))
        changed = self.change(said)
        return changed if isinstance(changed, Parcel) else encode(changed)


def packed_again(piece: Piece, sizes: Mapping[str, int], change: Callable[[Any], Any]) -> Piece:
    """A piece of whole groups in float32, after `change` of their values; it is consistent in itself."""
    values = torch.split(piece.data.view(torch.float32), [sizes[name] for name in piece.digests])
    changed = change(dict(zip(piece.digests, values, strict=True)))
    data = torch.cat([value.contiguous().view(torch.uint8) for value in changed.values()])
    digests = {name: digest(Packed(value)) for name, value in changed.items()}
    return replace(piece, data=data, digest=fingerprint([data.numpy().data]), digests=digests)


def shifted(start: Start) -> Start:
    values = start.weights[SHARED].values.clone()
    values[-1] += 1e-3
    return replace(start, weights={**start.weights, SHARED: Packed(values)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, r"east: sent other weights \([0-9a-f]{12}\) than it announced"),
        (lambda s: replace(s, weights={SHARED: s.weights[SHARED]}), r"east: the weights that it sent do not fit"),
        (lambda s: replace(s, weights={**s.weights, SHARED: Packed(torch.zeros(3))}), r"do not fit the model: shared"),
        (
            lambda s: replace(s, weights={**s.weights, ParameterGroup("gate", 9, 9): Packed(torch.zeros(3))}),
            "do not fit",
        ),
        (lambda s: replace(s, constants={"more": torch.zeros(3)}), "do not fit the model: constants: more"),
    ],
)
def test_weights_to_start_from_that_are_not_those_announced_are_refused(
    coordinated: Callable[..., Config],
    house: Path,
    tmp_path: Path,
    change: Callable[[Start], Start],
    message: str,
) -> None:
    config = coordinated()
    services = sites(tmp_path / "sites", house, config)
    services["east"] = Tampering(services["east"], "start", change)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", Direct(services), config)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_initial_weights_are_the_models_own(coordinated: Callable[..., Config], house: Path, tmp_path: Path) -> None:
    config = coordinated()
    link = Direct(sites(tmp_path / "sites", house, config))
    centre = Coordinator.connect(link, config, RunFolder(tmp_path / "run"))
    moe = MoEModel.load(config.model.path)
    weights = centre.initial_weights(Heap())
    assert list(weights) == list(moe.layout.groups)
    assert all(torch.equal(weights[group], value) for group, value in moe.read().items())
    assert centre.layout == moe.layout
    assert centre.evaluate(weights) is None
    assert {p.device.type for p in centre.bench.moe.model.parameters()} == {"meta"}  # never loaded


def test_a_site_with_other_weights_is_refused_and_the_run_goes_on(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    config = coordinated("run.rounds=1")
    services = sites(tmp_path / "sites", house, config)
    other = changed(config, "model", path=str(model_folder("olmoe", seed=5)))
    services["lab"] = sites(tmp_path / "sites", house, other)["lab"]
    summary = run(tmp_path / "run", Direct(services), config)
    assert [(f["client"], f["stage"]) for f in summary["failures"]] == [("lab", "join")]
    assert summary["failures"][0]["reason"].startswith("refused: its model weights differ")
    assert metrics(tmp_path / "run")[1]["clients"] == ["east", "ward"]


def test_a_hash_of_weights_that_no_site_has_ends_the_run_before_it_begins(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = coordinated(f"model.weights_hash={'0' * 64}")
    with pytest.raises(UserError, match=r"0 sites are connected and fit.*east: its model weights differ"):
        run(tmp_path / "run", Direct(sites(tmp_path / "sites", house, config)), config)


def test_a_hash_of_weights_that_the_coordinator_has_not_is_its_own_mistake(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = coordinated(f"model.weights_hash={'0' * 64}", f"data.test={house / 'test.jsonl'}")
    with pytest.raises(UserError, match=r"model.weights_hash = '0000.*': the coordinator's model has [0-9a-f]{64}"):
        Coordinator.connect(Direct({}), config, RunFolder(tmp_path / "run"))


def test_weights_are_the_coordinators_though_its_whole_test_set_is_too_long(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    data = write_jsonl(tmp_path / "long.jsonl", [{"text": "word " * 500, "label": "food"}])
    config = coordinated(f"data.test={data}", "data.too_long=drop")
    other = changed(config, "model", path=str(model_folder("olmoe", seed=5)))
    services = sites(tmp_path / "sites", house, changed(other, "data", too_long="error"))
    centre = Coordinator.connect(Direct(services), config, RunFolder(tmp_path / "run"))
    assert centre.test is None
    with pytest.raises(UserError, match=r"0 sites are connected and fit.*its model weights differ"):
        centre.federation.members()


def test_classes_must_be_named_where_no_one_sees_all_rows(coordinated: Callable[..., Config], tmp_path: Path) -> None:
    for more in ([], ["data.test=docstrings"]):
        config = coordinated("data.labels=[]", *more)
        with pytest.raises(UserError, match=r"data.labels = \[\]: sites see their own rows alone"):
            Coordinator.connect(Direct({}), config, RunFolder(tmp_path / "run"))
    with pytest.raises(UserError, match="0 sites are connected"):
        Coordinator.connect(Direct({}), coordinated("data.labels=[]", "data.kind=text"), RunFolder(tmp_path / "run"))


# ------------------------------------------------------------------------------------------- who breaks or cheats


Groups = dict[str, torch.Tensor]


def times(factor: float) -> Callable[[Groups], Groups]:
    return lambda groups: {name: values * factor for name, values in groups.items()}


def without_one(groups: Groups) -> Groups:
    return dict(list(groups.items())[1:])


def poisoned(groups: Groups) -> Groups:
    values = groups["shared"].clone()
    values[3] = torch.nan
    return {**groups, "shared": values}


@pytest.mark.parametrize(
    ("verb", "change", "reason"),
    [
        ("train", lambda s: replace(s, steps=10**9), "steps = 1000000000: with "),
        ("train", lambda s: replace(s, update_L_E_S=s.update_L_E_S[..., :8].clone()), "update_L_E_S is torch.float16"),
        ("train", lambda s: Parcel({**encode(s).head, "examples": 10**400}, encode(s).arrays), "a damaged statistics"),
        ("train", lambda s: replace(s, client="ward"), "it answers as 'ward'"),
        ("update", times(1e6), "but its statistics said"),
        ("update", poisoned, "shared: not finite"),
        ("update", without_one, "6 pieces in a row did not arrive as they were sent"),
        ("update", lambda u: {**u, "shared": torch.zeros(3)}, "6 pieces in a row did not arrive as they were sent"),
        ("evaluate", lambda s: replace(s, accuracy=1e9), "its accuracy is 1000000000.0"),
    ],
)
def test_a_site_that_sends_nonsense_is_named_and_left_out_and_the_run_completes(
    coordinated: Callable[..., Config],
    house: Path,
    tmp_path: Path,
    verb: str,
    change: Callable[[Any], Any],
    reason: str,
) -> None:
    config = coordinated("run.rounds=1")
    services = sites(tmp_path / "sites", house, config)
    services["lab"] = Tampering(services["lab"], verb, change)
    summary = run(tmp_path / "run", Direct(services), config)
    named = [fault for fault in summary["failures"] if fault["round"] == 1]
    assert [(fault["client"], fault["stage"]) for fault in named] == [("lab", verb)]
    assert reason in named[0]["reason"]
    line = metrics(tmp_path / "run")[1]
    left_out = (
        verb == "train" or "statistics said" in reason or "finite" in reason
    )  # of what cannot be read nothing came
    assert line["clients"] == (["east", "ward"] if left_out else list(SITES))
    assert set(line["client_accuracies"]) == ({"east", "ward"} if verb == "evaluate" else set(SITES))
    moved = MoEModel.load(tmp_path / "run" / "model").read([SHARED])[SHARED]
    assert bool(moved.isfinite().all())
    assert not torch.equal(moved, MoEModel.load(config.model.path).read([SHARED])[SHARED])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: replace(s, held_out_accuracy=1e9), "its accuracy is 1000000000.0"),
        (lambda s: replace(s, held_out_loss=math.nan), "its loss is nan on "),
        (lambda s: replace(s, held_out_loss=None), "its loss is nan on "),
        (lambda s: replace(s, held_out=-1), "on -1 examples"),
        (lambda s: replace(s, held_out=10**9), "examples = 1000000000: when it joined it had "),
        (lambda s: replace(s, held_out=0), "it trained and sent no score"),
    ],
)
def test_a_site_whose_score_is_nonsense_is_named_and_trains_all_the_same(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, change: Callable[[Any], Any], reason: str
) -> None:
    config = coordinated("run.rounds=1")
    services = sites(tmp_path / "sites", house, config)
    services["lab"] = Tampering(services["lab"], "train", change)
    run(tmp_path / "run", Direct(services), config)
    start, line = metrics(tmp_path / "run")
    (fault,) = start["failures"]
    assert (fault["client"], fault["stage"]) == ("lab", "evaluate")
    assert reason in fault["reason"]
    assert set(start["client_accuracies"]) == {"east", "ward"}
    assert (line["clients"], line["failures"]) == (list(SITES), [])


@pytest.mark.parametrize("stage", ["train", "update"])
def test_a_site_that_goes_away_costs_its_share_and_comes_back(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, stage: str
) -> None:
    config = coordinated("run.rounds=3")
    services = sites(tmp_path / "sites", house, config)
    link = Direct(services)
    inner = services["lab"]

    class Leaving:
        def answer(self, verb: str, parcel: Parcel) -> Parcel:
            if verb == stage and "lab" not in gone:
                gone.add("lab")
                link.away.add(1)
                return Parcel({"protocol": PROTOCOL, "kind": "half"}, {})  # what comes last is not whole
            return inner.answer(verb, parcel)

    gone: set[str] = set()
    link.services[1] = Leaving()

    def back(round: int, at: str, done: int) -> bool:
        if (round, at) == (1, "completed"):
            link.away.clear()
        return False

    folder = RunFolder(tmp_path / "run")
    folder.begin(config)
    summary = execute(Coordinator.connect(link, config, folder), folder, Silent(back))
    assert summary["rounds"] == 3
    assert {fault["client"] for fault in summary["failures"]} == {"lab"}
    lines = metrics(tmp_path / "run")
    assert lines[2]["clients"] == ["east", "ward"]
    assert set(lines[1]["client_accuracies"]) == {"east", "ward"}  # it is scored by those that train next
    assert lines[3]["clients"] == list(lines[3]["client_accuracies"]) == list(SITES)
    assert lines[3]["failures"] == []


def test_a_round_is_two_messages_to_a_site(coordinated: Callable[..., Config], house: Path, tmp_path: Path) -> None:
    config = coordinated("run.rounds=3", "algorithm.name=fedavg")
    link = Direct(sites(tmp_path / "sites", house, config))
    run(tmp_path / "run", link, config)
    rounds = [kind for kind, _ in link.asked if kind in ("train", "update", "evaluate")]
    assert rounds == [*["train"] * 3, *["update"] * 3] * 3 + ["evaluate"] * 3
    assert [len(line["client_accuracies"]) for line in metrics(tmp_path / "run")] == [3] * 4


@pytest.mark.parametrize(("dtype", "share"), [("int8", 1 / 4), ("int4", 1 / 8)])
def test_differences_go_down_in_a_quarter_of_the_bytes_or_an_eighth(
    coordinated: Callable[..., Config], house: Path, tmp_path: Path, dtype: WireDtype, share: float
) -> None:
    config = coordinated(f"wire.down={dtype}", "algorithm.name=fedavg")
    run(tmp_path / "run", Direct(sites(tmp_path / "sites", house, config)), config)
    sizes = MoEModel.load(config.model.path).layout.sizes.values()
    _, one, two = (line.get("bytes_down_by_client") for line in metrics(tmp_path / "run"))
    assert one == dict.fromkeys(SITES, 2 * sum(sizes))  # bfloat16
    difference = sum(packed_nbytes(size, dtype) for size in sizes)
    assert two == dict.fromkeys(SITES, 2 * difference)  # once more after the last round
    assert difference == pytest.approx(share * 4 * sum(sizes), rel=0.15)


def test_bytes_are_told_by_site_up_and_down(coordinated: Callable[..., Config], house: Path, tmp_path: Path) -> None:
    config = coordinated("run.rounds=1", "wire.dtype=bfloat16", "algorithm.name=fedavg")
    run(tmp_path / "run", Direct(sites(tmp_path / "sites", house, config)), config)
    line = metrics(tmp_path / "run")[1]
    trained = sum(MoEModel.load(config.model.path).layout.sizes.values())
    assert line["bytes_down_by_client"] == dict.fromkeys(SITES, 2 * 2 * trained)  # once more after the last round
    statistics = line["bytes_up_statistics"] // 3
    assert line["bytes_up_by_client"] == dict.fromkeys(SITES, 2 * trained + statistics)


def test_a_run_that_nobody_scores_ends_well(coordinated: Callable[..., Config], house: Path, tmp_path: Path) -> None:
    config = coordinated("clients.held_out=0", "run.rounds=1")
    summary = run(tmp_path / "run", Direct(sites(tmp_path / "sites", house, config)), config)
    assert summary["final_accuracy"] is None
    assert (summary["final_loss"], summary["best_round"], summary["client_accuracies"]) == (None, None, {})
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
