"""Everything that leaves a site, field by field, read off the messages themselves.

Each message is built for the model at hand, of tensors that have shapes and no values, and encoded by the codec that
sends the real ones: what is not in `MEANINGS` cannot be listed here, and a test lets nothing be sent that is not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from fedalign.client.spent import PAID
from fedalign.client.trainer import trained_sizes
from fedalign.config.run import Config
from fedalign.federation.messages import Parcel, encode
from fedalign.maths.rounding import TORCH_DTYPE, packed_nbytes, scales, stored
from fedalign.moe.model import MoEModel
from fedalign.protocol import (
    DEALT,
    PROTOCOL,
    TELLING,
    WORDS,
    Ask,
    Concealed,
    Consent,
    Evaluation,
    Failure,
    Hello,
    Lacking,
    Layout,
    Packed,
    ParameterGroup,
    Piece,
    Start,
    Statistics,
    WireDtype,
    asked_shapes,
)
from fedalign.server.masked import SCORE_RESIDUES, Residues, count_residues, share_residues

Leaving = Hello | Start | Lacking | Statistics | Piece | Evaluation | Failure | Concealed
SUMS = (
    "privacy.masked: what is concealed tells nothing but in the sum over the sites of a round, {least} or more. The "
    "sum tells what the sites have together; what one of them alone has stands in it, without its name."
)
CHECKED = "Masks are made with these sites alone, whose node keys are in site.toml: {names}."
UNCHECKED = (
    "Whose mask keys this site is handed is the coordinator's word. One that makes sites up can read what this site "
    "conceals: list the others' key.pub in site.toml ([privacy] node_keys)."
)
MASKED_SCORES = (
    "A sum of scores may be of fewer sites, of this one alone in the end: one that has scored all that it will "
    "(limits.evaluations) adds zeros."
)
OWN_ROWS = (
    "The router rows of this site's expert are fitted to its own texts before it first trains, and leave with its "
    "first update."
)
MASKED_ROWS = (
    "Rows of embeddings and counts of tokens leave concealed, if at all: a token that one site alone has stands in the "
    "sums, without the site's name."
)
NEVER = "Texts and labels are never sent as they stand; what is sent is made of them, and tells of them."
FROZEN = "Embeddings and head are not trained, so neither their rows nor counts of tokens leave."
REFUSED = (
    "Embeddings and head would be trained, but stay frozen at this site, which does not consent ([consent] in its "
    "site.toml): no row of them leaves, and no count of tokens."
)
ROWS = (
    "Rows of embeddings leave: which of them moved shows nearly every token of this site's texts, those that no count "
    "names too, whatever algorithm.vocabulary is."
)
COUNTED: dict[Ask, str] = {
    "tokens": "how often each token stands in them",
    "met": "whether each token stands in them",
}
LABELS = (
    "How many examples each label has leaves once, before the first round; each site is sent the sum over sites, of "
    "which it can take its own counts off. Labels of fewer than {examples} examples count as none."
)
NO_LABELS = "Asked for and not sent, for want of consent: how many examples each label has. The site trains as without."
BESIDES = (
    "Flower itself shows the coordinator this site's public key, its network address and when it answers. Unless "
    "FLWR_TELEMETRY_ENABLED=0, it also tells its makers that it was started."
)
WITHHELD = (
    "Of an expert that fewer than {tokens} tokens or {examples} examples reached, load, margin and both sketches are "
    "withheld; its mean probability and the length of its update are not. A token that fewer than {examples} examples "
    "hold counts as not met."
)
SCORE = "two means over the held-out part, which is never smaller than the site says (limits.min_held_out)."
HASH = "0" * 64
SIGNATURE = "0" * 206  # of ECDSA over P-384: 202 to 208 hex digits
REASON = "its loss is nan at step 1"
NUMBER, MEAN = 100_000, 1 / 3  # stand for counts and means, whose length depends on their value

WHEN: dict[type[Leaving], str] = {
    Hello: "once, before the site may take part",
    Start: "once, from one site, if the coordinator holds no weights",
    Lacking: "when weights come in pieces, for each of them; or it does not keep what it was sent; when the run ends",
    Statistics: "each round, after training",
    Piece: "each round, if the plan asks for its update; here with all that it trains; in pieces of wire.piece_mb",
    Concealed: "masked runs, each round: counts after training, the score among them, then its share of each sum; a "
    "score by itself after the last; each once more among the others if a site was lost",
    Evaluation: "after the last round, and where only some sites train or the run may end; else statistics hold it",
    Failure: "when something goes wrong",
}
TELLS: dict[type[Leaving], str] = {
    Hello: "How many examples there are; nothing of what is in them.",
    Start: "The model as it is before this run; what a copy tuned here earlier has learnt is in it.",
    Lacking: "How much of the server's own weights has arrived.",
    Statistics: "Sums and means over all tokens of a round: they tell what kinds of text the site holds, and how much. "
    f"With them {SCORE}",
    Piece: "The most telling message: rows of embeddings that moved name the tokens, where they are trained; with "
    "effort, pieces of the text can be guessed from changed weights, most of all where examples are few. No noise is "
    "added, and the coordinator sees each site's update by itself.",
    Concealed: "Nothing by itself: as good as random numbers, to all but two sites who put together what they know.",
    Evaluation: f"{SCORE[0].upper()}{SCORE[1:]}",
    Failure: "A sentence that never quotes the data and names no folder of the site; it may name a setting.",
}
NOISED: dict[type[Leaving], str] = {
    Hello: "How many examples there are, with noise; nothing of what is in them, and nothing is held out.",
    Statistics: "What follows from noised weights, and the number of examples with noise. Experts' loads are told with "
    "noise where the algorithm reads them. Loss, mean routing, tokens, scores and seconds are not: what stands there "
    "is the same whatever the data is.",
    Piece: "Noise hides each single example in it. What many examples have in common still shows.",
    Evaluation: "Not sent: no score has noise.",
    Concealed: f"{TELLS[Concealed]} Noise hides each single example in the sums, too. Loss and scores are in none.",
}
HIDDEN: dict[type[Leaving], str] = {
    Hello: "That it takes part, and with which key; nothing of what data there is.",
    Piece: "What is concealed, where it is larger than a piece (wire.piece_mb); nothing by itself.",
}
MEANINGS: dict[type[Leaving], dict[str, str]] = {
    Hello: {
        "client": "the site's name",
        "protocol": "version of these messages",
        "version": "version of this package",
        "architecture": "hash of the model's configuration and shapes",
        "weights": "hash of the model's values",
        "tokenizer": "hash of the tokenizer",
        "chat_template": "hash of the chat template",
        "layers": "MoE layers of the model",
        "experts": "experts of a layer",
        "examples": "how many examples it trains on",
        "held_out": "how many it keeps to be scored on",
        "token_counts": "whether it consents to send counts of tokens",
        "embeddings": "whether it consents to train embeddings and head",
        "labels": "how many examples each label has, where the loss reads it",
        "mask_key": "its public mask key of a masked run",
        "mask_signature": "its node key's signature of that",
    },
    Start: {
        "client": "the site's name",
        "weights": "every value that some site may train, as loaded",
        "constants": "the model's values that are never trained",
        "kept": "names, types and shapes, if the values follow in pieces",
    },
    Lacking: {
        "client": "the site's name",
        "round": "number of the round",
        "transfer": "hash of what was announced to it",
        "ranges": "which bytes of that have not arrived",
    },
    Statistics: {
        "client": "the site's name",
        "round": "number of the round",
        "examples": "how many examples it trained on",
        "tokens": "how many tokens the sums are over",
        "steps": "how many steps of training",
        "learning_rate": "size of these steps",
        "loss": "mean training loss",
        "prob_L_E": "mean probability of each expert",
        "load_L_E": "tokens that each expert was chosen for",
        "norm_G": "length of each group's update",
        "margin_L_E": "how clearly each expert was chosen, on average",
        "centroid_L_E_D": "random projection of the mean input of each expert",
        "centroid_scale_L": "what that is multiplied by",
        "update_L_E_S": "random projection of the direction of each expert's update",
        "token_count_M_V": "how often it met each token of the vocabulary",
        "token_met_M_B": "whether it met each token of the vocabulary",
        "frozen": "what its limits, or want of consent, kept it from training",
        "metrics": "seconds of training; in a private run what it cost so far, and its noise",
        "held_out": "how many examples the received weights were scored on, if that was asked for",
        "held_out_loss": "mean loss on them",
        "held_out_accuracy": "share of right answers",
    },
    Piece: {
        "client": "the site's name",
        "round": "number of the round",
        "transfer": "empty",
        "ranges": "empty",
        "data": "trained minus received values of the groups asked for, as bytes",
        "digest": "checksum of these bytes",
        "digests": "checksum of each group's update",
        "stale": "groups of which another update was sent before the coordinator was restarted",
    },
    Concealed: {
        "client": "the site's name",
        "round": "number of the round",
        "among": "the sites whose sum is made",
        "residues": "counts, or a weighed update, or a score, and masks; empty where they follow in pieces",
    },
    Evaluation: {
        "client": "the site's name",
        "examples": "how many examples it was scored on",
        "loss": "mean loss on them",
        "accuracy": "share of right answers",
    },
    Failure: {
        "client": "the site's name",
        "stage": "where it failed: join, train, update or evaluate",
        "reason": "why, in a sentence",
    },
}


@dataclass(frozen=True)
class Field:
    """One field of a message on the wire."""

    name: str
    meaning: str
    shape: str
    nbytes: int


@dataclass(frozen=True)
class Sent:
    """One kind of message, as this site would send it."""

    name: str
    when: str
    tells: str
    fields: tuple[Field, ...]
    nbytes: int  # of the whole, the names of its fields included


def what_leaves(name: str, moe: MoEModel, config: Config, consent: Consent = DEALT) -> list[Sent]:
    """Every message that a site called `name` may send when it trains this model; a skeleton of it is enough."""
    limits = config.statistics
    withheld = WITHHELD.format(tokens=limits.min_tokens, examples=limits.min_examples)
    every = [_sent(message, withheld) for message in empty_messages(name, moe, config, consent)]
    if config.training.loss == "label_shift":
        hello, *rest = every
        every = [
            dataclasses.replace(hello, tells=f"How many examples there are. {labels_told(config, consent)}"),
            *rest,
        ]
    instead = (NOISED if config.privacy.on else {}) | (HIDDEN if config.privacy.masked else {})
    tells = {kind.__name__: told for kind, told in instead.items()}
    return [dataclasses.replace(sent, tells=tells.get(sent.name, sent.tells)) for sent in every]


def masks_told(config: Config, known: Collection[str]) -> str:
    """A few sentences on who could read what is concealed; empty where nothing is.

    Args:
        config: the run's.
        known: the sites whose node keys this site has.
    """
    if not config.privacy.masked:
        return ""
    checked = CHECKED.format(names=", ".join(sorted(known))) if known else UNCHECKED
    scores = f" {MASKED_SCORES}" if config.evaluation.clients else ""
    return f"{SUMS.format(least=config.privacy.masked_min_holders)}{scores} {checked}"


def labels_told(config: Config, consent: Consent) -> str:
    """A sentence on what the coordinator learns of a site's labels; empty where the loss does not read them."""
    if config.training.loss != "label_shift":
        return ""
    return LABELS.format(examples=config.statistics.min_examples) if consent.token_counts else NO_LABELS


def tokens_told(name: str, layout: Layout, config: Config, consent: Consent, *, if_it_consents: bool = False) -> str:
    """A few sentences on what the coordinator learns of the tokens in a site's texts, and of its labels.

    Args:
        name: the site's.
        layout: of the model, tuned as configured.
        config: the run's, with the site's own limits.
        consent: the site's.
        if_it_consents: no site in particular; `consent` is what one may consent to.
    """
    labels = labels_told(config, consent)
    fitted = f" {OWN_ROWS}" if config.algorithm.build().shared is not None else ""
    return f"{_rows_told(name, layout, config, consent, if_it_consents)}{fitted}{labels and f' {labels}'}"


def _rows_told(name: str, layout: Layout, config: Config, consent: Consent, if_it_consents: bool) -> str:
    if not trained_sizes(config, layout, name, DEALT).keys() & WORDS:
        return FROZEN
    if not consent.embeddings:
        return REFUSED
    if config.privacy.masked:
        return MASKED_ROWS
    asked = [COUNTED[ask] for ask in sorted(config.asks & TELLING)]
    if not asked:
        counted = "Counts of tokens are not asked for."
    elif consent.token_counts:
        counted = f"So does {asked[0]}, tokens of fewer than {config.statistics.min_examples} examples left out."
    else:
        counted = f"Asked for and not sent, for want of consent: {asked[0]}."
    return f"{'If the site consents: ' if if_it_consents else ''}{ROWS} {counted}"


def empty_messages(name: str, moe: MoEModel, config: Config, consent: Consent = DEALT) -> list[Leaving]:
    """One message of each kind, its tensors without values."""
    layout, wire = moe.layout, config.wire.dtype
    reads = config.training.loss == "label_shift" and consent.token_counts
    said = consent.token_counts, consent.embeddings, (NUMBER,) * len(config.data.labels) * reads
    constants = {key: value.to("meta") for key, value in moe.constants().items()}
    trained = trained_sizes(config, layout, name, consent)
    version = metadata.version("fedalign-moe")
    hashes = (HASH, HASH, HASH, HASH)
    shares = config.algorithm.build().shares
    if config.privacy.masked and shares is not None:
        every = {group: size for group, size in layout.sizes.items() if size}  # what is not trained is sent as zeros
        piece = _bytes(every, "bfloat16")  # 16 bits a value, too
        digests = dict.fromkeys(map(str, every), HASH[:32])
        return [
            Hello(name, PROTOCOL, version, *hashes, layout.layers, layout.experts, 0, 0, *said, HASH, SIGNATURE),
            Start(name, _groups(layout.sizes, "float32"), constants),
            Lacking(name, NUMBER, HASH[:32], ()),
            _concealed(name, count_residues(layout, shares, config.tells)),
            _concealed(name, share_residues(every, every)),
            *([_concealed(name, SCORE_RESIDUES)] if config.evaluation.clients else []),
            Piece(name, 1, "", (), piece, HASH[:32], digests),
            Failure(name, "train", REASON),
        ]
    return [
        Hello(name, PROTOCOL, version, *hashes, layout.layers, layout.experts, NUMBER, NUMBER, *said),
        Start(name, _groups(layout.sizes, "float32"), constants),
        Lacking(name, NUMBER, HASH[:32], ()),
        _statistics(name, layout, config, consent),
        Piece(name, 1, "", (), _bytes(trained, wire), HASH[:32], dict.fromkeys(map(str, trained), HASH[:32])),
        Evaluation(name, NUMBER, MEAN, MEAN),
        Failure(name, "train", REASON),
    ]


def _concealed(name: str, residues: Mapping[str, Residues]) -> Concealed:
    tensors = {key: _empty(*shape, dtype=dtype) for key, (shape, dtype) in residues.items()}
    return Concealed(name, 1, (name, "B", "C"), tensors)


def _statistics(name: str, layout: Layout, config: Config, consent: Consent) -> Statistics:
    widths = config.statistics.centroid_width, config.statistics.update_width
    shapes = asked_shapes(layout, consent.granted(config.asks), *widths)
    fields: dict[str, Any] = {"client": name, "round": 1}
    fields |= dict.fromkeys(("learning_rate", "loss", "held_out_loss", "held_out_accuracy"), MEAN)
    fields |= dict.fromkeys(("examples", "tokens", "steps", "held_out"), NUMBER)
    fields |= {field: _empty(*shape, dtype=getattr(torch, dtype)) for field, (shape, dtype) in shapes.items()}
    metrics = PAID if config.privacy.on else ("train_seconds",)
    return Statistics(**fields, frozen=consent.frozen(layout), metrics=dict.fromkeys(metrics, MEAN))


def _groups(sizes: Mapping[ParameterGroup, int], dtype: WireDtype) -> dict[ParameterGroup, Packed]:
    def packed(size: int) -> Packed:
        blocks = scales(size, dtype)
        scale = None if blocks is None else _empty(blocks)
        return Packed(_empty(stored(size, dtype), dtype=TORCH_DTYPE[dtype]), scale)

    return {group: packed(values) for group, values in sizes.items()}


def _bytes(sizes: Mapping[ParameterGroup, int], dtype: WireDtype) -> Tensor:
    return _empty(sum(packed_nbytes(size, dtype) for size in sizes.values()), dtype=torch.uint8)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sent(message: Leaving, withheld: str) -> Sent:
    kind, parcel = type(message), encode(message)
    fields = (
        Field(
            name=field.name,
            meaning=MEANINGS[kind][field.name],
            shape=_shape(getattr(message, field.name)),
            nbytes=_nbytes(field.name, parcel),
        )
        for field in dataclasses.fields(message)
    )
    tells = f"{TELLS[kind]} {withheld}" if kind is Statistics else TELLS[kind]
    return Sent(kind.__name__, WHEN[kind], tells, tuple(fields), parcel.nbytes)


def _nbytes(name: str, parcel: Parcel) -> int:
    own = (pieces for key, pieces in parcel.arrays.items() if key == name or key.startswith((f"{name}.", f"{name}/")))
    return len(json.dumps(parcel.head[name], separators=(",", ":"))) + sum(p.nbytes for pieces in own for p in pieces)


def _shape(value: Any) -> str:
    """A field's content, in a few words.

    >>> _shape(torch.zeros(2, 3)), _shape({"steps": 1.0}), _shape(7)
    ('float32 [2, 3]', '1 number', 'a number')
    """
    if isinstance(value, Tensor):
        return f"{_dtype(value)} {list(value.shape)}" if value.numel() else "not sent"
    if isinstance(value, Mapping):
        return _mapping_shape(list(value.values()))
    if isinstance(value, tuple):
        return f"{len(value)} groups" if value else "none"
    return "text" if isinstance(value, str) else "a number"


def _mapping_shape(values: list[Any]) -> str:
    if values and isinstance(values[0], Packed):
        return f"{_dtype(values[0].values)}, {len(values)} groups, {sum(len(p.values) for p in values):,} values"
    if values and isinstance(values[0], Tensor):
        return f"{len(values)} tensors, {sum(tensor.numel() for tensor in values):,} values"
    if not values:
        return "none"
    if isinstance(values[0], str):
        return f"{len(values)} checksums"
    return f"{len(values)} number{'' if len(values) == 1 else 's'}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
