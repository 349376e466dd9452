"""Examples -> token ids -> batches under a token budget.

The loss is on the answer: labels are -100 everywhere else. Prompt and answer are tokenised apart and joined, so the
boundary between them is exact, and an answer has the same tokens whether it is trained on or scored.

Where an end token follows the answer: always when the answer is free text (the model must learn to stop) and in
encoder-decoder models (they were pretrained so). Choices get one only if one of them begins with all the tokens of
another ("card" and "card lost"): its likelihood could never be the higher one otherwise. Elsewhere it would be a
token to predict that tells nothing, and one-token labels are scored by a single position.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedalign.data.formats import Example
from fedalign.errors import UserError

IGNORED = -100  # label of a position without loss
WINDOW = 16  # batches among which similar lengths are put together: padding saved against randomness of batches


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


@dataclass(frozen=True)
class Batch:
    """Padded sequences: S positions, or S of the encoder and T of the decoder (then labels are B, T)."""

    input_ids_B_S: Tensor
    attention_mask_B_S: Tensor
    labels_B_S: Tensor
    rows: tuple[int, ...]  # positions in the sequence that was given to `batches`
    decoder_input_ids_B_T: Tensor | None = None
    decoder_attention_mask_B_T: Tensor | None = None
    counts: bool = True  # False: it is run only because a share of a batch must be

    @property
    def examples(self) -> int:
        """Number of sequences."""
        return len(self.rows)

    @property
    def targets_B_S(self) -> Tensor:
        """What the logits of each position should predict, -100 for nothing: labels moved to the position before."""
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


def load_tokenizer(path: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer, from its folder or the hub; `UserError` if there is none."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - takes seconds to import

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


def batches(
    encoded: Sequence[Encoded], batch_tokens: int, batch_examples: int, seed: int | None = None
) -> Iterator[Batch]:
    """Batches of similar lengths: rows times padded length stay within `batch_tokens`, rows within `batch_examples`.

    With a seed, sequences are shuffled, similar lengths of each window of batches are put together, and the batches
    are shuffled again: the same seed gives the same batches. Without, for evaluation: all by length, longest first,
    so that memory runs out at once or never. A sequence over the budget is a batch of its own. None is lost.
    """
    rng = random.Random(seed)
    order = list(range(len(encoded)))
    if seed is not None:
        rng.shuffle(order)
    window = WINDOW * batch_examples if seed is not None else max(1, len(order))
    groups: list[list[int]] = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: encoded[i].tokens, reverse=True)
        groups += _cut([encoded[i] for i in part], part, batch_tokens, batch_examples)
    if seed is not None:
        rng.shuffle(groups)
    for rows in groups:
        yield _collate([encoded[i] for i in rows], tuple(rows))


def _cut(sequences: Sequence[Encoded], rows: list[int], batch_tokens: int, batch_examples: int) -> list[list[int]]:
    """Cut consecutive rows into groups within the budget."""
    groups: list[list[int]] = []
    group: list[int] = []
    source = target = 0
    for row, one in zip(rows, sequences, strict=True):
        new_source, new_target = max(source, len(one.input_ids)), max(target, len(one.decoder_input_ids or ()))
        if group and (len(group) == batch_examples or (len(group) + 1) * (new_source + new_target) > batch_tokens):
            groups.append(group)
            group, new_source, new_target = [], len(one.input_ids), len(one.decoder_input_ids or ())
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
