"""Token ids, where the loss is, and batches under a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedalign.data.batches import batches
from fedalign.data.encode import IGNORED, Encoded, Encoder, load_tokenizer
from fedalign.data.formats import Chat, Example
from fedalign.errors import UserError

WORDS = ["<pad>", "<bos>", "<eos>", "the", "cup", "oil", "card", "lost", "Label:", "user:", "assistant:", "hi", "a"]
PAD, BOS, EOS, THE, CUP, OIL, CARD, LOST, LABEL, USER, ASSISTANT, HI, A = range(13)
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(bos: bool = False, end_by_itself: bool = False, chat_template: str | None = CHAT) -> Any:
    """One token a word, so that ids can be written by hand."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos or end_by_itself:
        template = f"{'<bos> ' if bos else ''}$A{' <eos>' if end_by_itself else ''}"
        words.post_processor = processors.TemplateProcessing(template, None, [("<bos>", BOS), ("<eos>", EOS)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>")
    wrapped.chat_template = chat_template
    return wrapped


NEWS = Example("the cup Label:", " cup", (" cup", " oil"))
TURNS = (("user", "oil"), ("assistant", "hi"), ("user", "cup"), ("assistant", "the cup"))
TALK = Example("", "hi", chat=Chat(tuple({"role": role, "content": said} for role, said in TURNS), (1, 3)))


@pytest.mark.parametrize("choices", [(), (" the cup", " oil")])  # free, or one of several
def test_an_answer_is_trained_with_its_end(choices: tuple[str, ...]) -> None:
    [encoded] = Encoder(tokenizer()).encode([Example("oil Label:", " the cup", choices)])
    assert encoded.input_ids == [OIL, LABEL, THE, CUP, EOS]
    assert encoded.labels == [IGNORED, IGNORED, THE, CUP, EOS]


def test_text_is_all_answer() -> None:
    [encoded] = Encoder(tokenizer(bos=True)).encode([Example("", "the cup")])
    assert encoded.input_ids == [BOS, THE, CUP, EOS]
    assert encoded.labels == [IGNORED, THE, CUP, EOS]


def test_special_tokens_as_the_tokenizer_puts_them() -> None:
    # A causal model reads on after the prompt: what the tokenizer puts at the end would come in between.
    [encoded] = Encoder(tokenizer(bos=True, end_by_itself=True)).encode([NEWS])
    assert encoded.input_ids == [BOS, THE, CUP, LABEL, CUP, EOS]


def test_choices_share_the_prompt_and_are_scored_without_their_end() -> None:
    cup, oil = Encoder(tokenizer()).encode_choices([NEWS])
    assert (cup.input_ids, oil.input_ids) == ([THE, CUP, LABEL, CUP], [THE, CUP, LABEL, OIL])
    assert (cup.example, cup.choice, oil.example, oil.choice) == (0, 0, 0, 1)
    assert oil.labels == [IGNORED, IGNORED, IGNORED, OIL]


def test_choices_end_where_one_begins_another() -> None:
    example = Example("Label:", " card", (" card", " card lost"))
    card, lost = Encoder(tokenizer()).encode_choices([example])
    assert (card.input_ids, lost.input_ids) == ([LABEL, CARD, EOS], [LABEL, CARD, LOST, EOS])
    assert Encoder(tokenizer()).encode([example]) == [
        Encoded([LABEL, CARD, EOS], [IGNORED, CARD, EOS], 0)  # trained as it is scored
    ]


def test_encoder_decoder() -> None:
    [encoded] = Encoder(tokenizer(end_by_itself=True), is_seq2seq=True).encode([NEWS])
    assert encoded.input_ids == [THE, CUP, LABEL, EOS]
    assert encoded.labels == [CUP, EOS]
    assert encoded.decoder_input_ids == [PAD, CUP]


def test_chat_puts_the_loss_on_every_assistants_turn() -> None:
    [encoded] = Encoder(tokenizer()).encode([TALK])
    assert encoded.input_ids == [USER, OIL, EOS, ASSISTANT, HI, EOS, USER, CUP, EOS, ASSISTANT, THE, CUP, EOS]
    assert [i for i, label in enumerate(encoded.labels) if label != IGNORED] == [4, 5, 10, 11, 12]
    assert all(label in (IGNORED, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


def test_prompts_for_generation_stop_before_the_answer() -> None:
    encoder = Encoder(tokenizer(bos=True), max_length=4)
    assert encoder.encode_prompts([NEWS]) == [[BOS, THE, CUP, LABEL]]
    assert Encoder(tokenizer(bos=True)).encode_prompts([TALK])[0][-4:] == [USER, CUP, EOS, ASSISTANT]


def test_chat_needs_a_template() -> None:
    with pytest.raises(UserError, match="no chat template"):
        Encoder(tokenizer(chat_template=None)).encode([TALK])


def test_a_template_that_rewrites_earlier_turns_gives_each_answer_the_history_it_would_have() -> None:
    forgetful = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }} <eos> {% endif %}{% endfor %}"
    )
    first, second = Encoder(tokenizer(chat_template=forgetful)).encode([TALK])
    assert (first.input_ids, first.labels) == ([OIL, EOS, HI, EOS], [IGNORED, IGNORED, HI, EOS])
    assert second.input_ids == [OIL, EOS, CUP, EOS, THE, CUP, EOS]
    assert second.labels == [IGNORED] * 4 + [THE, CUP, EOS]
    assert first.example == second.example == 0


def test_too_long_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        UserError,
        match=r"a\.csv, row 2 \('the cup Label: cup'\.\.\.\): 5 tokens, more than the limit of 3 .*drop, truncate",
    ):
        Encoder(tokenizer(), max_length=3).encode(
            [Example("the", " cup", (" cup", " oil")), replace(NEWS, where="a.csv, row 2")]
        )


def test_too_long_truncated_from_the_left() -> None:
    [encoded] = Encoder(tokenizer(bos=True), 4, too_long="truncate").encode([NEWS])
    assert encoded.input_ids == [BOS, LABEL, CUP, EOS]
    [encoded] = Encoder(tokenizer(), 2, too_long="truncate").encode([Example("", "the cup oil")])
    assert encoded.input_ids == encoded.labels == [THE, CUP]  # text has no prompt to cut


def test_choices_are_truncated_to_one_prompt() -> None:
    example = Example("the the cup Label:", " oil", (" oil", " card lost"))
    oil, card = Encoder(tokenizer(), 4, too_long="truncate").encode_choices([example])
    assert (oil.input_ids, card.input_ids) == ([CUP, LABEL, OIL], [CUP, LABEL, CARD, LOST])


def test_too_long_dropped() -> None:
    kept = Encoder(tokenizer(), 3, too_long="drop").encode([NEWS, Example("the", " cup", (" cup", " oil")), NEWS])
    assert [(one.example, one.input_ids) for one in kept] == [(1, [THE, CUP, EOS])]


def test_too_long_for_an_encoder_or_a_decoder() -> None:
    def kept(prompt: str, answer: str) -> int:
        return len(Encoder(tokenizer(), 3, is_seq2seq=True, too_long="drop").encode([Example(prompt, answer)]))

    assert [kept("the the cup", "oil oil"), kept("the the cup a", "oil"), kept("the", "oil oil oil")] == [1, 0, 0]


# Batches.


def sequences(lengths: list[int]) -> list[Encoded]:
    return [Encoded([A] * n, [IGNORED] * (n - 1) + [A], i) for i, n in enumerate(lengths)]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    budget=st.integers(10, 100),
    most=st.integers(1, 8),
    seed=st.none() | st.integers(0, 5),
)
def test_budget_is_kept_and_nothing_is_lost(lengths: list[int], budget: int, most: int, seed: int | None) -> None:
    found = list(batches(sequences(lengths), budget, most, seed))
    assert sorted(row for batch in found for row in batch.rows) == list(range(len(lengths)))
    for batch in found:
        assert batch.examples <= most
        assert batch.input_ids_B_S.numel() <= budget or batch.examples == 1
        assert batch.attention_mask_B_S.sum(1).tolist() == [lengths[row] for row in batch.rows]


def test_the_same_seed_gives_the_same_batches() -> None:
    encoded = sequences(list(range(1, 200)))
    rows = [[batch.rows for batch in batches(encoded, 300, 8, seed)] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


def test_similar_lengths_together() -> None:
    lengths = [1 + (i * 37) % 64 for i in range(640)]
    encoded = sequences(lengths)
    for seed in (None, 0):
        padded = sum(batch.input_ids_B_S.numel() for batch in batches(encoded, 10**6, 16, seed))
        assert padded < 1.1 * sum(lengths)  # batches of random rows would be padded to about 1.9 times


def test_without_a_seed_the_longest_come_first() -> None:
    assert [batch.rows for batch in batches(sequences([1, 3, 2]), 100, 1)] == [(1,), (2,), (0,)]


def test_padding() -> None:
    encoded = [Encoded([THE, CUP], [IGNORED, CUP], 0), Encoded([OIL, OIL, OIL], [IGNORED, OIL, OIL], 1)]
    [batch] = batches(encoded, 6, 2)
    assert batch.rows == (1, 0)
    assert batch.input_ids_B_S.tolist() == [[OIL, OIL, OIL], [THE, CUP, 0]]
    assert batch.attention_mask_B_S.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.labels_B_S.tolist() == [[IGNORED, OIL, OIL], [IGNORED, CUP, IGNORED]]
    assert batch.targets_B_S.tolist() == [[OIL, OIL, IGNORED], [CUP, IGNORED, IGNORED]]
    assert batch.answer_tokens == 3
    assert list(batch.inputs()) == ["input_ids", "attention_mask"]


def test_batches_of_an_encoder_decoder() -> None:
    encoded = [Encoded([THE], [CUP, EOS], 0, -1, [PAD, CUP]), Encoded([THE, OIL], [EOS], 1, -1, [PAD])]
    [batch] = batches(encoded, 8, 2)
    assert batch.rows == (0, 1)
    assert batch.input_ids_B_S.tolist() == [[THE, 0], [THE, OIL]]
    assert batch.labels_B_S.tolist() == batch.targets_B_S.tolist() == [[CUP, EOS], [EOS, IGNORED]]
    inputs = batch.to("cpu").inputs()
    assert inputs["decoder_input_ids"].tolist() == [[PAD, CUP], [PAD, 0]]
    assert inputs["decoder_attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch.answer_tokens == 3
    assert len(list(batches(encoded, 7, 2))) == 2  # two rows of two and two tokens are eight


def test_targets_are_what_the_logits_are_held_against() -> None:
    # A model that always predicts the next id of its input has no loss on [THE, CUP -> OIL].
    [batch] = batches([Encoded([THE, CUP, OIL], [IGNORED, IGNORED, OIL], 0)], 10, 1)
    logits = torch.nn.functional.one_hot(torch.tensor([[CUP, OIL, THE]]), len(WORDS)).float() * 100
    loss = torch.nn.functional.cross_entropy(logits[0], batch.targets_B_S[0])
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_a_folder_without_a_tokenizer(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="no tokenizer to load"):
        load_tokenizer(tmp_path)


def test_a_folder_with_a_tokenizer(tmp_path: Any) -> None:
    tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("the cup")["input_ids"] == [THE, CUP]


@pytest.mark.parametrize("seed", [None, 3])
def test_nothing_is_padded_where_numbers_depend_on_it(seed: int | None) -> None:
    lengths = [3, 5, 3, 4, 5, 3, 3, 3]
    made = [Encoded([7] * length, [7] * length, index) for index, length in enumerate(lengths)]
    cut = list(batches(made, 9, 3, seed, equal_lengths=True))
    assert all(batch.attention_mask_B_S.all() for batch in cut)
    assert sorted(row for batch in cut for row in batch.rows) == list(range(8))
    assert sorted(len(batch.rows) for batch in cut) == [1, 1, 1, 2, 3]  # of 5, 5 and 4 one each: 9 tokens a batch
