"""Incremental chat templating: finding the ids to feed for new messages, if the memory holds the earlier ones.

The template renders whole conversations, but the memory needs only the new part. Usually this is the part of the new
rendering after the text that was fed before. However, the template may now write the earlier text differently, because
it strips old reasoning, trims text or moves a system message. In this case the last fed message is rendered with a
*sentinel*, a unique word, in place of its content, and the new part is the text after the sentinel. After a reply of
the model, the sentinel is always used: the memory holds the sampled ids of the reply, so its text is never tokenized
again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from agentmem.errors import SettingsRefused
from agentmem.sessions.chat.continuation import Continuation, bounds, follow, unsettled
from agentmem.sessions.chat.dialogue import Delta, Dialogue, Message, Role, Span
from agentmem.sessions.chat.rendering import Chat, Renderer, Tool

__all__ = ["ChatTemplate", "Delta", "Dialogue", "Message", "Role", "Span", "Tool"]


class ChatTemplate:
    """A tokenizer's chat template, which extends dialogues and gives the ids to feed for new messages.

    An object of this class holds no conversation, so forks may share it.

    The ids to feed for new messages are called a delta. If the model wrote none of the messages, the joined deltas
    decode to the text that transformers' ``apply_chat_template`` gives for the whole conversation. If, in addition, the
    template separates messages by special tokens, the joined deltas also have the same ids as that text.

    A BOS token comes only from the template; the tokenizer adds none. A method that raises SettingsRefused has changed
    nothing. Rendering takes time in proportion to the length of the conversation.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tools: Sequence[Tool] | None = None,
        history: Literal["keep", "refuse"] = "keep",
        eos: int | Iterable[int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Check that the tokenizer has a template and that this template writes the tools.

        Args:
            tokenizer: a tokenizer with a chat template.
            tools: JSON schemas, or functions that transformers turns into schemas.
            history: behaviour if the template now writes earlier messages differently from what the memory holds:
                ``"keep"`` uses the memory's version, ``"refuse"`` refuses the new message.
            eos: further ids that end a reply, besides the tokenizer's own; usually
                ``generation_config.eos_token_id``.
            options: variables of the template, such as ``enable_thinking`` or ``date_string``.

        Raises:
            SettingsRefused: the tokenizer has no template, the template does not write the tools, a tool is not a
                valid schema, or ``history`` is unknown.

        """
        if history not in ("keep", "refuse"):
            raise SettingsRefused(f"history={history!r} is unknown; it is 'keep' or 'refuse'")
        self.history = history
        self._renderer = Renderer(tokenizer, tools, options)
        self._markup = self._renderer.markup
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        more = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        self.end_ids: frozenset[int] = frozenset((*own, *map(int, more)))
        ends = {str(tokenizer.decode([end], skip_special_tokens=False)) for end in self.end_ids}
        self._ends = sorted(filter(None, ends), key=len, reverse=True)

    def append(self, dialogue: Dialogue, *messages: Message | Mapping[str, Any]) -> tuple[Dialogue, Delta]:
        """Add messages to a dialogue; return the longer dialogue and the delta (the ids to feed, with their spans).

        Add the results of parallel tool calls in one call. If the template writes a system message into the next
        message, the system message is fed together with the next message. Text that depends on the next message, such
        as the end of a group of tool results, is held back until the next message is known.

        Raises:
            SettingsRefused: a reply is open, the template refuses a message, the template leaves out a message, or the
                template rewrites earlier messages although ``history="refuse"``. The dialogue and the memory are
                unchanged.

        """
        self._require_closed(dialogue)
        new = tuple(Message.each(messages))
        grown = dialogue.model_copy(update={"messages": (*dialogue.messages, *new)})
        chat = self._renderer.chat(grown)
        if not new or self._must_wait(grown, chat):
            return grown, Delta()
        found = self._follow(grown, chat)
        self._check_seen(chat, grown.fed)
        self._check_history(found)
        owed = unsettled(self._renderer, chat, found.text)
        text = found.text.removesuffix(owed)
        delta = self._delta(grown, chat, found, text)
        update = {"fed": len(chat), "owed": owed, "end": None, "rewrites": grown.rewrites or bool(found.change)}
        return grown.model_copy(update=update), delta

    def open_reply(self, dialogue: Dialogue) -> tuple[Dialogue, Delta]:
        """Open a reply; return the dialogue with the open reply, and the delta (the ids to feed, with their spans).

        The delta has all text that is not fed yet, such as text that :meth:`append` held back, and then the generation
        prompt. It may be empty if the template has no generation prompt.

        Raises:
            SettingsRefused: there is no message to reply to. The reasons given at :meth:`append` apply, too.

        """
        self._require_closed(dialogue)
        if not dialogue.messages:
            raise SettingsRefused("a reply to 0 messages cannot be opened; append a user's message first")
        chat = self._renderer.chat(dialogue)
        found = self._follow(dialogue, chat, opened=True)
        self._check_seen(chat, dialogue.fed, opened=True)
        self._check_history(found)
        delta = self._delta(dialogue, chat, found, found.text, opened=True)
        rewrites = dialogue.rewrites or bool(found.change)
        update = {"fed": len(chat), "owed": "", "open": True, "end": None, "rewrites": rewrites}
        return dialogue.model_copy(update=update), delta

    def close_reply(
        self,
        dialogue: Dialogue,
        text: str,
        *,
        end: int | None,
        tool_calls: Sequence[dict[str, Any]] | None = None,
    ) -> Dialogue:
        """Record the reply that the model wrote and return the dialogue with this reply.

        There is nothing to feed at this point. The markup that closes the reply is fed later: it comes first in the ids
        that the next call of :meth:`append` or :meth:`open_reply` returns.

        Args:
            dialogue: a dialogue with an open reply.
            text: the reply, decoded with its special tokens but without the end token. It is never tokenized again.
            end: the end token, if the model has sampled it *and the memory holds it*; ``None`` if the reply was cut
                (by a length limit, a stop string, or an end token that was not fed).
            tool_calls: calls that were parsed from the text, for templates that count calls and results.

        Raises:
            SettingsRefused: no reply is open, or ``end`` is not in :attr:`end_ids`.

        """
        if not dialogue.open:
            raise SettingsRefused("no reply is open; call open_reply first")
        if end is not None and end not in self.end_ids:
            raise SettingsRefused(
                f"end={end} ends no reply; the ends are {sorted(self.end_ids)}. Pass generation_config.eos_token_id as "
                "ChatTemplate's eos, or end=None for a reply that was cut"
            )
        reply = Message.of(role="assistant", content=text, tool_calls=tuple(tool_calls) if tool_calls else None)
        update = {
            "messages": (*dialogue.messages, reply),
            "generated": (*dialogue.generated, dialogue.fed),
            "fed": dialogue.fed + 1,
            "open": False,
            "end": end,
        }
        return dialogue.model_copy(update=update)

    def instruction(self, dialogue: Dialogue, text: str) -> tuple[int, ...]:
        """Return the ids that continue the dialogue with a user's message ``text`` and the generation prompt.

        The dialogue itself is not changed. If a reply is open, the ids begin with the markup that closes this reply. If
        the template refuses the message (most refuse two user messages in a row), an empty reply of the assistant is
        put before the message.

        Raises:
            SettingsRefused: the template refuses a user's message at this point.

        """
        base = self.close_reply(dialogue, "", end=None) if dialogue.open else dialogue
        ask = Message(role="user", content=text)
        try:
            return self._asked(base, ask)
        except SettingsRefused:
            if not base.messages or base.messages[-1].role == "assistant":
                raise
            return self._asked(base, Message(role="assistant"), ask)

    def _asked(self, base: Dialogue, *new: Message) -> tuple[int, ...]:
        # Nothing is recorded, so rewritten history does not matter; rewrites=True skips the search for it.
        grown = base.model_copy(update={"messages": (*base.messages, *new), "rewrites": True})
        chat = self._renderer.chat(grown)
        found = self._follow(grown, chat, opened=True)
        self._check_seen(chat, len(chat) - 1, opened=True)
        return self._markup.encode(found.text, before=found.before)[0]

    def _follow(self, dialogue: Dialogue, chat: Chat, *, opened: bool = False) -> Continuation:
        return follow(self._renderer, dialogue, chat, self._ends, opened=opened)

    def _delta(self, dialogue: Dialogue, chat: Chat, found: Continuation, text: str, *, opened: bool = False) -> Delta:
        """Tokenize ``text`` and return the delta: the ids to feed, and spans that say which message each id belongs to.

        ``text`` is ``found.text``, or a beginning of it: the end may be held back until the next message is known.
        """
        places = bounds(self._renderer, dialogue, chat, found, opened=opened)
        ids, firsts = self._markup.encode(text, [min(place, len(text)) for place, _ in places], found.before)
        starts = [0, *firsts[:-1]]
        stops = [*firsts[:-1], len(ids)]
        tiles = zip(places, starts, stops, strict=True)
        return Delta(ids, tuple(replace(span, start=a, stop=b) for (_, span), a, b in tiles if b > a))

    def _must_wait(self, dialogue: Dialogue, chat: Chat) -> bool:
        """Return True if nothing can be fed before another message is added.

        This is so if all messages are system messages and the template does not write them alone. Some templates write
        a system message only as a part of the user's message that follows.

        Raises:
            SettingsRefused: the template drops one of the system messages even if a user's message follows.

        """
        if dialogue.fed or any(message["role"] != "system" for message in chat):
            return False
        try:
            if all(self._renderer.shows(chat, at) for at in range(len(chat))):
                return False
        except SettingsRefused:
            pass  # the template may refuse a lone system message, but accept it together with a user's message
        self._check_seen([*chat, {"role": "user", "content": "x"}], 0)
        return True

    def _check_seen(self, chat: Chat, first: int, *, opened: bool = False) -> None:
        for at in range(first, len(chat)):
            if not self._renderer.shows(chat, at, opened=opened):
                message = chat[at]
                what = "tool calls" if message.get("tool_calls") else "content"
                raise SettingsRefused(
                    f"the chat template drops the {what} of message {at} ({message['role']}): the model would never "
                    "see it. Write it into a user's message, or use a model whose template has a place for it"
                )

    def _check_history(self, found: Continuation) -> None:
        if found.change and self.history == "refuse":
            raise SettingsRefused(
                f"history: the chat template rewrites earlier messages: {found.change}; history='refuse' allows no "
                "difference. Use history='keep' to go on with what the memory holds"
            )

    def _require_closed(self, dialogue: Dialogue) -> None:
        if dialogue.open:
            raise SettingsRefused(
                f"message {len(dialogue.messages)} is an open reply, and nothing can come before it ends; "
                "call close_reply first"
            )
