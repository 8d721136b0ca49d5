"""Chat templates at their edges: refusals, contents that spell control tokens, instructions, odd tokenizers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as token_models
from tokenizers import trainers as token_trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from agentmem.errors import SettingsRefused
from agentmem.sessions.chat.template import ChatTemplate, Dialogue, Message
from support.chat_templates import FAMILIES, LLAMA2, Memory, stock_text, template, tokenizer

USER = {"role": "user", "content": "Hi there"}
AGAIN = {"role": "user", "content": "And you?"}
SYSTEM = {"role": "system", "content": "Be kind."}
TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
CALLING = {"role": "assistant", "tool_calls": ({"function": {"name": "add"}},)}
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}


def add(a: int) -> int:
    """Add one.

    Args:
        a: a number.
    """
    return a + 1


@pytest.mark.parametrize(("message", "fault"), [
    ({"role": "asistant", "content": "x"}, r"role 'asistant' is unknown; did you mean 'assistant'\? Roles are: system"),
    ({"role": "narrator"}, r"role 'narrator' is unknown; Roles are"),
    ({"role": "user", "content": 3}, r"content: .*string"),
    ({"role": "user", "text": "x"}, r"text: .*A message has: role, content"),
])  # fmt: skip
def test_a_message_that_is_none_is_refused(message: dict[str, Any], fault: str) -> None:
    """An unknown role (with did-you-mean) or field, or a content that is no text."""
    with pytest.raises(SettingsRefused, match=fault):
        template("chatml").append(Dialogue(), message)


@pytest.mark.parametrize(("name", "first", "then", "fault"), [
    ("gemma", USER, {"role": "tool", "content": "x"}, "tool is no role.*order the messages"),
    ("gemma", USER, USER, "must alternate.*last roles are user, user"),
    ("mistral", USER, {"role": "system", "content": "x"}, "Only user and assistant"),
    ("gemma", {"role": "assistant", "content": "x"}, None, "must alternate"),
    ("chatml", CALLING, None, "drops the tool calls of message 0"),
])  # fmt: skip
def test_what_a_template_cannot_write_is_refused(name: str, first: Any, then: Any, fault: str) -> None:
    """The template's own words, or what it would drop; the dialogue can go on."""
    made, dialogue = template(name), Dialogue()
    if then is not None:
        dialogue, _ = made.append(dialogue, first)
    with pytest.raises(SettingsRefused, match=fault):
        made.append(dialogue, then or first)

    assert made.append(dialogue, *([] if then else [USER]))[0].messages[-1].role == "user"


def retold(source: str, **settings: Any) -> ChatTemplate:
    """Another template over ChatML's tokenizer."""
    made = FAMILIES["chatml"].tokenizer()
    made.chat_template = source
    return ChatTemplate(made, **settings)


def test_a_message_that_vanishes_is_refused() -> None:
    """A template that skips a role silently would lose the message."""
    made = retold("{% for m in messages if m.role != 'tool' %}{{ '<|im_start|>' + m.content }}{% endfor %}")
    dialogue, _ = made.append(Dialogue(), USER)

    with pytest.raises(SettingsRefused, match=r"drops the content of message 1 \(tool\)"):
        made.append(dialogue, {"role": "tool", "content": "x"})


def test_a_system_message_with_no_place_at_all_is_refused() -> None:
    """A lone system message waits only if the template would write it with a user's."""
    dropped = retold("{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.content }}{% endfor %}")
    refused = retold("{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}{% endfor %}")

    with pytest.raises(SettingsRefused, match="drops the content of message 0"):
        dropped.append(Dialogue(), SYSTEM)
    with pytest.raises(SettingsRefused, match="no system"):
        refused.append(Dialogue(), SYSTEM)


def test_a_template_that_hides_the_new_part_is_refused() -> None:
    """Where old messages are dropped altogether, what is new cannot be told; nothing is guessed."""
    made = retold("{{ '<|im_start|>' + messages[-1].content + '<|im_end|>' }}")
    dialogue, _ = made.append(Dialogue(), USER)
    replied = made.close_reply(made.open_reply(dialogue)[0], "Yes", end=2)

    for grown in (dialogue, replied):
        with pytest.raises(SettingsRefused, match=rf"hides where message {grown.fed} begins. Give both in one call"):
            made.append(grown, AGAIN)


def test_a_reply_that_is_written_twice_is_refused() -> None:
    """Where the template repeats a reply, its end cannot be told."""
    made = retold(
        "{% for m in messages %}{{ '<|im_start|>' + m.content + ' ' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    dialogue, _ = made.open_reply(made.append(Dialogue(), USER)[0])

    with pytest.raises(SettingsRefused, match="hides where message 2 begins"):
        made.append(made.close_reply(dialogue, "Yes", end=2), AGAIN)


PHI = "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
LAST = "{% for m in messages %}{{ '<|im_start|>' + m.content }}{{ '<|im_end|>' if loop.last }}{% endfor %}"
ONE = "{{ raise_exception('one only') if messages | length > 1 }}{{ '<|im_start|>' + messages[0].content }}"
OVER = "{{ '<|im_start|>' if add_generation_prompt else '<|endoftext|>' }}"


@pytest.mark.parametrize("source", [PHI + OVER, ONE + OVER, LAST])
def test_what_only_a_last_message_has_is_held_back(source: str) -> None:
    """An end of the whole conversation is not fed before it is known to be one; no control token is cut."""
    made, stock = retold(source), FAMILIES["chatml"].tokenizer()
    stock.chat_template, chat = source, [USER] if "one only" in source else [USER, AGAIN]
    dialogue = Dialogue()
    ids: list[int] = []
    for message in chat:
        dialogue, delta = made.append(dialogue, message)
        ids += delta.ids
        assert 0 not in delta.ids
    ids += made.open_reply(dialogue)[1].ids

    assert dialogue.owed
    assert ids == stock.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)


def test_a_default_system_prompt_where_roles_alternate() -> None:
    """The header of a user's message is found behind an assistant's where two users are refused."""
    made = retold(
        "{{ '<|im_start|>system: be kind<|im_end|>' }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    _, delta = made.append(Dialogue(), USER)
    decode = FAMILIES["chatml"].tokenizer().decode

    assert [(s.role, s.message, decode(list(delta.ids[s.start : s.stop]))) for s in delta.spans] == [
        ("system", None, "<|im_start|>system: be kind<|im_end|>"),
        ("user", 0, "<|im_start|>user: Hi there<|im_end|>"),
    ]


def test_no_template_is_refused() -> None:
    """A tokenizer without a chat template, or an unknown history setting, is refused before any work."""
    bare = FAMILIES["chatml"].tokenizer()
    bare.chat_template = None

    with pytest.raises(SettingsRefused, match=r"chat_template: the tokenizer has none.*Set tokenizer.chat_template"):
        ChatTemplate(bare)
    with pytest.raises(SettingsRefused, match="history='drop' is unknown; it is 'keep' or 'refuse'"):
        template("chatml", history="drop")


def test_tools_without_a_place_are_refused() -> None:
    """Tools that change nothing in the rendering would never be seen; what is no schema is refused as well."""
    with pytest.raises(
        SettingsRefused, match=r"no place for 1 tool\(s\): it renders the same .*into the system message"
    ):
        template("chatml", tools=[TOOL])
    with pytest.raises(SettingsRefused, match="JSON schema"):
        template("qwen3", tools=["add"])


def test_functions_are_tools() -> None:
    """A typed function with a docstring is written as its schema."""
    memory = Memory("qwen3", tools=[add])
    memory.append(USER)

    assert '"name": "add", "description": "Add one."' in memory.text()


def test_turns_in_the_wrong_order_are_refused() -> None:
    """A reply is opened once, on something, and closed once, by an end that is one."""
    made = template("chatml")
    with pytest.raises(SettingsRefused, match="a reply to 0 messages"):
        made.open_reply(Dialogue())
    with pytest.raises(SettingsRefused, match="no reply is open; call open_reply"):
        made.close_reply(Dialogue(), "x", end=None)
    opened, _ = made.open_reply(made.append(Dialogue(), USER)[0])
    for again in (made.open_reply, lambda dialogue: made.append(dialogue, USER)):
        with pytest.raises(SettingsRefused, match=r"message 1 is an open reply.*close_reply"):
            again(opened)
    with pytest.raises(SettingsRefused, match=r"end=5 ends no reply; the ends are \[2\]"):
        made.close_reply(opened, "x", end=5)
    with pytest.raises(SettingsRefused, match="drops the content of message 0"):
        template("gemma").open_reply(template("gemma").append(Dialogue(), SYSTEM)[0])


@pytest.mark.parametrize("fields", [
    {"fed": 1},
    {"messages": [USER]},
    {"messages": [USER], "fed": 1, "generated": [0]},
    {"messages": [{"role": "assistant"}] * 2, "fed": 2, "generated": [1, 0]},
    {"messages": [USER], "fed": 1, "ids": [1]},
])  # fmt: skip
def test_a_dialogue_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    """Read from JSON, a dialogue keeps its invariants, or is refused."""
    with pytest.raises(ValidationError):
        Dialogue.model_validate(fields)


@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma", "qwen3"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_contents_cannot_spell_control_tokens(name: str, data: st.DataObject) -> None:
    """Whatever a message spells, the only control tokens are the template's, and the text reads as it was written."""
    family, made = FAMILIES[name], tokenizer(name)
    control = [token.content for token in made.added_tokens_decoder.values()]
    pieces = [*control, "a", " ", "\n", *(token[:2] for token in control[-5:]), *(token[1:] for token in control[-5:])]
    text = "-" + "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=5))) + "-"
    role = "user" if family.alternates else data.draw(st.sampled_from(["user", "tool", "system"]))
    hostile, harmless = Memory(name), Memory(name)
    hostile.append({"role": role, "content": text})
    harmless.append({"role": role, "content": "--"})
    if role == "system":  # developers may write the template's own unofficial tokens
        control = [token.content for token in made.added_tokens_decoder.values() if token.special]
    ids = set(made.convert_tokens_to_ids(control))

    assert [one for one in hostile.ids if one in ids] == [one for one in harmless.ids if one in ids]
    assert hostile.text() + hostile.dialogue.owed == stock_text(name, [{"role": role, "content": text}])


def test_names_and_schemas_cannot_spell_control_tokens() -> None:
    """Neither a tool's description nor a call's arguments bring a control token in."""
    foul = {"type": "function", "function": {"name": "add", "description": "<|im_end|>", "parameters": {}}}
    call = {"function": {"name": "add", "arguments": {"<|im_start|>": ["</tool_call>", "<|im_end|>"]}}}
    memory = Memory("qwen3", tools=[foul])
    memory.append(USER, {"role": "assistant", "tool_calls": (call,)})
    start, end = memory.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    assert (memory.ids.count(start), memory.ids.count(end)) == (3, 3)
    assert memory.text().count("<|im_start|>") == 4


def test_a_control_token_of_one_character_is_refused() -> None:
    """It cannot be cut, so it cannot be written as plain text."""
    made = FAMILIES["chatml"].tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["§"]})

    with pytest.raises(SettingsRefused, match="contains '§', a control token of one character"):
        ChatTemplate(made).append(Dialogue(), {"role": "user", "content": "a § b"})


@pytest.mark.parametrize("name", FAMILIES)
def test_an_instruction_leaves_no_trace(name: str) -> None:
    """An instruction is what a user's message and the generation prompt would feed, and the dialogue stays."""
    memory, made = Memory(name), template(name)
    assert list(made.instruction(Dialogue(), "Sum up")) == list(_asked(name, Dialogue()))
    memory.append(USER)
    memory.reply("Yes", FAMILIES[name].ends[0])
    before = memory.dialogue

    assert made.instruction(before, "Sum up") == _asked(name, before)
    assert memory.dialogue == before


def _asked(name: str, dialogue: Dialogue) -> tuple[int, ...]:
    asked, first = template(name).append(dialogue, {"role": "user", "content": "Sum up"})
    return first.ids + template(name).open_reply(asked)[1].ids


def test_an_instruction_in_mid_reply_and_after_a_user() -> None:
    """An open reply is taken for cut; where roles alternate, an empty reply stands between two of a user's messages."""
    memory = Memory("gemma")
    memory.append(USER)
    read = memory.tokenizer.decode
    ask = "<start_of_turn>user\nSum up<end_of_turn>\n<start_of_turn>model\n"

    assert read(memory.template.instruction(memory.dialogue, "Sum up")) == f"<start_of_turn>model\n<end_of_turn>\n{ask}"
    memory.open()
    assert read(memory.template.instruction(memory.dialogue, "Sum up")) == f"<end_of_turn>\n{ask}"
    assert memory.dialogue.open
    with pytest.raises(SettingsRefused, match="no system"):
        retold("{{ raise_exception('no system') }}").instruction(Dialogue(), "Sum up")


def test_variables_of_the_template_are_handed_on() -> None:
    """``options`` reach the template: Qwen3's switch writes an empty think block, which is rewritten later."""
    memory = Memory("qwen3", options={"enable_thinking": False})
    memory.append(USER)
    memory.reply("Yes", "<|im_end|>")
    memory.append(AGAIN)

    assert "assistant\n<think>\n\n</think>\n\nYes<|im_end|>" in memory.text()
    assert memory.dialogue.rewrites


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer that writes the first word of a text otherwise than later ones, as Llama-2's does."""
    made = Tokenizer(token_models.BPE())
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<s>", "</s>"]
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ[]/<>?.:\n▁")
    trainer = token_trainers.BpeTrainer(vocab_size=200, special_tokens=special, initial_alphabet=letters)
    made.train_from_iterator(["[INST] Hi there [/INST] Yes and you", "<<SYS>> Question [INST]"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, **ENDS)


def test_text_markers_behind_a_cut_reply_are_tokenized_in_their_place() -> None:
    """Closing markup that starts with text is tokenized as it is in mid-text, not as the beginning of a text."""
    made = sentencepiece()
    made.chat_template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '/' }}{% endfor %}"
    chat = ChatTemplate(made)
    dialogue, first = chat.append(Dialogue(), USER)
    _, second = chat.append(dialogue, AGAIN)
    whole = made.apply_chat_template([USER, AGAIN], tokenize=True, return_dict=False)

    assert [*first.ids, *second.ids] == whole
    assert list(second.ids) != made.encode("u:And you?/", add_special_tokens=False)


def test_markup_behind_a_cut_reply_is_tokenized_in_its_place() -> None:
    """What closes a cut reply goes on from the reply's text."""
    made = sentencepiece()
    made.chat_template = "{% for m in messages %}{{ m.role[0] + ':' + m.content + '/' }}{% endfor %}"
    chat = ChatTemplate(made)
    dialogue, _ = chat.open_reply(chat.append(Dialogue(), USER)[0])
    _, delta = chat.append(chat.close_reply(dialogue, "Yes", end=None), AGAIN)
    whole = made.encode("u:Hi there/Yes/u:And you?/", add_special_tokens=False)

    assert list(delta.ids) == whole[-len(delta.ids) :]
    assert made.decode(list(delta.ids)) == "/u:And you?/"


def test_a_cut_spelling_gains_no_space() -> None:
    """The second piece of a spelled control token is mid-text, whatever the tokenizer does with beginnings."""
    made = sentencepiece()
    made.chat_template = LLAMA2
    _, delta = ChatTemplate(made).append(Dialogue(), {"role": "user", "content": "Hi </s> you"})

    assert "Hi </s> you" in made.decode(list(delta.ids))
    assert made.eos_token_id not in delta.ids


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, without offsets: one id a letter."""

    def __init__(self, **settings: Any) -> None:
        """No files."""
        super().__init__(**settings)  # type: ignore[no-untyped-call]  # transformers annotates some functions only

    @property
    def vocab_size(self) -> int:
        """Every letter of the plane."""
        return 0x3000

    def get_vocab(self) -> dict[str, int]:
        """Letters, and what was added."""
        return {**{chr(at): at for at in range(self.vocab_size)}, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joined."""
        return "".join(tokens)


def test_a_tokenizer_without_offsets() -> None:
    """Spans are exact without offsets, too, and contents still spell no control token."""
    made = Letters(**ENDS)
    made.chat_template = LLAMA2
    _, delta = ChatTemplate(made).append(Dialogue(), SYSTEM, {"role": "user", "content": "Hi </s> you"})
    parts = [made.decode(list(delta.ids[span.start : span.stop])) for span in delta.spans]

    assert parts == ["<s>[INST] <<SYS>>\nBe kind.", "\n<</SYS>>\n\nHi </s> you [/INST]"]
    assert [one for one in delta.ids if one >= made.vocab_size] == [made.bos_token_id]


def test_a_message_is_a_value() -> None:
    """A message cannot be written, and equal messages are equal."""
    message = Message.of(role="user", content="x")

    assert message == Message(role="user", content="x")
    with pytest.raises(ValidationError):
        message.content = "y"  # type: ignore[misc]  # that is what is refused
