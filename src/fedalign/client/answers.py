"""A model's answers to a test set, as text: a few rows to read, and the confusion of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from fedalign.client.evaluation import Answers, TestSet, generated, stops
from fedalign.config.run import Config
from fedalign.data.formats import FORMATS, Example
from fedalign.moe.model import MoEModel

HEAD, TAIL = 700, 300  # characters that are kept of a long text
Confusion = dict[str, dict[str, int]]  # true class -> given class -> examples


def given_answers(tests: TestSet, found: Answers) -> list[str]:
    """The model's choice or words; empty where there are neither."""
    if found.scores:
        chosen = (int(score_K.argmax()) for score_K in found.scores)
        return [one.choices[i].strip() for one, i in zip(tests.examples, chosen, strict=True)]
    return list(found.said)


def question(example: Example) -> str:
    """The question of an example, as a person would call it."""
    if example.chat is None:
        return example.prompt
    before = example.chat.messages[: example.chat.answers[-1]]
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in before)


def confusion(examples: Sequence[Example], given: Sequence[str]) -> Confusion:
    """Counts by true and by given class, all of both in one order."""
    counts = Counter(zip((one.answer.strip() for one in examples), given, strict=True))
    names = list(dict.fromkeys(choice.strip() for one in examples for choice in one.choices))
    return {true: {said: counts[true, said] for said in names} for true in names}


def sheet(
    moe: MoEModel, tests: TestSet, found: Answers, config: Config, tokenizer: Any, *, generate: bool
) -> dict[str, Any]:
    """A record for JSON: `examples` scored; `answered`, rows evenly spaced; for classes the `confusion`.

    With `generate`, answers to these rows are generated where scoring alone generated none.
    """
    given = given_answers(tests, found)
    places = spaced(len(tests), config.evaluation.answers)
    texts = [given[i] for i in places] if given else []
    if not given and generate and tests.prompts and all(tests.prompts):
        texts = [_said(moe, tests, i, config, tokenizer) for i in places]
    answered = [
        {
            "prompt": cut(question(tests.examples[i])),
            "expected": cut(tests.examples[i].answer.strip()),
            "given": cut(text),
            "right": None if found.right is None else bool(found.right[i]),
        }
        for i, text in zip(places, texts, strict=False)
    ]
    record: dict[str, Any] = {"examples": len(tests), "answered": answered}
    if FORMATS[config.data.kind].classes and found.scores:
        counts = confusion(tests.examples, given)
        record["confusion"] = {true: {name: n for name, n in row.items() if n} for true, row in counts.items()}
    return record


@torch.no_grad()
def _said(moe: MoEModel, tests: TestSet, place: int, config: Config, tokenizer: Any) -> str:
    ends = stops(moe, tokenizer) | ({tests.answers[place][-1]} & set(tokenizer.all_special_ids))
    new = generated(moe, tokenizer, tests.prompts[place], config.evaluation.max_new_tokens, ends)
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def spaced(count: int, most: int) -> list[int]:
    """At most `most` of so many places, evenly spaced, with the first and the last: a file may be sorted by class.

    >>> spaced(30, 4), spaced(2, 4), spaced(30, 0), spaced(30, 1)
    ([0, 10, 19, 29], [0, 1], [], [0])
    """
    kept = min(count, most)
    return [round(i * (count - 1) / max(kept - 1, 1)) for i in range(kept)]


def cut(text: str) -> str:
    """A long text without its middle, which is counted.

    >>> cut("ab"), len(cut("a" * 5000))
    ('ab', 1029)
    """
    left_out = len(text) - HEAD - TAIL
    return text if left_out <= 0 else f"{text[:HEAD]} [{left_out:,} characters left out] {text[-TAIL:]}"
