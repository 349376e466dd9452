"""Kinds of tokenizers, each built small: letters, and the few words that the tests write."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import GPTSw3Tokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from tests.rendering.templates import Family

WORDS = ("hi", "no", "yes", "user", "assistant", "system", "model")
LETTERS = [*map(chr, range(32, 127)), "\n", "é"]
PLAIN = Family("", ("</s>", "<s>"))


def _pieces(alphabet: Sequence[str], space: str) -> models.BPE:
    """Byte-pair encoding that has each word whole, with and without the space before it."""
    vocabulary = dict.fromkeys([*alphabet, space])
    merges: dict[tuple[str, str], None] = {}
    for letters in (*(space + word for word in WORDS), *WORDS):  # a space goes before the letters that follow it
        for i in range(1, len(letters)):
            merges[letters[:i], letters[i]] = None
            vocabulary[letters[: i + 1]] = None
    return models.BPE({piece: i for i, piece in enumerate(["<unk>", *vocabulary])}, list(merges), unk_token="<unk>")


def metaspace(scheme: str) -> Tokenizer:
    """As Gemma ("never"), and as converted from SentencePiece ("always", "first")."""
    tokenizer = Tokenizer(_pieces(LETTERS, "▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer


def prepending() -> Tokenizer:
    """As Llama 2 and Mixtral: a space before the text, and after every special token."""
    tokenizer = Tokenizer(_pieces(LETTERS, "▁"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def byte_level(trims: bool = False) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen; `trims`: its offsets leave spaces out."""
    tokenizer = Tokenizer(_pieces(sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġ"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: small letters, words and ends of words, spaces lost."""
    pieces = ["<unk>", *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


class Slow(PreTrainedTokenizer):  # type: ignore[misc]  # transformers has no types
    """A tokenizer in Python: one token a letter, but "hi", "no" and " no"; it does not tell where tokens stand."""

    def __init__(self, **options: Any) -> None:
        self.pieces = ["<unk>", "hi", "no", " no", *LETTERS]
        super().__init__(unk_token="<unk>", **options)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)} | dict(self.added_tokens_encoder)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        found = []
        while text:
            piece = next((piece for piece in (" no", "no", "hi") if text.startswith(piece)), text[0])
            found.append(piece)
            text = text[len(piece) :]
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.index(token) if token in self.pieces else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


KINDS = {
    "metaspace_always": lambda: metaspace("always"),
    "metaspace_first": lambda: metaspace("first"),
    "metaspace_never": lambda: metaspace("never"),
    "prepend": prepending,
    "bytes": byte_level,
    "bytes_trimmed": lambda: byte_level(trims=True),
    "words": word_piece,
}
LOSSLESS = ("metaspace_never", "bytes", "bytes_trimmed", "slow")  # decoding gives the text back


@functools.cache
def build(kind: str, family: Family = PLAIN, begins: bool = False) -> Any:
    """A tokenizer with a family's special tokens and template; `begins`: it puts a token before every text."""
    end, begin, *rest = family.special
    special = {"eos_token": end, "extra_special_tokens": rest} | ({"bos_token": begin} if begin else {})
    if kind == "slow":
        made: Any = Slow(**special)
    else:
        inner = KINDS[kind]()
        inner.add_special_tokens([token for token in family.special if token])
        if begins:
            ids = [(begin, inner.token_to_id(begin))]
            inner.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=ids)
        made = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    return _with_words_of(family, made)


def sentence_piece(folder: Path, family: Family = PLAIN) -> Any:
    """SentencePiece itself, in Python, trained on a few lines; as in GPT-SW3."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    (folder / "lines.txt").write_text("\n".join(["hi no yes", *WORDS, "no hi hi yes no"] * 20))
    options = {
        "model_type": "bpe",
        "vocab_size": 200,
        "required_chars": "".join(LETTERS[1:95]),
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    trainer.train(input=folder / "lines.txt", model_prefix=folder / "tiny", user_defined_symbols=["\n"], **options)
    end, begin, *rest = family.special
    special = {"eos_token": end, "bos_token": begin or end, "unk_token": "<unk>", "pad_token": "<unk>"}
    made = GPTSw3Tokenizer(str(folder / "tiny.model"), name_or_path="tiny", extra_special_tokens=rest, **special)
    return _with_words_of(family, made)


def _with_words_of(family: Family, made: Any) -> Any:
    made.add_tokens([AddedToken(token, normalized=False) for token in family.others])
    made.chat_template = family.source or None
    return made
