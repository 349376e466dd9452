"""How often a client met each token: what the rows of embeddings and head are weighted by.

A token that stands in few of a client's examples may be a name. It counts as not met, as an expert does that few
examples reached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedalign.data.batches import Batch
from fedalign.data.encode import IGNORED
from fedalign.protocol import TokenRows


class TokenCounts:
    """Sums over many batches, on the CPU."""

    def __init__(self, matrices: Sequence[TokenRows]) -> None:
        self._matrices = matrices
        width = max((rows.tokens for rows in matrices), default=0)
        self._count = [torch.zeros(width, dtype=torch.int64) for _ in matrices]
        self._examples = [torch.zeros(width, dtype=torch.int64) for _ in matrices]

    def update(self, batch: Batch) -> None:
        """Add a batch. Each of its rows is one example, seen once, but for those that another sequence repeats."""
        for matrix, rows in enumerate(self._matrices):
            token_N, example_N = answered(batch) if rows.answers else read(batch)
            width = len(self._count[matrix])
            kept_N = slice(None) if batch.whole_B is None else batch.whole_B[example_N]
            once_N = torch.unique((example_N * width + token_N)[kept_N]) % width
            self._count[matrix] += torch.bincount(token_N, minlength=width)
            self._examples[matrix] += torch.bincount(once_N, minlength=width)

    def finish(self, min_examples: int) -> Tensor:
        """The counts, float32 [M, V]; 0 for tokens of fewer than `min_examples` examples."""
        if not self._matrices:
            return torch.zeros(0, 0)
        count_M_V, examples_M_V = torch.stack(self._count), torch.stack(self._examples)
        return (count_M_V * (examples_M_V >= min_examples)).float()


def read(batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens that the model reads, padding left out, and the row of the batch that each stands in."""
    mask_B_S, mask_B_T = batch.masks()
    parts = [(batch.input_ids_B_S, mask_B_S)]
    if batch.decoder_input_ids_B_T is not None and mask_B_T is not None:
        parts.append((batch.decoder_input_ids_B_T, mask_B_T))
    token_N = torch.cat([ids[mask != 0] for ids, mask in parts])
    return token_N, torch.cat([(mask != 0).nonzero()[:, 0] for _, mask in parts])


def answered(batch: Batch) -> tuple[Tensor, Tensor]:
    """The tokens that the model is to answer, and the row of the batch that each stands in."""
    target_B_S = batch.targets_B_S
    return target_B_S[target_B_S != IGNORED], (target_B_S != IGNORED).nonzero()[:, 0]
