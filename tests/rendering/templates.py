"""Chat templates of eleven families, written anew in the form that each documents; and some of other kinds.

Of each: the template, its special tokens (the first is the one that ends a text, the second what begins one), and
whether it takes a system's turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One family's template."""

    source: str
    special: tuple[str, ...]  # end of text, beginning of text, the rest
    others: tuple[str, ...] = ()  # tokens that are whole but not special
    system: bool = True


def _lines(*lines: str) -> str:
    return re.sub("%}\n", "%}{{ '\\\\n' }}", "".join(lines))  # templates lose a line break after a block


CHATML = _lines(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
LLAMA3 = _lines(
    "{{ bos_token }}{% for m in messages %}",
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}",
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
)
MISTRAL = _lines(  # the system's words stand before the last user's: earlier turns are written anew
    "{% if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}",
    "{% else %}{% set system, turns = '', messages %}{% endif %}",
    "{% set ns = namespace(last=0) %}",
    "{% for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}",
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}",
    "{% endfor %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}",
    "[INST] {% if system and loop.index0 == ns.last %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]",
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
)
QWEN3 = _lines(
    "{% if tools %}<|im_start|>system\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n",
    "</tools><|im_end|>\n{% endif %}{% set ns = namespace(last=-1) %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'tool' %}",
    "<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n",
    "{% elif m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% else %}",
    "{% set thought = m.reasoning_content or '' %}<|im_start|>assistant\n",
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}",
    "{{ m.content }}{% for call in m.tool_calls %}{% if m.content or not loop.first %}\n{% endif %}<tool_call>\n",
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>',
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
GPT_OSS = _lines(
    "<|start|>system<|message|>You are ChatGPT.<|end|>{% for m in messages %}{% if m.role == 'assistant' %}",
    "{% if m.thinking and loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>",
    "{% endif %}",
    "{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary ",
    "json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% else %}",
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}",
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}{% endif %}",
    "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>",
    "{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>",
    "{% else %}<|start|>developer<|message|># Instructions\n\n{{ m.content }}<|end|>{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
)
DEEPSEEK_V3 = _lines(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}",
    "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}",
    "{% elif m.role == 'tool' %}<｜tool▁outputs▁begin｜>{{ m.content }}<｜tool▁outputs▁end｜>",
    "{% else %}<｜Assistant｜>{{ m.content }}{% for call in m.tool_calls %}<｜tool▁calls▁begin｜>",
    "{{ call.function.name + '\n```json\n' + call.function.arguments + '\n```' }}<｜tool▁calls▁end｜>{% endfor %}",
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
)
GLM45 = _lines(  # no token ends an assistant's turn: the next marker does
    "[gMASK]<sop>{% set ns = namespace(last=-1) %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n",
    "{% if loop.index0 > ns.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>",
    "{% else %}<think></think>{% endif %}{% if m.content %}\n{{ m.content }}{% endif %}",
    "{% for call in m.tool_calls %}\n<tool_call>{{ call.function.name }}",
    "{% for key, value in call.function.arguments.items() %}\n<arg_key>{{ key }}</arg_key>\n",
    "<arg_value>{{ value }}</arg_value>{% endfor %}\n</tool_call>{% endfor %}",
    "{% elif m.role == 'tool' %}<|observation|>\n<tool_response>\n{{ m.content }}\n</tool_response>",
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
)
PHI35 = _lines(
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}",
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
)
GEMMA = _lines(
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}",
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}",
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n",
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
)
OLMO = _lines(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content }}{{ eos_token }}",
    "{% if not loop.last %}\n{% endif %}{% else %}<|{{ m.role }}|>\n{{ m.content }}\n{% endif %}{% endfor %}",
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
)
GRANITE = _lines(
    "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>You are Granite.<|end_of_text|>\n",
    "{% endif %}{% for m in messages %}",
    "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}",
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
)

FAMILIES = {
    "chatml": Family(CHATML, ("<|endoftext|>", "", "<|im_start|>", "<|im_end|>")),
    "llama3": Family(
        LLAMA3,
        ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "mistral": Family(MISTRAL, ("</s>", "<s>", "[INST]", "[/INST]")),
    "qwen3": Family(
        QWEN3,
        ("<|endoftext|>", "", "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    ),
    "gpt_oss": Family(GPT_OSS, ("<|return|>", "", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>")),
    "deepseek_v3": Family(
        DEEPSEEK_V3,
        ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>"),
    ),
    "glm45": Family(
        GLM45,
        ("<|endoftext|>", "", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    ),
    "phi35": Family(PHI35, ("<|endoftext|>", "", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "gemma": Family(GEMMA, ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), system=False),
    "olmo": Family(OLMO, ("<|endoftext|>", "<|begin|>")),
    "granite": Family(GRANITE, ("<|end_of_text|>", "", "<|start_of_role|>", "<|end_of_role|>")),
}
MARKED = _lines(  # it says itself what is generated: what is thought is not
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}",
    "{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}",
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}{{ m.content }}<|im_end|>\n{% endif %}",
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"  # no token ends anything
