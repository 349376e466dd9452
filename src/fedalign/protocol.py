"""Messages between the server and its clients in one round: these travel, and nothing else.

A round is *plan, then sum*::

    broadcast -> local training -> statistics -> PLAN (a table of weights) -> updates -> SUM -> new model

    client -> server   Hello       once: versions and hashes that must agree before a client may take part
    client -> server   Start       once, from one client: the weights that the first round starts from
    server -> client   Broadcast   weights (in wire precision) and the algorithm's state; whether to score them first.
                                   In int8 and int4: their differences to those of the broadcast before
    client -> server   Statistics  sums over tokens: those that the algorithm asks for, and no others; the score
    server -> client   Request     the parameter groups whose planned weight is not zero
    client -> server   Update      those groups' updates (in wire precision)

After the last round, and others that no broadcast may follow, weights are scored by themselves::

    server -> client   Broadcast   the new weights, to be scored on the client's held-out part
    client -> server   Evaluation  loss and accuracy there, and the number of examples

Start travels only where the server holds no model; in one process, neither Hello nor Start does.

Between machines updates travel as pieces of at most `wire.piece_mb`, and so does a broadcast that is larger::

    server -> client   Offer       digests of the weights that the broadcast is about
    client -> server   Lacking     which bytes of them it does not have; the answer to each piece, too
    server -> client   Piece       some of these bytes; the Broadcast that follows names them by their digests
    server -> client   Fetch       which bytes of its update a client is to send
    client -> server   Piece       these bytes

With `privacy.masked` clients conceal what they send, but for its sums; in place of Statistics and Updates then travel::

    server -> client   Broadcast   with it the mask keys of all clients that are to be summed
    client -> server   Concealed   counts, masked: examples, those that weights are shares of, and the score
    server -> client   Recount     if a client was lost: to conceal them again among those left
    server -> client   Totals      their sums over all clients, of which each makes its own weights; in a Sum
    client -> server   Concealed   its weighted update, masked

and in place of an Evaluation a Concealed, too. What is larger than a piece is fetched in pieces, as updates are.

The second half of this page is the seam: what an algorithm is (`Algorithm`), what it sees of a round (`Reports`,
`Step`, `LocalRound`) and how a round reaches the clients (`Federation`).

Axis legend, used in names everywhere (``prob_L_E`` has shape [L, E]):

    C clients   L MoE layers (ordinal of the router)   E experts   K top-k   T tokens
    H hidden size   S sketch width of updates   D sketch width of centroids   G parameter groups
    N values of one parameter group, flattened   V tokens of the vocabulary   M matrices with a row for each of them
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from fedalign.maths import torch

if TYPE_CHECKING:
    from torch import Tensor

PROTOCOL = 11  # of these messages; sites that speak another are refused
Kind = Literal["shared", "embeddings", "head", "gate", "expert"]
Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "unknown"]
WireDtype = Literal["float32", "bfloat16", "int8", "int4"]
ServerOptimizer = Literal["average", "sgd", "adam", "yogi", "fedexp"]
Robust = Literal["none", "clip", "centered_clip", "trimmed_mean", "median", "krum"]  # see `maths.robust`
KEEPS_ALL: frozenset[Robust] = frozenset({"trimmed_mean", "median", "krum"})  # a round's updates, until it is over
Stage = Literal["join", "train", "update", "evaluate"]
Ask = Literal["margins", "centroids", "directions", "tokens", "met", "probabilities", "data"]  # see `Algorithm.asks`
LONGEST_NAME = 64  # characters of a client's name
KINDS: tuple[Kind, ...] = get_args(Kind)
TELLING: frozenset[Ask] = frozenset({"tokens", "met"})  # what tells which tokens a client holds
SKETCHES: frozenset[Ask] = frozenset({"centroids", "directions"})  # what pictures of a round's health are drawn from


@dataclass(frozen=True, order=True, slots=True)
class ParameterGroup:
    """The unit of aggregation: one router row, one expert, or what has no place: embeddings, a head, all else.

    Embeddings and head have rows for the tokens of the vocabulary: their updates tell which of them a client holds.
    A head that is the embedding itself is part of `embeddings`.
    """

    kind: Kind
    layer: int = 0
    expert: int = 0

    def __str__(self) -> str:
        return f"{self.kind}[{self.layer},{self.expert}]" if self.kind in CELLS else self.kind


CELLS: tuple[Kind, ...] = ("gate", "expert")  # groups that have a place, which stands in their name
SHARED, EMBEDDINGS, HEAD = ParameterGroup("shared"), ParameterGroup("embeddings"), ParameterGroup("head")
WORDS = (EMBEDDINGS, HEAD)  # groups whose updates tell which tokens a client holds
WHOLE = (SHARED, *WORDS)  # groups without a place
Shape = tuple[tuple[int, ...], str]  # and the name of the type
Weights = dict[ParameterGroup, "Tensor"]  # group -> flat float32 [N]
State = dict[str, "Tensor"]  # an algorithm's state between rounds: named tensors, broadcast and checkpointed


@dataclass(frozen=True)
class Factors:
    """Where one low-rank pair lies in a group's flat vector: the model uses the product B·A, up to a constant."""

    start_A: int  # A [rank, inputs], row by row from here
    start_B: int  # B [outputs, rank], row by row from here
    rank: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class TokenRows:
    """Where a matrix with one row for each token of the vocabulary lies in its group's flat vector, row by row."""

    start: int
    tokens: int
    width: int
    answers: bool = False  # a head of its own: its rows belong to the tokens of answers, else to those that are read

    @property
    def group(self) -> ParameterGroup:
        """The group that it lies in; no other matrix of tokens does."""
        return HEAD if self.answers else EMBEDDINGS

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + self.tokens * self.width


@dataclass(frozen=True)
class Layout:
    """The model as the server sees it: how many values each parameter group trains. No parameter names.

    A group that trains nothing has size 0; it keeps its place in `groups`, so plans of all models look alike. Of a
    model tuned by LoRA it also says which of a group's values are factors; the others stand for themselves.
    """

    layers: int
    experts: int
    sizes: Mapping[ParameterGroup, int]
    factors: Mapping[ParameterGroup, tuple[Factors, ...]] = field(default_factory=dict)
    token_rows: tuple[TokenRows, ...] = ()  # embeddings and head, as far as they are trained; tied ones once
    softmax_L: tuple[bool, ...] = ()  # whose routing stays if one vector is added to all router rows; empty: nobody's
    top_k_L: tuple[int, ...] = ()  # experts that a token is sent to; clients' limits can lower it; empty: not known
    two_sided: bool = False  # an encoder-decoder: it reads tokens that no router need see
    owners: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # a site's own experts, the same in each layer

    @property
    def token_cells(self) -> tuple[int, int]:
        """M matrices and V tokens of `token_rows`."""
        return len(self.token_rows), max((rows.tokens for rows in self.token_rows), default=0)

    @property
    def public(self) -> tuple[int, ...]:
        """Experts of each layer that no site owns.

        >>> Layout(1, 4, {}, owners={"hospital-a": (1, 3)}).public
        (0, 2)
        """
        owned = {expert for experts in self.owners.values() for expert in experts}
        return tuple(expert for expert in range(self.experts) if expert not in owned)

    @cached_property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """All G = 3 + 2·L·E groups in plan order: shared, embeddings, head; gates, then experts, layer by layer."""
        cells = [(layer, expert) for layer in range(self.layers) for expert in range(self.experts)]
        return (
            *WHOLE,
            *(ParameterGroup("gate", *cell) for cell in cells),
            *(ParameterGroup("expert", *cell) for cell in cells),
        )

    def table(self, shared: Tensor, gate: Tensor, expert: Tensor) -> Tensor:
        """Join [..., ], [..., L, E] and [..., L, E] into one [..., G] in the order of `groups`.

        Embeddings and head are given what `shared` is.
        """
        common = shared.unsqueeze(-1).expand(*shared.shape, len(WHOLE))
        return torch.cat([common, gate.flatten(-2), expert.flatten(-2)], dim=-1)

    def split(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of [..., G]: shared [...], gate [..., L, E], expert [..., L, E]."""
        gate, expert = (
            part.unflatten(-1, (self.layers, self.experts)) for part in table[..., len(WHOLE) :].chunk(2, dim=-1)
        )
        return table[..., 0], gate, expert


@dataclass(frozen=True)
class Part:
    """The part of the model that a client's forward passes go through, and what it trains of it."""

    experts: tuple[int, ...]  # the same in each layer, in the order that routers have there; those trained are the last
    trained: frozenset[ParameterGroup]


@dataclass(frozen=True)
class Consent:
    """Whether a client lets leave what tells its tokens."""

    token_counts: bool = True
    embeddings: bool = True  # without it embeddings and head stay frozen there

    def frozen(self, layout: Layout) -> tuple[ParameterGroup, ...]:
        """The groups that this client does not train."""
        return () if self.embeddings else tuple(group for group in WORDS if layout.sizes[group])

    def granted(self, asks: Set[Ask]) -> Set[Ask]:
        """The part of `asks` that is answered; counts of rows that are frozen would be of no use."""
        return asks if self.token_counts and self.embeddings else asks - TELLING


DEALT = Consent()  # where one person deals the data to all clients, nothing is to be consented to


def summed(labels: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Examples of each label, of those clients that tell it together.

    >>> summed([(1, 2), (), (3, 4)]), summed([(), ()])
    ((4, 6), ())
    """
    return tuple(sum(counts) for counts in zip(*filter(None, labels), strict=True))


@dataclass(frozen=True)
class Packed:
    """One group's values in wire precision: float32, bfloat16, int8, or int4, two to a byte (see `maths.rounding`)."""

    values: Tensor  # [N]; of int4 uint8 [ceil(N / 2)]
    scale: Tensor | None = None  # float32 [ceil(N / block)], int8 and int4 only

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return self.values.nbytes + (self.scale.nbytes if self.scale is not None else 0)


@dataclass(frozen=True)
class Hello:
    """Client to server, before it may take part: what must agree. Hashes are 64 hex digits."""

    client: str
    protocol: int
    version: str  # of this package
    architecture: str  # hash of configuration, parameter shapes and groups
    weights: str  # hash of all values that the client would start from
    tokenizer: str
    chat_template: str
    layers: int
    experts: int
    examples: int  # to train on
    held_out: int  # to be scored on
    token_counts: bool  # whether it sends them where they are asked for
    embeddings: bool  # whether it trains embeddings and head
    labels: tuple[int, ...] = ()  # examples of each label, where the loss reads it and the client consents
    mask_key: str = ""  # masked runs: 64 hex digits of its public X25519 key; examples and held_out are 0 then
    mask_signature: str = ""  # and of its node key's signature of that; empty where it has no node key


@dataclass(frozen=True)
class Start:
    """Client to server, if the server holds no model: what the first round starts from."""

    client: str
    weights: Mapping[ParameterGroup, Packed]  # float32
    constants: Mapping[str, Tensor]  # what is never trained but belongs to the model: frozen parameters, buffers
    kept: Mapping[str, str] = field(default_factory=dict)  # if both are to be fetched: names, and types with shapes


@dataclass(frozen=True)
class Broadcast:
    """Server to client: where the round starts.

    As the server makes it, `weights` are whole, and `differences` tell the same to whoever holds those of the broadcast
    before. As it travels, each group is in one of the two, or the client holds it.
    """

    round: int
    weights: Mapping[ParameterGroup, Packed]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    score: bool = False  # these weights are also to be scored on what the client holds out, before it trains on them
    kept: Mapping[str, str] = field(default_factory=dict)  # groups not sent whole -> digests, a difference added
    differences: Mapping[ParameterGroup, Packed] = field(default_factory=dict)  # of groups that changed
    before: Mapping[str, str] = field(default_factory=dict)  # digests of what they are added to; does not travel
    labels: tuple[int, ...] = ()  # examples of each label at all clients that tell it, where the loss reads it
    keys: Mapping[str, str] = field(default_factory=dict)  # masked runs: as of `Recount`

    @property
    def nbytes(self) -> int:
        """Bytes on the wire, where each group is sent whole."""
        return sum(p.nbytes for p in self.weights.values()) + sum(t.nbytes for t in self.state.values())


@dataclass(frozen=True)
class Offer:
    """Server to client, before a broadcast that is larger than a piece: the weights that it will be about."""

    round: int
    dtype: str
    digests: Mapping[str, str]  # group -> digest of its packed values
    difference: str = ""  # the type of differences, which a client is sent that can add them; "": there are none
    before: Mapping[str, str] = field(default_factory=dict)  # group with a difference -> digest of what it is added to


@dataclass(frozen=True)
class Lacking:
    """Client to server: the part of what it was offered that it does not have."""

    client: str
    round: int
    transfer: str  # which one, by a hash of what it is made of
    ranges: tuple[int, ...]  # first byte and the one behind the last, range after range


@dataclass(frozen=True)
class Piece:
    """Some bytes of packed groups, either way.

    Down they are ranges of what was offered. Up they are those that were asked for.
    """

    client: str | None  # who sends it; None: the server
    round: int  # 0: of the weights to start from
    transfer: str  # as in `Lacking`; empty on the way up
    ranges: tuple[int, ...]  # down: where they lie in what was offered, as in `Lacking`; empty on the way up
    data: Tensor  # uint8
    digest: str  # of these bytes
    digests: Mapping[str, str] = field(default_factory=dict)  # up: of each whole group that it has a part of
    stale: tuple[str, ...] = ()  # up: what the server has from before a restart, and is not the client's any more


@dataclass(frozen=True)
class Fetch:
    """Server to client: hand over these bytes of the update you kept."""

    client: str
    round: int  # 0: of the weights to start from
    names: tuple[str, ...]  # groups, whose packed values follow one another
    start: int  # the first of their bytes
    nbytes: int
    held: Mapping[str, str] = field(default_factory=dict)  # what the server has from before a restart: digests


@dataclass
class Moved:
    """Bytes of weights and updates that travelled in one round, by client."""

    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistics:
    """Client to server, before any update: sums over the non-padding tokens of the last local epoch.

    An expert that fewer than `min_tokens` tokens (or fewer than 4 examples) reached is withheld: load and centroid
    are zero, it counts as not held. Updates and centroids travel as seeded random projections (`maths.sketch`) in
    half precision; update sketches are scaled to unit norm, their true norms are in `norm_G`. What nobody asked for is
    not computed and stays empty: all its axes have length 0. So does what tells tokens where the client's consent to
    that is lacking.
    """

    client: str
    round: int
    examples: int  # n_c: training examples used in this round
    tokens: int  # non-padding tokens behind the routing statistics
    steps: int  # optimizer steps of the round
    learning_rate: float  # that they began with
    loss: float  # mean training loss per answer token, nats
    prob_L_E: Tensor  # float32: mean router probability [P]
    load_L_E: Tensor  # float32: tokens with e among their top-k [P]
    norm_G: Tensor  # float32: Euclidean norm of each group's update, checked again on arrival [O]
    margin_L_E: Tensor  # asks "margins"; float32: mean decision margin [P idea, O formula]
    centroid_L_E_D: Tensor  # "centroids"; float16 times centroid_scale_L: sketch of the mean router input [P; sketch O]
    centroid_scale_L: Tensor  # "centroids"; float32
    update_L_E_S: Tensor  # "directions"; float16, unit norm (or zero): sketch of the expert's update [P; sketch O]
    token_count_M_V: Tensor  # "tokens"; float32: how often each token was read, or was an answer [O]
    token_met_M_B: Tensor  # "met"; uint8: a bit for each token that was, eight to a byte, the lowest first [O]
    frozen: tuple[ParameterGroup, ...] = ()  # what it did not train, for want of means or consent: no holder of these
    metrics: Mapping[str, float] = field(default_factory=dict)  # names carry their units; no algorithm reads them
    held_out: int = 0  # examples of its own that it scored the received weights on; 0: not asked for, or it has none
    held_out_loss: float | None = None  # as in `Evaluation`
    held_out_accuracy: float | None = None

    @property
    def score(self) -> Evaluation | None:
        """The score of the weights that were received, if there is one."""
        loss = math.nan if self.held_out_loss is None else self.held_out_loss
        return Evaluation(self.client, self.held_out, loss, self.held_out_accuracy) if self.held_out else None

    @property
    def held_L_E(self) -> Tensor:
        """Boolean [L, E]: this client reported the expert."""
        return self.load_L_E > 0

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return 64 + 8 * len(self.metrics) + sum(v.nbytes for v in vars(self).values() if isinstance(v, torch.Tensor))


def asked_shapes(layout: Layout, asks: Set[Ask], centroid_width: int, update_width: int) -> dict[str, Shape]:
    """Shape and type of each tensor of `Statistics` when `asks` is asked for."""
    cells, (matrices, tokens) = (layout.layers, layout.experts), layout.token_cells
    every: dict[str, tuple[Ask | None, tuple[int, ...], str]] = {
        "prob_L_E": (None, cells, "float32"),
        "load_L_E": (None, cells, "float32"),
        "norm_G": (None, (len(layout.groups),), "float32"),
        "margin_L_E": ("margins", cells, "float32"),
        "centroid_L_E_D": ("centroids", (*cells, centroid_width), "float16"),
        "centroid_scale_L": ("centroids", (layout.layers,), "float32"),
        "update_L_E_S": ("directions", (*cells, update_width), "float16"),
        "token_count_M_V": ("tokens", (matrices, tokens), "float32"),
        "token_met_M_B": ("met", (matrices, -(-tokens // 8)), "uint8"),
    }
    return {
        name: (shape if ask is None or ask in asks else (0,) * len(shape), dtype)
        for name, (ask, shape, dtype) in every.items()
    }


@dataclass(frozen=True)
class Plan:
    """A weight for each client and group: the whole difference between one algorithm and another.

    new[g] = old[g] + Σ_c weight[c, g] · factor[c, g] · Δ_c[g], normalised by the weight that arrived. Factors clip,
    stretch or turn an update and never enter the normaliser. Zero weight: the group is never uploaded.

    A stream is a second sum over the same updates, which travel once: Σ_c stream · Δ of those of weight that arrived,
    as they are, but for what `server.robust` cuts off. Of these sums, and of how many updates of each group are in
    them, `then` makes the state of the next round, in place of `state`.

    With `centred`, each client's update of a softmax router has its mean over experts taken off before it is summed:
    one vector added to all rows changes no routing, but weighted row by row it would become noise [O].

    Rows of the layout's `token_rows` may have weights of their own: a matrix whose row is a token's is averaged, token
    by token, over those who have met it.
    """

    clients: tuple[str, ...]
    weight_C_G: Tensor  # float32, non-negative; a column sums to 1, or to 0 if nobody's update is wanted
    factor_C_G: Tensor | None = None  # float32; None: ones
    token_weight_C_M_V: Tensor | None = None  # float32, columns sum to 1: in place of their group's weight
    met_C_M_V: Tensor | None = None  # boolean, who met the token; None: those whose row has weight
    row_most_M_V: Tensor | None = None  # float32, length that anybody's update of a row may have; None: any
    centred: bool = False
    streams: Mapping[str, Tensor] = field(default_factory=dict)  # name -> float32 [C, G]
    state: State = field(default_factory=dict)  # the algorithm's, for the next round
    then: Callable[[Mapping[str, Weights], Mapping[ParameterGroup, int]], State] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the algorithm has to say about the round

    def without(self, frozen: Mapping[str, Sequence[ParameterGroup]], layout: Layout) -> Plan:
        """The same plan with no weight for groups that a client did not train, shared out among those who did."""
        if not any(frozen.values()):
            return self
        column = {group: i for i, group in enumerate(layout.groups)}
        holds_C_G = torch.ones_like(self.weight_C_G)
        for row, client in enumerate(self.clients):
            holds_C_G[row, [column[group] for group in frozen.get(client, ())]] = 0
        words = self.token_weight_C_M_V
        if words is not None:
            holds_C_M = holds_C_G[:, [column[rows.group] for rows in layout.token_rows]]
            words = _shared_out(words, holds_C_M.unsqueeze(-1))
        return replace(self, weight_C_G=_shared_out(self.weight_C_G, holds_C_G), token_weight_C_M_V=words)

    def wanted(self, layout: Layout) -> Tensor:
        """Boolean [C, G]: whose update of which group travels: those of nonzero weight that train anything.

        Of a router that is to be centred, all rows, if any is wanted.
        """
        trains_G = torch.tensor([layout.sizes[group] > 0 for group in layout.groups])
        wanted_C_G = self.weight_C_G > 0
        if self.centred and any(layout.softmax_L):
            _, gate_C_L_E, _ = layout.split(wanted_C_G)
            gate_C_L_E |= gate_C_L_E.any(-1, keepdim=True) & torch.tensor(layout.softmax_L).unsqueeze(-1)
        return wanted_C_G & trains_G

    def requests(self, round: int, layout: Layout) -> list[Request]:
        """The request to each client."""
        return [
            Request(client, round, tuple(layout.groups[i] for i in wanted.nonzero().flatten().tolist()))
            for client, wanted in zip(self.clients, self.wanted(layout), strict=True)
        ]


def _shared_out(weight: Tensor, holds: Tensor) -> Tensor:
    """Weights [C, ...] of those who hold it alone, stretched to what the sum over clients was."""
    left = weight * holds
    total = left.sum(0)
    return left * torch.where(total > 0, weight.sum(0) / total, torch.ones_like(total))


@dataclass(frozen=True)
class Request:
    """Server to client, after the plan: hand over these groups of the update you kept."""

    client: str
    round: int
    groups: tuple[ParameterGroup, ...]


@dataclass(frozen=True)
class Update:
    """Client to server: the requested groups of its update (trained minus received weights)."""

    client: str
    round: int
    groups: Mapping[ParameterGroup, Packed]

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return sum(p.nbytes for p in self.groups.values())


@dataclass(frozen=True)
class Concealed:
    """Client to server in a masked round: residues that tell nothing but in the sum over all of `among`.

    Counts are modulo 2^64, marks of heights modulo 2^32, values of an update modulo 2^16. See `docs/masks.md`.
    """

    client: str
    round: int
    among: tuple[str, ...]  # clients whose masks cancel, in the order of their names
    residues: Mapping[str, Tensor]  # name of a count, or a group's -> integers; empty: kept, to be fetched in pieces

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return sum(tensor.nbytes for tensor in self.residues.values())


EXAMPLES, LOSS = "examples", "loss"  # counts of a masked round: n_c, and n_c times the mean loss of training
LOAD, HOLDERS = "load_L_E", "holders_L_E"  # n_c(e), and 1 where that is not 0
ROWS, MET = "rows_M_V", "met_M_V"  # k_c(v), and 1 where that is not 0
HELD_OUT = "held_out"  # a `HeldOut`, of the weights that the round began with
SCORED = "scored"  # a `HeldOut`, of the weights that the round ended with, where these are scored by themselves
UNIT = 1 << 20  # of these, holders and held-out examples aside
MOST_LOSS = 100.0  # nats a token: a client's loss on its held-out part that is higher, or none, counts as this
HEIGHTS = "heights "  # and a group: of the blocks of its update, as `maths.fixed_point` has them
CLIPPED = "clipped "  # and a group, beside its update: how many of its values were


class HeldOut(NamedTuple):
    """Scores on held-out parts, of one client or the sum over all; zeros of a client that has no such part."""

    clients: int  # that scored
    examples: int  # of theirs
    judged: int  # examples of clients that tell an accuracy
    right: int  # of these
    loss: int  # each client's examples times its mean loss, nats; in 1 / UNIT


def count_shapes(layout: Layout, shares: Shares, tells: Set[str]) -> dict[str, tuple[int, ...]]:
    """Shape of each count but the heights, which are int64 and masked modulo 2^64.

    Args:
        layout: of the model.
        shares: of the algorithm.
        tells: which of LOSS and HELD_OUT are summed beside what weights are shares of.
    """
    cells: tuple[int, ...] = (layout.layers, layout.experts)
    shapes: dict[str, tuple[int, ...]] = {EXAMPLES: (1,)}
    shapes |= {name: shape for name, shape in {LOSS: (1,), HELD_OUT: (len(HeldOut._fields),)}.items() if name in tells}
    if shares.load:
        shapes |= dict.fromkeys((LOAD, HOLDERS), cells)
    if shares.rows != "examples" and layout.token_rows:
        shapes |= dict.fromkeys((ROWS, MET), layout.token_cells)
    return shapes


@dataclass(frozen=True)
class Totals:
    """Server to client in a masked round: the sums of all clients' counts but scores, the largest of their heights."""

    round: int
    among: tuple[str, ...]  # clients that were summed
    counts: Mapping[str, Tensor]  # int64; heights uint8

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return sum(tensor.nbytes for tensor in self.counts.values())


@dataclass(frozen=True)
class Recount:
    """Server to client in a masked round: conceal your counts once more, among those left."""

    round: int
    keys: Mapping[str, str]  # of all that are summed, by name: mask key and signature, as of `Hello`, and a space


@dataclass(frozen=True)
class Sum:
    """Server to client in a masked round: the totals, and of which groups a share is asked for, among whom."""

    round: int
    counted: tuple[str, ...]  # as in `Totals`, and
    counts: Mapping[str, Tensor]
    keys: Mapping[str, str]  # as of `Recount`
    groups: tuple[ParameterGroup, ...]

    @property
    def totals(self) -> Totals:
        """The totals alone."""
        return Totals(self.round, self.counted, self.counts)


@dataclass(frozen=True)
class Begun:
    """How far the sums of a round have come; a server that was interrupted goes on among the same clients."""

    counted: tuple[str, ...] = ()  # among whom counts were last asked for; empty: they were not
    left: tuple[str, ...] = ()  # among whom a second sum of updates was asked for, and
    groups: tuple[ParameterGroup, ...] = ()  # of which groups; no other sum of these may be asked for
    broken: tuple[ParameterGroup, ...] = ()  # of the first sum: a lost client's share is here in part
    score: bool = False  # whether scores of the weights that the round began with were asked for with the counts
    scored: tuple[str, ...] = ()  # among whom those that it ended with were last to be scored by themselves


@dataclass(frozen=True)
class Evaluation:
    """Scores of one set of examples; `client` is None for the global test set."""

    client: str | None
    examples: int
    loss: float  # mean negative log-likelihood per answer token, nats
    accuracy: float | None  # share of right answers, or exact matches; None for plain language modelling


@dataclass(frozen=True)
class Failure:
    """A client that is missing from a stage of a round: who, where and why."""

    client: str
    stage: Stage
    reason: str


@dataclass(frozen=True)
class LayerRouting:
    """One router's forward pass over the non-padding tokens of a batch."""

    logits_T_E: Tensor  # float32, differentiable
    topk_T_K: Tensor  # int64: the experts the router chose for each token, those with no room left included
    scoring: Scoring


@dataclass(frozen=True)
class Step:
    """One training step, as far as a penalty may see it."""

    routing: Sequence[LayerRouting]  # L entries
    drift: Callable[[], Tensor]  # ‖w − w_start‖² over all that is trained, w_start as in `LocalRound.start`; a scalar
    state: Mapping[str, Tensor]  # the algorithm's broadcast state
    prob_L_E: Tensor | None  # this client's own routing distribution when it last took part


@dataclass(frozen=True)
class Reports:
    """The statistics of a round's C clients, stacked: what a plan is made of."""

    of: Sequence[Statistics]
    layout: Layout
    members: int  # of the federation, asked or not

    @property
    def round(self) -> int:
        """Which it is, from 1."""
        return self.of[0].round

    @cached_property
    def examples_C(self) -> Tensor:
        """n_c, float64."""
        return torch.tensor([report.examples for report in self.of], dtype=torch.float64)

    @cached_property
    def share_C(self) -> Tensor:
        """n_c / Σ n, float32."""
        return (self.examples_C / self.examples_C.sum().clamp_min(1)).float()

    @cached_property
    def held_C_L_E(self) -> Tensor:
        """Boolean: who reported which expert."""
        return self.stack("load_L_E") > 0

    def stack(self, name: str) -> Tensor:
        """One field of all clients, clients first; half precision becomes float32, what a client withheld zeros."""
        values: list[Tensor] = [getattr(report, name) for report in self.of]
        whole = max(values, key=torch.Tensor.numel).shape
        return torch.stack([value if value.shape == whole else value.new_zeros(whole) for value in values]).float()

    def column(self, name: str) -> Tensor:
        """A number of each client, float64 [C]."""
        return torch.tensor([getattr(report, name) for report in self.of], dtype=torch.float64)

    def plan(self, gate_C_L_E: Tensor | None = None, expert_C_L_E: Tensor | None = None, **more: Any) -> Plan:
        """These weights, by data size where none are given. Router rows with weights of their own are centred."""
        by_size_C_L_E = self.share_C[:, None, None].expand(-1, self.layout.layers, self.layout.experts)
        gate, expert = (by_size_C_L_E if table is None else table.float() for table in (gate_C_L_E, expert_C_L_E))
        weight_C_G = self.layout.table(self.share_C, gate, expert)
        clients = tuple(report.client for report in self.of)
        return Plan(clients, weight_C_G, **({"centred": gate_C_L_E is not None} | more))


@dataclass(frozen=True)
class Shares:
    """A plan whose weights are each a client's own number over the sum of all clients': sums are all that it needs.

    All that is not named is by examples: n_c / Σ n.
    """

    load: bool = False  # experts by n_c times the expert's share of the client's load
    rows: Literal["examples", "tokens", "met"] = "examples"  # token rows by n_c times the token's share, or if met
    row_holders: int = 1  # rows whose token fewer clients met are by examples
    row_half_life: float = 0.0  # rounds in which rows go half of the way to examples; 0: they do not


@dataclass
class LocalRound:
    """One client's round on the client, as an algorithm may see and change it. Weights are flat float32, by group.

    A tensor here may be everybody's: set another in its place, and change none in place.
    """

    received: Mapping[ParameterGroup, Tensor]  # what the server sent; a look-up may unpack it
    start: MutableMapping[ParameterGroup, Tensor]  # what training starts from: received, but for private groups
    state: Mapping[str, Tensor]  # the algorithm's broadcast state
    kept: Mapping[str, Tensor]  # what `keep` kept when the client last took part; empty at first
    # the update of that round; empty at first, and where a run was complete and goes on, unless `keep` kept something
    last_update: Callable[[], Mapping[ParameterGroup, Tensor]]
    learning_rate: float
    shift: Weights = field(default_factory=dict)  # added to the gradients at every step
    steps: int = 0  # that were taken; `keep` may read it


Mix = Callable[
    ["Tensor", "Tensor", "Tensor"], "Tensor"
]  # server's log p [N, V], own log p [N, V], score [N, 1] -> log p


class Algorithm(Protocol):
    """An algorithm is a plan, and maybe more: `algorithms.fedavg.FedAvg` has a default for everything.

    Options are fields of a frozen dataclass. `plan` runs on the server, the others on clients; each of them has a copy
    of its own, so nothing may be kept in the object.
    """

    @property
    def asks(self) -> Set[Ask]:
        """Statistics that leave a client for the plan, beside its data size, loss, mean routing, loads and norms.

        "margins", "centroids", "directions" (of experts' updates), "tokens" (counts), "met" (a bit a token): fields of
        `Statistics`; the last two only of clients that consent. "probabilities": nothing more, but routers must show
        how they score. "data": all of it, to be pooled; only where all clients are in one process.
        """

    @property
    def private(self) -> Set[Kind]:
        """Kinds of groups in which each client goes on from its own values; they are summed for the global model."""

    @property
    def mix(self) -> Mix | None:
        """How each client mixes the server's model with one of its own, which it then trains; None: it has none."""

    @property
    def shares(self) -> Shares | None:
        """The numbers that its weights are shares of; None: it needs more of each client than sums over all of them."""

    @property
    def shared(self) -> Literal["frozen", "average"] | None:
        """The fate of all parts but sites' own experts, which nobody else trains; None: sites own none.

        Where they do, nobody's update is held against others'.
        """

    def part(self, layout: Layout, client: str) -> Part | None:
        """On a client: the part of the model that it trains, and runs meanwhile; None: all of it."""

    def plan(self, reports: Reports, state: State) -> Plan:
        """On the server: who counts for how much, and the state for the next round."""

    def begin(self, local: LocalRound) -> None:
        """On a client, before training: may change `local.start` and `local.shift`."""

    def penalty(self, step: Step) -> Tensor | None:
        """On a client, at each step: a differentiable scalar added to the task's loss, or None."""

    def keep(self, local: LocalRound, update: Mapping[ParameterGroup, Tensor]) -> Mapping[str, Tensor]:
        """On a client, after training: what it keeps for its next round. `update` is trained minus start."""


class Accumulator(Protocol):
    """Takes clients' updates, each whole, one after another; checks and sums each at once, so none is kept."""

    def add(self, update: Update) -> Failure | None:
        """Add one client's update, or say why it was refused."""


class Federation(Protocol):
    """How a round reaches the clients: the narrow seam between the round loop and an engine."""

    def members(self) -> Sequence[str]:
        """Ids of all clients that may be asked, in a fixed order."""

    def labels(self) -> tuple[int, ...]:
        """Examples of each label at all clients that tell it, together; empty if none does."""

    def train(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterable[Statistics | Failure]:
        """Local training, scored before where the broadcast asks for it; results in any order, each as it comes.

        A score that cannot be used is a Failure of stage "evaluate", and comes beside the client's statistics.
        """

    def collect(self, requests: Sequence[Request], accumulator: Accumulator) -> list[Failure]:
        """Fetch the requested groups and hand each update to the accumulator, in the order of `requests`."""

    def evaluate(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterable[Evaluation | Failure]:
        """Score the broadcast weights on each client's own held-out part, and train on nothing."""

    def faults(self) -> list[Failure]:
        """Faults outside of these calls since this was last asked: clients refused, gone, or late."""

    def moved(self, round: int) -> Moved:
        """Bytes that a round has moved so far; what was sent before an interruption counts, what did not travel not."""


class MaskedFederation(Federation, Protocol):
    """A federation whose clients can conceal what they send, but for its sums over all clients of a round."""

    def begun(self, round: int) -> Begun:
        """How far the sums of a round have come; before an interruption, too, unless clients have other keys now."""

    def count(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterable[Concealed | Failure]:
        """Local training, and the counts of each client, concealed among `clients`; in any order."""

    def score(self, broadcast: Broadcast, clients: Sequence[str]) -> Iterable[Concealed | Failure]:
        """The scores of the broadcast weights, concealed among `clients`; training on nothing."""

    def recount(self, round: int, left: Sequence[str], stage: Stage) -> Iterable[Concealed | Failure]:
        """The counts ("train") or scores ("evaluate") again, concealed among those left; a client answers once."""

    def conceal(
        self, totals: Totals, among: Sequence[str], groups: Sequence[ParameterGroup]
    ) -> Iterable[Concealed | Failure]:
        """Each client's share of these groups' updates, one message a group, or several; a client follows another.

        Asked again, a client answers once a round, for groups that are not complete. A group of which a lost client's
        share is here in part is among those that `begun` then tells as broken: a second sum of it, made without that
        client, would tell the part.
        """


Metrics = dict[str, Any]


def is_name(text: str) -> bool:
    r"""Whether a client may be called so: 1 to 64 printable characters.

    >>> is_name("ward 3"), is_name(""), is_name("\x1b[2J"), is_name("w" * 65)
    (True, False, False, False)
    """
    return bool(text.strip()) and len(text) <= LONGEST_NAME and text.isprintable()


def parse_group(key: str) -> ParameterGroup:
    """The group of a name, which is its `str`.

    >>> parse_group("expert[3,5]")
    ParameterGroup(kind='expert', layer=3, expert=5)
    """
    for group in WHOLE:
        if key == group.kind:
            return group
    for kind in CELLS:
        if key.startswith(f"{kind}["):
            layer, _, expert = key.removeprefix(f"{kind}[").removesuffix("]").partition(",")
            if layer.isdecimal() and expert.isdecimal():
                group = ParameterGroup(kind, int(layer), int(expert))
                if str(group) == key:
                    return group
    raise ValueError(f"no parameter group {key!r:.40}")
