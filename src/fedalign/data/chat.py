"""Chats as the model's own template writes them, and where in that text the answers stand.

The template is asked twice for each answer: for the chat up to it with the words that invite an answer, and for the
chat that ends with it. What the second text has more is the answer. Templates write earlier turns anew when a later
one is added (Qwen3 and gpt-oss leave out what was thought): such a chat becomes several renderings, each answer with
the history as the template shows it then. Answers that one text can hold share it.

What ends an answer is trained with it: a special token; or text that the template puts after every answer; or, where
the next turn's marker is what ends it (GLM), that marker; or at last the tokenizer's end token.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fedalign.config.run import CHAT_TEMPLATES, is_template
from fedalign.data.bounded import bounded
from fedalign.data.formats import Chat, Example
from fedalign.data.sources import say, shortened
from fedalign.errors import UserError

T = TypeVar("T")
Message = Mapping[str, Any]
Span = tuple[int, int]  # characters, the end not counted
PROBE = "probe7391"  # content that no template takes for anything else
SURE = 30  # characters of a text that stands in a rendering for no other reason than that it was written there
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SECONDS, MEMORY, LONGEST = 10.0, 2**29, 2**24  # of one rendering: beside what is in use; characters
NAMES = ("name", "tool_call_id")  # they say who speaks: many templates have no place for them, and no text is lost
CHATML = (  # a base model knows one token that ends a text, and generation stops at it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token or '<|im_end|>' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def choose_template(tokenizer: Any, name: str) -> None:
    """Give a tokenizer the chat template that data.chat_template says; it is saved with it.

    Raises:
        UserError: It is neither "model", "chatml" nor the text of a template.
    """
    if name == "model":
        return
    if name != "chatml" and not is_template(name):
        raise UserError(
            f"data.chat_template = {shortened(name)}: no template. Choose one of: {', '.join(CHAT_TEMPLATES)}, or a "
            "file that holds one."
        )
    tokenizer.chat_template = CHATML if name == "chatml" else name


@dataclass(frozen=True)
class Rendering:
    """A text for the model, and where in it the answers are."""

    text: str
    answers: tuple[Span, ...]


class ChatTemplate:
    """Chats as a tokenizer's chat template renders them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        special = {str(token) for token in added if token.special} | set(tokenizer.all_special_tokens)
        self.special = sorted(special - {""}, key=len, reverse=True)

    def source(self, tools: Any) -> tuple[str, bool]:
        """The template's own text, and whether it marks what the assistant says."""
        if not self.tokenizer.chat_template:
            raise UserError(
                'data.kind = "chat": the model\'s tokenizer has no chat template. Use a model tuned for chat, '
                'data.chat_template = "chatml", or data.kind = one of: instruction, text.'
            )
        source = self.tokenizer.get_chat_template(tools=tools)
        if _takes_powers(source):
            raise UserError(
                "the model's chat template takes powers (**), which no bound on time can stop. Use another."
            )
        return source, bool(MARKS.search(source))

    def renderings(self, example: Example) -> list[Rendering]:
        """As few texts as hold every answer of a chat with the history that it had; the last answer is in the last.

        Raises:
            UserError: The tokenizer has no template, or it refuses the chat or has no place for something in it.
        """
        chat = _Chat(self, example)
        chat.check()
        found: list[Rendering] = []
        for i in reversed(chat.answers):
            one = chat.answer(i)
            if found and found[-1].text.startswith(one.text[: one.answers[-1][1]]):
                found[-1] = Rendering(found[-1].text, one.answers + found[-1].answers)
            else:
                found.append(one)
        return found[::-1]

    def last(self, example: Example) -> Rendering:
        """The chat up to its last answer, with that answer alone."""
        chat = _Chat(self, example)
        return chat.answer(chat.answers[-1])

    def asked(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], where: str) -> str:
        """The text before an answer to these messages, as it is in training.

        Raises:
            UserError: As of `renderings`.
        """
        chat = Chat(tuple(messages), (), tuple(tools))
        return _Chat(self, Example("", "", chat=chat, where=where)).asked()


class _Chat:
    """One chat in the hands of its template."""

    def __init__(self, template: ChatTemplate, example: Example) -> None:
        assert example.chat is not None
        self.tokenizer, self.special, self.where = template.tokenizer, template.special, example.where
        self.tools = list(example.chat.tools) or None
        self.source, self.marked = template.source(self.tools)
        self.messages = self._with_arguments_as_asked([dict(message) for message in example.chat.messages])
        self.answers = [i for i in example.chat.answers if i or self.marked]  # nothing asks for what begins a chat
        if len(self.answers) < len(example.chat.answers):
            say("chats that begin with the assistant: nothing asks for that turn, so it is read and not trained")

    # ------------------------------------------------------------------------------------------------- rendering

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """A beginning of the chat; `ask`: and the words that ask for an answer."""
        try:
            return self._render(messages, ask, self.tools)
        except UserError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.where}: the model's chat template refuses this chat: {reason[:200]}. Write the chat as the "
                "template wants it, or use a model with another."
            ) from None

    def attempt(self, messages: Sequence[Message], with_tools: bool = True) -> str:
        """The same; empty where the template refuses it."""
        try:
            return self._render(messages, False, self.tools if with_tools else None)
        except UserError:
            raise
        except Exception:  # as above
            return ""

    def _render(self, messages: Sequence[Message], ask: bool, tools: Any) -> str:
        chat = list(messages)
        if not chat:  # transformers renders no empty chat
            return ""
        render = self.tokenizer.apply_chat_template
        text = str(self._bounded(lambda: render(chat, tools=tools, tokenize=False, add_generation_prompt=ask)))
        if len(text) > LONGEST:
            raise self._endless(f"it wrote {len(text):,} characters")
        return text

    def _bounded(self, render: Callable[[], T]) -> T:
        """The rendered text, in bounds.

        Raises:
            UserError: It takes more time or memory than any chat needs.
        """
        try:
            return bounded(render, SECONDS, MEMORY)
        except (TimeoutError, MemoryError) as error:
            raise self._endless(str(error) or f"it took more than {MEMORY:,} bytes") from None

    def _endless(self, much: str) -> UserError:
        return UserError(f"{self.where}: the model's chat template does not end: {much}. Use a model with another.")

    def _with_arguments_as_asked(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Arguments of tool calls stay objects, or become JSON text where the template wants to join them to text."""
        every = [value for message in messages for value in _arguments(message)]
        if not every:
            return messages
        text = self.attempt(messages)
        if text and not any(repr(value) in text for value in every):  # written as Python writes an object
            return messages
        as_text = [_with_text_arguments(message) for message in messages]
        return as_text if self.attempt(as_text) else messages

    # --------------------------------------------------------------------------------------------------- answers

    def answer(self, i: int) -> Rendering:
        """The chat up to answer `i`, with it and what ends it."""
        text = self.render(self.messages[: i + 1])
        if self.marked:
            spans = self._marks(i)
            if spans:
                return Rendering(text, spans)
            raise UserError(f"{self.where}: the chat template marks no generation in messages[{i}], an assistant's.")
        begin = self._begin(i, text)
        text, end = self._end(i, text)
        return Rendering(text, ((begin, end),))

    def _marks(self, i: int) -> tuple[Span, ...]:
        """The text between the template's own {% generation %} marks in turn `i`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        def spans(messages: Sequence[Message]) -> list[Span]:
            told = [{key: value for key, value in message.items() if value is not None} for message in messages]
            render = functools.partial(
                render_jinja_template,
                [told],
                tools=self.tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
            _, found = self._bounded(render)
            return [(int(begin), int(end)) for begin, end in found[0]]

        before = sum(message["role"] == "assistant" for message in self.messages[:i])
        every = spans(self.messages[: i + 1])
        earlier = len(spans(self.messages[:i])) if before else 0
        return tuple(every[earlier:])

    def asked(self) -> str:
        """The text before an answer to the whole chat."""
        asked = self.render(self.messages, ask=True)
        header = self._header(len(self.messages), asked)
        return asked if header is None else header

    def _header(self, i: int, asked: str) -> str | None:
        """The text before answer `i`, where that is less than what asks for it; None: it is not.

        A template may ask with more than it writes once the answer is there, say with an open thinking block.
        """
        probed = self.attempt([*self.messages[:i], _said("assistant")])
        header, found, _ = probed.partition(PROBE)
        return header if found and asked.startswith(header) and not probed.startswith(asked) else None

    def _begin(self, i: int, text: str) -> int:
        """Where answer `i` begins: after the words that ask for it."""
        asked = self.render(self.messages[:i], ask=True)
        if text.startswith(asked):
            return len(asked)
        header = self._header(i, asked)
        if header is None or not text.startswith(header):
            raise UserError(
                f"{self.where}: the model's chat template writes what stands before messages[{i}] in another way once "
                "that is answered. Use a model with another template."
            )
        more = shortened(asked[len(header) :], 40)
        say(f"the chat template asks for an answer with {more}, which it does not write before one: trained without")
        return len(header)

    def _end(self, i: int, text: str) -> tuple[str, int]:
        """The text up to what ends answer `i`, and where that is."""
        shown = text.rstrip()
        tail = self.attempt([*self.messages[:i], _said("assistant")]).rpartition(PROBE)[2].strip()
        if tail and shown.endswith(tail):  # of which the first special token ends the turn, any more the whole chat
            first = min((tail.find(token) + len(token) for token in self.special if token in tail), default=len(tail))
            return text, len(shown) - len(tail) + first
        if shown.endswith(tuple(self.special)):
            return text, len(shown)
        next_roles = ["tool", "user"] if self.messages[i].get("tool_calls") else ["user"]
        for following in (*self.messages[i + 1 : i + 2], *map(_said, next_roles)):
            marker = self._marker(i, {**following, "content": PROBE})
            overlap = next(n for n in range(len(marker), -1, -1) if text.endswith(marker[:n]))
            if marker.strip():
                return text + marker[overlap:], len(text + marker[overlap:])
        end = self.tokenizer.eos_token or ""
        return text + end, len(text + end)

    def _marker(self, i: int, following: Message) -> str:
        """The template's own text between the words of turn `i` and of the next turn, as far as it matters."""
        both = self.attempt([*self.messages[:i], _said("assistant"), following]).split(PROBE)
        if len(both) < 3:
            return ""
        marker = both[-2]
        space = len(marker) - len(marker.lstrip())
        tokens = (token for token in self.special if marker.startswith(token, space))
        return next((marker[: space + len(token)] for token in tokens), marker.rstrip())

    # ---------------------------------------------------------------------------------------------------- checks

    def check(self) -> None:
        """Everything that a message holds reaches the text.

        Raises:
            UserError: The template refuses the chat, or leaves something out.
        """
        whole = self.render(self.messages)
        if self.tools and whole == self.attempt(self.messages, with_tools=False):
            self._refuse("the row", "tools")
        for j, message in enumerate(self.messages):
            for key, value in message.items():
                if key == "role" or value in (None, "", [], {}):
                    continue
                if (isinstance(value, str) and len(value) > SURE and value in whole) or self._is_seen(j, key):
                    continue
                if key not in NAMES:
                    self._refuse(f"messages[{j}] (role {message['role']!r})", key)
                say(f"the model's chat template has no place for {key!r} of messages: it is left out")

    def _is_seen(self, j: int, key: str) -> bool:
        """Whether the text is another without what message `j` has under `key`, as the last message or in the chat."""
        lacking = {name: value for name, value in self.messages[j].items() if name != key}
        lacking |= {"content": ""} if key == "content" else {}
        before, after = self.messages[:j], self.messages[j + 1 :]
        return any(
            text and text != self.attempt([*before, lacking, *rest])
            for rest in ([], after)
            if (text := self.attempt([*before, self.messages[j], *rest]))
        )

    def _refuse(self, what: str, key: str) -> None:
        raise UserError(
            f"{self.where}: {what} has {key!r}, and the model's chat template has no place for it. Remove it, or use a "
            "model whose template writes it."
        )


@functools.cache
def _takes_powers(source: str) -> bool:
    """Whether a template computes one number to the power of another; ** before arguments of a call is none."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        words = [word for _, kind, word in Environment().lex(source) if kind not in ("whitespace", "data")]
    except TemplateSyntaxError:  # who renders it says so
        return False
    return any(word == "**" and before not in ("(", ",") for before, word in itertools.pairwise(words))


def _said(role: str) -> Message:
    return {"role": role, "content": PROBE}


def _arguments(message: Message) -> list[dict[str, Any]]:
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return [call["arguments"] for call in calls if isinstance(call.get("arguments"), dict) and call["arguments"]]


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    def changed(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return call | {"function": changed(call["function"])}
        return call | {"arguments": json.dumps(call.get("arguments", {}), ensure_ascii=False)}

    return (
        message | {"tool_calls": [changed(call) for call in message["tool_calls"]]} if _arguments(message) else message
    )
