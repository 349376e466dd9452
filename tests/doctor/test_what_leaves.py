"""The list of what leaves a site is that of the messages, field by field and byte by byte."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedalign.client.open import open_site
from fedalign.config.run import Config
from fedalign.config.site import SiteConfig, SiteFolder
from fedalign.config.toml import load_config
from fedalign.doctor.model import skeleton_bench
from fedalign.doctor.what_leaves import (
    MASKED_SCORES,
    MEANINGS,
    TELLS,
    WHEN,
    empty_messages,
    masks_told,
    what_leaves,
)
from fedalign.federation.flower.keys import make_node_key
from fedalign.federation.masks import fresh_key, public_key
from fedalign.federation.messages import MESSAGES, Parcel, decode, encode
from fedalign.federation.service import Service
from fedalign.federation.site import service_of
from fedalign.maths.fixed_point import POWERS
from fedalign.maths.rounding import pack
from fedalign.moe.model import MoEModel
from fedalign.protocol import (
    DEALT,
    HEIGHTS,
    HELD_OUT,
    LOSS,
    PROTOCOL,
    Broadcast,
    Concealed,
    Consent,
    Fetch,
    Hello,
    Offer,
    Piece,
    Recount,
    Statistics,
    Sum,
)
from tests.conftest import changed
from tests.federation.test_messages import travel

TO_SITES = {Broadcast, Fetch, Offer, Recount, Sum}


ADAPTERS = "tuning.kind=lora tuning.rank=2"


@pytest.fixture(
    scope="module",
    params=[
        *(f"wire.dtype={dtype}" for dtype in ("float32", "bfloat16", "int8", "int4")),
        *(f"{ADAPTERS} {more}" for more in ("tuning.average=factors", "tuning.average=exact wire.dtype=int4")),
        "tuning.kind=experts",
    ],
)
def config(request: pytest.FixtureRequest, settings: list[str]) -> Config:
    return load_config(None, [*settings, "federation.engine=flower", *request.param.split()])


@pytest.fixture(
    scope="module", params=[DEALT, Consent(False, False), Consent(False, True)], ids=["both", "neither", "rows"]
)
def consent(request: pytest.FixtureRequest) -> Consent:
    given: Consent = request.param
    return given


def service(config: Config, folder: Path, consent: Consent = DEALT) -> Service:
    limits = {"min_tokens": config.statistics.min_tokens}
    model = {"path": config.model.path}
    tables = {
        "name": "ward",
        "data": {"train": config.data.train},
        "model": model,
        "limits": limits,
        "consent": vars(consent),
    }
    here = SiteFolder(folder, SiteConfig.model_validate(tables))
    return Service("ward", here.memory("run"), lambda: open_site(here, config, "run"))


def broadcast(moe: MoEModel) -> Parcel:
    weights = {group: pack(value.cpu(), "float32", 0) for group, value in moe.read().items()}
    target_L_E = torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)
    return travel(encode(Broadcast(1, weights, {"target_L_E": target_L_E}, score=True)))


@pytest.fixture(scope="module")
def real(config: Config, consent: Consent, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Parcel]:
    """What a site really answers in its first round, by kind of message."""
    site = service(config, tmp_path_factory.mktemp("site"), consent)
    nothing = Parcel({"protocol": PROTOCOL, "kind": "nothing"}, {})
    moe = site.client.trainer.moe
    frozen = consent.frozen(moe.layout)
    trained = tuple(str(group) for group, size in moe.layout.sizes.items() if size and group not in frozen)
    weights = broadcast(moe)
    answers = [
        site.answer("hello", nothing),
        site.answer("start", nothing),
        site.answer("train", weights),
        site.answer("update", encode(Fetch("ward", 1, trained, 0, 1 << 40))),
        site.answer("evaluate", weights),
        site.answer("update", encode(Fetch("ward", 9, trained, 0, 1))),  # it keeps none of round 9
        site.answer("finish", nothing),
    ]
    return {answer.head["kind"]: answer for answer in answers}


def skeleton(config: Config) -> MoEModel:
    """As the command has it."""
    return skeleton_bench(config).moe


def test_every_message_and_every_field_is_listed() -> None:
    leaving = set(MESSAGES.values()) - TO_SITES
    for table in (MEANINGS, TELLS, WHEN):
        assert set(table) == leaving
    for kind, meanings in MEANINGS.items():
        assert list(meanings) == [field.name for field in dataclasses.fields(kind)]


def test_the_list_is_complete_for_a_model(config: Config, consent: Consent) -> None:
    sent = what_leaves("ward", skeleton(config), config, consent)
    assert {one.name for one in sent} == {kind.__name__ for kind in MEANINGS} - {"Concealed"}
    for one in sent:
        assert all(field.meaning and field.shape and field.nbytes for field in one.fields)
        assert one.when
        assert one.tells
        names = one.nbytes - sum(field.nbytes for field in one.fields)
        assert 0 < names < 40 + 25 * len(one.fields)  # what the fields do not take is their names


def test_a_real_round_sends_what_is_listed(config: Config, consent: Consent, real: dict[str, Parcel]) -> None:
    every = empty_messages("ward", skeleton(config), config, consent)
    listed = {encode(message).head["kind"]: message for message in every}
    sizes = {one.name.lower(): one.nbytes for one in what_leaves("ward", skeleton(config), config, consent)}
    assert set(real) == set(listed)
    for kind, answer in real.items():
        assert parts(answer) == parts(encode(listed[kind])), kind
        assert sizes[kind] == pytest.approx(answer.nbytes, rel=0.01, abs=60), kind


def parts(parcel: Parcel) -> tuple[Any, Any]:
    """The head without what it says, and the type and size of each array."""
    arrays = {
        name: (pieces[0].dtype, sum(len(piece) for piece in pieces)) for name, pieces in parcel.arrays.items() if pieces
    }
    return shape(parcel.head), arrays


def shape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: shape(entry) for key, entry in value.items()}
    return value if isinstance(value, list) else type(value)  # lists are groups, sizes and shapes


def test_the_limits_of_the_site_are_told(config: Config) -> None:
    strict = config.model_copy(update={"statistics": config.statistics.model_copy(update={"min_tokens": 77})})
    told = {one.name: one for one in what_leaves("ward", skeleton(config), strict)}
    assert "fewer than 77 tokens or 4 examples" in told["Statistics"].tells


def test_what_is_told_of_withheld_experts_is_so(settings: list[str], tmp_path: Path) -> None:
    site = service(
        load_config(None, [*settings, "federation.engine=flower", "statistics.min_tokens=1000000"]), tmp_path
    )
    answer = site.answer("train", broadcast(site.client.trainer.moe))
    statistics: Statistics = decode(travel(answer), Statistics)
    for name in ("load_L_E", "margin_L_E", "centroid_L_E_D", "update_L_E_S"):
        assert not getattr(statistics, name).any()
    assert statistics.prob_L_E.all()
    assert statistics.norm_G.any()


def test_shapes_need_no_memory(config: Config) -> None:
    tensors: list[Tensor] = [
        message.data for message in empty_messages("ward", skeleton(config), config) if isinstance(message, Piece)
    ]
    assert tensors
    assert all(tensor.device.type == "meta" for tensor in tensors)


@pytest.mark.parametrize("noise", [[], ["privacy.noise_multiplier=1"]], ids=["masks", "masks and noise"])
def test_a_real_masked_round_sends_what_is_listed(
    noise: list[str], ward: SiteFolder, site_config: Config, settings: list[str]
) -> None:
    """Hello, counts, shares and their piece: field by field, and no field beside the list."""
    by_use = ["algorithm.name=by_use", "algorithm.vocabulary=average", "privacy.masked=true", "server.max_norm_ratio=0"]
    parts_of = load_config(None, [*by_use, *noise, "evaluation.clients=false"])
    sections = {name: getattr(parts_of, name) for name in ("algorithm", "privacy", "server", "evaluation")}
    config = site_config.model_copy(update=sections)
    make_node_key(ward.path / "key")
    service = service_of(ward, config, "night", lambda: open_site(ward, config, "night"))
    small = changed(config, "wire", piece_mb=0.001)  # then shares are fetched
    again = service_of(ward, small, "night", lambda: open_site(ward, small, "night"))
    moe, name, nothing = service.client.trainer.moe, ward.config.name, Parcel({"protocol": PROTOCOL, "kind": "-"}, {})
    hello = service.answer("hello", nothing)
    own: Hello = decode(travel(hello), Hello)
    keys = {name: f"{own.mask_key} {own.mask_signature}", **{peer: public_key(fresh_key()).hex() for peer in "BC"}}
    weights = {group: pack(value.cpu(), "float32", 0) for group, value in moe.read().items()}
    round_1 = travel(encode(Broadcast(1, weights, keys=keys)))
    start, counts = service.answer("start", nothing), service.answer("train", round_1)
    told: Concealed = decode(travel(counts), Concealed)
    groups = tuple(group for group, size in moe.layout.sizes.items() if size)
    asked = travel(encode(Sum(1, tuple(keys), enough(told), keys, groups)))
    shares, without = service.answer("conceal", asked), again.answer("conceal", asked)
    piece = again.answer("update", encode(Fetch(name, 1, tuple(map(str, groups)), 0, 1 << 40)))
    failure = service.answer("evaluate", round_1)  # of a run without scores
    sent = (hello, start, counts, shares, piece, failure)
    every = [encode(one) for one in empty_messages(name, skeleton(config), config, ward.consent)]
    listed = [one for one in every if one.head["kind"] != "lacking"]  # weights came whole
    for answer, wanted in zip(sent, listed, strict=True):
        assert parts(answer) == parts(wanted), answer.head["kind"]
        assert answer.nbytes == pytest.approx(wanted.nbytes, rel=0.01, abs=60)
    assert decode(travel(without), Concealed).residues == {}
    assert (LOSS in told.residues) == (not noise)
    assert (own.examples, own.held_out) == (0, 0)


def enough(told: Concealed) -> dict[str, Tensor]:
    """Totals that are no less than any client counts."""
    named = {name: value for name, value in told.residues.items() if name != HELD_OUT}
    tall = {name: torch.full((len(value),), POWERS - 1, dtype=torch.uint8) for name, value in named.items()}
    most = {name: torch.full_like(value, 10**12) for name, value in named.items() if HEIGHTS not in name}
    return {name: most.get(name, tall[name]) for name in named}


def test_a_sum_of_scores_that_may_be_of_one_site_is_told(settings: list[str]) -> None:
    masked = [*settings, "algorithm.name=by_use", "privacy.masked=true", "server.max_norm_ratio=0"]
    for scored in ("true", "false"):
        config = load_config(None, [*masked, f"evaluation.clients={scored}"])
        assert (MASKED_SCORES in masks_told(config, ())) == (scored == "true")
    assert not masks_told(load_config(None, settings), ())
