"""Scores of the current weights on a set of examples.

Classification and multiple choice: the choice whose answer tokens are likeliest. Where every choice is one token, one
forward pass scores them all. Language modelling: loss. Instruction and chat: loss, and exact match on request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedalign.config import EvaluationConfig
from fedalign.data.batches import Batch, Encoded, Encoder, batches
from fedalign.data.formats import Example
from fedalign.forward import answer_logits
from fedalign.moe.model import MoEModel
from fedalign.protocol import Evaluation


@dataclass(frozen=True)
class TestSet:
    """Examples made ready for scoring once, to be scored every round."""

    __test__ = False  # not a test class

    encoded: Sequence[Encoded]  # with the right answer
    choices: Sequence[Sequence[Encoded]]  # one entry an example, one encoding a choice; empty without choices
    right_N: Tensor  # int64: index of the right choice
    answers: Sequence[str]  # what an exact match must equal

    @classmethod
    def prepare(cls, examples: Sequence[Example], encoder: Encoder) -> TestSet:
        """Encode right answers and, where there are any, all choices."""
        chosen = [example for example in examples if example.choices]
        return cls(
            encoded=encoder.encode_all(examples),
            choices=[encoder.encode_choices(example) for example in chosen],
            right_N=torch.tensor([example.choices.index(example.answer) for example in chosen], dtype=torch.int64),
            answers=[example.answer.strip() for example in examples],
        )

    def __len__(self) -> int:
        return len(self.encoded)


@torch.no_grad()
def evaluate(moe: MoEModel, tests: TestSet, config: EvaluationConfig, tokenizer: Any, client: str | None) -> Evaluation:
    """Score the model as it stands; deterministic, and independent of how examples are batched to rounding."""
    moe.model.eval()
    if len(tests.choices):
        nll_sum, tokens, right = _score_choices(moe, tests, config)
        return Evaluation(client, len(tests), nll_sum / tokens, right / len(tests))
    nll_sum, tokens = 0.0, 0
    for batch in _batches(tests.encoded, config, moe.device):
        nll_N = answer_logits(moe, batch).nll_N
        nll_sum, tokens = nll_sum + float(nll_N.double().sum()), tokens + nll_N.numel()
    matches = _exact_matches(moe, tests, config, tokenizer) if config.generate else None
    return Evaluation(client, len(tests), nll_sum / tokens, None if matches is None else matches / len(tests))


def _batches(encoded: Sequence[Encoded], config: EvaluationConfig, device: torch.device) -> Iterator[Batch]:
    for batch in batches(encoded, config.batch_tokens, batch_examples=config.batch_tokens, seed=None):
        yield batch.to(device)


def _score_choices(moe: MoEModel, tests: TestSet, config: EvaluationConfig) -> tuple[float, int, int]:
    """Sum of the right answers' NLL, their tokens, and how many examples were answered rightly."""
    answer_tokens = [[_answer_tokens(choice) for choice in choices] for choices in tests.choices]
    if all(len(tokens) == 1 for example in answer_tokens for tokens in example):
        return _score_single_tokens(moe, tests, config, torch.tensor([[t[0] for t in e] for e in answer_tokens]))
    flat = [choice for choices in tests.choices for choice in choices]
    nll_F, length_F = torch.zeros(len(flat), dtype=torch.float64), torch.zeros(len(flat), dtype=torch.int64)
    for batch in _batches(flat, config, moe.device):
        answers = answer_logits(moe, batch)
        rows = torch.tensor(batch.rows)[answers.row_N.cpu()]
        nll_F.index_add_(0, rows, answers.nll_N.double().cpu())
        length_F.index_add_(0, rows, torch.ones_like(rows))
    score_F = nll_F / length_F if config.length_normalise else nll_F
    counts = [len(choices) for choices in tests.choices]
    first_N = torch.tensor([0, *counts[:-1]]).cumsum(0)
    best_N = torch.stack([part.argmin() for part in score_F.split(counts)])
    right_F = first_N + tests.right_N
    return float(nll_F[right_F].sum()), int(length_F[right_F].sum()), int((best_N == tests.right_N).sum())


def _score_single_tokens(
    moe: MoEModel, tests: TestSet, config: EvaluationConfig, choice_N_K: Tensor
) -> tuple[float, int, int]:
    nll_sum, right = 0.0, 0
    for batch in _batches(tests.encoded, config, moe.device):
        answers = answer_logits(moe, batch)
        rows = torch.tensor(batch.rows)[answers.row_N.cpu()]
        nll_sum += float(answers.nll_N.double().sum())
        score_N_K = answers.logits_N_V.gather(1, choice_N_K[rows].to(moe.device))
        right += int((score_N_K.argmax(1).cpu() == tests.right_N[rows]).sum())
    return nll_sum, len(tests), right


def _answer_tokens(encoded: Encoded) -> list[int]:
    return [label for label in encoded.labels if label != -100]


def _exact_matches(moe: MoEModel, tests: TestSet, config: EvaluationConfig, tokenizer: Any) -> int:
    """Greedy continuations of each prompt that equal the answer but for white space at the ends."""
    matches = 0
    for encoded, answer in zip(tests.encoded, tests.answers, strict=True):
        prompt = encoded.input_ids if moe.is_seq2seq else _prompt(encoded)
        output = moe.model.generate(
            torch.tensor([prompt], device=moe.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=moe.device),
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[0] if moe.is_seq2seq else output[0, len(prompt) :]
        matches += tokenizer.decode(new, skip_special_tokens=True).strip() == answer
    return matches


def _prompt(encoded: Encoded) -> list[int]:
    """The tokens before the last answer."""
    answer_starts = [i for i, label in enumerate(encoded.labels) if label != -100]
    start = answer_starts[-1]
    while start > 0 and encoded.labels[start - 1] != -100:
        start -= 1
    return list(encoded.input_ids[:start])
