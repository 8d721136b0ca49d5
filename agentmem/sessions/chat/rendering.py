"""Rendering of conversations through a tokenizer's chat template.

To find a message in the rendered text, its content can be replaced by a sentinel, a unique random word.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

from agentmem.errors import SettingsRefused
from agentmem.sessions.arguments import check_encodable
from agentmem.sessions.chat.control_tokens import Markup

if TYPE_CHECKING:
    from agentmem.sessions.chat.dialogue import Dialogue, Message

Chat = list[dict[str, Any]]
Tool = dict[str, Any] | Callable[..., Any]

# Exceptions that templates raise: their own refusals, and Python's if a message lacks a field that they read.
_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
_SHOWN = 300
"""Most characters of a template's error that are shown, since the error may quote the whole template."""


class Renderer:
    """A chat template with its tools and variables, which renders conversations as text.

    ``markup`` handles the control tokens of the template.
    """

    def __init__(self, tokenizer: Any, tools: Sequence[Tool] | None, options: Mapping[str, Any] | None) -> None:
        """Find the tokenizer's template, and check that the template writes the tools.

        Raises:
            SettingsRefused: the tokenizer has no template, a tool is not a valid schema, or the template does not
                write the tools.

        """
        self.tokenizer, self.options = tokenizer, dict(options or {})
        check_encodable("tools", list(tools or ()))
        # Letters and digits survive trimming and every kind of escaping; random ones occur in no message.
        self.sentinel, mark = (f"x{secrets.token_hex(16)}x" for _ in range(2))
        self.markup = Markup(tokenizer, self._source(tools), mark)
        # A tool's description may come from a server elsewhere, so it must not spell control tokens either.
        self.tools = [self.markup.neutral(tool, "tool") for tool in tools] if tools else None
        if self.tools:
            self._check_tools()

    def _source(self, tools: Sequence[Tool] | None) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise SettingsRefused(
                "chat_template: the tokenizer has none, so turns cannot be written. Set tokenizer.chat_template to the "
                "model's Jinja template, or load an instruction-tuned model"
            )
        try:
            return str(self.tokenizer.get_chat_template(None, tools))
        except ValueError as error:
            raise SettingsRefused(f"chat_template: {error}") from error

    def _check_tools(self) -> None:
        user, system = {"role": "user", "content": "x"}, {"role": "system", "content": "x"}
        faults = []
        for chat in ([system, user], [user]):
            try:
                if self.write(chat, opened=True) != self.write(chat, opened=True, tools=None):
                    return
            except SettingsRefused as error:
                faults.append(str(error))
        reason = faults[0] if len(faults) > 1 else "it renders the same text with them as without"
        raise SettingsRefused(
            f"tools: the chat template has no place for {len(self.tools or ())} tool(s): {reason}. "
            "Write them into the system message, or use a model whose template knows tools"
        )

    def chat(self, dialogue: Dialogue) -> Chat:
        """Return the messages of a dialogue as the dicts that the template reads.

        In given messages, the texts of control tokens are marked, so that they are tokenized as plain text. Replies of
        the model stay as they are.
        """
        replies = set(dialogue.generated)
        return [self._plain(message, given=at not in replies) for at, message in enumerate(dialogue.messages)]

    def _plain(self, message: Message, *, given: bool) -> dict[str, Any]:
        plain = message.model_dump(exclude_none=True, mode="json")
        if given:
            return {key: self.markup.neutral(value, message.role) for key, value in plain.items()}
        return plain

    def write(self, chat: Chat, *, opened: bool = False, tools: Sequence[Tool] | str | None = "own") -> str:
        """Return the whole conversation as the template writes it; ``opened`` adds the generation prompt.

        The default ``"own"`` for ``tools`` means the renderer's own tools, and ``None`` means no tools.

        Raises:
            SettingsRefused: the template refuses the conversation; the message quotes the template's error.

        """
        try:
            text = self.tokenizer.apply_chat_template(
                chat,
                tools=self.tools if isinstance(tools, str) else tools,
                tokenize=False,
                add_generation_prompt=opened,
                **self.options,
            )
        except _FAULTS as error:
            raise _refusal(chat, error) from error
        return str(text)

    def tail(self, chat: Chat, index: int, *, opened: bool = False) -> str | None:
        """Return the rendered text after the content of the message ``index``, or ``None`` if the content is not found.

        If the message has tool calls, this is the text after the name of the last call. ``opened`` adds the generation
        prompt.
        """
        return self._after(_marked(chat, index, self.sentinel), opened=opened)

    def reply_tail(self, chat: Chat, index: int, ends: Sequence[str], *, ended: bool, opened: bool) -> str | None:
        """Return the text to feed after a generated reply, or ``None`` if this text cannot be found.

        The text begins with the markup that closes the reply, such as an end token. Everything that the template writes
        after this markup follows. ``ends`` are the texts of the tokens that end a reply. If ``ended`` is true, the
        model has already written an end token, and the returned text begins after this token. ``opened`` adds the
        generation prompt.

        The reply is rendered with the sentinel (a random word) as its content; the text begins after the sentinel. In a
        reply with tool calls, the sentinel is the name of the last call instead, and the text begins at the first of
        the texts ``ends`` after the sentinel. If none of them follows, for example because the template does not write
        calls, the reply is rendered again without its calls.
        """
        reply = chat[index]
        if "tool_calls" in reply:
            bare = [{**call, "function": {**call.get("function", {}), "arguments": {}}} for call in reply["tool_calls"]]
            silent = {**reply, "content": "", "tool_calls": bare}  # the content already contains the calls as text
            calls = [*chat[:index], silent, *chat[index + 1 :]]
            text = self._after(_marked(calls, index, self.sentinel), opened=opened)
            found = [(text.find(end), -len(end)) for end in ends if end in text] if text else []
            if text and found:
                place, length = min(found)
                return text[place - length if ended else place :]
            chat = [*chat[:index], {"role": reply["role"], "content": ""}, *chat[index + 1 :]]
        text = self._after(_marked(chat, index, self.sentinel), opened=opened)
        if text is None or not ended:
            return text
        bare_text = text.lstrip()
        first = next((end for end in ends if bare_text.startswith(end)), None)
        return text if first is None else bare_text.removeprefix(first)

    def _after(self, chat: Chat, *, opened: bool) -> str | None:
        try:
            pieces = self.write(chat, opened=opened).split(self.sentinel)
        except SettingsRefused:
            return None
        return pieces[1] if len(pieces) == 2 else None  # noqa: PLR2004  # exactly one sentinel

    def before(self, chat: Chat, index: int) -> str:
        """Return the rendered text before the content of the message ``index``; empty if this content is not found.

        The content is not found if the template does not write it, or refuses the chat. If the message has tool calls,
        the text ends before the name of the last call.
        """
        try:
            text, found, _ = self.write(_marked(chat, index, self.sentinel)).partition(self.sentinel)
        except SettingsRefused:
            return ""
        return text if found else ""

    def shows(self, chat: Chat, index: int, *, opened: bool = False) -> bool:
        """Return True if the template writes the message ``index``; some templates drop some messages.

        Raises:
            SettingsRefused: the template refuses the conversation.

        """
        return self.sentinel in self.write(_marked(chat, index, self.sentinel), opened=opened)


def _refusal(chat: Chat, error: Exception) -> SettingsRefused:
    """Return the error for a conversation that the template refuses, with the template's own error and a remedy."""
    roles = ", ".join(str(message["role"]) for message in chat[-4:])
    if isinstance(error, TemplateSyntaxError):
        remedy = f"it is no Jinja template (line {error.lineno}); set tokenizer.chat_template to the model's own"
    elif isinstance(error, UndefinedError | LookupError | AttributeError | TypeError):
        remedy = (
            "it reads a field that the message lacks, or a variable that nobody gave: complete the message (name, "
            "tool_calls, tool_call_id, reasoning_content), or give the variable in template_options"
        )
    else:
        remedy = "order the messages as the template wants them, or write what it has no role for into a user's message"
    return SettingsRefused(
        f"chat_template: the chat template refuses the conversation: {str(error)[:_SHOWN]}. "
        f"Its last roles are {roles}; {remedy}"
    )


def _marked(chat: Chat, index: int, sentinel: str) -> Chat:
    """Return the chat with the sentinel as the content of the message ``index``.

    If the message has tool calls, the sentinel replaces the name of the last call instead.
    """
    message = chat[index]
    if message.get("tool_calls"):
        *others, last = message["tool_calls"]
        last = {**last, "function": {**last.get("function", {}), "name": sentinel}}
        marked = {**message, "tool_calls": [*others, last]}
    else:
        marked = {**message, "content": sentinel}
    return [*chat[:index], marked, *chat[index + 1 :]]
