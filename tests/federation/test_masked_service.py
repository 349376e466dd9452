"""What a site of a masked run answers, and what it refuses, whoever asks and however often its processes end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedalign.client.log import SiteLog
from fedalign.client.open import open_site
from fedalign.config.run import Config
from fedalign.config.settled import sha256_of
from fedalign.config.site import SiteFolder
from fedalign.config.toml import load_config
from fedalign.errors import UserError
from fedalign.federation.flower.client_app import site_answer
from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.masked_service import COUNTS, RECORD
from fedalign.federation.masked_site import seen_of
from fedalign.federation.masks import fresh_key, public_key, signed, signer
from fedalign.federation.messages import MESSAGES, Message, Parcel, decode, encode
from fedalign.federation.site import service_of, withdraw
from fedalign.maths.fixed_point import MOST_CLIENTS
from fedalign.maths.rounding import pack
from fedalign.moe.model import MoEModel
from fedalign.protocol import (
    EXAMPLES,
    HEIGHTS,
    HELD_OUT,
    HOLDERS,
    PROTOCOL,
    SCORED,
    SHARED,
    Broadcast,
    Concealed,
    Failure,
    Fetch,
    Hello,
    ParameterGroup,
    Recount,
    Sum,
)
from tests.conftest import changed, make_site, site_toml
from tests.federation.test_messages import travel

NOTHING = Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})
PEERS = ("b", "c", "d")
OWN = "ward 3"


@pytest.fixture
def config(settings: list[str], site_config: Config) -> Config:
    privacy = site_config.privacy.model_copy(update={"masked": True})
    algorithm = load_config(None, ["algorithm.name=fedavg"]).algorithm
    return changed(site_config, "training", epochs=1).model_copy(update={"privacy": privacy, "algorithm": algorithm})


@pytest.fixture
def peers() -> dict[str, str]:
    return {name: public_key(fresh_key()).hex() for name in PEERS}


def ask(site: SiteFolder, config: Config, verb: str, message: Message | Parcel = NOTHING) -> Any:
    """The answer of a process that was just started."""
    parcel = message if isinstance(message, Parcel) else encode(message)
    service = service_of(site, config, "night", lambda: open_site(site, config, "night"))
    return decode(travel(service.answer(verb, travel(parcel))), tuple(MESSAGES.values()))


def fails(site: SiteFolder, config: Config, verb: str, message: Message | Parcel = NOTHING) -> str:
    answer = ask(site, config, verb, message)
    assert isinstance(answer, Failure), answer
    assert "\n" not in answer.reason
    return answer.reason


def broadcast(config: Config, keys: Mapping[str, str], round: int = 1, shift: float = 0.0) -> Broadcast:
    moe = MoEModel.load(config.model.path)
    weights = {group: pack(value + shift, "float32", 0) for group, value in moe.read().items()}
    return Broadcast(round, weights, keys=keys)


def keys_of(site: SiteFolder, config: Config, peers: Mapping[str, str]) -> dict[str, str]:
    hello: Hello = ask(site, config, "hello")
    return {**peers, OWN: f"{hello.mask_key} {hello.mask_signature}".strip()}


def totals_of(told: Concealed, examples: int = 10**12) -> dict[str, torch.Tensor]:
    """Totals that are large enough for any client."""
    named = {name: value for name, value in told.residues.items() if name != HELD_OUT}
    counts = {name: torch.full_like(value, examples) for name, value in named.items() if "heights" not in name}
    heights = {n: torch.full((len(v),), 46, dtype=torch.uint8) for n, v in named.items() if "heights" in n}
    return counts | heights


def test_a_whole_round_by_processes_that_end_with_each_message(
    ward: SiteFolder, config: Config, peers: dict[str, str]
) -> None:
    keys = keys_of(ward, config, peers)
    told = ask(ward, config, "train", broadcast(config, keys))
    assert isinstance(told, Concealed)
    assert (told.client, told.round, told.among) == (OWN, 1, tuple(keys))
    assert EXAMPLES in told.residues
    again = ask(ward, config, "train", broadcast(config, keys))  # by a coordinator that was started again
    assert all(torch.equal(value, told.residues[name]) for name, value in again.residues.items())
    left = {name: keys[name] for name in ("b", "c", OWN)}
    fewer = ask(ward, config, "count", Recount(1, left))
    assert fewer.among == tuple(left)
    assert not torch.equal(fewer.residues[EXAMPLES], told.residues[EXAMPLES])
    asked = Sum(1, tuple(left), totals_of(told), left, (SHARED,))
    share = ask(ward, config, "conceal", asked)
    assert {str(SHARED), f"clipped {SHARED}"} == set(share.residues)
    assert torch.equal(ask(ward, config, "conceal", asked).residues[str(SHARED)], share.residues[str(SHARED)])
    small = changed(config, "wire", piece_mb=0.001)  # then it is fetched
    assert ask(ward, small, "conceal", asked).residues == {}
    piece = ask(ward, small, "update", Fetch(OWN, 1, (str(SHARED),), 0, 1 << 40))
    assert torch.equal(piece.data.view(torch.int16), share.residues[str(SHARED)])


def test_a_piece_of_another_round_is_not_handed_over(ward: SiteFolder, config: Config, peers: dict[str, str]) -> None:
    """What was last concealed lies in one folder for all rounds, and stays there where a round sends it at once."""
    keys = keys_of(ward, config, peers)
    small = changed(config, "wire", piece_mb=0.001)
    assert ask(ward, small, "train", broadcast(config, keys)).residues == {}
    name = f"{HEIGHTS}{SHARED}"
    assert ask(ward, small, "update", Fetch(OWN, 1, (name,), 0, 100)).data.numel()
    assert ask(ward, config, "train", broadcast(config, keys, round=2)).residues  # in one message: nothing is kept
    for asked in (2, 3, -1):
        reason = fails(ward, small, "update", Fetch(OWN, asked, (name,), 0, 100))
        assert reason == f"it keeps no update of round {asked}: its last is of round 1"


def test_what_is_not_concealed_does_not_leave(ward: SiteFolder, config: Config, peers: dict[str, str]) -> None:
    hello: Hello = ask(ward, config, "hello")
    assert (hello.examples, hello.held_out) == (0, 0)
    keys = keys_of(ward, config, peers)
    without = changed(config, "evaluation", clients=False)
    scored = replace(broadcast(config, keys), score=True)
    assert "this run has none of clients (evaluation.clients)" in fails(ward, without, "train", scored)
    assert "this run has none of clients (evaluation.clients)" in fails(ward, without, "evaluate", scored)
    ask(ward, config, "train", broadcast(config, keys))
    assert list(ward.memory("night").rglob("round-*/update.safetensors"))
    fetch = Fetch(OWN, 1, (str(SHARED),), 0, 100)
    assert fails(ward, config, "update", fetch) == "it keeps no update of round 1"


def test_a_score_by_itself_by_processes_that_end_with_each_message(
    ward: SiteFolder, config: Config, peers: dict[str, str]
) -> None:
    keys = keys_of(ward, config, peers)
    ask(ward, config, "train", broadcast(config, keys))
    trained = broadcast(config, keys, shift=0.01)
    told = ask(ward, config, "evaluate", trained)
    assert isinstance(told, Concealed)
    assert (told.round, told.among) == (1, tuple(keys))
    assert {name: tuple(value.shape) for name, value in told.residues.items()} == {SCORED: (5,)}
    assert torch.equal(ask(ward, config, "evaluate", trained).residues[SCORED], told.residues[SCORED])
    left = {name: keys[name] for name in ("b", "c", OWN)}
    fewer = ask(ward, config, "count", Recount(1, left))
    assert fewer.among == tuple(left)
    assert not torch.equal(fewer.residues[SCORED], told.residues[SCORED])
    other = {name: keys[name] for name in ("c", "d", OWN)}
    assert "a further sum would tell of one client" in fails(ward, config, "count", Recount(1, other))
    reason = fails(ward, config, "evaluate", broadcast(config, keys, shift=0.02))
    assert reason == "round 1 began with other weights: its masks are used up"
    assert "not of what it counted" in fails(ward, config, "conceal", Sum(1, tuple(keys), {}, keys, (SHARED,)))


def test_who_is_asked_for_a_score_and_others_are_not_has_masks_that_do_not_cancel(
    ward: SiteFolder, config: Config, peers: dict[str, str]
) -> None:
    """Else a coordinator could ask one site alone, and read its score in the sum."""
    asked = broadcast(config, {})
    assert seen_of(asked) != seen_of(replace(asked, score=True))
    assert seen_of(asked) == seen_of(replace(asked, keys=peers))


def test_a_site_that_has_scored_all_that_it_will_trains_and_adds_no_score(
    ward: SiteFolder, config: Config, peers: dict[str, str]
) -> None:
    text = (ward.path / "site.toml").read_text().replace("[limits]", "[limits]\nevaluations = 1")
    ward, toml = make_site(ward.path, text), changed(config, "server", robust="none", max_norm_ratio=0.0).to_toml()
    keys = keys_of(ward, config, peers)

    def score_of(round: int, score: bool) -> list[int]:
        """What it kept of its score before it concealed it."""
        asked = encode(replace(broadcast(config, keys, round), score=score))
        told = decode(travel(site_answer(ward, toml, "night", "train", travel(asked))), Concealed)
        assert HELD_OUT in told.residues
        return list(map(int, load_file(ward.memory("night") / COUNTS)[HELD_OUT]))

    first = score_of(1, score=True)
    assert first[0] == 1
    assert first[1] > 0
    assert score_of(1, score=True) == first  # asked once more: it conceals what it counted, and scores nothing
    assert score_of(2, score=True) == score_of(3, score=False) == [0, 0, 0, 0, 0]
    scored = [(entry.verb, entry.scored) for entry in SiteLog(ward.path).entries() if entry.verb == "train"]
    assert scored == [("train", True), ("train", False), ("train", False), ("train", False)]


@pytest.mark.parametrize("verb", ["hello", "start", "train", "update", "evaluate", "count", "conceal"])
def test_a_run_that_began_masked_cannot_go_on_without_masks(
    ward: SiteFolder, config: Config, site_config: Config, peers: dict[str, str], verb: str
) -> None:
    ask(ward, config, "train", broadcast(config, keys_of(ward, config, peers)))
    fetch = encode(Fetch(OWN, 1, (str(SHARED),), 0, 100))
    answer = site_answer(ward, site_config.to_toml(), "night", verb, travel(fetch))
    assert "this run began with masked sums" in decode(answer, Failure).reason


@pytest.mark.parametrize("verb", ["hello", "start", "train", "update", "evaluate", "finish"])
def test_a_site_may_demand_masks(ward: SiteFolder, site_config: Config, verb: str) -> None:
    strict = make_site(ward.path, (ward.path / "site.toml").read_text() + "\n[privacy]\nmasked = true\n")
    reason = decode(site_answer(strict, site_config.to_toml(), "night", verb, NOTHING), Failure).reason
    assert reason == (
        "privacy.masked = false: this site takes part only in runs with masked sums ([privacy] in its site.toml). "
        "Choose true."
    )


def test_a_site_is_summed_with_as_many_as_it_says(ward: SiteFolder, config: Config) -> None:
    few = changed(config, "privacy", masked_min_holders=2)
    with pytest.raises(UserError, match=r"privacy\.masked_min_holders = 2: .* 3 or more"):
        ward.check_masked(few)
    loose = make_site(ward.path, (ward.path / "site.toml").read_text() + "\n[privacy]\nmasked_min_holders = 2\n")
    loose.check_masked(few)


def test_a_site_that_trains_some_experts_takes_no_part(ward: SiteFolder, config: Config) -> None:
    limited = (ward.path / "site.toml").read_text().replace("[limits]", "[limits]\nmax_experts = 2")
    with pytest.raises(UserError, match=r"limits\.max_experts"):
        make_site(ward.path, limited).check_masked(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b": "zz"}, "mask key of 'b': not written as one"),
        ({"b": "a" * 500}, "mask key of 'b': not written as one"),
        ({"b": "ab"}, "b: its mask key is no X25519 public key"),
        ({"b": "00" * 32}, "b: its mask key is no X25519 public key"),  # the same secret with everybody
        ({OWN: "ab" * 32}, "ward 3: has another mask key than before"),
        ({"b": None, "c": None}, "2 clients: it takes part in sums of 3 to 1024, itself among them"),
        ({OWN: None}, "itself among them"),
        ({str(n): "ab" for n in range(MOST_CLIENTS)}, "clients: a sum is of 1024 at most"),
    ],
)
def test_keys_that_are_none_are_refused_before_anything_is_trained(
    ward: SiteFolder, config: Config, peers: dict[str, str], change: dict[str, str | None], said: str
) -> None:
    keys = {name: key for name, key in (keys_of(ward, config, peers) | change).items() if key is not None}
    assert said in fails(ward, config, "train", broadcast(config, keys))
    assert not any("names" in line for line in record(ward))


def test_two_names_with_one_key_are_refused(ward: SiteFolder, config: Config, peers: dict[str, str]) -> None:
    keys = keys_of(ward, config, peers)
    assert "has the mask key of" in fails(ward, config, "train", broadcast(config, keys | {"b": keys["c"]}))


def test_a_run_that_is_complete_leaves_no_key_on_the_disk(
    ward: SiteFolder, config: Config, peers: dict[str, str]
) -> None:
    keys = keys_of(ward, config, peers)
    asked = concealed(ward, config, keys)
    private = record(ward)[0]["key"]
    ask(ward, config, "finish")
    kept = [file for file in ward.path.rglob("*") if file.is_file()]
    for text in (private.encode(), bytes.fromhex(private)):
        assert [file.name for file in kept if text in file.read_bytes()] == []
    assert record(ward)[0]["key"] == ""
    goes_on = keys_of(ward, config, peers)  # as under `fedalign run --resume`, with more rounds
    assert goes_on[OWN] != keys[OWN]
    assert isinstance(ask(ward, config, "train", broadcast(config, goes_on, round=2)), Concealed)
    assert "has another mask key than before" in fails(ward, config, "conceal", asked)
    with pytest.raises(UserError, match="began with masked sums"):
        service_of(ward, changed(config, "privacy", masked=False), "night", lambda: open_site(ward, config, "night"))


def test_a_site_forgets_its_update_where_its_record_cannot_be_read(
    ward: SiteFolder, config: Config, peers: dict[str, str]
) -> None:
    keys, memory = keys_of(ward, config, peers), ward.memory("night")
    ask(ward, config, "train", broadcast(config, keys))
    assert list(memory.rglob("round-*/update.safetensors"))
    (memory / RECORD).write_text("no record\n")
    assert "tells what was concealed in this run, and cannot be read. Remove it" in fails(ward, config, "finish")
    assert not list(memory.rglob("update.safetensors"))
    assert not (memory / COUNTS).exists()


def test_a_site_that_withdraws_has_no_key_of_the_run(ward: SiteFolder, config: Config, peers: dict[str, str]) -> None:
    keys_of(ward, config, peers)
    withdraw(ward, "night")
    assert [path.name for path in ward.memory("night").iterdir()] == ["withdrawn"]


def concealed(site: SiteFolder, config: Config, keys: dict[str, str]) -> Sum:
    """Round 1 as far as the site's share of the sum; what it was asked for."""
    told = ask(site, config, "train", broadcast(config, keys))
    asked = Sum(1, tuple(keys), totals_of(told), keys, (SHARED,))
    assert isinstance(ask(site, config, "conceal", asked), Concealed)
    return asked


def record(site: SiteFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (site.memory("night") / RECORD).read_text().splitlines()]


def test_other_weights_in_the_same_round_are_refused(ward: SiteFolder, config: Config, peers: dict[str, str]) -> None:
    keys = keys_of(ward, config, peers)
    ask(ward, config, "train", broadcast(config, keys))
    reason = fails(ward, config, "train", broadcast(config, keys, shift=0.1))
    assert reason == "round 1 began with other weights: its masks are used up"
    concealed(ward, config, keys)  # what was trained is still there
    (ward.memory("night") / COUNTS).unlink()  # and were it trained anew, nothing of that would be concealed
    reason = fails(ward, config, "train", broadcast(config, keys, shift=0.1))
    assert reason == "other counts and update of round 1 before: its masks are used up"


def test_another_update_is_not_concealed_under_the_mask_of_the_first(
    ward: SiteFolder, config: Config, peers: dict[str, str]
) -> None:
    """The difference of both would be that of the updates."""
    keys = keys_of(ward, config, peers)
    asked = concealed(ward, config, keys)
    other = open_site(ward, config, "night")
    assert other.trainer.train(other.data, broadcast(config, {}, shift=0.1)).round == 1  # by a process beside it
    reason = "other counts and update of round 1 before: its masks are used up"
    assert fails(ward, config, "conceal", asked) == reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"groups": (ParameterGroup("gate", 9, 9),)}, "a sum of gate[9,9], which this model does not train"),
        ({"round": 2}, "not of what it counted"),
        ({"counted": ("b", "c", OWN)}, "not of what it counted"),
        ({"counts": {}}, "not of what it counted"),
        ({EXAMPLES: torch.tensor([float("nan")])}, "not of what it counted"),  # nothing is less than it is
        ({EXAMPLES: torch.tensor([1])}, "less than it counted itself"),
        ({EXAMPLES: torch.tensor([1, 2])}, "not of what it counted"),
        ({f"{HEIGHTS}{SHARED}": torch.tensor([255])}, "not of what it counted"),
        ({f"{HEIGHTS}{SHARED}": 255}, "heights that no update may have"),
    ],
)
def test_totals_that_cannot_be_are_refused(
    ward: SiteFolder, config: Config, peers: dict[str, str], change: dict[str, Any], said: str
) -> None:
    keys = keys_of(ward, config, peers)
    counts = totals_of(ask(ward, config, "train", broadcast(config, keys)))
    for name in counts.keys() & change.keys():
        value = change[name]
        counts[name] = value if isinstance(value, torch.Tensor) else torch.full_like(counts[name], value)
    more = {name: value for name, value in change.items() if name not in counts}
    asked = replace(Sum(1, tuple(keys), counts, keys, (SHARED,)), **more)
    assert said in fails(ward, config, "conceal", asked)


def test_nothing_is_concealed_before_it_was_counted(ward: SiteFolder, config: Config, peers: dict[str, str]) -> None:
    keys = keys_of(ward, config, peers)
    assert fails(ward, config, "count", Recount(1, keys)) == "nothing was counted in this run"
    ask(ward, config, "train", broadcast(config, keys))
    assert fails(ward, config, "count", Recount(2, keys)) == "round 2: nothing was counted in it"


def test_in_a_run_without_masks_there_is_nothing_to_conceal(ward: SiteFolder, site_config: Config) -> None:
    for verb in ("count", "conceal"):
        assert fails(ward, site_config, verb) == "its sums are not masked in this run"


def test_others_keys_are_held_against_their_node_keys(
    ward: SiteFolder, config: Config, peers: dict[str, str], tmp_path: Path
) -> None:
    nodes = {name: tmp_path / name for name in PEERS}
    publics = {name: make_node_key(node).read_text().strip() for name, node in nodes.items()}
    text = "\n[privacy.node_keys]\n" + "".join(f'{name} = "{key}"\n' for name, key in publics.items())
    knows = make_site(ward.path, (ward.path / "site.toml").read_text() + text)
    keys = keys_of(knows, config, peers)
    said = "mask key of 'b': not signed with its node key for this run"
    assert fails(knows, config, "train", broadcast(config, keys)) == said
    for run, expected in (("day", said), ("night", "")):  # a signature of another run is worth nothing
        signatures = {n: signed(run, n, bytes.fromhex(k), signer(nodes[n])).hex() for n, k in peers.items()}
        vouched = keys | {name: f"{key} {signatures[name]}" for name, key in peers.items()}
        answer = ask(knows, config, "train", broadcast(config, vouched))
        assert (answer.reason if isinstance(answer, Failure) else "") == expected
    invented = vouched | {"e": public_key(fresh_key()).hex()}
    reason = fails(knows, config, "train", broadcast(config, invented))
    assert reason == "mask key of 'e': its node key is not among those that are known here"


def test_a_node_key_in_site_toml_is_one(ward: SiteFolder) -> None:
    text = (ward.path / "site.toml").read_text() + '\n[privacy.node_keys]\nb = "ssh-ed25519 AAAA"\n'
    with pytest.raises(UserError, match=r"must be the line of a site's key\.pub"):
        make_site(ward.path, text)


def shared_load(config: Config) -> Config:
    """A run whose experts are summed by what each client sent them."""
    return config.model_copy(update={"algorithm": load_config(None, ["algorithm.name=by_use"]).algorithm})


@pytest.mark.parametrize(
    ("section", "values"), [("privacy", {"masked_min_holders": 4}), ("run", {"seed": 7}), ("algorithm", {"rows": 2})]
)
def test_under_other_terms_nothing_more_of_a_round_is_told(
    ward: SiteFolder, config: Config, peers: dict[str, str], section: str, values: dict[str, int]
) -> None:
    config, keys = shared_load(config), keys_of(ward, config, peers)
    told = ask(ward, config, "train", broadcast(config, keys))
    assert isinstance(told, Concealed)
    totals = totals_of(told)
    totals[HOLDERS] = torch.full_like(totals[HOLDERS], 3)  # enough for 3, and too few for 4
    asked = Sum(1, tuple(keys), totals, keys, (SHARED,))
    first = ask(ward, config, "conceal", asked)
    assert isinstance(first, Concealed)
    if section == "algorithm":
        rows = load_config(None, ["algorithm.name=by_use", "algorithm.vocabulary_holders=2"]).algorithm
        other = config.model_copy(update={"algorithm": rows})
    else:
        other = changed(config, section, **values)
    assert "other totals of round 1 before: its masks are used up" in fails(ward, other, "conceal", asked)
    again = ask(ward, config, "conceal", asked)
    assert isinstance(again, Concealed)
    assert all(torch.equal(again.residues[name], first.residues[name]) for name in first.residues)


def test_once_totals_were_told_counts_are_concealed_among_nobody_else(
    ward: SiteFolder, config: Config, peers: dict[str, str]
) -> None:
    keys = keys_of(ward, config, peers)
    told = ask(ward, config, "train", broadcast(config, keys))
    assert isinstance(told, Concealed)
    ask(ward, config, "conceal", Sum(1, tuple(keys), totals_of(told), keys, (SHARED,)))
    left = {name: keys[name] for name in keys if name != "d"}
    assert "were summed: other sums of them would tell of one client" in fails(ward, config, "count", Recount(1, left))
    assert isinstance(ask(ward, config, "count", Recount(1, keys)), Concealed)  # the same once more


def test_a_site_does_not_tell_whom_it_knows(ward: SiteFolder, config: Config, peers: dict[str, str]) -> None:
    privacy = ward.config.privacy.model_copy(update={"node_keys": {"secret-partner": "ecdsa-sha2-nistp384 AAAA"}})
    ward = replace(ward, config=ward.config.model_copy(update={"privacy": privacy}))
    reason = fails(ward, config, "train", broadcast(config, keys_of(ward, config, peers)))
    assert "its node key is not among those that are known here" in reason
    assert "secret-partner" not in reason


@pytest.mark.parametrize("lie", ["", "learning_rate"])
def test_who_trains_by_another_configuration_has_masks_that_do_not_cancel(
    lie: str, config: Config, texts: Path, olmoe: Path, tmp_path: Path
) -> None:
    """A coordinator that lets the others learn nothing would read one site's update off the sum."""
    told = dict.fromkeys("abc", config) | ({"b": changed(config, "training", learning_rate=1e-30)} if lie else {})
    sites = dict[str, SiteFolder]()
    for name in told:
        (tmp_path / name).mkdir()
        sites[name] = make_site(tmp_path / name, site_toml(name, texts / "train.jsonl", olmoe))
    keys = {name: ask(sites[name], told[name], "hello").mask_key for name in told}
    counts = [ask(sites[name], told[name], "train", broadcast(told[name], keys)).residues[EXAMPLES] for name in told]
    total = int(torch.stack(counts).sum())
    assert (0 < total < 1 << 40) == (not lie)  # else any number of 64 bits


def test_masks_depend_on_all_that_may_not_change_in_a_run(config: Config) -> None:
    assert sha256_of(config) == sha256_of(changed(config, "run", rounds=99, workers=2))
    assert sha256_of(config) == sha256_of(changed(config, "wire", piece_mb=1))
    for section, other in (("training", {"epochs": 7}), ("data", {"max_train": 3}), ("statistics", {"min_tokens": 9})):
        assert sha256_of(config) != sha256_of(changed(config, section, **other))
