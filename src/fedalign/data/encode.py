"""Examples as tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedalign.data.formats import Example
from fedalign.errors import UserError


def tokenizer_hash(tokenizer: object) -> str:
    """The same for tokenizers that give every text the same ids and end it alike, as far as their definition tells."""
    end = getattr(tokenizer, "eos_token_id", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        for changing in ("padding", "truncation"):  # settings of the last call, not of the tokenizer
            definition.pop(changing, None)
        return text_hash(json.dumps([definition, end], sort_keys=True))
    return text_hash(json.dumps([sorted(tokenizer.get_vocab().items()), end]))  # type: ignore[attr-defined] # every tokenizer has one


def text_hash(text: str) -> str:
    """64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


IGNORED = -100  # label of a position without loss


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence for the model; for encoder-decoder models the labels are a sequence of their own."""

    input_ids: list[int]
    labels: list[int]  # as long as input_ids, or as decoder_input_ids
    example: int  # index of its example
    choice: int = -1  # which of the example's choices this is; -1: its answer
    decoder_input_ids: list[int] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.input_ids) + len(self.decoder_input_ids or ())


def load_tokenizer(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer, from its folder or the hub; `UserError` if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises many kinds for what a user can mend
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.path = {str(path)!r}: no tokenizer to load: {reason} "
            "Give a folder with tokenizer files or a hub id."
        ) from None


class Encoder:
    """Tokenises examples for one model.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: longest sequence (prompt and answer; in encoder-decoder models each of the two); 0: no limit.
        is_seq2seq: whether the prompt goes to an encoder and the answer to a decoder.
        too_long: "error"; "truncate" cuts the prompt from the left, and text or an answer that is too long by itself
            from the right; "drop" leaves the example out.
        decoder_start: first token of the decoder; None: the padding token, as in T5 and Switch Transformers.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 0,
        is_seq2seq: bool = False,
        too_long: Literal["error", "truncate", "drop"] = "error",
        decoder_start: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.is_seq2seq = is_seq2seq
        self.too_long = too_long
        self.end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.decoder_start = decoder_start if decoder_start is not None else tokenizer.pad_token_id
        self.before, self.after = _special_tokens(tokenizer)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """One sequence for each example, in order; with "drop", without the examples that are too long."""
        if any(example.messages for example in examples):
            found = (self._chat(i, example) for i, example in enumerate(examples))
            return [encoded for encoded in found if encoded is not None]
        prompts = self._ids([example.prompt for example in examples])
        answers = self._answers(examples)
        joined = (self._join(i, *pair) for i, pair in enumerate(zip(prompts, answers, strict=True)))
        return [encoded for encoded in joined if encoded is not None]

    def encode_choices(self, examples: Sequence[Example]) -> list[Encoded]:
        """One sequence for each choice of each example, for scoring; choices of one example share one prompt."""
        ids_by_choices = self._choices(examples)
        encoded: list[Encoded] = []
        for i, (example, prompt) in enumerate(zip(examples, self._ids([e.prompt for e in examples]), strict=True)):
            choices = ids_by_choices[example.choices]
            longest = max(map(len, choices), default=0)
            joined = (self._join(i, prompt, answer, choice, longest) for choice, answer in enumerate(choices))
            encoded += [one for one in joined if one is not None]
        return encoded

    def encode_prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """What the model reads before it generates an answer; a chat up to its last assistant's turn.

        A prompt that is too long is cut from the left whatever `too_long` says; room for the answer is the caller's.
        """
        chats = [bool(example.messages) for example in examples]
        texts = [self._before_last_answer(e) if e.messages else e.prompt for e in examples]
        prompts = [
            ids if chat else self.before + ids + (self.after if self.is_seq2seq else [])
            for ids, chat in zip(self._ids(texts), chats, strict=True)
        ]
        return [ids[-self.max_length :] if self.max_length else ids for ids in prompts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _answers(self, examples: Sequence[Example]) -> list[list[int]]:
        """Tokens of each answer with its end token; one of several choices has the tokens it is scored by."""
        ids_by_choices = self._choices(examples)
        free = iter(self._ids([example.answer for example in examples if not example.choices]))
        return [
            ids_by_choices[example.choices][example.choices.index(example.answer)]
            if example.choices
            else next(free) + self.end
            for example in examples
        ]

    def _choices(self, examples: Sequence[Example]) -> dict[tuple[str, ...], list[list[int]]]:
        """Tokens of each set of choices among the examples, tokenised in one call."""
        sets = list(dict.fromkeys(example.choices for example in examples if example.choices))
        ids = iter(self._ids([choice for choices in sets for choice in choices]))
        found: dict[tuple[str, ...], list[list[int]]] = {(): []}
        for choices in sets:
            own = [next(ids) for _ in choices]
            end = self.end if self.is_seq2seq or _one_begins_another(own) else []
            found[choices] = [one + end for one in own]
        return found

    def _join(
        self, example: int, prompt: list[int], answer: list[int], choice: int = -1, longest: int | None = None
    ) -> Encoded | None:
        """Prompt and answer as the model reads them; `longest`: tokens of the longest answer to this prompt."""
        head, tail = self.before, self.after if self.is_seq2seq else []
        longest = longest or len(answer)
        # An encoder-decoder model reads prompt and answer apart, each within the limit.
        beside = len(head) + len(tail) + (0 if self.is_seq2seq else longest)
        length = max(len(prompt) + beside, longest if self.is_seq2seq else 0)
        if 0 < self.max_length < length:
            if not self._may_cut(example, length, prompt or answer):
                return None
            prompt = prompt[max(0, len(prompt) + beside - self.max_length) :]
            answer = answer[: self.max_length - (0 if self.is_seq2seq else len(head))]
        if self.is_seq2seq:
            return Encoded(head + prompt + tail, answer, example, choice, [self.decoder_start, *answer[:-1]])
        start = len(head) + len(prompt)
        return Encoded(head + prompt + answer, [IGNORED] * start + answer, example, choice)

    def _may_cut(self, example: int, length: int, ids: list[int]) -> bool:
        if self.too_long == "error":
            begins = " ".join(self.tokenizer.decode(ids[:12]).split())
            raise UserError(
                f"example {example + 1} ({begins!r}...): {length} tokens, more than the limit of {self.max_length} "
                "(data.max_length, or what the model allows). "
                "Raise data.max_length, or set data.too_long to one of: drop, truncate."
            )
        return self.too_long == "truncate"

    def _chat(self, index: int, example: Example) -> Encoded | None:
        """A rendered chat, cut where assistant's turns begin and end, so that the boundaries are exact."""
        if self.is_seq2seq:
            raise UserError('data.kind = "chat": not for encoder-decoder models. Choose one of: instruction, text.')
        pieces = self._chat_pieces(example)
        ids: list[int] = []
        labels: list[int] = []
        for piece, (_, is_answer) in zip(self._ids([text for text, _ in pieces]), pieces, strict=True):
            ids += piece
            labels += piece if is_answer else [IGNORED] * len(piece)
        if 0 < self.max_length < len(ids):
            if not self._may_cut(index, len(ids), ids):
                return None
            ids, labels = ids[-self.max_length :], labels[-self.max_length :]
        return Encoded(ids, labels, index)

    def _chat_pieces(self, example: Example) -> list[tuple[str, bool]]:
        whole = self._render(example.messages)
        pieces: list[tuple[str, bool]] = []
        done = 0
        for i, (role, _) in enumerate(example.messages):
            if role != "assistant":
                continue
            before, after = self._render(example.messages[:i], ask=True), self._render(example.messages[: i + 1])
            if not (whole.startswith(before) and whole.startswith(after) and done <= len(before) < len(after)):
                raise UserError(
                    'data.kind = "chat": this tokenizer\'s chat template writes earlier turns anew when a later one is '
                    "added, so the loss cannot be put on every assistant's turn. Give chats of one answer each."
                )
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
        return [*pieces, (whole[done:], False)]

    def _before_last_answer(self, example: Example) -> str:
        last = max(i for i, (role, _) in enumerate(example.messages) if role == "assistant")
        return self._render(example.messages[:last], ask=True)

    def _render(self, messages: Sequence[tuple[str, str]], ask: bool = False) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                'data.kind = "chat": the model\'s tokenizer has no chat template. Use a model tuned for chat, or '
                "data.kind = one of: instruction, text."
            )
        turns = [{"role": role, "content": content} for role, content in messages]
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask))


def _one_begins_another(sequences: Sequence[list[int]]) -> bool:
    """Whether one sequence is a proper beginning of another; in sorted order such a pair has one side by side.

    >>> _one_begins_another([[5, 6], [7], [5]]), _one_begins_another([[5, 6], [5, 7], [5, 6]])
    (True, False)
    """
    ordered = sorted(sequences)
    return any(a != b and b[: len(a)] == a for a, b in itertools.pairwise(ordered))


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text by itself, such as a beginning-of-sequence token."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
