"""Examples as tokens."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fedalign.data.chat import ChatTemplate, Rendering
from fedalign.data.formats import Example, name_some
from fedalign.data.sources import say
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
    repeats: bool = False  # whether a later sequence is of the same example and holds what it has

    @property
    def trains(self) -> bool:
        """Whether there is a loss: nothing predicts a first token."""
        return any(label != IGNORED for label in self.labels[self.decoder_input_ids is None :])

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
        leaves_out: whether a chat that its template refuses is left out and told, like one that is too long.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int = 0,
        is_seq2seq: bool = False,
        too_long: Literal["error", "truncate", "drop"] = "error",
        decoder_start: int | None = None,
        leaves_out: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.leaves_out = leaves_out
        self.max_length = max_length
        self.is_seq2seq = is_seq2seq
        self.too_long = too_long
        self.end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.decoder_start = decoder_start if decoder_start is not None else tokenizer.pad_token_id
        self.before, self.after = _special_tokens(tokenizer)
        self.chats = ChatTemplate(tokenizer)

    def encode(self, examples: Sequence[Example]) -> list[Encoded]:
        """The sequences to train on: one of each example, or more for a chat whose template rewrites its history.

        Whatever is no chat's ends with the end token, so that a model that generates stops there.
        What trains nothing is left out and named, and so is what is too long, with "drop".
        """
        renderings = [(i, one) for i, example in enumerate(examples) for one in self._renderings(example)]
        split = self._split([one for _, one in renderings])
        encoded: list[Encoded] = []
        for (i, _), parts in zip(renderings, split, strict=True):
            one = (
                self._chat(i, examples[i], *parts) if examples[i].chat else self._join(i, examples[i], *parts, self.end)
            )
            if one is not None and one.trains:
                if encoded and encoded[-1].example == i:
                    encoded[-1] = replace(encoded[-1], repeats=True)
                encoded.append(one)
        self._name_left_out(examples, {one.example for one in encoded})
        return encoded

    def encode_choices(self, examples: Sequence[Example]) -> list[Encoded]:
        """One sequence for each choice of each example, for scoring; choices of one example share one prompt.

        What is likely is the choice itself: its end token is scored only where it alone tells a choice from another.
        """
        ends = self._ends(examples)
        split = iter(self._split([_rendering(e.prompt, choice) for e in examples for choice in e.choices]))
        encoded: list[Encoded] = []
        for i, example in enumerate(examples):
            parts = [next(split) for _ in example.choices]
            longest = max((sum(trained) for _, trained in parts), default=0) + len(ends[i])
            joined = [self._join(i, example, *part, ends[i], choice, longest) for choice, part in enumerate(parts)]
            scored = [one for one in joined if one is not None and one.trains]
            encoded += scored if len(scored) == len(joined) else []
        self._name_left_out(examples, {one.example for one in encoded})
        return encoded

    def encode_prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        """The tokens that the model reads before it generates an answer; of a chat those up to its last answer.

        A prompt that is too long is cut from the left whatever `too_long` says; room for the answer is the caller's.
        """
        lasts = [self.chats.last(example) if example.chat else None for example in examples]
        texts = [
            e.prompt if one is None else one.text[: one.answers[0][0]] for e, one in zip(examples, lasts, strict=True)
        ]
        prompts = [
            self.before + ids + (self.after if self.is_seq2seq else []) if one is None else ids
            for ids, one in zip(self._ids(texts), lasts, strict=True)
        ]
        return [ids[-self.max_length :] if self.max_length else ids for ids in prompts]

    def encode_answers(self, examples: Sequence[Example]) -> list[list[int]]:
        """The tokens of each last answer and of what ends it, as they are trained where nothing is cut."""
        renderings = [self.chats.last(e) if e.chat else _rendering(e.prompt, e.answer) for e in examples]
        found = []
        for example, (ids, trained) in zip(examples, self._split(renderings), strict=True):
            first = trained.index(True) if True in trained else len(ids)
            last = len(ids) - trained[::-1].index(True) if True in trained else 0
            found.append(ids[first:last] + ([] if example.chat else self.end))
        return found

    # ------------------------------------------------------------------------------------------------ one rendering

    def _renderings(self, example: Example) -> list[Rendering]:
        if example.chat is None:
            return [_rendering(example.prompt, example.answer)]
        if self.is_seq2seq:
            raise UserError('data.kind = "chat": not for encoder-decoder models. Choose one of: instruction, text.')
        try:
            return self.chats.renderings(example)
        except UserError as error:
            if not self.leaves_out:
                raise
            say(str(error))
            return []

    def _split(self, renderings: Sequence[Rendering]) -> list[tuple[list[int], list[bool]]]:
        """Tokens of each text, and which of them hold a character of an answer.

        An encoder-decoder model reads prompt and answer apart, so there each is a text of its own.
        """
        if self.is_seq2seq:
            begins = [one.answers[0][0] for one in renderings]
            prompts = self._ids([one.text[:begin] for one, begin in zip(renderings, begins, strict=True)])
            answers = self._ids([one.text[begin:] for one, begin in zip(renderings, begins, strict=True)])
            pairs = zip(prompts, answers, strict=True)
            return [(p + a, [False] * len(p) + [True] * len(a)) for p, a in pairs]
        if not self.tokenizer.is_fast:
            return [self._split_slowly(one) for one in renderings]
        encoded = self._tokenise([one.text for one in renderings], return_offsets_mapping=True)
        return [
            (list(ids), _inside(offsets, one.answers))
            for ids, offsets, one in zip(encoded["input_ids"], encoded["offset_mapping"], renderings, strict=True)
        ]

    def _split_slowly(self, one: Rendering) -> tuple[list[int], list[bool]]:
        """The same of a tokenizer that does not tell where its tokens stand.

        A text up to a boundary has the same tokens as the whole of it but for the last ones, if a token goes across.
        """
        texts = [one.text, *(one.text[:cut] for span in one.answers for cut in span)]
        ids, *cuts = self._ids(texts)
        trained = [False] * len(ids)
        for before, after in zip(cuts[::2], cuts[1::2], strict=True):
            first, last = _common(ids, before), _common(ids, after)
            last += last < len(after) and last < len(ids)  # the token across the end
            trained[first:last] = [True] * (last - first)
        return ids, trained

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self._tokenise(texts)["input_ids"]]

    def _tokenise(self, texts: list[str], **options: Any) -> Any:
        if not texts:
            return {"input_ids": [], "offset_mapping": []}
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)

    def _ends(self, examples: Sequence[Example]) -> list[list[int]]:
        """The tokens scored after the choices of each example: an end, where one of them begins another."""
        sets = list(dict.fromkeys(example.choices for example in examples if example.choices))
        ids = iter(self._ids([choice for choices in sets for choice in choices]))
        ended = {choices: self.is_seq2seq or _one_begins_another([next(ids) for _ in choices]) for choices in sets}
        return [self.end if ended.get(example.choices) else [] for example in examples]

    # ------------------------------------------------------------------------------------------------------ lengths

    def _join(
        self,
        index: int,
        example: Example,
        ids: list[int],
        trained: list[bool],
        end: list[int],
        choice: int = -1,
        longest: int | None = None,
    ) -> Encoded | None:
        """Prompt and answer as the model reads them; `longest`: tokens of the longest answer to this prompt."""
        start = len(ids) - sum(trained)
        prompt, answer = ids[:start], ids[start:] + end if sum(trained) else []
        head, tail = self.before, self.after if self.is_seq2seq else []
        longest = longest or len(answer)
        # An encoder-decoder model reads prompt and answer apart, each within the limit.
        beside = len(head) + len(tail) + (0 if self.is_seq2seq else longest)
        length = max(len(prompt) + beside, longest if self.is_seq2seq else 0)
        if 0 < self.max_length < length:
            if not self._may_cut(example, length, ids):
                return None
            prompt = prompt[max(0, len(prompt) + beside - self.max_length) :]
            answer = answer[: self.max_length - (0 if self.is_seq2seq else len(head))]
        if self.is_seq2seq:
            return Encoded(head + prompt + tail, answer, index, choice, [self.decoder_start, *answer[:-1]])
        start = len(head) + len(prompt)
        return Encoded(head + prompt + answer, [IGNORED] * start + answer, index, choice)

    def _chat(self, index: int, example: Example, ids: list[int], trained: list[bool]) -> Encoded | None:
        """A rendered chat; its template writes all special tokens."""
        labels = [token if is_answer else IGNORED for token, is_answer in zip(ids, trained, strict=True)]
        if 0 < self.max_length < len(ids):
            if not self._may_cut(example, len(ids), ids):
                return None
            ids, labels = ids[-self.max_length :], labels[-self.max_length :]
        return Encoded(ids, labels, index)

    def _may_cut(self, example: Example, length: int, ids: list[int]) -> bool:
        if self.too_long == "error":
            begins = " ".join(self.tokenizer.decode(ids[:12]).split())
            raise UserError(
                f"{example.where} ({begins!r}...): {length} tokens, more than the limit of {self.max_length} "
                "(data.max_length, or what the model allows). "
                "Raise data.max_length, or set data.too_long to one of: drop, truncate."
            )
        return self.too_long == "truncate"

    def _name_left_out(self, examples: Sequence[Example], kept: set[int]) -> None:
        left = [example.where for i, example in enumerate(examples) if i not in kept]
        if left:
            limit = f"more than {self.max_length} tokens or " if self.max_length and self.too_long == "drop" else ""
            say(f"{name_some(left)} of {len(examples):,} examples left out: {limit}no answer that could be trained")


def _rendering(prompt: str, answer: str) -> Rendering:
    return Rendering(prompt + answer, ((len(prompt), len(prompt + answer)),))


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens hold a character of a span.

    >>> _inside([(0, 3), (3, 6), (8, 8), (8, 9)], [(6, 8)])  # the third is white space, trimmed from its offsets
    [False, False, True, False]
    """
    found, done = [], 0
    for begin, end in offsets:
        first = done if begin == end else begin
        found.append(any(first < last and max(end, first + 1) > start for start, last in spans))
        done = end
    return found


def _common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many first tokens are the same."""
    return next(
        (i for i, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other), min(len(ids), len(others))
    )


def _one_begins_another(sequences: Sequence[list[int]]) -> bool:
    """Whether one sequence is a proper beginning of another; in sorted order such a pair has one side by side.

    >>> _one_begins_another([[5, 6], [7], [5]]), _one_begins_another([[5, 6], [5, 7], [5, 6]])
    (True, False)
    """
    ordered = sorted(sequences)
    return any(a != b and b[: len(a)] == a for a, b in itertools.pairwise(ordered))


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts around a text by itself, such as a beginning-of-sequence token."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []
