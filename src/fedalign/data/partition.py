"""Which client holds which example.

Splits by label or size come from flwr-datasets' partitioners, run on a local table of labels:

- dirichlet: each class is dealt to clients in shares drawn from Dirichlet(alpha) (Yurochkin et al. 2019, arXiv
  1905.12022), without balancing of sizes;
- pathological: each client holds `classes` classes (Li et al. 2021, arXiv 2102.02079);
- iid: equal parts; size: parts that grow with the client's number.

`natural` follows the client column and `files` the files, one client each. All examples find a client, and the same
seed gives the same split to every algorithm.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedalign.data.formats import Example
from fedalign.errors import UserError

if TYPE_CHECKING:
    from fedalign.config.run import ClientsConfig

Partition = dict[str, list[int]]
DRAWS = 110  # of a Dirichlet split, until each client has clients.min_examples


def partition(examples: Sequence[Example], clients: ClientsConfig, seed: int) -> Partition:
    """Client id -> indices into `examples`, ascending.

    Ids are `client-00`, `client-01`, ... or, for natural and files, the data's own. Clients are in the order of
    their ids.

    Raises:
        UserError: fewer examples than clients, fewer classes than asked for, no labels or client column to split
            by, or a client left with fewer than `clients.min_examples`.
    """
    if clients.partition in ("natural", "files"):
        parts = _by_owner(examples, clients)
    else:
        parts = _by_partitioner(examples, clients, seed)
    small = {client: len(part) for client, part in parts.items() if len(part) < clients.min_examples}
    if small:
        named = ", ".join(f"{client} ({size})" for client, size in list(small.items())[:5])
        raise UserError(
            f"clients.min_examples = {clients.min_examples}: {len(small)} of {len(parts)} clients hold fewer: {named}"
            f"{', ...' if len(small) > 5 else ''}. Lower it, {_REMEDY[clients.partition]}."
        )
    return parts


def hold_out(indices: Sequence[int], fraction: float, seed: int, client: str) -> tuple[list[int], list[int]]:
    """Split one client's indices at random: what it trains on, and its own test part.

    The held part is `fraction` of the indices, rounded, and at least one if `fraction` > 0; at least one stays for
    training. The draw depends on the seed and the client's id alone.

    >>> train, held = hold_out(range(10), 0.2, seed=0, client="client-00")
    >>> len(train), len(held), sorted(train + held) == list(range(10))
    (8, 2, True)

    Raises:
        UserError: the client holds too few examples for both parts.
    """
    if not fraction:
        return list(indices), []
    held = max(1, round(fraction * len(indices)))
    if held >= len(indices):
        raise UserError(
            f"client {client!r} holds {len(indices)} example(s): too few for clients.held_out = {fraction}, "
            f"which takes {held}. Lower clients.held_out (0: no own test part), raise clients.min_examples or give it "
            "more data."
        )
    order = np.random.default_rng([seed, zlib.crc32(client.encode())]).permutation(len(indices))
    chosen = set(order[:held].tolist())
    return (
        [index for i, index in enumerate(indices) if i not in chosen],
        [index for i, index in enumerate(indices) if i in chosen],
    )


def _by_owner(examples: Sequence[Example], clients: ClientsConfig) -> Partition:
    natural = clients.partition == "natural"
    parts: defaultdict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        parts[example.client if natural else example.file].append(i)
    if "" in parts:
        what = "a client column: name it in data.columns.client" if natural else "a folder of files"
        raise UserError(
            f"clients.partition = {clients.partition!r}: {len(parts['']):,} of {len(examples):,} examples name no "
            f"client. It needs {what}. Or choose one of: dirichlet, iid, pathological, size."
        )
    return dict(sorted(parts.items()))


def _by_partitioner(examples: Sequence[Example], clients: ClientsConfig, seed: int) -> Partition:
    _check(examples, clients)
    from datasets import Dataset
    from flwr_datasets import partitioner as flower

    make: dict[str, Callable[[], Any]] = {
        "dirichlet": lambda: flower.DirichletPartitioner(
            clients.count, "label", clients.alpha, clients.min_examples, self_balancing=False, shuffle=False, seed=seed
        ),
        "pathological": lambda: flower.PathologicalPartitioner(
            clients.count, "label", clients.classes, "first-deterministic", shuffle=False, seed=seed
        ),
        "iid": lambda: flower.IidPartitioner(clients.count),
        "size": lambda: getattr(flower, f"{clients.size_growth.capitalize()}Partitioner")(clients.count),
    }
    # The partitioners cut consecutive rows: shuffle, so that the user's order of rows says nothing.
    order = np.random.default_rng(seed).permutation(len(examples))
    codes = {label: code for code, label in enumerate(sorted({example.label for example in examples}))}
    split = make[clients.partition]()
    split.dataset = Dataset.from_dict({"index": order, "label": [codes[examples[i].label] for i in order]})
    parts = _parts(split, clients)
    missing = set(range(len(examples))).difference(*parts)
    if missing:
        unheld = sorted({examples[i].label for i in missing})
        raise UserError(
            f"clients.classes = {clients.classes}: with clients.count = {clients.count} nobody holds {len(unheld)} of "
            f"{len(codes)} classes ({', '.join(unheld[:5])}). Raise either, or run.seed = another number."
        )
    width = max(2, len(str(clients.count - 1)))
    return {f"client-{i:0{width}}": part for i, part in enumerate(parts)}


def _parts(split: Any, clients: ClientsConfig) -> list[list[int]]:
    """Each client's indices. A Dirichlet partitioner draws 11 times a call, and goes on drawing when called again."""
    for calls_left in reversed(range(DRAWS // 11 if clients.partition == "dirichlet" else 1)):
        try:
            with warnings.catch_warnings():  # each draw that is thrown away warns; only failure in the end matters
                warnings.simplefilter("ignore")
                return [sorted(split.load_partition(i)[:]["index"]) for i in range(clients.count)]
        except ValueError as error:
            if not calls_left:
                raise _impossible(clients, error) from None
    raise AssertionError("the last call returns or raises")


def _check(examples: Sequence[Example], clients: ClientsConfig) -> None:
    kind = clients.partition
    if clients.count > len(examples):
        raise UserError(
            f"clients.count = {clients.count}: more clients than examples ({len(examples)}). "
            f"Choose at most {len(examples)}."
        )
    if kind not in ("dirichlet", "pathological"):
        return
    sizes = Counter(example.label for example in examples)
    if "" in sizes:
        raise UserError(
            f"clients.partition = {kind!r}: splits by label, but {sizes['']:,} of {len(examples):,} examples have "
            "none. Name the column in data.columns.label, or choose one of: files, iid, natural, size."
        )
    if kind == "dirichlet" and not (clients.alpha > 0 and math.isfinite(clients.alpha)):
        raise UserError(f"clients.alpha = {clients.alpha}: must be above 0 (0.1: very skewed, 100: nearly even).")
    if kind == "pathological" and clients.classes > len(sizes):
        raise UserError(
            f"clients.classes = {clients.classes}: the data has {len(sizes)} classes. Choose 1 to {len(sizes)}."
        )


def _impossible(clients: ClientsConfig, error: ValueError) -> UserError:
    if clients.partition == "dirichlet":
        return UserError(
            f"clients.alpha = {clients.alpha}: in {DRAWS} draws some of the {clients.count} clients always got fewer "
            f"than clients.min_examples = {clients.min_examples} examples. "
            f"Lower it, {_REMEDY['dirichlet']}, or use more data."
        )
    return UserError(f"clients.partition = {clients.partition!r}: {error}")


_REMEDY = {
    "dirichlet": "raise clients.alpha, lower clients.count or change run.seed",
    "pathological": "lower clients.count or raise clients.classes",
    "iid": "lower clients.count",
    "size": "lower clients.count or choose a slower clients.size_growth (linear, square, exponential)",
    "natural": "join small clients in the data, or choose another clients.partition",
    "files": "join small files, or choose another clients.partition",
}
