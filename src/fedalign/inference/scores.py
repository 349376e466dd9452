"""Scores of a model on a file: all in all, class by class, and what it said to single rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedalign.client.answers import confusion as confusion_of
from fedalign.client.answers import given_answers, question
from fedalign.client.evaluation import TestSet, answers
from fedalign.client.workbench import Workbench
from fedalign.data.formats import FORMATS, Example
from fedalign.errors import UserError


@dataclass(frozen=True)
class ClassScore:
    """One class of a classification."""

    name: str
    examples: int
    recall: float | None  # of its examples, the share that was given its name; None: it has none
    precision: float | None  # of those that were given its name, the share that are its own; None: none was


@dataclass(frozen=True)
class Answered:
    """A row, and what the model said to it."""

    prompt: str
    expected: str
    given: str


@dataclass(frozen=True)
class Scores:
    """All scores of one model on one set of examples."""

    examples: int
    loss: float  # nats an answer token
    accuracy: float | None  # share of right choices, or of exact matches; None: nothing was chosen or generated
    classes: tuple[ClassScore, ...] = ()
    confusion: Mapping[str, Mapping[str, int]] | None = None  # true class -> given class -> examples
    answered: tuple[Answered, ...] = ()

    @property
    def perplexity(self) -> float:
        """Of an answer token."""
        return math.exp(min(self.loss, 700.0))


def score(bench: Workbench, examples: Sequence[Example], shown: int = 10) -> Scores:
    """Score a model on examples, and keep the first `shown` answers.

    Raises:
        UserError: No example can be scored, or the model answers with no numbers.
    """
    tests = TestSet.prepare(examples, bench.encoder)
    if tests is None:
        raise UserError("no example can be scored: all are too long for the model, or have no answer.")
    config = bench.config.evaluation
    found = answers(bench.moe, tests, config, bench.tokenizer).numbers()
    whole = found.score(None, len(tests))
    given = given_answers(tests, found)
    classes: tuple[ClassScore, ...] = ()
    confusion = None
    if FORMATS[bench.config.data.kind].classes and found.scores:
        confusion = confusion_of(tests.examples, given)
        classes = tuple(_class(name, confusion) for name in confusion)
    rows = zip(tests.examples, given, strict=True) if given else ()
    kept = [Answered(question(one), one.answer.strip(), said) for one, said in list(rows)[:shown]]
    return Scores(whole.examples, whole.loss, whole.accuracy, classes, confusion, tuple(kept))


def _class(name: str, confusion: Mapping[str, Mapping[str, int]]) -> ClassScore:
    right, own = confusion[name][name], sum(confusion[name].values())
    said = sum(row[name] for row in confusion.values())
    return ClassScore(name, own, right / own if own else None, right / said if said else None)
