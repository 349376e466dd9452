"""Masked rounds over sites, but for Flower between them: the run of one process, and what is left when sites are lost.

Each message is answered by a service that was just made: all that a site knows of the round stands on its disk.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from fedalign.client.open import DealtClients, open_site
from fedalign.client.spent import PrivacyLedger
from fedalign.config.run import Config
from fedalign.config.site import SiteFolder
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.flower import carrier, talks
from fedalign.federation.flower import sites as federation
from fedalign.federation.flower.client_app import _dealt_service, site_answer
from fedalign.federation.flower.coordinator import Coordinator
from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.in_process import prepare
from fedalign.federation.masked_service import RECORD
from fedalign.federation.messages import MESSAGES, Parcel, decode, encode
from fedalign.federation.site import service_of
from fedalign.protocol import PROTOCOL, Concealed, Evaluation, Failure, Fetch, Hello, Piece, Statistics
from fedalign.server.results import WRITTEN, RunFolder
from fedalign.server.run import execute
from tests.conftest import changed, make_site, rows, write_jsonl
from tests.federation.flower.scripted import Clock
from tests.federation.flower.test_coordinator import Direct, Tampering, as_coordinator, same_runs
from tests.federation.test_messages import travel
from tests.foreign import check_foreign_files_are_kept
from tests.server.test_run import Silent, metrics

SITES = ("east", "lab", "north", "ward")
MASKED = ("privacy.masked=true", "server.max_norm_ratio=0", "evaluation.clients=false")
SCORES = "evaluation.clients=true"
LIMITS = "min_tokens = 4\nmin_examples = 4\nmin_train = 4\nmin_held_out = 1\n"
SMALL = "wire.piece_mb=0.05"  # counts and updates are larger, and travel in pieces


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    for module in (federation, talks, carrier):
        monkeypatch.setattr(module, "time", clock)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    (folder / "train").mkdir()
    for number, site in enumerate(SITES):
        write_jsonl(folder / "train" / f"{site}.jsonl", rows()[number :: len(SITES)])
    return folder


@pytest.fixture
def masked(olmoe: Path) -> Callable[..., Config]:
    """`masked(*overrides)`: as a coordinator configures a masked run of two rounds."""
    return partial(as_coordinator, olmoe, "algorithm.name=by_use", *MASKED, "server.robust=none")


@pytest.fixture(scope="module")
def rehearsed(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], int]:
    """`rehearsed(config)`: for how many pieces a site is asked in such a run when nobody is lost; it is made once."""
    pieces: dict[str, int] = {}

    def count(config: Config) -> int:
        if (of := config.to_toml()) not in pieces:
            place = tmp_path_factory.mktemp("rehearsed")
            services = sites(place / "sites", house, config)
            run(place / "run", link(services), config)
            pieces[of] = services["ward"].heard.count("update")
        return pieces[of]

    return count


@dataclass
class Cold:
    """A site whose processes end with each message; it may be gone, or lose what it keeps, when `before` says so."""

    folder: SiteFolder
    config: Config
    before: Callable[[str, Parcel], str | None] = lambda verb, parcel: None
    heard: list[str] = field(default_factory=list)
    sent: list[Any] = field(default_factory=list)

    def answer(self, verb: str, parcel: Parcel) -> Parcel:
        self.heard.append(verb)
        if (gone := self.before(verb, parcel)) is not None:
            return encode(Failure(self.folder.config.name, "train", gone))
        opened = service_of(self.folder, self.config, "run", lambda: open_site(self.folder, self.config, "run"))
        answer = opened.answer(verb, parcel)
        self.sent.append(decode(travel(answer), tuple(MESSAGES.values())))
        return answer


def sites(
    folder: Path, house: Path, config: Config, privacy: Mapping[str, str] | None = None, consent: bool = True
) -> dict[str, Cold]:
    made = {}
    for name in SITES:
        toml = f'name = "{name}"\n[data]\ntrain = "{house / "train" / name}.jsonl"\n'
        toml += f'[model]\npath = "{config.model.path}"\n[limits]\n{LIMITS}'
        toml += f"seed = {config.run.seed}\nheld_out = {config.clients.held_out}\n"
        toml += f"[privacy]\nmasked = true\n{(privacy or {}).get(name, '')}\n"
        toml += f"[consent]\ntoken_counts = {json.dumps(consent)}\nembeddings = {json.dumps(consent)}\n"
        made[name] = Cold(make_site(folder / name, toml), config)
        if not (folder / name / "key").exists():
            make_node_key(folder / name / "key")
    return made


def link(services: Mapping[str, Cold]) -> Direct:
    return Direct(dict(services))


def run(out: Path, over: Direct, config: Config, resume: bool = False, watch: Silent | None = None) -> dict[str, Any]:
    folder = RunFolder(out)
    if not resume:
        folder.begin(config)
    return execute(Coordinator.connect(over, config, folder), folder, watch or Silent())


def in_process(out: Path, house: Path, config: Config, without: Sequence[str] = ()) -> dict[str, Any]:
    data = out.with_name(f"{out.name}-data")
    shutil.copytree(house / "train", data)
    for name in without:
        (data / f"{name}.jsonl").unlink()
    here = changed(changed(config, "federation", engine="in_process"), "data", train=str(data))
    folder = RunFolder(out)
    prepared = prepare(here, folder.clients)
    folder.begin(here)
    return execute(prepared, folder, Silent())


@pytest.mark.parametrize(
    "more",
    [
        (),
        (SMALL, SCORES),
        ("algorithm.name=fedprox", "server.optimizer=adam", "wire.down=int8"),
        ("algorithm.vocabulary=clients", "tuning.kind=lora", "tuning.average=freeze_a", SCORES, "run.patience=1"),
    ],
    ids=" ".join,
)
def test_a_masked_run_over_sites_is_the_run_in_one_process(
    masked: Callable[..., Config], house: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    config = masked(*more)
    services = sites(tmp_path / "sites", house, config)
    summary = run(tmp_path / "run", link(services), config)
    assert summary["failures"] == []
    in_process(tmp_path / "here", house, config)
    same_runs(tmp_path / "run", tmp_path / "here")
    last = metrics(tmp_path / "run")[-1]
    assert last["clients"] == list(SITES)
    assert ("client_accuracy_weighted" in last) == (SCORES in more)
    assert not any("by_client" not in name and isinstance(value, dict) for name, value in last.items())


def test_a_masked_simulation_is_the_run_in_one_process(settings: list[str], tmp_path: Path) -> None:
    more = [*MASKED, SCORES, "server.robust=none", "run.rounds=2", "training.epochs=1", "federation.engine=simulation"]
    config = load_config(None, [*settings, "algorithm.name=by_use", *more])
    out = tmp_path / "simulated"
    dealt = DealtClients(config, out / "clients")
    services: dict[str, Any] = {
        name: _dealt_service(number, config.to_toml(), out / "clients", "run")
        for number, name in enumerate(dealt.names)
    }
    run(out, Direct(services), config)
    here = changed(config, "federation", engine="in_process")
    folder = RunFolder(tmp_path / "here")
    prepared = prepare(here, folder.clients)
    folder.begin(here)
    execute(prepared, folder, Silent())
    same_runs(out, tmp_path / "here")
    assert all("client_accuracy_weighted" in line for line in metrics(out))


def test_nothing_but_residues_leaves(masked: Callable[..., Config], house: Path, tmp_path: Path) -> None:
    config = masked(SMALL, SCORES, "run.rounds=1")
    services = sites(tmp_path / "sites", house, config)
    run(tmp_path / "run", link(services), config)
    for site in services.values():
        assert not any(isinstance(one, Statistics | Evaluation) for one in site.sent)
        assert {one.examples + one.held_out for one in site.sent if isinstance(one, Hello)} == {0}
        assert any(isinstance(one, Concealed) and not one.residues for one in site.sent)
        data = torch.cat([one.data for one in site.sent if isinstance(one, Piece) and one.round])
        assert chisquare(torch.bincount(data.long(), minlength=256)).pvalue > 1e-6
        assert not list(site.folder.path.rglob("counts.safetensors"))  # forgotten at the end


def test_without_consent_rows_stay_and_the_rest_is_summed(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = masked("run.rounds=1")
    summary = run(tmp_path / "run", link(sites(tmp_path / "sites", house, config, consent=False)), config)
    assert summary["failures"] == []
    line = metrics(tmp_path / "run")[-1]
    assert line["experts_held_share"] > 0
    assert line["clipped_share"] == 0


# ----------------------------------------------------------------------------------------------------------- drop-outs


def lost(site: Cold, *verbs: str, after: int = 0) -> None:
    """From its answer number `after` to one of these on it is gone for the rest of the round."""

    def before(verb: str, parcel: Parcel) -> str | None:
        said = [one for one in site.heard if one in verbs]
        return "gone" if len(said) > after and verb != "hello" else None

    site.before = before


def test_a_site_that_is_lost_before_its_counts_are_there_is_as_if_it_had_not_been(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = masked("run.rounds=1")
    services = sites(tmp_path / "sites", house, config)
    lost(services["north"], "train")
    run(tmp_path / "run", link(services), config)
    in_process(tmp_path / "here", house, config, without=["north"])
    line, alone = metrics(tmp_path / "run")[-1], metrics(tmp_path / "here")[-1]
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        tmp_path / "here/model/model.safetensors"
    ).read_bytes()
    assert line["train_examples"] == alone["train_examples"]
    assert [(fault["client"], fault["reason"]) for fault in line["failures"]] == [("north", "gone")]
    assert services["east"].heard.count("count") == 1


@pytest.mark.parametrize(("more", "after"), [((), 0), ((SMALL,), 0), ((SMALL,), 9)])
def test_of_a_site_that_is_lost_between_totals_and_update_no_group_has_two_sums(
    masked: Callable[..., Config],
    house: Path,
    rehearsed: Callable[[Config], int],
    tmp_path: Path,
    more: tuple[str, ...],
    after: int,
) -> None:
    config = masked("run.rounds=1", *more)
    services = sites(tmp_path / "sites", house, config)
    lost(services["ward"], *(("update",) if after else ("conceal",)), after=rehearsed(config) // 2 if after else 0)
    run(tmp_path / "run", link(services), config)
    line = metrics(tmp_path / "run")[-1]
    assert line["clients"] == list(SITES)  # all were counted
    assert {fault["client"] for fault in line["failures"]} == {"ward"}
    asked = [one for one in services["east"].heard if one == "conceal"]
    assert len(asked) == 2
    names = [set(names) for names in concealed_of(services["east"].folder)]
    assert len(names) == 2
    assert names[1] <= names[0]
    assert (names[1] < names[0]) == bool(after)  # groups that were complete keep their sum


@pytest.mark.parametrize("kills", [0, 1, 2])
def test_of_a_group_of_which_a_lost_sites_share_broke_off_no_second_sum_is_made(
    masked: Callable[..., Config], house: Path, rehearsed: Callable[[Config], int], tmp_path: Path, kills: int
) -> None:
    """The difference of the first pieces of both sums would be its share of them; so the group stays as it was.

    Also where the coordinator is killed in the second sum, once and again, and the site is back when it goes on.
    """
    config = masked("run.rounds=1", "wire.piece_mb=0.003")
    pieces = rehearsed(config)
    services = sites(tmp_path / "sites", house, config)
    came = Counter[str]()  # bytes of each group that ward has handed over
    sizes: dict[str, int] = {}

    def before(verb: str, parcel: Parcel) -> str | None:
        updates = services["ward"].heard.count("update")
        broken = [name for name, nbytes in came.items() if nbytes < sizes[name]]
        if updates > pieces // 3 and broken and verb != "hello":  # from here on it is gone
            return "gone"
        if verb == "conceal":
            layout = json.loads((services["ward"].folder.memory("run") / "layout.json").read_text())
            sizes.update({name: 2 * size for name, size in layout["sizes"].items()})
        if verb == "update":
            asked, start = decode(parcel, Fetch), 0
            for name in asked.names:
                stop = start + sizes.get(name, 8)  # "clipped ..." is one number
                if name in sizes:
                    came[name] += max(min(stop, asked.start + asked.nbytes) - max(start, asked.start), 0)
                start = stop
        return None

    services["ward"].before = before
    out, summing = tmp_path / "run", list[int]()

    def second(number: int, stage: str, done: int) -> bool:
        summing.extend([done] if stage == "summing" else [])
        return summing[-2:] == [len(SITES), 1]

    for kill in range(kills):
        with pytest.raises(KeyboardInterrupt):
            run(out, link(services), config, resume=kill > 0, watch=Silent(second))
        services["ward"].before = lambda verb, parcel: None
        summing.clear()
    run(out, link(services), config, resume=kills > 0)
    broken = {name for name, nbytes in came.items() if 0 < nbytes < sizes[name]}
    whole = {name for name, nbytes in came.items() if nbytes == sizes[name]}
    assert broken
    assert whole
    first, again = (set(names) for names in concealed_of(services["east"].folder))
    assert again == {name for name in first if name in sizes} - broken - whole
    line = metrics(out)[-1]
    assert line["groups_unchanged"] == len(broken)
    assert {fault["client"] for fault in line["failures"]} <= {"ward"}


def concealed_of(folder: SiteFolder) -> list[list[str]]:
    """The groups that a site concealed, first and second."""
    named = [line["names"] for line in recorded(folder) if "names" in line]
    return [names for names in named if not {"examples", "scored"} & {*names}]


def test_a_site_that_was_started_again_goes_on_and_does_not_train_anew(
    masked: Callable[..., Config], house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that is killed asks for the round once more; sites conceal what they counted then."""
    config = masked("run.rounds=1", SMALL)
    in_process(tmp_path / "here", house, config)
    for turn, (stage, more) in enumerate([("training", 1), ("training", 4), ("summing", 2)]):
        services = sites(tmp_path / f"sites-{turn}", house, config)
        out = tmp_path / f"run-{turn}"
        stop = Silent(lambda *where, at=(1, stage, more): where == at)
        with pytest.raises(KeyboardInterrupt):
            run(out, link(services), config, watch=stop)
        check_foreign_files_are_kept(out, "run", WRITTEN)
        before = [one.heard.count("train") for one in services.values()]
        run(out, link(services), config, resume=True)
        assert (out / "model/model.safetensors").read_bytes() == (
            tmp_path / "here/model/model.safetensors"
        ).read_bytes()
        trained = [one.heard.count("train") for one in services.values()]
        assert sum(trained) <= sum(before) + len(SITES) - more or stage == "summing"
        assert all(len(concealed_of(one.folder)) == 1 for one in services.values())


def test_a_second_sum_that_was_interrupted_goes_on_and_no_other_is_made(
    masked: Callable[..., Config], house: Path, rehearsed: Callable[[Config], int], tmp_path: Path
) -> None:
    """Ward is lost half-way; the coordinator is killed in the second sum, and ward is back when it is resumed."""
    config = masked("run.rounds=1", SMALL)
    pieces = rehearsed(config)
    models = []
    for turn, killed in enumerate((False, True)):
        services = sites(tmp_path / f"sites-{turn}", house, config)
        lost(services["ward"], "update", after=pieces // 2)
        heard = list[int]()

        def second(number: int, stage: str, done: int, heard: list[int] = heard) -> bool:
            heard += [done] if stage == "summing" else []
            return heard[-2:] == [len(SITES), 1]  # the first sum is over, and the second has begun

        out = tmp_path / f"run-{turn}"
        if killed:
            with pytest.raises(KeyboardInterrupt):
                run(out, link(services), config, watch=Silent(second))
            services["ward"].before = lambda verb, parcel: None
        run(out, link(services), config, resume=killed)
        models.append((out / "model/model.safetensors").read_bytes())
        first, again = concealed_of(services["east"].folder)
        assert set(again) < set(first)
    assert models[0] == models[1]


def test_a_site_that_is_away_when_a_round_goes_on_was_counted_all_the_same(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = masked("run.rounds=1", "federation.min_sites=3")
    services = sites(tmp_path / "sites", house, config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", link(services), config, watch=Silent(lambda *where: where == (1, "training", 4)))
    away = link(services)
    away.away = {SITES.index("east")}
    run(tmp_path / "run", away, config, resume=True)
    line = metrics(tmp_path / "run")[-1]
    assert line["clients"] == list(SITES)
    assert [(fault["client"], fault["reason"]) for fault in line["failures"]] == [("east", "not connected")]
    assert [len(concealed_of(site.folder)) for site in services.values()][1:] == [2, 2, 2]


def test_a_site_that_lost_its_record_has_another_key_and_the_sum_is_right_or_none(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = masked()
    in_process(tmp_path / "here", house, config)
    services = sites(tmp_path / "sites", house, config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", link(services), config, watch=Silent(lambda *where: where == (2, "training", 2)))
    (services["lab"].folder.memory("run") / RECORD).unlink()
    run(tmp_path / "run", link(services), config, resume=True)
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        tmp_path / "here/model/model.safetensors"
    ).read_bytes()


def test_a_round_that_cannot_be_summed_ends_the_run_in_one_line(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = masked()
    services = sites(tmp_path / "sites", house, config)
    lost(services["ward"], "train")
    lost(services["north"], "train")
    with pytest.raises(UserError, match=r"round 1: 2 clients can be summed, .* ask for 3") as failed:
        run(tmp_path / "run", link(services), config)
    assert "\n" not in str(failed.value)
    for site in services.values():
        site.before = lambda verb, parcel: None
    run(tmp_path / "run", link(services), config, resume=True)  # all are back
    assert [line["clients"] for line in metrics(tmp_path / "run")[1:]] == [[*SITES]] * 2


# -------------------------------------------------------------------------------------------------------------- scores


def test_a_site_that_is_lost_while_it_scores_costs_its_score(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = masked("run.rounds=1", SCORES)
    services = sites(tmp_path / "sites", house, config)
    lost(services["north"], "evaluate")
    run(tmp_path / "run", link(services), config)
    all_of_them, line = metrics(tmp_path / "run")
    assert [(fault["client"], fault["stage"], fault["reason"]) for fault in line["failures"]] == [
        ("north", "evaluate", "gone")
    ]
    assert 0 < line["held_out_examples"] < all_of_them["held_out_examples"]
    assert "client_accuracy_weighted" in line
    assert services["east"].heard.count("count") == 1  # once more, among those left
    assert services["east"].heard.count("evaluate") == 1


class Guarded(Cold):
    """A site whose messages pass its door, where they are counted."""

    def answer(self, verb: str, parcel: Parcel) -> Parcel:
        return site_answer(self.folder, self.config.to_toml(), "run", verb, parcel)


def test_a_site_that_has_scored_all_that_it_will_is_summed_all_the_same(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    """Its masks are those of the others, who were asked for scores as it was."""
    config = masked("run.rounds=2", SCORES)
    services = sites(tmp_path / "sites", house, config)
    toml = (services["north"].folder.path / "site.toml").read_text()
    make_site(services["north"].folder.path, toml.replace("[limits]\n", "[limits]\nevaluations = 1\n"))
    guarded = {name: Guarded(SiteFolder.load(one.folder.path), config) for name, one in services.items()}
    run(tmp_path / "run", link(guarded), config)
    start, first, last = metrics(tmp_path / "run")
    assert first["clients"] == last["clients"] == list(SITES)
    assert 0 < first["held_out_examples"] < start["held_out_examples"]
    assert first["held_out_examples"] == last["held_out_examples"]
    assert [(fault["client"], fault["stage"]) for fault in last["failures"]] == [("north", "evaluate")]
    assert start["failures"] == first["failures"] == []
    in_process(tmp_path / "here", house, config)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run" / "model" / name).read_bytes() == (tmp_path / "here" / "model" / name).read_bytes()


@pytest.mark.parametrize("at", [(1, "evaluating", 2), (2, "summing", 1)])
def test_a_coordinator_that_was_killed_goes_on_with_the_same_scores(
    masked: Callable[..., Config], house: Path, tmp_path: Path, at: tuple[int, str, int]
) -> None:
    """In the midst of scores, where one site stays away afterwards; or when those of the round before are there."""
    config = masked("run.rounds=1" if at[0] == 1 else "run.rounds=2", SCORES)
    in_process(tmp_path / "here", house, config)
    services = sites(tmp_path / "sites", house, config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", link(services), config, watch=Silent(lambda *where: where == at))
    check_foreign_files_are_kept(tmp_path / "run", "run", WRITTEN)
    run(tmp_path / "run", link(services), config, resume=True)
    same_runs(tmp_path / "run", tmp_path / "here", resumed=True)
    for site in services.values():
        scored = [one for one in recorded(site.folder) if "scored" in one.get("names", ())]
        assert [one["among"] for one in scored] == [list(SITES)]


def recorded(folder: SiteFolder) -> list[dict[str, Any]]:
    """The lines that a site has written down of the last round."""
    return [json.loads(line) for line in (folder.memory("run") / RECORD).read_text().splitlines()[1:]]


# ------------------------------------------------------------------------------------------------- keys and refusals


def test_keys_are_held_against_the_node_keys_that_a_site_was_given(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = masked("run.rounds=1")
    publics = {name: make_node_key(tmp_path / "sites" / name / "key").read_text().strip() for name in SITES}
    privacy = {
        name: "node_keys = {" + ", ".join(f'{one} = "{key}"' for one, key in publics.items() if one != name) + "}"
        for name in SITES
    }
    services = sites(tmp_path / "sites", house, config, privacy)
    assert run(tmp_path / "run", link(services), config)["failures"] == []

    strangers = sites(tmp_path / "strangers", house, config, {"east": privacy["east"]})  # east knows other keys
    (failure,) = run(tmp_path / "again", link(strangers), config)["failures"]
    assert (failure["client"], failure["stage"]) == ("east", "train")
    assert failure["reason"] == "mask key of 'lab': not signed with its node key for this run"
    assert not any(isinstance(one, Concealed) for one in strangers["east"].sent)
    assert metrics(tmp_path / "again")[-1]["clients"] == ["lab", "north", "ward"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hello: replace(hello, mask_key=""), "its mask key '' or the signature of it is none"),
        (lambda hello: replace(hello, mask_key="A" * 64), "or the signature of it is none"),
        (lambda hello: replace(hello, mask_key="00" * 32), "is no X25519 public key"),
        (lambda hello: replace(hello, mask_signature="30" * 500), "or the signature of it is none"),
        (lambda hello: replace(hello, examples=40), "it tells how many examples it has, in a masked run"),
    ],
)
def test_a_hello_that_does_not_fit_a_masked_run_is_refused(
    masked: Callable[..., Config], house: Path, tmp_path: Path, change: Callable[[Hello], Hello], said: str
) -> None:
    config = masked("run.rounds=1")
    services: dict[str, Any] = dict(sites(tmp_path / "sites", house, config))
    services["lab"] = Tampering(services["lab"], "hello", change)
    summary = run(tmp_path / "run", Direct(services), config)
    (failure,) = summary["failures"]
    assert (failure["client"], failure["stage"]) == ("lab", "join")
    assert said in failure["reason"]


def test_a_site_that_shows_the_key_of_another_is_refused(
    masked: Callable[..., Config], house: Path, tmp_path: Path
) -> None:
    config = masked("run.rounds=1")
    services: dict[str, Any] = dict(sites(tmp_path / "sites", house, config))
    own = decode(services["east"].answer("hello", Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})), Hello)
    services["lab"] = Tampering(services["lab"], "hello", lambda hello: replace(hello, mask_key=own.mask_key))
    (failure,) = run(tmp_path / "run", Direct(services), config)["failures"]
    assert (failure["client"], failure["stage"]) == ("lab", "join")
    assert failure["reason"].endswith("its mask key is that of east")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: replace(one, round=9), "its masked numbers are of another sum"),
        (lambda one: replace(one, among=("lab",)), "its masked numbers are of another sum"),
        (lambda one: replace(one, residues={"examples": torch.zeros(1)}), "its masked numbers of"),
        (lambda one: replace(one, residues={**one.residues, "z": torch.zeros(9).long()}), "its masked numbers of 'z'"),
        (
            lambda one: replace(one, residues={**one.residues, "examples": torch.zeros(1 << 20).long()}),
            "its masked numbers of 'examples' are not those asked for",
        ),
        (lambda one: replace(one, residues={}), "it keeps no update of round 1"),
        (lambda one: Failure("lab", "train", "no"), "no"),
        (lambda one: replace(one, client="east"), "it answers as 'east'"),
    ],
)
def test_what_a_site_says_that_was_not_asked_for_is_not_summed(
    masked: Callable[..., Config], house: Path, tmp_path: Path, change: Callable[[Concealed], Any], said: str
) -> None:
    config = masked("run.rounds=1")
    services: dict[str, Any] = dict(sites(tmp_path / "sites", house, config))
    services["lab"] = Tampering(services["lab"], "train", change)
    run(tmp_path / "run", Direct(services), config)
    (failure,) = metrics(tmp_path / "run")[-1]["failures"]
    assert (failure["client"], failure["stage"]) == ("lab", "train")
    assert said in failure["reason"]
    in_process(tmp_path / "here", house, config, without=["lab"])
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        tmp_path / "here/model/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("masks", [True, False])
def test_noise_with_and_without_masks_over_sites(masks: bool, olmoe: Path, house: Path, tmp_path: Path) -> None:
    """Each site pays for its own rounds; without masks it tells what they cost, and with them nobody else knows."""
    noise = ("privacy.epsilon=4", "evaluation.clients=false", "server.max_norm_ratio=0")
    way = ("algorithm.name=by_use", "algorithm.vocabulary=average") if masks else ("algorithm.name=fedavg",)
    config = as_coordinator(
        olmoe, *noise, *way, f"privacy.masked={str(masks).lower()}", f"server.robust={'none' if masks else 'clip'}"
    )
    services = sites(tmp_path / "sites", house, config)
    for one in () if masks else services.values():
        file = one.folder.path / "site.toml"
        file.write_text(file.read_text().replace("masked = true", "epsilon_total = 50.0"))
        one.folder = SiteFolder.load(one.folder.path)
    summary = run(tmp_path / "run", link(services), config)
    assert (summary["failures"], summary["rounds"]) == ([], 2)
    ledgers = {name: PrivacyLedger(one.folder.path) for name, one in services.items()}
    spent = {name: ledger.spent(summary["privacy_delta"] or 1e-5) for name, ledger in ledgers.items()}
    assert all(0 < cost <= 4 for cost in spent.values())
    kinds = ["count", *(["training", "loads"] if masks else ["training"]) * 2]
    assert [[line.kind for line in ledger.lines()] for ledger in ledgers.values()] == [kinds] * 4
    last = metrics(tmp_path / "run")[-1]
    assert last.get("privacy_epsilons", {}) == ({} if masks else pytest.approx(spent))
    assert summary["privacy_epsilon"] == (None if masks else pytest.approx(max(spent.values())))
    assert not {"train_loss_nats", "routing_divergence_nats"} & last.keys()
