"""A client's answers to messages, whichever way they came.

A reason that leaves a site never quotes its data and never names its folders: what went wrong with them is told in the
site's own log alone.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from fedalign.client.memory import ClientMemory
from fedalign.errors import DataError, ModelError, TrainingFailedError, UserError
from fedalign.federation.messages import VERBS, Message, MessageError, Parcel, decode, encode, stage_of
from fedalign.federation.received import Received
from fedalign.federation.transfer import CONSTANT, FIRST, described
from fedalign.files import write_text
from fedalign.maths.rounding import shapes_of, unpack_weights
from fedalign.maths.tensor_file import Named
from fedalign.protocol import Broadcast, Failure, Fetch, Hello, Lacking, Offer, Packed, Piece, Start

if TYPE_CHECKING:  # transformers takes seconds to import, and handing over an update needs none of it
    from fedalign.client.trainer import OpenClient

log = logging.getLogger("fedalign")

SIZES = "sizes.json"  # of the model's groups, in a client's memory
SEE_LOG = "the reason is in the client's own log"


class Service:
    """Answers for one client; what it opens stays open for the next message.

    Args:
        name: the client.
        memory: what the client keeps on disk for this run; handing over an update needs nothing else.
        open_client: loads the model and the client's data.
    """

    def __init__(self, name: str, memory: Path, open_client: Callable[[], OpenClient]) -> None:
        self.name = name
        self.memory = ClientMemory(memory)
        self.received = Received(name, memory)
        self._open_client = open_client
        self._client: OpenClient | None = None
        self._hello_said: Hello | None = None
        self._as_loaded = True  # the model, as far as this service has to do with it

    @property
    def client(self) -> OpenClient:
        """The loaded client; loads it when first asked."""
        if self._client is None:
            self._client = self._open_client()
            self._as_loaded = True
            sizes = {str(group): size for group, size in self._client.trainer.moe.layout.sizes.items()}
            self.memory.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.memory.folder / SIZES, json.dumps(sizes))
        return self._client

    @property
    def sizes(self) -> dict[str, int]:
        """How many values each group of the model trains; written down, so that pieces need no model."""
        file = self.memory.folder / SIZES
        if not file.exists():
            _ = self.client
        found: dict[str, int] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def close(self) -> None:
        """Free the model's memory."""
        self._client = None
        gc.collect()  # a model's modules refer to each other

    def answer(self, verb: str, parcel: Parcel, *, scores: bool = True) -> Parcel:
        """Answer a message, which asks for one of `VERBS`; a fault becomes a Failure.

        Without `scores` it trains where a score is asked for as well, and is not scored: all that may be is told.
        """
        stage = stage_of(verb)
        answers: dict[str, Callable[[Parcel], Message]] = {one: getattr(self, f"_{one}") for one in VERBS}
        answers["train"] = partial(self._train, scores=scores)
        try:
            return encode(answers[verb](parcel))
        except (TrainingFailedError, MessageError, UserError) as error:
            reason = str(error)
        except DataError as error:
            log.error("%s: its data cannot be used: %s", self.name, error)
            reason = f"its data cannot be used; {SEE_LOG}"
        except ModelError as error:
            log.error("%s: its model cannot be loaded: %s", self.name, error)
            reason = f"its model cannot be loaded; {SEE_LOG}"
        except Exception as error:
            log.exception("%s: %s failed", self.name, verb)
            reason = f"{type(error).__name__}; {SEE_LOG}"
        return encode(Failure(self.name, stage, reason))

    def _reload(self) -> None:
        """Reload before describing the model: training has overwritten the loaded weights."""
        if not self._as_loaded:
            self.close()

    def _hello(self, _: Parcel) -> Message:
        if self._hello_said is None:
            self._reload()
            self._hello_said = self.client.hello()
        return self._hello_said

    def _start(self, _: Parcel) -> Message:
        self._reload()
        trainer = self.client.trainer
        moe = trainer.moe
        constants = {name: value.cpu().contiguous() for name, value in moe.constants().items()}
        nbytes = 4 * sum(moe.layout.sizes.values()) + sum(value.nbytes for value in constants.values())
        if nbytes <= min(FIRST, trainer.config.wire.piece_nbytes):
            weights = {group: Packed(value.cpu()) for group, value in moe.read().items()}
            return Start(self.name, weights, constants)
        fixed = {f"{CONSTANT}{name}": value for name, value in constants.items()}
        tensors = [one for group, size in moe.layout.sizes.items() for one in shapes_of(str(group), size, "float32")]
        tensors += [Named(name, value.dtype, tuple(value.shape)) for name, value in fixed.items()]
        values = ((str(group), moe.read([group])[group].cpu()) for group in moe.layout.groups)
        self.memory.keep_start(chain(values, fixed.items()), tensors)
        return Start(self.name, {}, {}, {one.name: described(one) for one in tensors})

    def _offer(self, parcel: Parcel) -> Message:
        return self.received.offered(decode(parcel, Offer), self.sizes)

    def _piece(self, parcel: Parcel) -> Message:
        return self.received.take(decode(parcel, Piece))

    def _broadcast(self, parcel: Parcel) -> Broadcast | Lacking:
        broadcast: Broadcast = decode(parcel, Broadcast)
        if broadcast.round < 0:  # what is kept of such a round would never be forgotten
            raise MessageError(f"round = {broadcast.round}: must be 0 or more")
        return self.received.completed(broadcast, self.sizes)

    def _count(self, _: Parcel) -> Message:
        raise MessageError("its sums are not masked in this run")

    _conceal = _count

    def _train(self, parcel: Parcel, *, scores: bool) -> Message:
        broadcast = self._broadcast(parcel)
        if isinstance(broadcast, Lacking):
            return broadcast
        self.memory.forget_start()  # whoever asks for training has it
        client, self._as_loaded = self.client, False
        return client.trainer.train(client.data, replace(broadcast, score=broadcast.score and scores))

    def _update(self, parcel: Parcel) -> Message:
        return self.memory.hand_piece(self.name, decode(parcel, Fetch))

    def _evaluate(self, parcel: Parcel) -> Message:
        broadcast = self._broadcast(parcel)
        if isinstance(broadcast, Lacking):
            return broadcast
        client, self._as_loaded = self.client, False
        score = client.trainer.evaluate(client.data, unpack_weights(broadcast.weights), broadcast.round)
        return score if score is not None else Failure(self.name, "evaluate", "it holds nothing out to be scored on")

    def _finish(self, _: Parcel) -> Message:
        self.memory.forget_updates()
        self.received.forget()
        return Lacking(self.name, 0, "", ())


def log_to_stderr() -> None:
    """Let what this package logs be seen, in a process that Flower started."""
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s fedalign: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
