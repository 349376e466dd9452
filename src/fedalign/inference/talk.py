"""A model that answers a person: what is typed, put as it was trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from fedalign.client.evaluation import TestSet, answers, generated, stops
from fedalign.client.workbench import Workbench
from fedalign.config.run import DataConfig
from fedalign.data.chat import Message
from fedalign.data.formats import FORMATS, Chat, Example, asked, first_field, prompt_of
from fedalign.data.sources import Row
from fedalign.errors import UserError

Say = Callable[[str], None]
LEAST, MOST = 0.001, 100.0  # temperatures: what is colder draws the likeliest, and hotter any


def check_classes(data: DataConfig) -> None:
    """Refuse a classification whose classes nobody named: those of a scored file need not be the model's.

    Raises:
        UserError: data.labels is empty.
    """
    if FORMATS[data.kind].classes and not data.labels:
        raise UserError(
            "data.labels = []: which classes there are is not known. Give --set data.labels='[...]', or what the model "
            "was tuned for, as --set data.kind=chat."
        )


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    most: int = 256  # tokens
    temperature: float = 0.0  # 0: greedy

    def __post_init__(self) -> None:
        if self.temperature and not LEAST <= self.temperature <= MOST:
            raise UserError(f"--temperature {self.temperature:g}: must be 0, or from {LEAST:g} to {MOST:g}.")

    @property
    def options(self) -> dict[str, Any]:
        """As `generate` takes them."""
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}


@dataclass
class Talk:
    """A conversation with a model; of one that was not tuned for chats, each question stands alone."""

    bench: Workbench
    sampling: Sampling
    messages: list[Message] = field(default_factory=list)

    @property
    def _data(self) -> DataConfig:
        return self.bench.config.data

    @property
    def role(self) -> str:
        """The column that a typed line stands for."""
        columns, roles = self._data.columns, {"instruction": "prompt", "multiple_choice": "question"}
        column = str(getattr(columns, roles.get(self._data.kind, "text")))
        template = self._data.template
        return column if template is None or f"{{{column}}}" in template else first_field(template)

    def answer(self, row: Mapping[str, Any], say: Say | None = None) -> str:
        """The model's answer to a row, which needs none of its own; `say` hears it piece by piece.

        Raises:
            UserError: The row lacks a column that the prompt is made of, or is too long.
        """
        if (classes := self.classes(row)) is not None:
            return next(iter(classes))
        if self._data.kind == "chat":
            if self._holds_chat(row):
                chat = asked(Row(row, "prompt", 1), self._data)
            else:
                chat = Chat(({"role": "user", "content": row[self.role]},), ())
            text = self.bench.encoder.chats.asked([*self.messages, *chat.messages], chat.tools, "prompt")
            return self._generate(self.bench.tokenizer(text, add_special_tokens=False)["input_ids"], say)
        if self._data.kind == "text":
            return self._generate(self.bench.tokenizer(str(row[self.role]))["input_ids"], say)
        (ids,) = self.bench.encoder.encode_prompts([self._example(Row(row, "prompt", 1))])
        return self._generate(ids, say)

    def _holds_chat(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has messages; a line that was typed is one of them, whatever the column is called."""
        column = self._data.columns.messages
        typed = column == self.role and isinstance(row.get(column), str) and not row[column].lstrip().startswith("[")
        return column in row and not typed

    def _example(self, row: Row) -> Example:
        """A row without its answer; a package's format is given the whole row."""
        form = FORMATS[self._data.kind]
        if not form.reads_all:
            return Example(prompt_of(row, self._data), "")
        (example,) = form.read([row], self._data, None)
        return example

    def remember(self, said: str, answer: str) -> None:
        """Go on from here; only chats do, and not from an answer in which nothing is said."""
        if self._data.kind == "chat" and answer:
            self.messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]

    def classes(self, row: Mapping[str, Any]) -> dict[str, float] | None:
        """Each class and its probability, the likeliest first; None: it is no classification."""
        if not FORMATS[self._data.kind].classes:
            return None
        check_classes(self._data)
        names = self._data.labels
        labelled = Row({**row, self._data.columns.label: names[0]}, "prompt", 1)
        found = FORMATS[self._data.kind].read([labelled], self._data, None)
        tests = TestSet.prepare(list(found), self.bench.encoder)
        if tests is None:
            raise UserError('the text is too long for the model. Shorten it, or set data.too_long = "truncate".')
        told = answers(self.bench.moe, tests, self.bench.config.evaluation, self.bench.tokenizer)
        (scores,) = told.numbers().scores
        shares = torch.softmax(scores, 0).tolist()
        return dict(sorted(zip(names, shares, strict=True), key=lambda pair: -pair[1]))

    @torch.no_grad()
    def _generate(self, ids: list[int], say: Say | None) -> str:
        moe, tokenizer, limit = self.bench.moe, self.bench.tokenizer, self.bench.encoder.max_length
        room = limit - len(ids) if limit and not moe.is_seq2seq else self.sampling.most
        if room < 1:
            anew = ", or begin anew with /new" if self.messages else ""
            raise UserError(f"{len(ids)} tokens: the model reads at most {limit}, answer included. Ask for less{anew}.")
        moe.model.eval()
        streamer = _Said(tokenizer, say) if say is not None else None
        most, ends = min(self.sampling.most, room), stops(moe, tokenizer)
        new = generated(moe, tokenizer, ids, most, ends, streamer=streamer, **self.sampling.options)
        return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


class _Said(TextStreamer):  # type: ignore[misc] # transformers ships no types
    """Passes on what is said as it comes."""

    def __init__(self, tokenizer: Any, say: Say) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass it on."""
        self._say(text + ("\n" if stream_end else ""))
