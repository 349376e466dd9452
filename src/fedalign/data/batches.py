"""Examples -> token ids -> batches under a token budget.

The loss is on the answer: labels are -100 everywhere else. Prompt and answer are tokenised apart and joined, so the
boundary between them is exact, and an answer has the same tokens whether it is trained on or scored.

Where an end token follows the answer: always when the answer is free text (the model must learn to stop) and in
encoder-decoder models (they were pretrained so). Choices get one only if one of them begins with all the tokens of
another ("card" and "card lost"): its likelihood could never be the higher one otherwise. Elsewhere it would be a
token to predict that tells nothing, and one-token labels are scored by a single position.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedalign.data.encode import IGNORED, Encoded

WINDOW = 16  # batches among which similar lengths are put together: padding saved against randomness of batches


@dataclass(frozen=True)
class Batch:
    """Padded sequences: S positions, or S of the encoder and T of the decoder (then labels are B, T)."""

    input_ids_B_S: Tensor
    attention_mask_B_S: Tensor
    labels_B_S: Tensor
    rows: tuple[int, ...]  # positions in the sequence that was given to `batches`
    decoder_input_ids_B_T: Tensor | None = None
    decoder_attention_mask_B_T: Tensor | None = None
    whole_B: Tensor | None = None  # False where a later sequence is of the same example; None: nowhere
    counts: bool = True  # False: it is run only because a share of a batch must be

    @property
    def examples(self) -> int:
        """Number of sequences."""
        return len(self.rows)

    @property
    def targets_B_S(self) -> Tensor:
        """The target of each position's logits, -100 for nothing: labels moved to the position before."""
        if self.decoder_input_ids_B_T is not None:  # its inputs are moved already
            return self.labels_B_S
        end = self.labels_B_S.new_full((self.examples, 1), IGNORED)
        return torch.cat([self.labels_B_S[:, 1:], end], dim=1)

    @cached_property
    def answer_tokens(self) -> int:
        """Number of positions with a loss."""
        return int((self.targets_B_S != IGNORED).sum())

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward pass, without labels."""
        inputs = {"input_ids": self.input_ids_B_S, "attention_mask": self.attention_mask_B_S}
        if self.decoder_input_ids_B_T is not None and self.decoder_attention_mask_B_T is not None:
            inputs["decoder_input_ids"] = self.decoder_input_ids_B_T
            inputs["decoder_attention_mask"] = self.decoder_attention_mask_B_T
        return inputs

    def masks(self) -> tuple[Tensor, Tensor | None]:
        """1 where a token counts, of the encoder and of the decoder."""
        mask_B_S, mask_B_T = self.attention_mask_B_S, self.decoder_attention_mask_B_T
        if self.counts:
            return mask_B_S, mask_B_T
        return torch.zeros_like(mask_B_S), None if mask_B_T is None else torch.zeros_like(mask_B_T)

    def share(self, rows: range) -> Batch:
        """Some of its rows; of none the first, which then has no loss and does not count."""
        if len(rows) == self.examples:
            return self
        kept = slice(rows.start, rows.stop) if rows else slice(1)
        cut: dict[str, Any] = {name: t[kept] for name, t in vars(self).items() if isinstance(t, Tensor)}
        if not rows:
            cut["labels_B_S"] = torch.full_like(cut["labels_B_S"], IGNORED)
        return replace(self, **cut, rows=self.rows[kept], counts=bool(rows))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def batches(
    encoded: Sequence[Encoded],
    batch_tokens: int,
    batch_examples: int,
    seed: int | None = None,
    *,
    equal_lengths: bool = False,
) -> Iterator[Batch]:
    """Batches of similar lengths: rows times padded length stay within `batch_tokens`, rows within `batch_examples`.

    With a seed, sequences are shuffled, similar lengths of each window of batches are put together, and the batches
    are shuffled again: the same seed gives the same batches. Without, for evaluation: all by length, longest first,
    so that memory runs out at once or never. A sequence over the budget is a batch of its own. None is lost.
    With `equal_lengths` nothing is padded, for models whose numbers depend on it.
    """
    rng = random.Random(seed)
    order = list(range(len(encoded)))
    if seed is not None:
        rng.shuffle(order)
    window = WINDOW * batch_examples if seed is not None else max(1, len(order))
    groups: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: encoded[i].tokens, reverse=True)
        groups += _cut([encoded[i] for i in part], part, batch_tokens, batch_examples, equal_lengths)
    if seed is not None:
        rng.shuffle(groups)
    for rows in groups:
        yield _collate([encoded[i] for i in rows], tuple(rows))


def _cut(
    sequences: Sequence[Encoded], rows: list[int], batch_tokens: int, batch_examples: int, equal: bool
) -> list[list[int]]:
    """Cut consecutive rows into groups within the budget."""
    groups: list[list[int]] = []
    group: list[int] = []
    source = target = 0
    for row, one in zip(rows, sequences, strict=True):
        new_source, new_target = max(source, len(one.input_ids)), max(target, len(one.decoder_input_ids or ()))
        size = (len(one.input_ids), len(one.decoder_input_ids or ()))
        full = len(group) == batch_examples or (len(group) + 1) * (new_source + new_target) > batch_tokens
        if group and (full or (equal and size != (source, target))):
            groups.append(group)
            group, (new_source, new_target) = [], size
        group.append(row)
        source, target = new_source, new_target
    return [*groups, group] if group else groups


def _collate(sequences: Sequence[Encoded], rows: tuple[int, ...]) -> Batch:
    # Padding is id 0, which every vocabulary has: the mask hides it, so a tokenizer needs no padding token.
    batch = Batch(
        _padded([one.input_ids for one in sequences], 0),
        _padded([[1] * len(one.input_ids) for one in sequences], 0),
        _padded([one.labels for one in sequences], IGNORED),
        rows,
        whole_B=torch.tensor([not s.repeats for s in sequences]) if any(s.repeats for s in sequences) else None,
    )
    if sequences[0].decoder_input_ids is None:
        return batch
    decoder = [one.decoder_input_ids or [] for one in sequences]
    return replace(
        batch,
        decoder_input_ids_B_T=_padded(decoder, 0),
        decoder_attention_mask_B_T=_padded([[1] * len(ids) for ids in decoder], 0),
    )


def _padded(ids_by_row: Sequence[list[int]], padding: int) -> Tensor:
    length = max(map(len, ids_by_row))
    return torch.tensor([ids + [padding] * (length - len(ids)) for ids in ids_by_row])
