"""Losses for clients whose labels are spread unlike those of all: gradients, what leaves, and what stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from fedalign.client.losses import Labels, correction
from fedalign.client.memory import ClientData, ClientMemory
from fedalign.client.open import open_site
from fedalign.client.trainer import Trainer
from fedalign.config.run import Config, TrainingConfig
from fedalign.config.site import SiteConsent, SiteFolder
from fedalign.config.toml import load_config
from fedalign.data.encode import Encoded
from fedalign.data.formats import Example
from fedalign.doctor.what_leaves import labels_told, tokens_told, what_leaves
from fedalign.errors import TrainingFailedError, UserError
from fedalign.federation.in_process import prepare
from fedalign.maths.rounding import pack, unpack
from fedalign.moe.model import MoEModel
from fedalign.protocol import DEALT, Broadcast, Consent, Request, Statistics, Weights
from tests.conftest import changed
from tests.moe.tiny import VOCABULARY, build

RATE = 0.01
TOKENS = ((5,), (6, 7), (8,))  # of three labels
OWN, ALL = (6, 2, 0), (8, 16, 8)
LABELS = Labels(TOKENS, OWN)
NAMES = 'data.labels=["animals", "weather", "food"]'
PRIVATE = ("privacy.epsilon=4", "algorithm.name=fedavg", "evaluation.clients=false")
LOSSES = ("label_shift", "fedlc", "fedrs")


def examples(counts: Sequence[int] = OWN, seq2seq: bool = False) -> list[Encoded]:
    """Prompts of three tokens, answers of a label's tokens and an end token 2."""
    generator = torch.Generator().manual_seed(0)
    made = list[Encoded]()
    for label, count in enumerate(counts):
        for _ in range(count):
            prompt, answer = torch.randint(9, VOCABULARY, (3,), generator=generator).tolist(), [*TOKENS[label], 2]
            if seq2seq:
                made.append(Encoded(prompt, answer, len(made), decoder_input_ids=[0, *answer[:-1]]))
            else:
                made.append(Encoded(prompt + answer, [-100] * 3 + answer, len(made)))
    return made


def built(family: str) -> PreTrainedModel:
    """A tiny model that does the same in training and in scoring."""
    still: dict[str, Any] = {"dropout_rate": 0.0, "router_jitter_noise": 0.0}
    return build(family, **(still if family.startswith("switch") else {}))


def config_of(loss: str, *more: str) -> Config:
    """One step of plain gradient descent on all examples."""
    plain = ("training.optimizer=sgd", f"training.learning_rate={RATE}", "training.max_grad_norm=0")
    whole = ("training.batch_examples=100", "algorithm.name=fedavg", NAMES)
    return load_config(None, [f"training.loss={loss}", *plain, *whole, *more])


def step(
    folder: Path,
    loss: str,
    *more: str,
    family: str = "olmoe",
    consent: Consent = DEALT,
    sent: Sequence[int] = ALL,
) -> tuple[Weights, Statistics]:
    """The update of one step, and its report."""
    config = config_of(loss, *more)
    moe = MoEModel.wrap(built(family), config.tuning)
    train = examples(seq2seq=moe.is_seq2seq)
    client = ClientData("c", train, None, ClientMemory(folder), consent=consent, labels=LABELS)
    start = {group: pack(value, "float32", 0) for group, value in moe.read().items()}
    trainer = Trainer(moe, None, config.algorithm.build(), config)
    report = trainer.train(client, Broadcast(1, start, labels=tuple(sent)))
    update = client.memory.hand_over("c", Request("c", 1, moe.layout.groups))
    return {group: unpack(packed) for group, packed in update.groups.items()}, report


def by_hand(loss: str, logits_V: Tensor, strength: float) -> Tensor:
    """Corrected logits of one position, written out token by token."""
    seen, everywhere = {5: 6, 6: 2, 7: 2, 8: 0}, {5: 8, 6: 16, 7: 16, 8: 8}
    here, there = 10, 48
    corrected = list(logits_V)
    for v, n in seen.items():
        if loss == "label_shift":
            share, share_of_all = (n + everywhere[v] / there) / (here + 1), everywhere[v] / there
            corrected[v] = logits_V[v] + strength * (torch.tensor(share).log() - torch.tensor(share_of_all).log())
        elif loss == "fedlc":
            corrected[v] = logits_V[v] - strength / max(n, 1e-8) ** 0.25
        elif n == 0:
            corrected[v] = logits_V[v] * strength
    return torch.stack(corrected)


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers"])
@pytest.mark.parametrize(
    ("loss", "more", "strength"),
    [
        ("label_shift", (), 1.0),
        ("label_shift", ("training.loss_strength=0.5",), 0.5),
        ("fedlc", (), 1.0),
        ("fedlc", ("training.loss_strength=2",), 2.0),
        ("fedrs", (), 0.5),
        ("fedrs", ("training.loss_strength=0",), 0.0),
    ],
)
def test_a_step_follows_the_gradient_written_by_hand(
    family: str, loss: str, more: tuple[str, ...], strength: float, tmp_path: Path
) -> None:
    update, report = step(tmp_path, loss, *more, family=family)
    moe = MoEModel.wrap(built(family))
    moe.model.train()
    torch.manual_seed(0)
    total, tokens = torch.zeros(()), 0
    for one in examples(seq2seq=moe.is_seq2seq):
        if moe.is_seq2seq:
            decoder = torch.tensor([one.decoder_input_ids])
            logits_S_V = moe.model(input_ids=torch.tensor([one.input_ids]), decoder_input_ids=decoder).logits[0]
            pairs = list(zip(logits_S_V, one.labels, strict=True))
        else:
            logits_S_V = moe.model(input_ids=torch.tensor([one.input_ids])).logits[0]
            pairs = [(logits_V, target) for logits_V, target in zip(logits_S_V[:-1], one.labels[1:], strict=True)]
        for logits_V, target in pairs:
            if target != -100:
                corrected_V = by_hand(loss, logits_V, strength)
                total = total + corrected_V.logsumexp(0) - corrected_V[target]
                tokens += 1
    (total / tokens).backward()
    assert report.loss == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    start = {group: value.clone() for group, value in moe.read().items()}
    with torch.no_grad():
        for parameter in moe.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(RATE * parameter.grad)
    for group, value in moe.read().items():
        assert_close(update[group], value - start[group], rtol=1e-3, atol=1e-7)
    plain, _ = step(tmp_path / "plain", "plain", family=family)
    assert max(float((update[g] - plain[g]).norm() / plain[g].norm().clamp_min(1e-12)) for g in plain) > 0.01


@pytest.mark.parametrize("tuning", ["full", "moe", "lora"])
@pytest.mark.parametrize("loss", LOSSES)
def test_however_it_is_tuned_the_loss_is_another(loss: str, tuning: str, tmp_path: Path) -> None:
    update, _ = step(tmp_path / "a", loss, f"tuning.kind={tuning}")
    plain, _ = step(tmp_path / "b", "plain", f"tuning.kind={tuning}")
    assert any(not torch.equal(update[group], plain[group]) for group in plain)


@pytest.mark.parametrize("everybody", [(60, 20, 0), (6, 2, 0), ()], ids=["ten times", "alone", "nobody tells"])
def test_where_shares_agree_nothing_changes(everybody: tuple[int, ...], tmp_path: Path) -> None:
    assert correction(TrainingConfig(loss="label_shift"), LABELS, everybody) is None
    update, report = step(tmp_path / "a", "label_shift", sent=everybody)
    plain, expected = step(tmp_path / "b", "plain")
    assert report.loss == expected.loss
    assert all(torch.equal(update[group], plain[group]) for group in plain)


def test_who_does_not_tell_its_labels_trains_as_without(tmp_path: Path) -> None:
    silent, told = Consent(token_counts=False), Consent(token_counts=True)
    update, _ = step(tmp_path / "a", "label_shift", consent=silent)
    plain, _ = step(tmp_path / "b", "plain", consent=silent)
    other, _ = step(tmp_path / "c", "label_shift", consent=told)
    assert all(torch.equal(update[group], plain[group]) for group in plain)
    assert any(not torch.equal(other[group], plain[group]) for group in plain)
    local, _ = step(tmp_path / "d", "fedlc", consent=silent)  # tells nobody
    assert any(not torch.equal(local[group], plain[group]) for group in plain)


@pytest.mark.parametrize("sent", [(1, 2), (1, 2, 3, 4), (5, -1, 3)])
def test_counts_of_other_labels_are_refused(sent: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(TrainingFailedError, match=rf"was sent {len(sent)} counts of labels, of 3 labels"):
        step(tmp_path, "label_shift", sent=sent)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_labels_there_is_nothing_to_correct(loss: str) -> None:
    assert correction(config_of(loss).training, None, ALL) is None
    assert correction(config_of(loss).training, LABELS, ALL) is not None


def shifted(settings: list[str], *more: str, loss: str = "label_shift") -> Config:
    return load_config(None, [*settings, NAMES, f"training.loss={loss}", *more])


def test_labels_of_a_client_are_those_that_it_trains_on(settings: list[str], tmp_path: Path) -> None:
    prepared = prepare(shifted(settings, "statistics.min_examples=5"), tmp_path)
    everybody = [0, 0, 0]
    for client in prepared.clients.values():
        assert client.labels is not None
        trained = [prepared.bench.tokenizer.decode([t for t in one.labels if t != -100]) for one in client.train]
        counts = tuple(sum(name in text for text in trained) for name in ("animals", "weather", "food"))
        assert client.labels.examples == counts
        assert sum(counts) == client.examples
        texts = [prepared.bench.tokenizer(name)["input_ids"] for name in (" animals", " weather", " food")]
        assert [sorted(tokens) for tokens in texts] == [list(tokens) for tokens in client.labels.tokens]
        everybody = [n + (count if count >= 5 else 0) for n, count in zip(everybody, counts, strict=True)]
    assert prepared.federation.labels() == tuple(everybody)


def test_labels_have_the_tokens_of_every_template(settings: list[str], tmp_path: Path) -> None:
    bench = prepare(shifted(settings), tmp_path).bench
    spaced, bare = tuple(" " + name for name in ("animals", "food")), ("animals", "food")
    mixed = [
        Example("it rains. Label:", " food", spaced),
        Example("it rains. Label:", " food", spaced),
        Example("a dog\n", "animals", bare),
    ]
    encoded = bench.encoder.encode(mixed)
    labels = Labels.of(mixed, encoded, bench.encoder)
    assert labels is not None
    assert labels.examples == (1, 2)
    for one in encoded:
        answer = {token for token in one.labels if token not in (-100, bench.tokenizer.eos_token_id)}
        assert answer <= set(labels.tokens[1 if one.example < 2 else 0])
    assert Labels.of(mixed, [], bench.encoder) is None
    other = replace(mixed[0], choices=(" animals", " weather"), answer=" animals")
    twice = [mixed[0], other]
    alone, both = (Labels.of(some, bench.encoder.encode(some), bench.encoder) for some in (twice[:1], twice))
    assert alone is not None
    assert both is not None
    assert alone.tokens[0] == both.tokens[0]  # a token that stands in both spellings counts once


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_are_of_the_model_as_it_is(loss: str, settings: list[str], tmp_path: Path) -> None:
    scores = []
    for name in (loss, "plain"):
        prepared = prepare(shifted(settings, loss=name), tmp_path / name)
        marked = prepared.evaluate(prepared.bench.moe.read())
        assert marked is not None
        client = next(iter(prepared.clients.values()))
        own = prepared.bench.trainer().evaluate(client, prepared.bench.moe.read(), 0)
        scores.append((marked[0], own))
    assert scores[0] == scores[1]


def test_pooled_data_agrees_with_itself(settings: list[str], tmp_path: Path) -> None:
    prepared = prepare(shifted(settings, "algorithm.name=centralised", "statistics.min_examples=1"), tmp_path)
    (client,) = prepared.federation.clients.values()
    assert client.labels is not None
    assert client.labels.examples == prepared.federation.labels()
    assert correction(prepared.config.training, client.labels, prepared.federation.labels()) is None


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["training.loss=focal"], r"training.loss = 'focal': unknown. Choose one of: fedlc, fedrs, label_shift, plain"),
        (["training.loss_strength=1"], r'training.loss_strength = 1.0: training.loss = "plain" has none'),
        (["training.loss=fedrs", "training.loss_strength=2"], r"training.loss_strength = 2.0: .* at most 1"),
        (
            ["training.loss=label_shift", "data.labels=[]"],
            r'training.loss = "label_shift": .*labels, which is \[\]',
        ),
        (["training.loss=fedlc", "data.kind=chat"], r'training.loss = "fedlc": reads labels, and data.kind = "chat"'),
        (
            ["training.loss=fedrs", *PRIVATE],
            r"no noise",
        ),
        (["training.loss=label_shift", "algorithm.name=pfl_moe"], r"a mixture of two models"),
    ],
)
def test_what_cannot_be_is_refused(more: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(None, [NAMES, *more])


@pytest.mark.parametrize("consents", [True, False])
def test_what_a_site_tells_of_its_labels(
    consents: bool, site_config: Config, ward: SiteFolder, olmoe: Path, tmp_path: Path
) -> None:
    own = ward.config.model_copy(update={"consent": SiteConsent(token_counts=consents)})
    site, config = replace(ward, config=own), changed(site_config, "training", loss="label_shift")
    client = open_site(site, config, "night")
    hello = client.hello()
    assert client.data.labels is not None
    assert hello.labels == (client.data.labels.told(4) if consents else ())
    assert (sum(hello.labels) > 0) == consents
    moe, consent = MoEModel.load(olmoe), site.consent
    sent = next(one for one in what_leaves("ward", moe, config, consent) if one.name == "Hello")
    (field,) = [field for field in sent.fields if field.name == "labels"]
    assert (field.shape == "none") != consents
    assert ("leaves once" in sent.tells) == consents
    assert labels_told(config, consent) in tokens_told("ward", moe.layout, config, consent)
    assert labels_told(config, consent).startswith("How many" if consents else "Asked for and not sent")
    plain = open_site(site, changed(config, "training", loss="fedlc"), "day").hello()
    assert plain.labels == ()
