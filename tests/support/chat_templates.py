"""Chat templates in the manner of the common model families, over the default model's tokenizer.

Each keeps what makes its family hard: where system messages, tools and results go, what is trimmed or rewritten, what
separates messages, and which ids end a reply. They are written for these tests; only the markers are the families'.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer

from agentmem import models
from agentmem.sessions.chat.template import ChatTemplate, Delta, Dialogue

LLAMA3 = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' }}
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{{ '\n\n' }}{% endfor %}{% endif %}
{{- system + '<|eot_id|>' }}
{%- for message in rest %}
{%- if message.tool_calls %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{{- '{"name": "' + message.tool_calls[0].function.name + '", "parameters": ' }}
{{- message.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = none %}{% set rest = messages %}{% endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}
{%- set turns = namespace(count=0) %}
{%- for message in rest %}
{%- if message.role == 'user' or message.role == 'assistant' and not message.tool_calls %}
{%- if (message.role == 'user') != (turns.count % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set turns.count = turns.count + 1 %}
{%- endif %}
{%- endfor %}
{%- for message in rest %}
{%- if message.role == 'user' %}
{%- if tools and message == users[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' }}
{%- if loop.first and system %}{{ system + '\n\n' }}{% endif %}
{{- message.content + '[/INST]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('Tool call ids have 9 letters!') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content | trim + eos_token }}
{%- elif message.role == 'tool' %}
{%- set asked = rest[loop.index0 - 1] %}
{%- if not asked.tool_calls and asked.role != 'tool' %}{{ raise_exception('A result without a call!') }}{% endif %}
{{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported!') }}
{%- endif %}
{%- endfor %}"""

LLAMA2 = """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}
{%- else %}{% set rest = messages %}{% set system = false %}{% endif %}
{%- for message in rest %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content %}
{%- else %}{% set content = message.content %}{% endif %}
{%- if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{% set prefix = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}
{%- else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if message.role not in ['user', 'assistant'] %}{{ raise_exception(message.role + ' is no role') }}{% endif %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

QWEN3 = """{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
{{- '# Tools\n\n<tools>' }}{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
{{- '\n</tools>\n\nReturn <tool_call></tool_call> around a JSON object.<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(last=messages | length - 1, open=true) %}
{%- for message in messages[::-1] %}
{%- if ns.open and message.role == 'user' %}
{%- set ns.open = false %}{% set ns.last = messages | length - 1 - loop.index0 %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or message.role == 'system' and not loop.first %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}
{%- set thinking = '' %}{% set content = message.content %}
{%- if '</think>' in content %}
{%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thinking) %}
{{- '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{ content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '\n' if content or not loop.first }}{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""


@dataclass(frozen=True)
class Family:
    """A template, its control tokens (special, and added but not special), its BOS and the texts that end a reply."""

    name: str
    source: str | None
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    bos: str | None = None
    ends: tuple[str, ...] = ("<|im_end|>",)
    alternates: bool = False
    tools: bool = False

    def tokenizer(self) -> Any:
        """A copy of the default model's tokenizer that speaks this family's language."""
        made = copy.deepcopy(_base())
        if self.source is not None:
            made.add_special_tokens({"additional_special_tokens": [*self.special]})
            made.add_tokens([AddedToken(text, special=False, normalized=False) for text in self.added])
            made.chat_template, made.bos_token, made.eos_token = self.source, self.bos, self.ends[0]
        return made

    def end_ids(self, tokenizer: Any) -> list[int]:
        """The ids that end a reply, the template's own first."""
        return [tokenizer.convert_tokens_to_ids(text) for text in self.ends]


_THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
_INST = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]")
_RESULTS = ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<s>", "</s>")

FAMILIES = {
    family.name: family
    for family in (
        Family("chatml", None),
        Family("llama3", LLAMA3, _HEADERS, (), "<|begin_of_text|>", ("<|eot_id|>", "<|eom_id|>"), tools=True),
        Family("mistral", MISTRAL, (*_INST, *_RESULTS), (), "<s>", ("</s>",), alternates=True, tools=True),
        Family("llama2", LLAMA2, ("<s>", "</s>"), (), "<s>", ("</s>",), alternates=True),
        Family(
            "gemma",
            GEMMA,
            ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
            (),
            "<bos>",
            ("<end_of_turn>", "<eos>"),
            alternates=True,
        ),
        Family(
            "qwen3", QWEN3, ("<|im_start|>", "<|im_end|>"), _THINK, None, ("<|im_end|>", "<|endoftext|>"), tools=True
        ),
    )
}


@cache
def _base() -> Any:
    return AutoTokenizer.from_pretrained(models.default_folder())


@cache
def tokenizer(name: str) -> Any:
    """One family's tokenizer, shared: leave it as you found it."""
    return FAMILIES[name].tokenizer()


def template(name: str, **settings: Any) -> ChatTemplate:
    """One family's template with its ends."""
    made = tokenizer(name)
    return ChatTemplate(made, **{"eos": FAMILIES[name].end_ids(made), **settings})


def stock_text(name: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    """What the tokenizer itself renders."""
    return str(tokenizer(name).apply_chat_template(messages, tokenize=False, **settings))


def stock_ids(name: str, messages: list[dict[str, Any]], **settings: Any) -> list[int]:
    """What the tokenizer itself makes of the whole conversation."""
    return list(tokenizer(name).apply_chat_template(messages, tokenize=True, return_dict=False, **settings))


class Memory:
    """The ids that a session would hold: deltas as they come, replies as sampled."""

    def __init__(self, name: str, **settings: Any) -> None:
        """An empty memory of one family's model."""
        self.tokenizer, self.template = tokenizer(name), template(name, **settings)
        self.dialogue = Dialogue()
        self.ids: list[int] = []

    def append(self, *messages: dict[str, Any]) -> Delta:
        """Give messages."""
        self.dialogue, delta = self.template.append(self.dialogue, *messages)
        return self._feed(delta)

    def open(self) -> Delta:
        """Open a reply."""
        self.dialogue, delta = self.template.open_reply(self.dialogue)
        return self._feed(delta)

    def reply(self, text: str, end: str | None = None, tool_calls: list[dict[str, Any]] | None = None) -> None:
        """Open a reply, sample it, and close it: with the end of that text, or cut."""
        self.open()
        self.ids += self.tokenizer.encode(text, add_special_tokens=False)
        ended = None if end is None else int(self.tokenizer.convert_tokens_to_ids(end))
        self.ids += [] if ended is None else [ended]
        self.dialogue = self.template.close_reply(self.dialogue, text, end=ended, tool_calls=tool_calls)

    def text(self) -> str:
        """Everything that is held, read back."""
        return str(self.tokenizer.decode(self.ids))

    def parts(self, delta: Delta) -> list[tuple[str, int | None, str]]:
        """Role, message and text of every span."""
        return [(s.role, s.message, self.tokenizer.decode(delta.ids[s.start : s.stop])) for s in delta.spans]

    def _feed(self, delta: Delta) -> Delta:
        stops = [0, *(span.stop for span in delta.spans)]
        assert [span.start for span in delta.spans] == stops[:-1]
        assert stops[-1] == len(delta.ids)
        self.ids += delta.ids
        return delta
