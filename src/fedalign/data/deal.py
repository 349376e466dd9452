"""Who holds what: examples dealt to the clients of a simulation, and the validation part."""

from __future__ import annotations

import random

from fedalign.config.run import Config
from fedalign.data.formats import Example, load_examples
from fedalign.data.partition import Partition, partition
from fedalign.errors import UserError, unknown


def split_among_clients(config: Config) -> tuple[list[Example], Partition]:
    """The training examples and which client holds which of them, as a simulation deals them.

    Who takes part changes nothing of what each of them holds.

    Raises:
        UserError: It cannot be dealt so, or one who is to take part holds nothing.
    """
    examples, _ = set_aside(config)
    parts, only = partition(examples, config.clients, config.run.seed), config.clients.only
    for name in only:
        if name not in parts:
            raise unknown("clients.only", name, parts)
    return examples, {name: part for name, part in parts.items() if name in only or not only}


def set_aside(config: Config) -> tuple[list[Example], list[Example]]:
    """The examples dealt to clients, and the validation part: a draw by the seed, so the same for every algorithm.

    Raises:
        UserError: The share leaves nothing in one of them.
    """
    examples = load_examples(config.data.train, config.data, "train", config.run.seed)
    share = config.data.validation
    if not share:
        return examples, []
    count = round(share * len(examples))
    if not 0 < count < len(examples):
        raise UserError(
            f"data.validation = {share}: of {len(examples)} examples that is {count}. Choose another share."
        )
    chosen = set(random.Random(f"{config.run.seed} validation").sample(range(len(examples)), count))
    return (
        [example for i, example in enumerate(examples) if i not in chosen],
        [example for i, example in enumerate(examples) if i in chosen],
    )
