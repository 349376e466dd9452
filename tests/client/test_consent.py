"""What a client does not consent to never leaves it, and the others' round goes on without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fedalign.client.open import open_site
from fedalign.config.run import Config
from fedalign.config.site import SiteConfig, SiteFolder
from fedalign.config.toml import load_config
from fedalign.doctor.what_leaves import REFUSED, ROWS, tokens_told
from fedalign.federation.in_process import InProcess
from fedalign.federation.messages import Message, decode, encode
from fedalign.federation.service import Service
from fedalign.maths.rounding import pack, unpack
from fedalign.moe.model import MoEModel
from fedalign.protocol import (
    EMBEDDINGS,
    HEAD,
    SHARED,
    WORDS,
    Broadcast,
    Consent,
    Failure,
    Fetch,
    ParameterGroup,
    Piece,
    Request,
    Statistics,
)
from tests.algorithms.test_rounds import federation, one_round
from tests.federation.test_messages import travel
from tests.moe.tiny import build

NEITHER, ROWS_ALONE, BOTH = Consent(False, False), Consent(False, True), Consent(True, True)
COUNTS_ALONE = Consent(True, False)


def consenting(folder: Path, name: str, **consents: Consent) -> InProcess:
    """Clients a, b and c, of which some do not consent to everything."""
    engine = federation(folder, name)
    clients = {client: replace(data, consent=consents.get(client, BOTH)) for client, data in engine.clients.items()}
    return InProcess(engine.trainer, clients)


def moved(engine: InProcess, client: str, group: ParameterGroup) -> torch.Tensor:
    return unpack(engine.clients[client].memory.hand_over(client, Request(client, 1, (group,))).groups[group])


@pytest.mark.parametrize("name", ["fedavg", "scaffold", "fedprox", "fedalign_moe", "by_use"])
def test_embeddings_are_averaged_over_those_who_consent(name: str, tmp_path: Path) -> None:
    engine = consenting(tmp_path, name, a=NEITHER)
    layout = engine.trainer.moe.layout
    old = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    reports, plan, new, _ = one_round(engine, 1, old, {})
    first = reports[0]
    assert first.client == "a"
    assert first.frozen[:2] == WORDS
    column = {group: index for index, group in enumerate(layout.groups)}
    assert all(first.norm_G[column[group]] == 0 for group in WORDS)
    assert first.norm_G[column[SHARED]] > 0  # the rest is trained
    assert first.token_count_M_V.numel() == first.token_met_M_B.numel() == 0
    asked = {request.client: request.groups for request in plan.requests(1, layout)}
    assert not set(WORDS) & set(asked["a"])
    assert set(WORDS) < set(asked["b"])
    if plan.token_weight_C_M_V is None:  # b has 5 examples and c 15
        for group in WORDS:
            expected = old[group] + 0.25 * moved(engine, "b", group) + 0.75 * moved(engine, "c", group)
            assert_close(new[group], expected, atol=1e-6, rtol=1e-5)
    else:
        assert not plan.token_weight_C_M_V[0].any()
        assert_close(plan.token_weight_C_M_V.sum(0), torch.ones_like(plan.token_weight_C_M_V[0]))
    assert all(not torch.equal(new[group], old[group]) for group in WORDS)


def test_what_is_frozen_cannot_be_had_by_asking_for_it(tmp_path: Path) -> None:
    engine = consenting(tmp_path, "fedavg", a=COUNTS_ALONE)
    old = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    one_round(engine, 1, old, {})
    with pytest.raises(Exception, match="its update of round 1 has no embeddings"):
        moved(engine, "a", EMBEDDINGS)
    assert moved(engine, "a", SHARED).any()
    kept = [file for file in (tmp_path / "a").rglob("update.safetensors") if b'"embeddings"' in file.read_bytes()]
    assert kept == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_frozen_row_does_not_move_by_rounding_or_drift(precision: str, tmp_path: Path) -> None:
    """Neither weight decay, nor momentum of rounds before, nor masters of rounded weights change what is frozen."""
    engine = consenting(tmp_path, "scaffold", b=NEITHER)
    trainer = engine.trainer
    if precision == "bfloat16":
        trainer.moe = MoEModel.wrap(build("olmoe").to(torch.bfloat16))
    options = trainer.config.training.model_copy(update={"weight_decay": 0.5, "keep_optimizer": True})
    trainer.config = trainer.config.model_copy(update={"training": options})
    layout = trainer.moe.layout
    old = {group: value.clone() for group, value in trainer.moe.read().items()}
    state = {"control": torch.ones(sum(layout.sizes.values()))}
    for number in (1, 2):
        weights = {group: pack(value + 1e-3, "float32", 0) for group, value in old.items()}
        report = trainer.train(engine.clients["b"], Broadcast(number, weights, state))
        held = dict(zip(layout.groups, report.norm_G.tolist(), strict=True))
        assert held[EMBEDDINGS] == held[HEAD] == 0
        assert held[SHARED] > 0
    # consent comes and goes without losing what the optimizer knows of the rest
    again = replace(engine.clients["b"], consent=BOTH)
    report = trainer.train(again, Broadcast(3, weights, state))
    assert dict(zip(layout.groups, report.norm_G.tolist(), strict=True))[EMBEDDINGS] > 0
    assert all(slot.parameter.requires_grad for slot in trainer.moe.slots)


@pytest.mark.parametrize("name", ["fedavg", "fedalign_moe", "by_use"])
def test_with_nobodys_consent_rows_stay_and_the_rest_goes_on(name: str, tmp_path: Path) -> None:
    engine = consenting(tmp_path, name, a=NEITHER, b=NEITHER, c=NEITHER)
    old = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    _, plan, new, _ = one_round(engine, 1, old, {})
    assert plan.token_weight_C_M_V is None
    assert all(torch.equal(new[group], old[group]) for group in WORDS)
    assert not torch.equal(new[SHARED], old[SHARED])


@pytest.mark.parametrize("vocabulary", ["tokens", "clients"])
def test_without_any_counts_rows_are_averaged_by_data(vocabulary: str, tmp_path: Path) -> None:
    everywhere = dict.fromkeys("abc", ROWS_ALONE)
    engine = consenting(tmp_path, "by_use", **everywhere)
    engine.trainer.config = load_config(None, ["algorithm.name=by_use", f"algorithm.vocabulary={vocabulary}"])
    engine.trainer.algorithm = engine.trainer.config.algorithm.build()
    old = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    reports, plan, new, _ = one_round(engine, 1, old, {})
    assert all(report.token_count_M_V.numel() == report.token_met_M_B.numel() == 0 for report in reports)
    assert plan.token_weight_C_M_V is None
    total = sum(report.examples for report in reports)
    mean = sum(report.examples / total * moved(engine, report.client, EMBEDDINGS) for report in reports)
    assert_close(new[EMBEDDINGS], old[EMBEDDINGS] + mean, atol=1e-6, rtol=1e-5)


def test_who_sends_no_counts_does_not_count_for_rows_that_others_met(tmp_path: Path) -> None:
    engine = consenting(tmp_path, "by_use", a=ROWS_ALONE)
    old = {group: value.clone() for group, value in engine.trainer.moe.read().items()}
    reports, plan, _, _ = one_round(engine, 1, old, {})
    weight_C_M_V = plan.token_weight_C_M_V
    assert weight_C_M_V is not None
    met_M_V = torch.stack([report.token_count_M_V for report in reports[1:]]).sum(0) > 0
    assert met_M_V.any()
    assert not weight_C_M_V[0][met_M_V].any()
    assert bool((weight_C_M_V[0][~met_M_V] > 0).all())
    assert reports[0].nbytes == reports[1].nbytes - 4 * met_M_V.numel()


# --------------------------------------------------------------------------------------------- a site, as a whole


def site(config: Config, folder: Path, consent: Consent) -> Service:
    about = {
        "name": "ward",
        "data": {"train": config.data.train},
        "model": {"path": config.model.path},
        "limits": {"min_train": 4, "min_held_out": 1, "min_tokens": 4, "min_examples": 4},
        "consent": vars(consent),
    }
    here = SiteFolder(folder, SiteConfig.model_validate(about))
    return Service("ward", here.memory("run"), lambda: open_site(here, config, "run"))


def ask(service: Service, verb: str, message: Message, expected: type) -> Message:
    answer: Message = decode(travel(service.answer(verb, travel(encode(message)))), (expected, Failure))
    return answer


@pytest.mark.parametrize("vocabulary", ["tokens", "clients", "average"])
@pytest.mark.parametrize("consent", [NEITHER, COUNTS_ALONE, ROWS_ALONE, BOTH])
def test_tokens_can_be_read_off_rows_where_it_is_said_and_nowhere_else(
    settings: list[str], tmp_path: Path, vocabulary: str, consent: Consent
) -> None:
    more = ["federation.engine=flower", "data.max_train=12", "statistics.min_examples=4"]
    config = load_config(None, [*settings, f"algorithm.vocabulary={vocabulary}", *more])
    service = site(config, tmp_path, consent)
    moe, trained = service.client.trainer.moe, service.client.data.train
    weights = {group: pack(value.cpu().clone(), "float32", 0) for group, value in moe.read().items()}
    target_L_E = torch.full((moe.layout.layers, moe.experts), 1 / moe.experts)
    report = ask(service, "train", Broadcast(1, weights, {"target_L_E": target_L_E}), Statistics)
    assert isinstance(report, Statistics)
    told = tokens_told("ward", moe.layout, service.client.trainer.config, consent)
    counted = report.token_count_M_V.numel() + report.token_met_M_B.numel()
    assert bool(counted) == (consent == BOTH and vocabulary != "average")
    assert ("in them, tokens of fewer than" in told) == bool(counted)

    update = ask(service, "update", Fetch("ward", 1, ("embeddings",), 0, 1 << 40), Piece)
    if not consent.embeddings:
        assert told == REFUSED
        assert isinstance(update, Failure)
        ours = ask(service, "update", Fetch("ward", 1, ("shared",), 0, 1), Piece)
        assert isinstance(ours, Piece)
        assert set(ours.digests) == {"shared"}
        return
    assert isinstance(update, Piece)
    (rows,) = [rows for rows in moe.layout.token_rows if not rows.answers]
    change_V_H = update.data.view(torch.float32)[rows.start : rows.stop].view(rows.tokens, rows.width)
    read_off = set(change_V_H.any(dim=1).nonzero().flatten().tolist())
    held = {token for example in trained for token in example.input_ids}
    assert len(read_off & held) >= 0.95 * len(held)
    assert len(read_off - held) <= 0.05 * len(held)
    if counted:  # and more of them than the counts tell
        named = report.token_count_M_V[0] if vocabulary == "tokens" else torch.empty(0)
        assert int((named > 0).sum()) < len(read_off)
    assert told.startswith(ROWS)
