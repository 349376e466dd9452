"""What is trained, token by token: templates x tokenizers x shapes of chats.

Expected tokens are written out by hand, trained ones in brackets, line breaks as ⏎. All other combinations are held
against two rules: the tokens are those of the template's own text, and what is trained reads as the answers do.
"""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedalign.config.toml import load_config, read_config
from fedalign.data.batches import batches
from fedalign.data.bounded import bounded
from fedalign.data.chat import ChatTemplate, choose_template
from fedalign.data.encode import IGNORED, Encoded, Encoder, load_tokenizer
from fedalign.data.formats import Chat, Example
from fedalign.errors import UserError
from tests.rendering.kinds import KINDS, LOSSLESS, build, sentence_piece
from tests.rendering.templates import CHATML, FAMILIES, MARKED, PLAIN, Family


def turns(*said: str) -> list[dict[str, Any]]:
    """`role: words` each."""
    return [dict(zip(("role", "content"), one.split(": "), strict=True)) for one in said]


TWO = turns("user: hi", "assistant: no", "user: hi hi", "assistant: yes no")


def chat(messages: list[dict[str, Any]], answers: tuple[int, ...] | None = None, tools: Any = ()) -> Example:
    every = tuple(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return Example("", "x", chat=Chat(tuple(messages), every if answers is None else answers, tuple(tools)))


def shown(tokenizer: Any, one: Encoded) -> str:
    tokens = [token.replace("\n", "⏎") for token in tokenizer.convert_ids_to_tokens(one.input_ids)]
    for token, label in zip(one.input_ids, one.labels, strict=True):
        assert label in (token, IGNORED)
    return " ".join(f"[{t}]" if label != IGNORED else t for t, label in zip(tokens, one.labels, strict=True))


def rendered(family: Family, kind: str, example: Example) -> list[str]:
    tokenizer = build(kind, family)
    return [shown(tokenizer, one) for one in Encoder(tokenizer).encode([example])]


# ------------------------------------------------------------------------------------- answers after a prompt, by hand


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("metaspace_always", "▁hi ⏎ hi : [▁no] [</s>]"),
        ("metaspace_first", "▁hi ⏎ hi : [▁no] [</s>]"),
        ("metaspace_never", "hi ⏎ hi : [▁no] [</s>]"),
        ("prepend", "▁hi ⏎ hi : [▁no] [</s>]"),  # of " no" by itself: ▁ ▁no
        ("bytes", "hi Ċ hi : [Ġno] [</s>]"),
        ("bytes_trimmed", "hi Ċ hi : [Ġno] [</s>]"),
        ("words", "hi hi : [no] [</s>]"),
        ("slow", "hi ⏎ hi : [ no] [</s>]"),
    ],
)
def test_an_answer_has_the_tokens_that_it_has_after_its_prompt(kind: str, expected: str) -> None:
    tokenizer = build(kind)
    encoder = Encoder(tokenizer)
    example = Example("hi\nhi:", " no", (" no", " yes"))
    [free] = encoder.encode([Example("hi\nhi:", " no")])
    assert shown(tokenizer, free) == expected
    [one_of_two] = encoder.encode([example])
    assert shown(tokenizer, one_of_two) == expected
    assert shown(tokenizer, encoder.encode_choices([example])[0]) == expected.removesuffix(" [</s>]")
    assert encoder.encode_prompts([example]) == [free.input_ids[: free.labels.count(IGNORED)]]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("metaspace_always", "<s> ▁hi ⏎ [no] [</s>]"),  # of "no" by itself: ▁no
        ("metaspace_first", "<s> ▁hi ⏎ [no] [</s>]"),
        ("prepend", "<s> ▁hi ⏎ [no] [</s>]"),
        ("bytes", "<s> hi Ċ [no] [</s>]"),
    ],
)
def test_a_tokenizer_that_begins_every_text(kind: str, expected: str) -> None:
    tokenizer = build(kind, begins=True)
    [one] = Encoder(tokenizer).encode([Example("hi\n", "no")])
    assert shown(tokenizer, one) == expected


def test_a_token_across_the_boundary_is_the_answers() -> None:
    for kind in ("bytes", "metaspace_never", "slow"):
        tokenizer = build(kind)
        [one] = Encoder(tokenizer).encode([Example("n", "o")])
        assert shown(tokenizer, one) == "[no] [</s>]"


def test_spaces_that_offsets_leave_out_are_where_they_stand() -> None:
    for kind, expected in (("bytes_trimmed", "hi Ġ [Ġ] [Ġno] [</s>]"), ("bytes", "hi Ġ [Ġ] [Ġno] [</s>]")):
        tokenizer = build(kind)
        [one] = Encoder(tokenizer).encode([Example("hi ", "  no")])
        assert shown(tokenizer, one) == expected


def test_sentence_piece_in_python(tmp_path: Path) -> None:
    tokenizer = sentence_piece(tmp_path)
    assert not tokenizer.is_fast
    encoder = Encoder(tokenizer)
    [one] = encoder.encode([Example("hi\nhi:", " no")])
    assert shown(tokenizer, one) == "▁hi ⏎ hi : [▁no] [</s>]"
    assert encoder.encode_prompts([Example("hi\nhi:", " no")]) == [one.input_ids[:4]]
    for name, family in FAMILIES.items():
        tokenizer = sentence_piece(tmp_path, family)
        encoded = Encoder(tokenizer).encode([chat(TWO)])
        text = tokenizer.apply_chat_template(TWO, tokenize=False) + "<|user|>" * (name == "glm45")
        assert encoded[-1].input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        if name == "mistral":
            by_hand = "<s> [INST] ▁hi [/INST] [▁no] [</s>] [INST] ▁hi ▁hi [/INST] [▁yes] [▁no] [</s>]"
            assert [shown(tokenizer, one) for one in encoded] == [by_hand]
        trained = [label for one in encoded for label in one.labels if label != IGNORED]
        assert trained.count(tokenizer.convert_tokens_to_ids(ENDS[name])) == 2
        wanted = "".join(BEFORE.get(name, "") + words + ENDS[name] for words in ("no", "yes no"))
        assert "".join(tokenizer.decode(trained).split()) == "".join(wanted.split())


# --------------------------------------------------------------------------------------------------- chats, by hand

LLAMA_HEAD = "<|start_header_id|> {} <|end_header_id|> Ċ Ċ"
GPT_OSS_HEAD = (
    "<|start|> system <|message|> Y o u Ġa r e Ġ C h a t G P T . <|end|> <|start|> user <|message|> hi <|end|> "
)
BY_HAND = [
    (
        "chatml",
        "bytes",
        [
            "<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> assistant Ċ [no] [<|im_end|>] Ċ "
            "<|im_start|> user Ċ hi Ġhi <|im_end|> Ċ <|im_start|> assistant Ċ [yes] [Ġno] [<|im_end|>] Ċ"
        ],
    ),
    (
        "chatml",
        "prepend",
        [
            "<|im_start|> ▁user ⏎ hi <|im_end|> ▁ ⏎ <|im_start|> ▁assistant ⏎ [no] [<|im_end|>] ▁ ⏎ "
            "<|im_start|> ▁user ⏎ hi ▁hi <|im_end|> ▁ ⏎ <|im_start|> ▁assistant ⏎ [yes] [▁no] [<|im_end|>] ▁ ⏎"
        ],
    ),
    (
        "llama3",
        "bytes",
        [
            f"<|begin_of_text|> {LLAMA_HEAD.format('user')} hi <|eot_id|> {LLAMA_HEAD.format('assistant')} "
            f"[no] [<|eot_id|>] {LLAMA_HEAD.format('user')} hi Ġhi <|eot_id|> {LLAMA_HEAD.format('assistant')} "
            "[yes] [Ġno] [<|eot_id|>]"
        ],
    ),
    (
        "mistral",
        "metaspace_first",
        ["<s> [INST] ▁hi [/INST] [▁no] [</s>] [INST] ▁hi ▁hi [/INST] [▁yes] [▁no] [</s>]"],
    ),
    (
        "mistral",
        "prepend",  # a space of the template's and one of the tokenizer's
        ["<s> [INST] ▁ ▁hi [/INST] [▁] [▁no] [</s>] [INST] ▁ ▁hi ▁hi [/INST] [▁] [▁yes] [▁no] [</s>]"],
    ),
    (
        "qwen3",
        "bytes",  # an earlier answer has lost its thinking block
        [
            "<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> assistant Ċ "
            "[<think>] [Ċ] [Ċ] [</think>] [Ċ] [Ċ] [no] [<|im_end|>] Ċ",
            "<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> assistant Ċ no <|im_end|> Ċ "
            "<|im_start|> user Ċ hi Ġhi <|im_end|> Ċ <|im_start|> assistant Ċ "
            "[<think>] [Ċ] [Ċ] [</think>] [Ċ] [Ċ] [yes] [Ġno] [<|im_end|>] Ċ",
        ],
    ),
    (
        "gpt_oss",
        "bytes_trimmed",  # the last answer ends as no earlier one does
        [
            GPT_OSS_HEAD + "<|start|> assistant [<|channel|>] [f] [i] [n] [a] [l] [<|message|>] [no] [<|return|>]",
            GPT_OSS_HEAD + "<|start|> assistant <|channel|> f i n a l <|message|> no <|end|> "
            "<|start|> user <|message|> hi Ġhi <|end|> "
            "<|start|> assistant [<|channel|>] [f] [i] [n] [a] [l] [<|message|>] [yes] [Ġno] [<|return|>]",
        ],
    ),
    (
        "deepseek_v3",
        "bytes",
        [
            "<｜begin▁of▁sentence｜> <｜User｜> hi <｜Assistant｜> [no] [<｜end▁of▁sentence｜>] "
            "<｜User｜> hi Ġhi <｜Assistant｜> [yes] [Ġno] [<｜end▁of▁sentence｜>]"
        ],
    ),
    (
        "deepseek_v3",
        "metaspace_always",
        [
            "<｜begin▁of▁sentence｜> <｜User｜> ▁hi <｜Assistant｜> [▁no] [<｜end▁of▁sentence｜>] "
            "<｜User｜> ▁hi ▁hi <｜Assistant｜> [▁yes] [▁no] [<｜end▁of▁sentence｜>]"
        ],
    ),
    (
        "glm45",
        "bytes",  # the next marker ends an answer, the last one too
        [
            "[gMASK] <sop> <|user|> Ċ hi <|assistant|> [Ċ] [<think>] [</think>] [Ċ] [no] [<|user|>] "
            "Ċ hi Ġhi <|assistant|> [Ċ] [<think>] [</think>] [Ċ] [yes] [Ġno] [<|user|>]"
        ],
    ),
    (
        "glm45",
        "slow",
        [
            "[gMASK] <sop> <|user|> ⏎ hi <|assistant|> [⏎] [<think>] [</think>] [⏎] [no] [<|user|>] "
            "⏎ hi   hi <|assistant|> [⏎] [<think>] [</think>] [⏎] [y] [e] [s] [ no] [<|user|>]"
        ],
    ),
    (
        "phi35",
        "bytes",  # what ends the whole chat is not what ends an answer
        [
            "<|user|> Ċ hi <|end|> Ċ <|assistant|> Ċ [no] [<|end|>] Ċ <|user|> Ċ hi Ġhi <|end|> Ċ "
            "<|assistant|> Ċ [yes] [Ġno] [<|end|>] Ċ <|endoftext|>"
        ],
    ),
    (
        "gemma",
        "metaspace_never",
        [
            "<bos> <start_of_turn> user ⏎ hi <end_of_turn> ⏎ <start_of_turn> model ⏎ [no] [<end_of_turn>] ⏎ "
            "<start_of_turn> user ⏎ hi ▁hi <end_of_turn> ⏎ <start_of_turn> model ⏎ [yes] [▁no] [<end_of_turn>] ⏎"
        ],
    ),
    (
        "olmo",
        "bytes",  # its roles are no tokens
        [
            "<|begin|> < | user | > Ċ hi Ċ < | assistant | > Ċ [no] [<|endoftext|>] Ċ "
            "< | user | > Ċ hi Ġhi Ċ < | assistant | > Ċ [yes] [Ġno] [<|endoftext|>]"
        ],
    ),
    (
        "granite",
        "words",
        [
            "<|start_of_role|> system <|end_of_role|> y ##o ##u a ##r ##e g ##r ##a ##n ##i ##t ##e . <|end_of_text|> "
            "<|start_of_role|> user <|end_of_role|> hi <|end_of_text|> "
            "<|start_of_role|> assistant <|end_of_role|> [no] [<|end_of_text|>] "
            "<|start_of_role|> user <|end_of_role|> hi hi <|end_of_text|> "
            "<|start_of_role|> assistant <|end_of_role|> [yes] [no] [<|end_of_text|>]"
        ],
    ),
]


@pytest.mark.parametrize(("family", "kind", "expected"), BY_HAND)
def test_every_answer_is_trained_with_what_ends_it(family: str, kind: str, expected: list[str]) -> None:
    assert rendered(FAMILIES[family], kind, chat(TWO)) == expected


def test_text_ends_an_answer_where_no_token_does() -> None:
    plain = Family(PLAIN, ("</s>", "<s>"))
    [one] = rendered(plain, "bytes", chat(TWO))
    said = "user : Ġhi Ċ [assistant] [:] [Ġno] [Ċ] [user] [:] Ġhi Ġhi Ċ [assistant] [:] [Ġyes] [Ġno] [Ċ] [user] [:]"
    assert one == said  # the template does not ask for an answer, so the assistant's marker is the model's to say


def test_the_end_token_ends_an_answer_where_the_template_writes_nothing() -> None:
    one_turn = Family("{% for m in messages[:2] %}{{ m.content }} {% endfor %}", ("</s>", "<s>"))
    assert rendered(one_turn, "bytes", chat(TWO[:2])) == ["hi [Ġno] [Ġ] [</s>]"]


def test_a_template_that_marks_what_is_generated_is_used_as_it_says() -> None:
    thought = [*TWO[:3], {**TWO[3], "thinking": "hi"}]
    marked = Family(MARKED, FAMILIES["chatml"].special, ("<think>", "</think>"))
    assert rendered(marked, "bytes", chat(thought)) == [
        "<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> assistant Ċ [no] [<|im_end|>] Ċ <|im_start|> user Ċ hi Ġhi "
        "<|im_end|> Ċ <|im_start|> assistant Ċ <think> hi </think> [yes] [Ġno] [<|im_end|>] Ċ"
    ]


# ------------------------------------------------------------------------------------------------------ shapes of chats

CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "no", "arguments": {"yes": "hi"}}}],
}
TOOLS = [{"name": "no"}]
SHAPES = {
    "one": TWO[:2],
    "two": TWO,
    "system": [*turns("system: model"), *TWO],
    "ends on a user": TWO[:3],
    "begins with the assistant": [*turns("assistant: yes"), *TWO],
}
ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "qwen3": "<|im_end|>",
    "gpt_oss": "<|return|>",
    "deepseek_v3": "<｜end▁of▁sentence｜>",
    "glm45": "<|user|>",
    "phi35": "<|end|>",
    "gemma": "<end_of_turn>",
    "olmo": "<|endoftext|>",
    "granite": "<|end_of_text|>",
}
BEFORE = {
    "mistral": " ",
    "qwen3": "<think>\n\n</think>\n\n",
    "glm45": "\n<think></think>\n",
    "gpt_oss": "<|channel|>final<|message|>",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_templates_own_text(family: str, shape: str) -> None:
    messages = SHAPES[shape]
    refuses = {"system": ["gemma"], "begins with the assistant": ["mistral", "gemma"]}
    for kind in (*KINDS, "slow"):
        tokenizer = build(kind, FAMILIES[family])
        encoder = Encoder(tokenizer)
        if family in refuses.get(shape, ()):
            with pytest.raises(UserError, match=r"an example: the model's chat template refuses this chat: \S+"):
                encoder.encode([chat(messages)])
            continue
        encoded = encoder.encode([chat(messages)])
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        text = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
        text += "<|user|>" if family == "glm45" else ""  # it ends the answer
        assert encoded[-1].input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        if kind not in LOSSLESS or (kind == "metaspace_never" and "▁" in tokenizer.eos_token):
            continue  # decoding does not give the text back
        assert tokenizer.decode(encoded[-1].input_ids) == text
        answers = [m["content"] for i, m in enumerate(messages[: last + 1]) if m["role"] == "assistant" and i]
        trained = [label for one in encoded for label in one.labels if label != IGNORED]
        wanted = "".join(BEFORE.get(family, "") + words + ENDS[family] for words in answers)
        assert tokenizer.decode(trained) == wanted


def test_a_chat_is_one_sequence_unless_the_template_writes_its_history_anew() -> None:
    several = {"qwen3", "gpt_oss"}
    for name, family in FAMILIES.items():
        assert len(rendered(family, "bytes", chat(TWO))) == (2 if name in several else 1)
    assert len(rendered(FAMILIES["mistral"], "bytes", chat(SHAPES["system"]))) == 2  # the system's words move on
    encoded = Encoder(build("bytes", FAMILIES["qwen3"])).encode([chat(TWO), chat(TWO[:2])])
    assert [(one.example, one.repeats) for one in encoded] == [(0, True), (0, False), (1, False)]
    [batch] = batches(encoded, 1000, 10)
    assert batch.whole_B is not None
    assert [encoded[row].repeats for row in batch.rows] == (~batch.whole_B).tolist()


@pytest.mark.parametrize(
    ("family", "trained"),
    [
        (
            "qwen3",
            '<think>\n\n</think>\n\n<tool_call>\n{"name": "no", "arguments": {"yes": "hi"}}\n</tool_call><|im_end|>',
        ),
        (
            "deepseek_v3",
            '<｜tool▁calls▁begin｜>no\n```json\n{"yes": "hi"}\n```<｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
        ),
        (
            "glm45",
            "\n<think></think>\n<tool_call>no\n<arg_key>yes</arg_key>\n<arg_value>hi</arg_value>\n</tool_call>"
            "<|observation|>",
        ),
        ("gpt_oss", ' to=functions.no<|channel|>commentary json<|message|>{"yes": "hi"}<|call|>'),
    ],
)
def test_a_tool_call_is_trained_as_the_template_writes_it(family: str, trained: str) -> None:
    tokenizer = build("bytes", FAMILIES[family])
    tools = TOOLS if family == "qwen3" else ()
    for messages in ([TWO[0], CALL], [TWO[0], CALL, *turns("tool: hi", "assistant: yes")]):
        encoded = Encoder(tokenizer).encode([chat(messages, (1,), tools)])
        assert [tokenizer.decode([t for t in one.labels if t != IGNORED]) for one in encoded] == [trained]
    if tools:
        assert '<tools>\n{"name": "no"}\n</tools>' in tokenizer.decode(encoded[0].input_ids)


def test_what_was_thought_is_trained_where_it_is_last() -> None:
    tokenizer = build("bytes", FAMILIES["qwen3"])
    messages = [*TWO[:3], {**TWO[3], "reasoning_content": "hi"}]
    _, second = Encoder(tokenizer).encode([chat(messages)])
    assert tokenizer.decode([t for t in second.labels if t != IGNORED]) == "<think>\nhi\n</think>\n\nyes no<|im_end|>"
    tokenizer = build("bytes", FAMILIES["glm45"])
    [last] = Encoder(tokenizer).encode([chat(messages, (3,))])
    assert tokenizer.decode([t for t in last.labels if t != IGNORED]) == "\n<think>hi</think>\nyes no<|user|>"


def test_a_turn_of_no_weight_is_read_and_not_trained() -> None:
    [one] = rendered(FAMILIES["chatml"], "bytes", chat(TWO, (3,)))
    assert "assistant Ċ no <|im_end|>" in one
    assert "assistant Ċ [yes] [Ġno] [<|im_end|>]" in one


@pytest.mark.parametrize(
    ("family", "message", "said"),
    [
        (
            "chatml",
            {**TWO[1], "reasoning_content": "yes"},
            r"messages\[1\] \(role 'assistant'\) has 'reasoning_content'",
        ),
        ("chatml", CALL, r"messages\[1\] \(role 'assistant'\) has 'tool_calls'"),
        ("glm45", {**TWO[1], "note": "yes"}, r"messages\[1\] \(role 'assistant'\) has 'note'"),
    ],
)
def test_what_the_template_has_no_place_for_is_refused(family: str, message: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"an example: {said}, and the model's chat template has no place for it"):
        rendered(FAMILIES[family], "bytes", chat([TWO[0], message]))


def test_tools_and_turns_that_the_template_has_no_place_for_are_refused() -> None:
    with pytest.raises(UserError, match="an example: the row has 'tools'"):
        rendered(FAMILIES["chatml"], "bytes", chat(TWO, tools=TOOLS))
    deaf = Family(
        "{% for m in messages if m.role != 'developer' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        ("e", "", "<|im_start|>", "<|im_end|>"),
    )
    with pytest.raises(UserError, match=r"messages\[0\] \(role 'developer'\) has 'content'"):
        rendered(deaf, "bytes", chat([*turns("developer: model"), *TWO]))


def test_a_name_that_the_template_has_no_place_for_is_told(caplog: pytest.LogCaptureFixture) -> None:
    rendered(FAMILIES["chatml"], "bytes", chat([{**TWO[0], "name": "yes"}, TWO[1]]))
    assert "the model's chat template has no place for 'name' of messages: it is left out" in caplog.text


def test_arguments_are_objects_or_text_as_the_template_takes_them() -> None:
    joined = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}</s>"
        "{% endfor %}"
    )
    tokenizer = build("bytes", Family(joined, ("</s>", "<s>")))
    [one] = Encoder(tokenizer).encode([chat([TWO[0], CALL])])
    assert tokenizer.decode(one.input_ids) == 'hi</s>{"yes": "hi"}</s>'  # and not as Python writes an object


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ messages[0].nothing.at_all }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(1000000000) %}{{ i }}{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_a_template_that_fails_is_told_in_one_line(source: str) -> None:
    with pytest.raises(UserError, match=r"an example: the model's chat template refuses this chat: \S+") as caught:
        rendered(Family(source, ("</s>", "<s>")), "bytes", chat(TWO))
    assert "\n" not in str(caught.value)


IN_A_LOOP = "{{% set ns = namespace(x={}) %}}{{% for i in range(99) %}}{{% set ns.x = ns.x {} ns.x %}}{{% endfor %}}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) | list %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 1 / (i - i + 1) }}{% endfor %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 'a' * messages | length * 10000000000 }}",
        "{{ 'a' * 300000000 }}",
        "{{ 'a' * 20000000 }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ ([('a' * 10000000)] * 100000) | join }}",
        IN_A_LOOP.format("'a'", "~"),
        IN_A_LOOP.format("3", "*"),
    ],
)
def test_a_template_that_does_not_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedalign.data.chat.SECONDS", 0.5)
    for template in (source, source + CHATML):
        with pytest.raises(
            UserError, match=r"^an example: the model's chat template does not end: it (took|wrote) \S+"
        ) as caught:
            rendered(Family(template, ("</s>", "<s>")), "bytes", chat(TWO))
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a stop may fall into a finaliser
def test_a_stop_that_falls_into_a_finaliser_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __del__(self) -> None:
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                pass

    def endless() -> None:
        slow = Slow()
        del slow  # which is when the first stop comes, and is lost
        while True:
            pass

    monkeypatch.setattr("fedalign.data.bounded.AGAIN", 0.1)
    with pytest.raises(TimeoutError, match=r"it took more than 0\.2 seconds"):
        bounded(endless, 0.2, 2**29)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the same
def test_a_template_is_stopped_in_any_thread_and_where_only_one_rendering_is_endless(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedalign.data.chat.SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    asks = f"{{% if add_generation_prompt %}}{endless}{{% endif %}}{CHATML}"
    probed = f"{{% if messages | length == 1 %}}{endless}{{% endif %}}{CHATML}"
    told: list[str] = []

    def render(source: str) -> None:
        with pytest.raises(UserError) as caught:
            rendered(Family(source, FAMILIES["chatml"].special), "bytes", chat(TWO))
        told.append(str(caught.value))

    for source in (asks, probed, MARKED.replace("{{ m.content }}", endless)):
        thread = threading.Thread(target=render, args=(source,))
        thread.start()
        thread.join()
    assert (
        told
        == [
            "an example: the model's chat template does not end: it took more than 0.2 seconds. "
            "Use a model with another."
        ]
        * 3
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_asks_for_an_answer_is_what_stands_before_one_in_training(family: str, shape: str) -> None:
    chats = ChatTemplate(build("bytes", FAMILIES[family]))
    messages = SHAPES[shape]
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    try:
        trained = chats.last(chat(messages[: last + 1]))
    except UserError:
        with pytest.raises(UserError, match="the model's chat template refuses this chat"):
            chats.asked(messages[:last], (), "prompt")
        return
    assert chats.asked(messages[:last], (), "prompt") == trained.text[: trained.answers[0][0]]


def test_an_asking_person_is_refused_in_a_line_what_training_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedalign.data.chat.SECONDS", 0.2)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    raising = "{{ raise_exception('no system') }}"
    for source, told in (
        ("", "the model's tokenizer has no chat template"),
        (endless + CHATML, r"prompt: the model's chat template does not end: it took more than 0\.2 seconds"),
        ("{{ 9 ** 9 ** 9 }}" + CHATML, r"takes powers \(\*\*\)"),
        (raising + CHATML, r"prompt: the model's chat template refuses this chat: no system\. "),
    ):
        chats = ChatTemplate(build("bytes", Family(source, FAMILIES["chatml"].special)))
        with pytest.raises(UserError, match=told):
            chats.asked(TWO[:1], (), "prompt")


def test_asking_adds_no_thinking_block_that_training_leaves_out_and_writes_arguments_as_it_does() -> None:
    thinks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    chats = ChatTemplate(build("bytes", Family(thinks, FAMILIES["chatml"].special)))
    assert chats.asked(TWO[:1], (), "prompt").endswith("<|im_start|>assistant\n")
    joins = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.name + ' ' + c.arguments }}{% endfor %}{% endfor %}"
    chats = ChatTemplate(build("bytes", Family(joins + CHATML, FAMILIES["chatml"].special)))
    called = {"role": "assistant", "content": "", "tool_calls": [{"name": "get", "arguments": {"a": "town"}}]}
    assert chats.asked([*TWO[:1], called], (), "prompt").startswith('get {"a": "town"}')


def test_a_template_that_takes_powers_is_refused() -> None:
    for source in ("{{ 9 ** 9 ** 9 }}", "{% set x = messages | length ** 99 %}"):
        with pytest.raises(UserError, match=r"the model's chat template takes powers \(\*\*\)"):
            rendered(Family(source + CHATML, FAMILIES["chatml"].special), "bytes", chat(TWO))
    bold = "{% macro f(a) %}**{{ a }}{{ '**' }}{% endmacro %}{{ f(**{'a': 2 * 3}) }}" + CHATML
    assert rendered(Family(bold, FAMILIES["chatml"].special), "bytes", chat(TWO))[0].startswith(
        "* * 6 * * <|im_start|>"
    )


def test_a_template_that_asks_with_more_than_it_writes(caplog: pytest.LogCaptureFixture) -> None:
    asks = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    [one] = rendered(Family(asks, FAMILIES["chatml"].special), "bytes", chat(TWO[:2]))
    assert one == "<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> assistant Ċ [no] [<|im_end|>] Ċ"
    assert "asks for an answer with '<think>'" in caplog.text


def test_prompts_of_chats_end_where_the_last_answer_begins() -> None:
    tokenizer = build("bytes", FAMILIES["qwen3"])
    encoder = Encoder(tokenizer)
    [prompt] = encoder.encode_prompts([chat(TWO[:3])])
    assert tokenizer.decode(prompt) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    [answer] = encoder.encode_answers([chat(TWO[:3])])
    assert tokenizer.decode(answer) == "<think>\n\n</think>\n\nno<|im_end|>"


# ------------------------------------------------------------------------------------------- what trains nothing


def test_what_trains_nothing_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(build("words"))
    [one] = encoder.encode([Example("hi", " no"), Example("hi", "\n", where="a.csv, row 2")])
    assert one.example == 0
    assert "1 (a.csv, row 2) of 2 examples left out: no answer that could be trained" in caplog.text
    assert encoder.encode_choices([Example("hi", " no", (" no", "\n"))]) == []
    alone = build("words", Family("", ("", "")))  # it has no token to begin or end with: nothing predicts the first
    assert Encoder(alone).encode([Example("", "hi")]) == []
    assert len(Encoder(alone).encode([Example("", "hi no")])) == 1


def test_an_answer_that_is_cut_to_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build("bytes", begins=True)
    assert Encoder(tokenizer, 1, too_long="truncate").encode([Example("hi", " no", where="b.csv, row 1")]) == []
    assert "1 (b.csv, row 1) of 1 examples left out" in caplog.text


def test_a_chat_that_ends_on_a_user_is_read_to_its_last_answer() -> None:
    tokenizer = build("bytes", FAMILIES["chatml"])
    messages = [*TWO[:2], {"role": "user", "content": "hi " * 100}]
    [one] = Encoder(tokenizer, 32, too_long="truncate").encode([chat(messages)])
    assert shown(tokenizer, one) == ("<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> assistant Ċ [no] [<|im_end|>] Ċ")


# A template that the configuration chooses.


def test_a_base_model_learns_chats_as_chatml_and_stops_at_its_own_end() -> None:
    tokenizer = copy.deepcopy(build("bytes", Family("", ("<|endoftext|>", ""))))
    choose_template(tokenizer, "chatml")
    [one] = Encoder(tokenizer).encode(
        [chat(turns("system: yes", "user: hi", "assistant: no", "user: hi", "assistant: yes"))]
    )
    text = "<|im_start|>system\nyes<|endoftext|>\n<|im_start|>user\nhi<|endoftext|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(one.input_ids).startswith(text + "no<|endoftext|>\n")
    trained = [token for token, label in zip(one.input_ids, one.labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(trained) == "no<|endoftext|>yes<|endoftext|>"


def test_a_template_of_a_file_is_used_and_saved_with_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("\ufeff" + PLAIN, encoding="utf-8")
    config = load_config(None, [f"data.chat_template={tmp_path / 'mine.jinja'}"])
    assert config.data.chat_template == PLAIN  # a run keeps the text, whatever becomes of the file
    assert read_config(config.to_toml()) == config
    tokenizer = copy.deepcopy(build("bytes", FAMILIES["chatml"]))
    choose_template(tokenizer, config.data.chat_template)
    assert tokenizer.decode(Encoder(tokenizer).encode([chat(TWO)])[0].input_ids).startswith("user: hi\nassistant: no")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == PLAIN


@pytest.mark.parametrize("content", [None, "no braces"])
def test_a_file_that_holds_no_template_is_one_line(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "mine.jinja"
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        UserError, match=r"data.chat_template = '.*mine.jinja': (no file that can be read|holds no Jinja)"
    ):
        load_config(None, [f"data.chat_template={file}"])
    with pytest.raises(
        UserError, match=r"data.chat_template = 'mine.jinja': no template. Choose one of: model, chatml"
    ):
        choose_template(
            copy.deepcopy(build("bytes", FAMILIES["chatml"])), "mine.jinja"
        )  # as a configuration from elsewhere says


def test_the_models_own_template_stays() -> None:
    tokenizer = copy.deepcopy(build("bytes", FAMILIES["chatml"]))
    choose_template(tokenizer, "model")
    assert tokenizer.chat_template == CHATML
