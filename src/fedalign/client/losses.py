"""Losses for clients whose labels are spread unlike those of all: in training alone, logits at answers are corrected.

z_v is the logit of token v, n_v how often v stands in the client's answers, and π_v its share of their tokens:

    label_shift   z_v + s·log(π_v / π_v of all clients)   p(y | x) of all, seen through the client's own shares [O]
    fedlc         z_v − τ·n_v^(-1/4)                      Zhang et al. 2022 (arXiv 2209.00189)
    fedrs         α·z_v where n_v = 0                     Li and Zhan 2021 (KDD, FedRS: restricted softmax)

Both papers have classes, a language model has tokens [O]: those of the labels' texts are corrected, and all others,
the end token among them, stay as they are. Shares are smoothed by one token, spread as all clients' are [O]:

    π_v / π_v of all = (n_v·N / n_v of all + 1) / (n + 1)      n, N: tokens of labels at the client, and at all

So it is 1 where they agree. It counts as 1 of a token that no client has told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedalign.client.forward import AnswerLogits
from fedalign.config.run import TrainingConfig
from fedalign.data.encode import Encoded, Encoder
from fedalign.data.formats import Example
from fedalign.errors import TrainingFailedError

NONE = 1e-8  # times that fedlc counts a token as seen which the client has not: 100 τ off its logit


@dataclass(frozen=True)
class Labels:
    """Labels of one client's training examples, in the order of `data.labels`."""

    tokens: tuple[tuple[int, ...], ...]  # of each label's text as an answer, in any order, without an end token
    examples: tuple[int, ...]  # of each label

    @classmethod
    def of(cls, examples: Sequence[Example], train: Sequence[Encoded], encoder: Encoder) -> Labels | None:
        """Those of the examples that are in `train`; None if there are none."""
        trained = [examples[index] for index in sorted({one.example for one in train})]
        if not trained:
            return None
        most: list[Counter[int]] = [Counter() for _ in trained[0].choices]
        for one in {example.choices: example for example in trained}.values():  # with and without a space before them
            answers = encoder.encode_answers([replace(one, answer=choice) for choice in one.choices])
            most = [m | Counter(a[: len(a) - len(encoder.end)]) for m, a in zip(most, answers, strict=True)]
        count = Counter(example.choices.index(example.answer) for example in trained)
        tokens = tuple(tuple(sorted(label.elements())) for label in most)
        return cls(tokens, tuple(count[index] for index in range(len(tokens))))

    def told(self, least: int) -> tuple[int, ...]:
        """Examples of each label; fewer than `least` are told as none."""
        return tuple(count if count >= least else 0 for count in self.examples)

    def count(self, examples: Sequence[int] | None = None) -> dict[int, int]:
        """How often each token stands in answers, 0 included: at this client, or where labels have these examples.

        >>> Labels(((5,), (6, 7)), (3, 0)).count()
        {5: 3, 6: 0, 7: 0}
        """
        found: Counter[int] = Counter()
        for tokens, times in zip(self.tokens, self.examples if examples is None else examples, strict=True):
            for token in tokens:
                found[token] += times
        return dict(found)


@dataclass(frozen=True)
class Correction:
    """A logit of token_A becomes scale_A times it, plus shift_A."""

    token_A: Tensor  # int64
    scale_A: Tensor  # float32
    shift_A: Tensor  # float32

    def __call__(self, answer: AnswerLogits) -> AnswerLogits:
        """The same predictions with corrected logits."""
        logits_N_V = answer.logits_N_V
        token_A, scale_A, shift_A = (part.to(logits_N_V.device) for part in (self.token_A, self.scale_A, self.shift_A))
        corrected_N_A = scale_A * logits_N_V[:, token_A] + shift_A
        return replace(answer, logits_N_V=logits_N_V.index_copy(1, token_A, corrected_N_A))


def correction(options: TrainingConfig, labels: Labels | None, everybody: Sequence[int] = ()) -> Correction | None:
    """The configured correction for a client; None: there is nothing to correct.

    Args:
        options: of training.
        labels: the client's own.
        everybody: examples of each label at all clients together; empty: not known.

    Raises:
        TrainingFailedError: `everybody` is not of these labels.
    """
    if labels is None or options.loss == "plain":
        return None
    own, strength = labels.count(), options.strength
    if options.loss == "label_shift":
        if len(everybody) not in (0, len(labels.tokens)) or any(count < 0 for count in everybody):
            raise TrainingFailedError(f"it was sent {len(everybody)} counts of labels, of {len(labels.tokens)} labels")
        scale, shift = dict.fromkeys(own, 1.0), log_ratio(own, labels.count(everybody or None))
        shift = {token: strength * value for token, value in shift.items()}
    elif options.loss == "fedlc":
        scale, shift = dict.fromkeys(own, 1.0), {v: -strength * max(n, NONE) ** -0.25 for v, n in own.items()}
    else:
        scale, shift = {v: strength if n == 0 else 1.0 for v, n in own.items()}, dict.fromkeys(own, 0.0)
    touched = [token for token in own if (scale[token], shift[token]) != (1.0, 0.0)]
    if not touched:
        return None
    return Correction(
        torch.tensor(touched),
        torch.tensor([scale[token] for token in touched]),
        torch.tensor([shift[token] for token in touched]),
    )


def log_ratio(own: dict[int, int], everybody: dict[int, int]) -> dict[int, float]:
    """Log of each token's smoothed share at a client by its share at all: exactly 0 where they agree.

    >>> log_ratio({1: 2, 2: 4, 3: 0}, {1: 5, 2: 10, 3: 0})
    {1: 0.0, 2: 0.0, 3: 0.0}
    >>> {token: round(value, 3) for token, value in log_ratio({1: 9, 2: 0}, {1: 50, 2: 50}).items()}
    {1: 0.642, 2: -2.303}
    """
    here, there = sum(own.values()), sum(everybody.values())
    return {
        token: math.log((count * there / everybody[token] + 1) / (here + 1)) if everybody[token] else 0.0
        for token, count in own.items()
    }
