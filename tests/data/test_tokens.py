"""How often a client met each token, by hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, tensor

from fedalign.data.batches import Batch
from fedalign.data.encode import IGNORED
from fedalign.data.tokens import TokenCounts
from fedalign.protocol import TokenRows

READ, ANSWERED = TokenRows(0, tokens=6, width=2), TokenRows(12, tokens=6, width=2, answers=True)
BATCH = Batch(
    input_ids_B_S=tensor([[1, 2, 2, 3], [1, 4, 0, 0]]),
    attention_mask_B_S=tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    labels_B_S=tensor([[IGNORED, IGNORED, IGNORED, 3], [IGNORED, 4, IGNORED, IGNORED]]),
    rows=(0, 1),
)


def counted(*batches: Batch, min_examples: int = 1) -> list[list[float]]:
    counts = TokenCounts((READ, ANSWERED))
    for batch in batches:
        counts.update(batch)
    table: Tensor = counts.finish(min_examples)
    assert table.dtype == torch.float32
    return table.tolist()


def test_what_is_read_and_what_is_answered_without_padding() -> None:
    assert counted(BATCH) == [[0, 2, 2, 1, 1, 0], [0, 0, 0, 1, 1, 0]]


def test_tokens_of_few_examples_count_as_not_met() -> None:
    # 2 stands twice, but in one example
    assert counted(BATCH, min_examples=2) == [[0, 2, 0, 0, 0, 0], [0] * 6]
    assert counted(BATCH, BATCH, min_examples=2) == [[0, 4, 4, 2, 2, 0], [0, 0, 0, 2, 2, 0]]
    assert counted(BATCH, BATCH, min_examples=3) == [[0, 4, 0, 0, 0, 0], [0] * 6]


def test_both_sides_of_an_encoder_decoder_model_are_read() -> None:
    seq2seq = replace(
        BATCH,
        decoder_input_ids_B_T=tensor([[0, 5], [0, 2]]),
        decoder_attention_mask_B_T=tensor([[1, 1], [1, 0]]),
        labels_B_S=tensor([[5, 1], [2, IGNORED]]),
    )
    assert counted(seq2seq) == [[2, 2, 2, 1, 1, 1], [0, 1, 1, 0, 0, 1]]
    # an example that reads a token on both sides is still one
    assert counted(replace(seq2seq, decoder_input_ids_B_T=tensor([[2, 2], [0, 0]])), min_examples=2)[0][2] == 0


def test_a_share_that_does_not_count_is_not_counted() -> None:
    assert counted(replace(BATCH, counts=False))[0] == [0] * 6


def test_nothing_to_count_is_an_empty_table() -> None:
    counts = TokenCounts(())
    counts.update(BATCH)
    assert counts.finish(1).shape == (0, 0)


def test_a_sequence_that_another_one_repeats_is_no_example_of_its_own() -> None:
    repeated = replace(BATCH, whole_B=tensor([False, True]))
    assert counted(repeated) == [[0, 2, 0, 0, 1, 0], [0, 0, 0, 0, 1, 0]]  # 2 and 3 stand in no other example
    assert counted(repeated, BATCH, min_examples=2) == [[0, 4, 0, 0, 2, 0], [0, 0, 0, 0, 2, 0]]
