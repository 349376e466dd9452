"""Scores of the current weights on a set of examples.

Classification and multiple choice: the choice whose answer tokens are likeliest. Where every choice is one token, one
forward pass scores them all. Language modelling: loss. Instruction and chat: loss, and exact match on request.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedalign import parallel
from fedalign.client.forward import AnswerLogits, answer_logits, own_share
from fedalign.config.run import EvaluationConfig
from fedalign.data.batches import Batch, batches
from fedalign.data.encode import IGNORED, Encoded, Encoder
from fedalign.data.formats import Example
from fedalign.data.sources import say
from fedalign.errors import UserError
from fedalign.moe.model import MoEModel
from fedalign.protocol import Evaluation

Answer = Callable[[Batch], AnswerLogits]
Apply = Callable[[Callable[[Batch], Any], Iterable[Batch]], Iterable[Any]]  # such as `map`: results in order


@dataclass(frozen=True)
class TestSet:
    """Examples made ready for scoring once, to be scored every round."""

    __test__ = False  # not a test class

    encoded: Sequence[Encoded]  # with the right answer
    choices: Sequence[Sequence[Encoded]] = ()  # of each example, if all have some
    right_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # index of the right choice
    prompts: Sequence[list[int]] = ()  # what a generated answer continues,
    answers: Sequence[list[int]] = ()  # and the tokens that it was trained to be
    examples: Sequence[Example] = ()  # that are scored: some may have been left out

    @classmethod
    def prepare(cls, examples: Sequence[Example], encoder: Encoder) -> TestSet | None:
        """Encode right answers and, where all examples have them, choices; None if nothing is left to score.

        Where only some have choices, all are scored as free text is.
        """
        choose = sum(bool(example.choices) for example in examples)
        if 0 < choose < len(examples):
            say(
                f"{choose:,} of {len(examples):,} examples to score have choices and the others none: of all of them "
                "the loss is scored, and no choice. Score kinds apart, each with its own data.test, for accuracies"
            )
        every = 0 < choose == len(examples)
        tests = cls._with_choices(examples, encoder) if every else cls._free(examples, encoder)
        return tests if len(tests) else None

    @classmethod
    def _free(cls, examples: Sequence[Example], encoder: Encoder) -> TestSet:
        encoded = encoder.encode(examples)
        kept = [examples[i] for i in dict.fromkeys(one.example for one in encoded)]
        return cls(encoded, prompts=encoder.encode_prompts(kept), answers=encoder.encode_answers(kept), examples=kept)

    @classmethod
    def _with_choices(cls, examples: Sequence[Example], encoder: Encoder) -> TestSet:
        groups = [list(group) for _, group in itertools.groupby(encoder.encode_choices(examples), lambda e: e.example)]
        kept = [examples[group[0].example] for group in groups]
        right = [example.choices.index(example.answer) for example in kept]
        encoded = [group[i] for group, i in zip(groups, right, strict=True)]
        return cls(encoded, groups, torch.tensor(right), examples=kept)

    def __len__(self) -> int:
        """Number of examples: a chat may be several sequences."""
        return len(self.choices) or len(self.answers)


@dataclass(frozen=True)
class Answers:
    """A model's answers to the examples of a test set, one by one."""

    nll_sum: float  # of the right answers, nats
    tokens: int  # of the right answers
    scores: Sequence[Tensor] = ()  # of each example, log-likelihoods of its choices up to a constant, float64 [K]
    said: Sequence[str] = ()  # what was generated for each
    right: Sequence[bool] | None = None  # None: nothing was chosen or generated

    def numbers(self) -> Answers:
        """These answers.

        Raises:
            UserError: Some are no numbers: nothing was chosen then, and the first choice would be taken for one.
        """
        if math.isnan(self.nll_sum) or any(bool(score_K.isnan().any()) for score_K in self.scores):
            raise UserError("the model's answers are no numbers (nan). Take another round of it, or another model.")
        return self

    def score(self, client: str | None, examples: int) -> Evaluation:
        """Loss and accuracy."""
        accuracy = None if self.right is None else sum(self.right) / examples
        return Evaluation(client, examples, self.nll_sum / self.tokens, accuracy)


def evaluate(
    moe: MoEModel,
    tests: TestSet,
    config: EvaluationConfig,
    tokenizer: Any,
    client: str | None,
    answer: Answer | None = None,
) -> Evaluation:
    """Score the model as it stands; deterministic, and independent of how examples are batched to rounding.

    `answer` predicts in the model's place, where a client mixes it with another; generated text is the model's alone.
    """
    return answers(moe, tests, config, tokenizer, answer).score(client, len(tests))


@torch.no_grad()
def answers(
    moe: MoEModel,
    tests: TestSet,
    config: EvaluationConfig,
    tokenizer: Any,
    answer: Answer | None = None,
    apply: Apply = map,
) -> Answers:
    """The model's answers; arguments as in `evaluate`. `apply` may score batches side by side."""
    moe.model.eval()
    answer = answer or partial(answer_logits, moe)
    if len(tests.choices):
        nll_sum, tokens, scores = _score_choices(moe, answer, tests, config, apply)
        chosen = (int(score_K.argmax()) for score_K in scores)
        right = [choice == wanted for choice, wanted in zip(chosen, tests.right_N.tolist(), strict=True)]
        return Answers(nll_sum, tokens, scores, right=right)
    nll_sum, tokens = 0.0, 0

    def loss(batch: Batch) -> tuple[float, int]:
        nll_N = answer(batch).nll_N
        return float(nll_N.double().sum()), nll_N.numel()

    for part, count in apply(loss, _batches(moe, tests.encoded, config)):
        nll_sum, tokens = nll_sum + part, tokens + count
    nll_sum, tokens = _over_all(moe.device, nll_sum, tokens)
    if not config.generate:
        return Answers(nll_sum, tokens)
    said, right = _generated(moe, tests, config, tokenizer)
    return Answers(nll_sum, tokens, said=said, right=right)


def _batches(moe: MoEModel, encoded: Sequence[Encoded], config: EvaluationConfig) -> Iterator[Batch]:
    for batch in batches(encoded, config.batch_tokens, config.batch_tokens, equal_lengths=moe.equal_lengths):
        yield own_share(batch).to(moe.device)


def _over_all(device: torch.device, nll_sum: float, count: int) -> tuple[float, int]:
    """The sums of all processes that share the batches."""
    both = parallel.total(torch.tensor([nll_sum, count], dtype=torch.float64, device=device))
    return float(both[0]), int(both[1])


def _score_choices(
    moe: MoEModel, answer: Answer, tests: TestSet, config: EvaluationConfig, apply: Apply
) -> tuple[float, int, Sequence[Tensor]]:
    """Sum of the right answers' NLL, their tokens, and scores of each example's choices."""
    tokens = [[[t for t in choice.labels if t != IGNORED] for choice in choices] for choices in tests.choices]
    one_prompt = all(len({tuple(choice.input_ids[:-1]) for choice in choices}) == 1 for choices in tests.choices)
    one_token = all(len(t) == 1 for choices in tokens for t in choices)
    if one_prompt and one_token and len(set(map(len, tokens))) == 1:
        return _score_single_tokens(moe, answer, tests, config, torch.tensor(tokens).squeeze(2), apply)
    flat = [choice for choices in tests.choices for choice in choices]
    nll_F, length_F = torch.zeros(len(flat), dtype=torch.float64), torch.zeros(len(flat), dtype=torch.int64)

    def losses(batch: Batch) -> tuple[Tensor, Tensor]:
        answers = answer(batch)
        return torch.tensor(batch.rows)[answers.row_N.cpu()], answers.nll_N.double().cpu()

    for rows, nll_N in apply(losses, _batches(moe, flat, config)):
        nll_F.index_add_(0, rows, nll_N)
        length_F.index_add_(0, rows, torch.ones_like(rows))
    nll_F, length_F = (parallel.total(sums.to(moe.device)).cpu() for sums in (nll_F, length_F))
    score_F = nll_F / length_F if config.length_normalise else nll_F
    counts = [len(choices) for choices in tests.choices]
    right_F = torch.tensor([0, *counts[:-1]]).cumsum(0) + tests.right_N
    return float(nll_F[right_F].sum()), int(length_F[right_F].sum()), torch.split(-score_F, counts)


def _score_single_tokens(
    moe: MoEModel, answer: Answer, tests: TestSet, config: EvaluationConfig, choice_N_K: Tensor, apply: Apply
) -> tuple[float, int, Sequence[Tensor]]:
    nll_sum, score_N_K = 0.0, torch.zeros(choice_N_K.shape, dtype=torch.float64)

    def scores(batch: Batch) -> tuple[float, Tensor, Tensor]:
        answers = answer(batch)
        rows = torch.tensor(batch.rows)[answers.row_N.cpu()]
        score_N_K = answers.logits_N_V.gather(1, choice_N_K[rows].to(moe.device)).double().cpu()
        return float(answers.nll_N.double().sum()), rows, score_N_K

    for part, rows, some_N_K in apply(scores, _batches(moe, tests.encoded, config)):
        nll_sum += part
        score_N_K[rows] = some_N_K
    nll_sum, _ = _over_all(moe.device, nll_sum, 0)
    return nll_sum, len(tests), parallel.total(score_N_K.to(moe.device)).cpu().unbind()


def _generated(moe: MoEModel, tests: TestSet, config: EvaluationConfig, tokenizer: Any) -> tuple[list[str], list[bool]]:
    """Greedy continuations, and whether each says what was trained, decoded alike, but for white space at the ends."""
    if not all(tests.prompts):
        raise UserError("evaluation.generate = true: plain text has no prompts to continue. Choose false.")
    special, said, right = set(tokenizer.all_special_ids), list[str](), list[bool]()
    ends_of = [stops(moe, tokenizer) | ({answer[-1]} & special) for answer in tests.answers]
    whole = [_until(answer, ends) for answer, ends in zip(tests.answers, ends_of, strict=True)]
    if longer := sum(len(ids) > config.max_new_tokens for ids in whole):
        say(
            f"evaluation.max_new_tokens = {config.max_new_tokens}: {longer:,} of {len(tests):,} answers are longer "
            "and counted as wrong, whatever is generated"
        )
    for prompt, answer, asked, ends in zip(tests.prompts, tests.answers, whole, ends_of, strict=True):
        new = generated(moe, tokenizer, prompt, config.max_new_tokens, ends)
        given, wanted = (tokenizer.decode(ids).strip() for ids in (_until(new, ends), asked))
        said.append(given)  # where text ends an answer, more may follow it
        right.append(given == wanted if answer[-1] in ends else given.startswith(wanted))
    return said, right


def stops(moe: MoEModel, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, as model and tokenizer say."""
    own = moe.model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def generated(
    moe: MoEModel, tokenizer: Any, prompt: Sequence[int], most: int, ends: Set[int], **options: Any
) -> list[int]:
    """The tokens that the model says after a prompt, at most so many; greedy unless `options` say more."""
    output = moe.model.generate(
        torch.tensor([prompt], device=moe.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=moe.device),
        max_new_tokens=most,
        synced_gpus=parallel.world() > 1,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **({"do_sample": False} | options),
    )
    new: Tensor = output[0, 1:] if moe.is_seq2seq else output[0, len(prompt) :]  # a decoder begins with a start token
    return list(new.tolist())


def _until(ids: Sequence[int], ends: Set[int]) -> list[int]:
    """The tokens before the first that ends an answer."""
    return list(itertools.takewhile(lambda token: token not in ends, ids))
