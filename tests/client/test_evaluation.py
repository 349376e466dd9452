from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedalign.client.evaluation import TestSet, _generated, evaluate
from fedalign.config.run import EvaluationConfig
from fedalign.data.encode import Encoder, load_tokenizer
from fedalign.data.formats import Example
from fedalign.data.sources import say
from fedalign.errors import UserError
from fedalign.moe.model import MoEModel
from tests.rendering.kinds import build
from tests.rendering.templates import FAMILIES, PLAIN, Family
from tests.rendering.test_rendering import CALL, TWO, chat

CONFIG = EvaluationConfig()


@pytest.fixture(scope="module")
def model(olmoe: Path) -> MoEModel:
    return MoEModel.load(olmoe)


@pytest.fixture(scope="module")
def encoder(olmoe: Path) -> Encoder:
    return Encoder(load_tokenizer(olmoe), 64)


def nll(model: MoEModel, encoder: Encoder, prompt: str, answer: str) -> list[float]:
    """Of each answer token, by a plain forward pass."""
    ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer)]
    with torch.no_grad():
        logits = model.model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
    return [float(x) for x in -logits.log_softmax(-1).gather(1, torch.tensor(ids[1])[:, None])]


def choose(prompts: list[str], choices: list[tuple[str, ...]], right: list[int]) -> list[Example]:
    spaced = [tuple(f" {words}" for words in each) for each in choices]
    return [Example(p, c[r], choices=c) for p, c, r in zip(prompts, spaced, right, strict=True)]


def prepare(examples: list[Example], encoder: Encoder) -> TestSet:
    tests = TestSet.prepare(examples, encoder)
    assert tests is not None
    return tests


PROMPTS = ["the dog runs", "rain falls in town", "bread", "a cat sleeps near here"]


def test_one_token_choices_and_long_ones_are_scored_alike(model: MoEModel, encoder: Encoder) -> None:
    letters = choose(PROMPTS, [("a", "b", "c")] * 4, [0, 1, 2, 0])
    assert all(len(nll(model, encoder, "x", f" {letter}")) == 1 for letter in "abc")
    words = choose(PROMPTS, [("animals", "weather report", "food")] * 4, [0, 1, 2, 0])
    for examples in (letters, words):
        scores = [[sum(nll(model, encoder, e.prompt, c)) for c in e.choices] for e in examples]
        right = [e.choices.index(e.answer) for e in examples]
        got = evaluate(model, prepare(examples, encoder), CONFIG, encoder.tokenizer, "me")
        assert got.client == "me"
        assert got.examples == 4
        assert got.accuracy == sum(s.index(min(s)) == r for s, r in zip(scores, right, strict=True)) / 4
        tokens = [t for e in examples for t in nll(model, encoder, e.prompt, e.answer)]
        assert got.loss == pytest.approx(sum(tokens) / len(tokens), rel=1e-5)


def test_examples_may_have_different_numbers_of_choices(model: MoEModel, encoder: Encoder) -> None:
    examples = choose(PROMPTS[:2], [("a", "b"), ("a", "b", "c")], [1, 2])
    got = evaluate(model, prepare(examples, encoder), CONFIG, encoder.tokenizer, None)
    best = [
        min(range(len(e.choices)), key=lambda i: sum(nll(model, encoder, e.prompt, e.choices[i]))) for e in examples
    ]
    assert got.accuracy == sum(e.choices[b] == e.answer for e, b in zip(examples, best, strict=True)) / 2


def test_examples_with_choices_and_without_are_all_scored_and_that_is_said(
    model: MoEModel, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    say.cache_clear()
    free = [Example("the dog", " runs far"), Example("rain", " falls")]
    mixed = [*choose(PROMPTS[:1], [("a", "b")], [1]), *free]
    tests = prepare(mixed, encoder)
    assert list(tests.examples) == mixed
    got = evaluate(model, tests, CONFIG, encoder.tokenizer, None)
    assert (got.examples, got.accuracy) == (3, None)
    assert "1 of 3 examples to score have choices and the others none" in caplog.text
    caplog.clear()
    prepare(free, encoder)
    prepare(mixed[:1], encoder)
    assert caplog.text == ""


def test_length_normalised_scores_are_means(model: MoEModel, encoder: Encoder) -> None:
    examples = choose(PROMPTS, [("a", "the weather in the north every day")] * 4, [1] * 4)
    tests = prepare(examples, encoder)
    summed = evaluate(model, tests, CONFIG, encoder.tokenizer, None)
    mean = evaluate(model, tests, EvaluationConfig(length_normalise=True), encoder.tokenizer, None)
    losses = [[nll(model, encoder, e.prompt, c) for c in e.choices] for e in examples]
    assert summed.accuracy == sum(sum(long) < sum(short) for short, long in losses) / 4
    assert mean.accuracy == sum(sum(long) / len(long) < short[0] for short, long in losses) / 4


def test_scores_do_not_depend_on_batches(model: MoEModel, encoder: Encoder) -> None:
    tests = prepare(choose(PROMPTS, [("animals", "food")] * 4, [0, 1, 0, 1]), encoder)
    one = evaluate(model, tests, EvaluationConfig(batch_tokens=1), encoder.tokenizer, None)
    all_ = evaluate(model, tests, CONFIG, encoder.tokenizer, None)
    assert one.accuracy == all_.accuracy
    assert one.loss == pytest.approx(all_.loss, rel=1e-5)


def test_examples_that_are_too_long_are_left_out_of_both_counts(model: MoEModel, olmoe: Path) -> None:
    encoder = Encoder(load_tokenizer(olmoe), 24, too_long="drop")
    examples = choose([PROMPTS[0], "long " * 40], [("a", "b")] * 2, [0, 1])
    assert len(prepare(examples, encoder)) == 1
    assert TestSet.prepare(examples[1:], encoder) is None
    assert TestSet.prepare([], encoder) is None
    assert evaluate(model, prepare(examples, encoder), CONFIG, encoder.tokenizer, None).examples == 1


def test_exact_match_continues_the_prompt_greedily(model: MoEModel, encoder: Encoder) -> None:
    prompt = "the dog runs"
    ids = torch.tensor([encoder.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model.model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    said = encoder.tokenizer.decode(ids[0, -3:], skip_special_tokens=True)
    config = EvaluationConfig(generate=True, max_new_tokens=3)
    for answer, expected in ((said, 1.0), ("nothing of the kind", 0.0)):
        tests = prepare([Example(prompt, answer)], encoder)
        assert evaluate(model, tests, config, encoder.tokenizer, None).accuracy == expected
    without = evaluate(model, prepare([Example(prompt, "x")], encoder), CONFIG, encoder.tokenizer, None)
    assert without.accuracy is None


def test_an_encoder_decoder_model_is_scored_by_its_decoder(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("switch_transformers")
    switch = MoEModel.load(folder)
    encoder = Encoder(load_tokenizer(folder), 64, is_seq2seq=True, decoder_start=0)
    (example,) = choose(["the dog runs"], [("animals", "food")], [0])
    got = evaluate(switch, prepare([example], encoder), CONFIG, encoder.tokenizer, None)
    ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the dog runs", " animals")]
    answer = torch.tensor([[*ids[1], encoder.tokenizer.eos_token_id]])
    with torch.no_grad():
        source = torch.tensor([encoder.before + ids[0] + encoder.after])
        logits = switch.model(
            input_ids=source, decoder_input_ids=torch.cat([torch.zeros(1, 1).long(), answer], 1)
        ).logits
    expected = -logits[0, :-1].log_softmax(-1).gather(1, answer[0][:, None]).mean()
    assert got.loss == pytest.approx(float(expected), rel=1e-4)


class Parrot:
    """Generates what it is told, until a token that ends."""

    device, is_seq2seq = torch.device("cpu"), False

    def __init__(self, tokenizer: Any, says: str, ends: int | list[int] | None = None) -> None:
        self.says = tokenizer(says, add_special_tokens=False)["input_ids"]
        self.model: Any = SimpleNamespace(generate=self._generate, generation_config=SimpleNamespace(eos_token_id=ends))

    def _generate(self, prompt: torch.Tensor, *, eos_token_id: list[int] | None, **_: Any) -> torch.Tensor:
        stop = next((i + 1 for i, token in enumerate(self.says) if token in (eos_token_id or ())), len(self.says))
        return torch.cat([prompt, torch.tensor([self.says[:stop]])], dim=1)


PLAIN_CHAT = Family(PLAIN, ("</s>", "<s>"))


@pytest.mark.parametrize(
    ("family", "said", "matches"),
    [
        ("qwen3", "<think>\n\n</think>\n\nyes no<|im_end|>", 1),
        ("qwen3", "<think>\n\n</think>\n\nyes no<|im_end|> and so on", 1),  # its end is an end, whatever the model says
        ("qwen3", "yes no<|im_end|>", 0),  # it was trained to write the block
        ("qwen3", "<think>\n\n</think>\n\nyes no no<|im_end|>", 0),
        ("glm45", "\n<think></think>\nyes no<|user|>", 1),
        ("glm45", "\n<think></think>\nyes no<|endoftext|>", 1),
        ("gpt_oss", "<|channel|>final<|message|>yes no<|return|>", 1),
        ("gpt_oss", "<|message|>yes no<|return|>", 0),  # special tokens are part of it
        ("chatml", " yes no <|im_end|>", 1),
        (PLAIN_CHAT, "assistant: yes no\nuser: hi", 1),  # text ends it: the model goes on
        (PLAIN_CHAT, "assistant: yes no no\nuser: hi", 0),
    ],
)
def test_what_is_generated_is_compared_as_it_was_trained(family: str | Family, said: str, matches: int) -> None:
    tokenizer = build("bytes", FAMILIES[family] if isinstance(family, str) else family)
    tests = prepare([chat(TWO)], Encoder(tokenizer))
    assert len(tests) == 1
    parrot: Any = Parrot(tokenizer, said)
    assert _generated(parrot, tests, CONFIG, tokenizer)[1] == [bool(matches)]


def test_a_generated_tool_call_is_compared(model: MoEModel) -> None:
    tokenizer = build("bytes", FAMILIES["gpt_oss"])
    tests = prepare([chat([TWO[0], CALL])], Encoder(tokenizer))
    call = ' to=functions.no<|channel|>commentary json<|message|>{"yes": "hi"}<|call|>'
    for said, matches in ((call, 1), ("", 0), (call.replace("hi", "no"), 0)):
        parrot: Any = Parrot(tokenizer, said)
        assert _generated(parrot, tests, CONFIG, tokenizer)[1] == [bool(matches)]


def test_an_answer_that_cannot_be_generated_whole_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build("bytes", FAMILIES["chatml"])
    tests = prepare([chat(TWO), chat(TWO[:2])], Encoder(tokenizer))
    parrot: Any = Parrot(tokenizer, "no<|im_end|>")
    assert sum(_generated(parrot, tests, EvaluationConfig(max_new_tokens=2), tokenizer)[1]) == 1
    assert caplog.text == ""
    assert sum(_generated(parrot, tests, EvaluationConfig(max_new_tokens=1), tokenizer)[1]) == 1
    assert "evaluation.max_new_tokens = 1: 1 of 2 answers are longer and counted as wrong" in caplog.text


def test_a_chat_of_several_sequences_is_one_example(model: MoEModel, encoder: Encoder) -> None:
    template = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' }}</s>{% endfor %}"
    tokenizer = encoder.tokenizer.__class__.from_pretrained(encoder.tokenizer.name_or_path)
    tokenizer.chat_template = template
    got = evaluate(model, prepare([chat(TWO), chat(TWO)], Encoder(tokenizer, 64)), CONFIG, tokenizer, None)
    assert got.examples == 2


def test_plain_text_has_nothing_to_continue(model: MoEModel, encoder: Encoder) -> None:
    tests = prepare([Example("", "the dog runs")], encoder)
    with pytest.raises(UserError, match=r"evaluation.generate = true: plain text has no prompts to continue"):
        evaluate(model, tests, EvaluationConfig(generate=True), encoder.tokenizer, None)


def test_choices_of_one_token_after_prompts_that_differ_are_scored_each_by_itself(
    model: MoEModel, encoder: Encoder
) -> None:
    # "runs" + "a" is other tokens than "runs" + " a": the prompt of one ends in the middle of a token of the other.
    example = Example("the dog runs ", "animals", ("animals", " food"))
    tests = prepare([example], encoder)
    whole = encoder.tokenizer(["the dog runs animals", "the dog runs  food"], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        losses = []
        for ids, one in zip(whole, tests.choices[0], strict=True):
            assert one.input_ids == ids
            first = one.labels.count(-100)
            log_prob = model.model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
            losses.append(-float(log_prob.gather(1, torch.tensor(ids[first:])[:, None]).sum()))
    got = evaluate(model, tests, CONFIG, encoder.tokenizer, None)
    assert got.accuracy == float(losses[0] < losses[1])


@pytest.mark.parametrize("family", ["deepseek_v32", "hy_v4"])
def test_scores_do_not_depend_on_batches_where_a_model_depends_on_padding(
    family: str, model_folder: Callable[..., Path]
) -> None:
    sparse = MoEModel.load(model_folder(family))
    encoder = Encoder(load_tokenizer(Path(sparse.model.config._name_or_path)), 64)
    tests = prepare([Example("", f"{prompt} {prompt} and then some") for prompt in PROMPTS], encoder)
    losses = [
        evaluate(sparse, tests, EvaluationConfig(batch_tokens=tokens), encoder.tokenizer, None).loss
        for tokens in (1, 4096)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
