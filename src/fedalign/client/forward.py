"""One forward pass that computes logits only where an answer is read.

Of a 60-token prompt with a one-token answer, one position in sixty matters; the head over the whole vocabulary is
often the largest matrix of a small model. The head's input is cut to those positions before it runs, so whatever a
family does to its logits afterwards (scaling, soft caps) still happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedalign import parallel
from fedalign.data.batches import Batch
from fedalign.data.encode import IGNORED
from fedalign.moe.model import MoEModel


@dataclass(frozen=True)
class AnswerLogits:
    """Predictions of N answer tokens."""

    logits_N_V: Tensor  # float32
    target_N: Tensor  # int64: the token that is right
    row_N: Tensor  # int64: the batch row it belongs to
    hidden_N_H: Tensor  # what the head reads there

    @property
    def nll_N(self) -> Tensor:
        """Negative log-likelihood of each answer token, nats."""
        return nn.functional.cross_entropy(self.logits_N_V, self.target_N, reduction="none")


def own_share(batch: Batch) -> Batch:
    """This process's share of a batch that several run together; all of it where it is alone."""
    return batch.share(parallel.own_rows(batch.examples))


def answer_logits(moe: MoEModel, batch: Batch) -> AnswerLogits:
    """Run the model on a batch; predict each token whose label is not -100."""
    target_B_S = batch.targets_B_S
    row_N, position_N = torch.nonzero(target_B_S != IGNORED, as_tuple=True)
    with _cut_head(moe.model, row_N, position_N) as heard:
        logits_N_V = moe.model(**batch.inputs(), use_cache=False).logits.squeeze(0)
    return AnswerLogits(logits_N_V.float(), target_B_S[row_N, position_N], row_N, heard[0])


@contextmanager
def _cut_head(model: Any, row_N: Tensor, position_N: Tensor) -> Iterator[list[Tensor]]:
    """The head sees answer positions alone; what it sees is in the list."""
    heard: list[Tensor] = []

    def keep_answers(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        here = args[0].device  # of a split model the last one
        heard.append(args[0][row_N.to(here), position_N.to(here)])
        return (heard[0].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_answers)
    try:
        yield heard
    finally:
        handle.remove()
