"""Functions that find the text to feed next in a rendering of the conversation and split it into spans of messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentmem.errors import SettingsRefused
from agentmem.sessions.chat.dialogue import Span

if TYPE_CHECKING:
    from agentmem.sessions.chat.dialogue import Dialogue
    from agentmem.sessions.chat.rendering import Chat, Renderer

_SHOWN = 40
_NEXT: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "x"},
    {"role": "tool", "content": "x", "name": "x", "tool_call_id": "x00000000"},
    {"role": "system", "content": "x"},
)


@dataclass(frozen=True, slots=True)
class Continuation:
    """The text to feed next, and how it relates to what the memory holds."""

    text: str
    """The text to feed."""
    before: str = ""
    """Text at the end of what the memory holds, just before ``text``."""
    closing: str = ""
    """Markup that would close the last fed message if nothing followed. The common start of this markup and ``text``
    belongs to that message."""
    change: str = ""
    """Description of the first place where the template now writes earlier text differently; empty if nowhere."""


def follow(renderer: Renderer, dialogue: Dialogue, chat: Chat, ends: Sequence[str], *, opened: bool) -> Continuation:
    """Find the text to feed for those messages of ``chat`` that ``dialogue`` has not fed.

    Args:
        renderer: the chat template.
        dialogue: the conversation so far.
        chat: all messages of the conversation, including the new ones.
        ends: texts of the tokens that end a reply.
        opened: also feed the generation prompt.

    Raises:
        SettingsRefused: the template refuses the conversation, or the beginning of the new part cannot be found.

    """
    if not dialogue.fed:
        return Continuation(renderer.write(chat, opened=opened))
    if dialogue.fed - 1 in dialogue.generated:
        return _after_reply(renderer, dialogue, chat, ends, opened=opened)
    return _after_given(renderer, dialogue, chat, opened=opened)


def _after_given(renderer: Renderer, dialogue: Dialogue, chat: Chat, *, opened: bool) -> Continuation:
    """Find the text to feed after a given message.

    This is the text after the earlier rendering. If the template now writes the earlier part differently, it is the
    text after the last fed message.
    """
    had = renderer.write(chat[: dialogue.fed]).removesuffix(dialogue.owed)
    now = renderer.write(chat, opened=opened)
    if now.startswith(had):
        return Continuation(now[len(had) :], had, dialogue.owed)
    last = dialogue.fed - 1
    then, tail = renderer.tail(chat[: dialogue.fed], last), renderer.tail(chat, last, opened=opened)
    closed = None if then is None else then.removesuffix(dialogue.owed)
    if tail is None or closed is None or not tail.startswith(closed):
        raise _hidden(chat, last)
    return Continuation(tail[len(closed) :], had, dialogue.owed, _difference(had, now))


def _after_reply(
    renderer: Renderer, dialogue: Dialogue, chat: Chat, ends: Sequence[str], *, opened: bool
) -> Continuation:
    """Find the text to feed after a reply of the model, without the end token if the model has sampled it."""
    last, ended = dialogue.fed - 1, dialogue.end is not None
    now = renderer.write(chat, opened=opened)  # first, so that a refusal is raised with the template's own error
    text = renderer.reply_tail(chat, last, ends, ended=ended, opened=opened)
    if text is None:
        raise _hidden(chat, last)
    closing = renderer.reply_tail(chat[: dialogue.fed], last, ends, ended=ended, opened=False) or ""
    reply = dialogue.messages[last]
    held = reply.content if not reply.tool_calls else ""
    change = ""
    if not dialogue.rewrites:
        change = _difference(renderer.write(chat[:last], opened=True) + held, now)
    before = (ends[0] if ends else "") if ended else reply.content
    return Continuation(text, before, closing, change)


def _hidden(chat: Chat, last: int) -> SettingsRefused:
    return SettingsRefused(
        f"the chat template writes message {last} ({chat[last]['role']}) otherwise once others follow, and hides where "
        f"message {last + 1} begins. Give both in one call of append, or use a template that leaves earlier turns alone"
    )


def _difference(had: str, now: str) -> str:
    """Describe the first place where the memory's text and the template's differ; empty if the template only adds text.

    White space is ignored: templates trim replies, and that should not count as rewriting.
    """
    one, other = "".join(had.split()), "".join(now.split())
    if other.startswith(one):
        return ""
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"it writes {other[at : at + _SHOWN]!r} where the memory holds {one[at : at + _SHOWN]!r}"


def unsettled(renderer: Renderer, chat: Chat, text: str) -> str:
    """Return the end of ``text`` that depends on what follows the last message.

    It is found by rendering the chat with several possible next messages. For example, Qwen's template closes a tool's
    result only if no other result follows.
    """
    last = len(chat) - 1
    alone = renderer.tail(chat, last)
    if not alone:
        return ""
    others = [renderer.tail([*chat, message], last) for message in _NEXT]
    others.append(renderer.tail(chat, last, opened=True))
    keep = renderer.markup.common(alone, *(other for other in others if other is not None))
    return alone[keep:] if text.endswith(alone[keep:]) else ""


def bounds(
    renderer: Renderer, dialogue: Dialogue, chat: Chat, found: Continuation, *, opened: bool
) -> list[tuple[int, Span]]:
    """Return the places in ``found.text`` at which spans end, in ascending order, each with its span.

    The ``start`` and ``stop`` of these spans are still 0, since the ids are not known yet.
    """
    text, common = found.text, renderer.markup.common
    places: list[tuple[int, Span]] = []
    if dialogue.fed and found.closing:
        places.append((common(found.closing, text), _span(chat, dialogue.fed - 1)))
    if not dialogue.fed:
        places.append((_preamble(renderer, chat, text), Span("system", None, 0, 0)))
    done = places[-1][0] if places else 0
    for at in range(dialogue.fed, len(chat)):
        tail = renderer.tail(chat, at, opened=opened)
        if tail is None or not text.endswith(tail):
            continue  # it shares the next message's span
        alone = renderer.tail(chat[: at + 1], at)
        done = max(done, len(text) - len(tail) + (common(alone, tail) if alone else 0))
        places.append((done, _span(chat, at)))
    if opened:
        places.append((len(text), Span("assistant", len(chat), 0, 0)))
    elif places:
        places[-1] = (len(text), places[-1][1])
    return places


def _span(chat: Chat, at: int) -> Span:
    return Span(chat[at]["role"], at, 0, 0, chat[at].get("name"))


def _preamble(renderer: Renderer, chat: Chat, text: str) -> int:
    """Return the place in ``text`` at which the first message begins, after a default system prompt or tools.

    The result is 0 if nothing stands before the first message. The message begins with its header; this is the text
    that the template writes before a later message of the same role.
    """
    before = renderer.before(chat[:1], 0)
    for between in ([], [{"role": "assistant", "content": "x"}]):
        rest = [*chat[:1], *between]
        written = renderer.before([*rest, chat[0]], len(rest))
        try:
            header = written.removeprefix(renderer.write(rest)) if written else ""
        except SettingsRefused:
            continue
        if not header.strip() or header == written:
            continue
        place = before.rfind(header)
        if place > 0 and text.startswith(before[:place]) and renderer.markup.words(before[:place]):
            return place
    return 0
