"""Incremental chat templating: which ids go on from a dialogue that a memory already holds.

The template renders whole conversations; a memory wants only what is new. What is new is what follows, in the new
rendering, the text that was fed before. Where the template writes that text otherwise now (it strips old thinking,
trims, moves a system message), the new text is what follows a *sentinel*: the last message is rendered with a unique
word in place of its content, and the word tells where the message ends, whatever the template did to it. A reply that
the model wrote is always found so: its ids are in the memory as sampled, and its text is never tokenized again.
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
    """Grows dialogues through a tokenizer's chat template. It holds no conversation; forks may share it.

    Invariants: the deltas of given messages together are the ids that stock ``apply_chat_template`` gives for the whole
    conversation wherever messages are separated by special tokens, and decode to the same text elsewhere; BOS comes
    from the template alone; a refusal changes nothing. Rendering costs time in proportion to the conversation.
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
        """Check the template, and that it has a place for tools.

        Args:
            tokenizer: with a chat template.
            tools: JSON schemas, or functions that transformers makes schemas of.
            history: where the template rewrites what the memory holds, ``keep`` the memory's or ``refuse``.
            eos: ids that end a reply besides the tokenizer's own: ``generation_config.eos_token_id``.
            options: the template's own variables, such as ``enable_thinking`` or ``date_string``.

        Raises:
            SettingsRefused: no template, one without a place for tools, tools that are no schemas, unknown ``history``.

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
        """Give messages; return the longer dialogue and what to feed. Results of parallel tool calls belong together.

        A system message that the template writes only into the message after it comes with that one. What would
        change with the next message (the end of a group of tool results) is held back until that is known.

        Raises:
            SettingsRefused: the template refuses or drops a message, rewrites history that must not be rewritten, or
                a reply is open. The dialogue and the memory are as before.

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
        """The generation prompt, and what was held back before it. A template without one gives an empty delta.

        Raises:
            SettingsRefused: nothing to reply to, a reply is open already, or as in :meth:`append`.

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
        """Record the reply that the model wrote. Nothing is fed; closing markup that is owed heads the next delta.

        Args:
            dialogue: with an open reply.
            text: the reply, decoded with its special tokens but without the end. It is never tokenized again.
            end: the id that ended it, if that was sampled *and is in the memory*; ``None`` if it was cut (a length
                limit, a stop string, an end that was not fed).
            tool_calls: what was parsed from the text, for templates that count calls and results.

        Raises:
            SettingsRefused: no reply is open, or ``end`` is none of :attr:`end_ids`.

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
        """Ids of a user's message with ``text`` and the generation prompt, as they would come next.

        Nothing is recorded. An open reply is taken for cut here; where the template wants roles to alternate and the
        last message is a user's, an empty reply stands between.

        Raises:
            SettingsRefused: the template refuses a user's message here.

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
        # Nothing is recorded, so whether history is rewritten is not looked at.
        grown = base.model_copy(update={"messages": (*base.messages, *new), "rewrites": True})
        chat = self._renderer.chat(grown)
        found = self._follow(grown, chat, opened=True)
        self._check_seen(chat, len(chat) - 1, opened=True)
        return self._markup.encode(found.text, before=found.before)[0]

    def _follow(self, dialogue: Dialogue, chat: Chat, *, opened: bool = False) -> Continuation:
        return follow(self._renderer, dialogue, chat, self._ends, opened=opened)

    def _delta(self, dialogue: Dialogue, chat: Chat, found: Continuation, text: str, *, opened: bool = False) -> Delta:
        """Ids of ``text``, which is ``found.text`` but for what is owed, and the spans that tile them."""
        places = bounds(self._renderer, dialogue, chat, found, opened=opened)
        ids, firsts = self._markup.encode(text, [min(place, len(text)) for place, _ in places], found.before)
        starts = [0, *firsts[:-1]]
        stops = [*firsts[:-1], len(ids)]
        tiles = zip(places, starts, stops, strict=True)
        return Delta(ids, tuple(replace(span, start=a, stop=b) for (_, span), a, b in tiles if b > a))

    def _must_wait(self, dialogue: Dialogue, chat: Chat) -> bool:
        """Whether there are only system messages, which the template writes into the message after them.

        Raises:
            SettingsRefused: not there either.

        """
        if dialogue.fed or any(message["role"] != "system" for message in chat):
            return False
        try:
            if all(self._renderer.shows(chat, at) for at in range(len(chat))):
                return False
        except SettingsRefused:
            pass  # it may refuse a lone system message, and take it with a user's
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
