"""What follows the text that a memory was fed, in a rendering of the conversation that goes on from it."""

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
    """``text`` is to be fed; its first characters that ``closing`` begins with close the last message.

    ``before`` is what the memory holds just before; ``change`` tells what of it the template writes otherwise now,
    if anything.
    """

    text: str
    before: str = ""
    closing: str = ""
    change: str = ""


def follow(renderer: Renderer, dialogue: Dialogue, chat: Chat, ends: Sequence[str], *, opened: bool) -> Continuation:
    """What to feed for the messages of ``chat`` (and the generation prompt) that ``dialogue`` has not fed.

    Raises:
        SettingsRefused: the template refuses the conversation, or hides where its new part begins.

    """
    if not dialogue.fed:
        return Continuation(renderer.write(chat, opened=opened))
    if dialogue.fed - 1 in dialogue.generated:
        return _after_reply(renderer, dialogue, chat, ends, opened=opened)
    return _after_given(renderer, dialogue, chat, opened=opened)


def _after_given(renderer: Renderer, dialogue: Dialogue, chat: Chat, *, opened: bool) -> Continuation:
    """What follows what was rendered before; if that is written otherwise now, what follows the last message."""
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
    """What follows the reply that the model wrote, without the end that it sampled."""
    last, ended = dialogue.fed - 1, dialogue.end is not None
    now = renderer.write(chat, opened=opened)  # first: a refusal speaks for itself
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
    """Where the memory's text departs from the template's, white space apart; empty if the template only goes on.

    White space is left out because templates trim replies, which no one calls rewriting.
    """
    one, other = "".join(had.split()), "".join(now.split())
    if other.startswith(one):
        return ""
    at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"it writes {other[at : at + _SHOWN]!r} where the memory holds {one[at : at + _SHOWN]!r}"


def unsettled(renderer: Renderer, chat: Chat, text: str) -> str:
    """The end of ``text`` that depends on what follows the last message, found by rendering what may follow.

    Qwen, for example, closes a tool's result only if no other result follows.
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
    """The places in ``found.text`` where spans end, ascending, each with its span (whose ids are still unknown)."""
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
    """Where the first message begins behind a default system prompt or tools; 0 if nothing stands before it.

    A message's header is what the template writes before a later message of the same role.
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
