"""Turns appended through chat templates: only what is new, as stock would have written it, each id in its span."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentmem.errors import SettingsRefused
from agentmem.sessions.chat.template import Delta, Dialogue
from support.chat_templates import FAMILIES, Memory, stock_ids, stock_text, template, tokenizer

SPECIAL = sorted(FAMILIES.keys() - {"llama2"})
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi there"}
ANSWER = {"role": "assistant", "content": "Hello."}
AGAIN = {"role": "user", "content": "And you?"}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds one.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def result(text: str) -> dict[str, Any]:
    """A tool's answer to CALL."""
    return {"role": "tool", "name": "add", "content": text, "tool_call_id": "abcdefghi"}


def squash(text: str) -> str:
    """The text without its white space, which templates trim."""
    return "".join(text.split())


@pytest.mark.parametrize("name", SPECIAL)
def test_deltas_are_stock_ids(name: str) -> None:
    """Given messages, one at a time, and the generation prompt together are stock's ids of the whole conversation."""
    memory, messages = Memory(name), [SYSTEM, USER, ANSWER, AGAIN]
    given = [SYSTEM, USER] if name == "qwen3" else messages  # its assistant message is written otherwise when last
    for message in given:
        memory.append(message)
    memory.open()

    assert memory.ids == stock_ids(name, given, add_generation_prompt=True)
    assert not memory.dialogue.rewrites


@pytest.mark.parametrize("name", FAMILIES)
def test_messages_together_are_stock_ids(name: str) -> None:
    """Messages given in one call are stock's ids, in every family, and every message has a span of its own."""
    memory, messages = Memory(name), [SYSTEM, USER, ANSWER, AGAIN]
    delta = memory.append(*messages)

    assert memory.ids == stock_ids(name, messages)
    assert [(span.role, span.message) for span in delta.spans] == [
        (message["role"], at) for at, message in enumerate(messages)
    ]
    for span, message in zip(delta.spans, messages, strict=True):
        assert message["content"] in memory.tokenizer.decode(delta.ids[span.start : span.stop])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_with_replies_reads_as_stock_writes_it(name: str) -> None:
    """Ended and cut replies, closed and gone on from: the memory reads like stock's rendering, white space apart."""
    family, memory = FAMILIES[name], Memory(name)
    memory.append(SYSTEM)
    messages: list[dict[str, Any]] = [SYSTEM]
    for turn, text in enumerate(["Fine.", "One, two", "Well"]):
        user = {"role": "user", "content": f"Question {turn}"}
        memory.append(user)
        memory.reply(text, None if turn == 1 else family.ends[0])
        messages += [user, {"role": "assistant", "content": text}]
    memory.append(AGAIN)
    expected = stock_text(name, [*messages, AGAIN])

    assert squash(memory.text()) == squash(expected)
    assert not memory.dialogue.rewrites
    ends = family.end_ids(memory.tokenizer)
    assert memory.ids.count(ends[0]) == expected.count(family.ends[0])
    if family.bos is not None:
        assert memory.ids.count(memory.tokenizer.bos_token_id) == expected.count(family.bos)
        assert memory.ids[0] == memory.tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma"])
def test_one_bos(name: str) -> None:
    """BOS comes once, from the template, however many deltas there are."""
    memory = Memory(name)
    for _ in range(3):
        memory.append(USER)
        memory.reply("Yes", FAMILIES[name].ends[0])

    assert memory.ids.count(memory.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(("name", "end", "closing"), [
    ("chatml", "<|im_end|>", "\n"),
    ("chatml", None, "<|im_end|>\n"),
    ("llama3", "<|eot_id|>", ""),
    ("llama3", "<|eom_id|>", ""),
    ("llama3", None, "<|eot_id|>"),
    ("gemma", "<eos>", "\n"),
    ("llama2", "</s>", ""),
    ("llama2", None, " </s>"),
    ("qwen3", "<|endoftext|>", "\n"),
])  # fmt: skip
def test_an_end_is_fed_once(name: str, end: str | None, closing: str) -> None:
    """What closes a reply heads the next delta, in the reply's span, without any end that was sampled."""
    memory = Memory(name)
    memory.append(USER)
    memory.reply("Yes", end)
    first, *others = memory.parts(memory.append(AGAIN))

    assert first[:2] == (("assistant", 1) if closing else ("user", 2))
    assert not closing or first[2] == closing
    assert len(others) == bool(closing)


def test_the_ends_are_a_union() -> None:
    """Ids of the generation config, one or several, join the tokenizer's own."""
    made = tokenizer("llama3")
    eot, eom = FAMILIES["llama3"].end_ids(made)

    assert template("llama3", eos=None).end_ids == {eot}
    assert template("llama3", eos=eom).end_ids == {eot, eom}
    assert template("llama3", eos=[eom, 7]).end_ids == {eot, eom, 7}


def test_a_default_system_prompt_has_its_own_span() -> None:
    """What ChatML writes before a first user message is nobody's message, with the role system; headers are not."""
    memory = Memory("chatml")
    parts = memory.parts(memory.append(USER))
    greeting = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"

    assert parts == [("system", None, greeting), ("user", 0, "<|im_start|>user\nHi there<|im_end|>\n")]
    assert memory.parts(memory.open()) == [("assistant", 1, "<|im_start|>assistant\n")]


def test_a_bos_alone_is_no_system_prompt() -> None:
    """Where only BOS stands before the first message, it belongs to that message."""
    memory = Memory("gemma")

    assert memory.parts(memory.append(USER)) == [("user", 0, "<bos><start_of_turn>user\nHi there<end_of_turn>\n")]


@pytest.mark.parametrize("name", ["mistral", "llama2", "gemma"])
def test_a_folded_system_message_waits(name: str) -> None:
    """Where the template folds it into the user's message, a lone one feeds nothing; then each has its share."""
    memory = Memory(name)

    assert memory.append(SYSTEM) == Delta()
    assert memory.dialogue.fed == 0
    (first, second) = memory.parts(memory.append(USER))
    assert first[:2] == ("system", 0)
    assert first[2].endswith("Be kind.")
    assert second[:2] == ("user", 1)
    assert memory.ids == stock_ids(name, [SYSTEM, USER])


def test_old_thinking_is_kept_and_said() -> None:
    """Where Qwen3 drops thinking once a user speaks, the memory keeps it, says so, and feeds only what is new."""
    memory = Memory("qwen3")
    memory.append(USER)
    memory.reply("<think>\nhm\n</think>\n\nYes", "<|im_end|>")
    delta = memory.append(AGAIN)

    assert memory.dialogue.rewrites
    assert memory.tokenizer.decode(delta.ids) == "\n<|im_start|>user\nAnd you?<|im_end|>\n"
    assert "hm" not in stock_text("qwen3", [USER, {"role": "assistant", "content": "<think>hm</think>Yes"}, AGAIN])


def test_a_reply_without_thinking_is_not_rewritten() -> None:
    """Qwen3's empty think block around the last reply was never fed, so its later absence is no rewriting."""
    memory = Memory("qwen3", history="refuse")
    for text in ("Yes", "No"):
        memory.append(USER)
        memory.reply(text, "<|im_end|>")
    memory.append(AGAIN)

    assert not memory.dialogue.rewrites
    assert "think" not in memory.text()


def test_a_given_message_that_is_rewritten_is_kept() -> None:
    """A given assistant message that Qwen3 wraps while it is last: what follows it is found all the same."""
    memory = Memory("qwen3")
    for message in (USER, ANSWER, AGAIN):
        memory.append(message)

    assert memory.dialogue.rewrites
    assert memory.text() == (
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello.<|im_end|>\n"
        "<|im_start|>user\nAnd you?<|im_end|>\n"
    )


def test_thinking_of_replies_with_calls_is_watched() -> None:
    """Thinking before a tool call stays while results come, and its loss at the next user's turn is said."""
    memory = Memory("qwen3", tools=[TOOL])
    memory.append(USER)
    memory.reply("<think>\nhm\n</think>\n\n<tool_call>…</tool_call>", "<|im_end|>", [CALL])
    memory.append(result("2"))
    memory.reply("Two", "<|im_end|>")
    assert not memory.dialogue.rewrites

    memory.append(AGAIN)

    assert memory.dialogue.rewrites


def test_history_can_be_refused() -> None:
    """With history="refuse", the refusal names what changed and the remedy, and changes nothing."""
    memory = Memory("qwen3", history="refuse")
    memory.append(USER)
    memory.reply("<think>\nhm\n</think>\n\nYes", "<|im_end|>")
    before = memory.dialogue

    with pytest.raises(SettingsRefused, match=r"rewrites earlier messages: it writes 'Yes.*holds '<think>hm.*'keep'"):
        memory.append(AGAIN)
    assert memory.dialogue == before


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen3"])
def test_results_of_two_calls(name: str, together: bool) -> None:
    """Results of parallel calls, given together or one by one, are fed as stock writes them, each with its span."""
    memory = Memory(name, tools=[TOOL])
    memory.append(USER)
    memory.reply("(the calls)", FAMILIES[name].ends[0], [CALL, CALL])
    given = len(memory.ids)
    deltas = [memory.append(result("2"), result("3"))] if together else [memory.append(result(n)) for n in "23"]
    memory.open()
    calls: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}
    chat: list[dict[str, Any]] = [USER, calls, result("2"), result("3")]
    whole = stock_text(name, chat, tools=[TOOL], add_generation_prompt=True)
    owners = [span.message for delta in deltas for span in delta.spans if span.role == "tool"]

    assert memory.tokenizer.decode(memory.ids[given:]) == whole[-len(memory.tokenizer.decode(memory.ids[given:])) :]
    assert memory.text().count(FAMILIES[name].ends[0]) == whole.count(FAMILIES[name].ends[0])
    assert owners == [2, 3]
    assert not memory.dialogue.rewrites


@pytest.mark.parametrize(("name", "owner"), [("llama3", None), ("qwen3", None), ("mistral", 0)])
def test_tools_are_in_the_first_span(name: str, owner: int | None) -> None:
    """Schemas stand once, in the system message's span; without one, before the first message or in it."""
    memory = Memory(name, tools=[TOOL])
    parts = memory.parts(memory.append(SYSTEM, USER))
    assert parts[0][:2] == ("system", 0)
    assert "Adds one." in parts[0][2]
    assert "Adds one." not in parts[1][2]

    bare = Memory(name, tools=[TOOL])
    first, *_ = bare.parts(bare.append(USER))
    assert first[1] == owner
    assert "Adds one." in first[2]


def test_a_dialogue_survives_json() -> None:
    """A dialogue written and read back is equal, and goes on with the same ids."""
    memory = Memory("qwen3", tools=[TOOL])
    memory.append(SYSTEM, USER)
    memory.reply("<think>x</think>\n<tool_call></tool_call>", "<|im_end|>", [CALL])
    memory.append(result("2"))
    read = Dialogue.model_validate_json(memory.dialogue.model_dump_json())

    assert read == memory.dialogue
    assert read.owed
    assert template("qwen3", tools=[TOOL]).open_reply(read) == memory.template.open_reply(memory.dialogue)


def test_forks_do_not_disturb_one_another() -> None:
    """Two continuations of one dialogue are what each would be alone, and the dialogue stays as it was."""
    memory, made = Memory("chatml"), template("chatml")
    memory.append(USER)
    memory.reply("Yes", "<|im_end|>")
    root, text = memory.dialogue, memory.dialogue.model_dump_json()
    one, first = made.append(root, AGAIN)
    two, second = made.append(root, {"role": "user", "content": "No"})

    assert root.model_dump_json() == text
    assert (made.append(root, AGAIN), made.append(root, two.messages[-1])) == ((one, first), (two, second))
    assert one.messages[-1] != two.messages[-1]
    assert first.ids != second.ids


CONTENT = st.lists(
    st.sampled_from(
        ["word", " ", "\n", "é日本", "🙂", "{{ x }}", "{% raw %}", "<|", "|>", "[", "/INST", "\\n", '"', "0"]
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", SPECIAL)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_given_conversation_is_stock_ids(name: str, data: st.DataObject) -> None:
    """Whatever roles and contents, split over calls in whatever way: together they are stock's ids, all in spans."""
    roles = ["user", "assistant"] * data.draw(st.integers(1, 3))
    if not FAMILIES[name].alternates:
        roles = data.draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=5))
        roles = [role for role in roles if role != "assistant"] or ["user"] if name == "qwen3" else roles
    roles = ["system"] * data.draw(st.integers(0, 1)) + roles
    messages = [{"role": role, "content": data.draw(CONTENT)} for role in roles]
    memory, rest = Memory(name), messages
    while rest:
        count = data.draw(st.integers(1, len(rest)))
        memory.append(*rest[:count])
        rest = rest[count:]
    memory.open()

    assert memory.ids == stock_ids(name, messages, add_generation_prompt=True)
