"""The part of a session's state that its memory does not hold, in the form in which a snapshot stores it.

This part has the dialogue (the messages), the entries of the transcript (who wrote which tokens), the open reply (a
reply that was begun and not yet closed), and the pending ids (ids that the memory has not consumed). It also has the
state of the session's sampling generator.
"""

from __future__ import annotations

import base64
import binascii
from array import array
from typing import TYPE_CHECKING, Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from agentmem.sessions.chat.dialogue import Dialogue
from agentmem.sessions.conversation import Conversation, Reply
from agentmem.sessions.transcript import Entry
from agentmem.untrusted.texts import faults

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


Count = Annotated[int, Field(ge=0, lt=1 << 31)]


class Saved(BaseModel):
    """The part of one session's state that its memory does not hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pending: Annotated[tuple[Count, ...], FailFast()]
    """The ids that the memory has not consumed; the consumed ids are stored with the sequence."""
    dialogue: Dialogue
    entries: Annotated[tuple[Entry, ...], FailFast()]
    open_reply: tuple[Count, str, int | None] | None
    """The open reply: how many of the last ids belong to it, its text, and its end token if it has one."""
    sampling: str | None
    """State of the session's sampling generator, in base64; ``None`` if the session has no generator of its own."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Read the session's state from the whole state in a snapshot.

        Raises:
            ValueError: the snapshot's state has no session's state, or an invalid one.

        """
        try:
            return cls.model_validate(state["session"])
        except KeyError:
            raise ValueError("it has no session's state") from None
        except ValidationError as error:
            raise ValueError(f"the session's state cannot be read: {faults(error, state['session'])}") from None

    def check(self, tokens: int, pinned: int, words: int) -> None:
        """Refuse a state that no session can have.

        Args:
            tokens: number of tokens that the session's memory has consumed.
            pinned: index just after the last pinned token.
            words: size of the vocabulary.

        Raises:
            ValueError: the state is invalid; the message has the value and the limit.

        """
        total = tokens + len(self.pending)
        if wrong := [each for each in self.pending if each >= words]:
            raise ValueError(f"ids {wrong[:4]} are pending, and the vocabulary ends at {words - 1}")
        for entry in self.entries:
            if not 0 <= entry.start <= entry.stop <= total:
                raise ValueError(f"an entry says tokens {entry.start}..{entry.stop} of {total}")
        if pinned > total:
            raise ValueError(f"tokens up to {pinned} are pinned, of {total}")
        count, _, end = self.open_reply or (0, "", None)
        if count > total:
            raise ValueError(f"its open reply has {count} tokens of {total}")
        if end is not None and (not count or end not in self.pending[-1:]):
            raise ValueError(f"its open reply of {count} tokens ended with {end}, which is not the last id")
        if self.dialogue.open and self.open_reply is None:
            raise ValueError("its dialogue says that a reply is open, and there is none")
        self.generator()

    def generator(self) -> torch.Generator | None:
        """Return a generator for sampling in its saved state, or ``None`` if the session had no generator of its own.

        Raises:
            ValueError: the saved text is not the state of a generator.

        """
        if self.sampling is None:
            return None
        made = torch.Generator()
        try:
            octets = base64.b64decode(self.sampling, validate=True)
            made.set_state(torch.frombuffer(bytearray(octets), dtype=torch.uint8))
        except (binascii.Error, RuntimeError, ValueError) as error:
            raise ValueError(f"the state of its sampling is none: {error}") from None
        return made


def saved(session: Conversation) -> Saved:
    """Return the part of a session's state that its memory does not hold, such as the dialogue and the open reply."""
    drawn, reply = session.generator, session.draft
    return Saved(
        pending=tuple(session.pending),
        dialogue=session.dialogue,
        entries=tuple(session.entries),
        open_reply=None if reply is None else (len(reply.ids), reply.text, reply.end),
        sampling=None if drawn is None else base64.b64encode(drawn.get_state().numpy().tobytes()).decode(),
    )


def restore(session: Conversation, state: Saved, consumed: Sequence[int]) -> None:
    """Give an empty session a saved state; ``consumed`` are the ids that the session's memory has consumed."""
    session.ids = array("q", (*consumed, *state.pending))
    session.dialogue, session.entries = state.dialogue, list(state.entries)
    if state.open_reply is not None:
        count, text, end = state.open_reply
        session.reply_start = len(session.ids) - count
        session.draft = Reply(list(session.ids[session.reply_start :]), text, end=end)
    drawn = state.generator()
    if drawn is not None and session.generator is not None:
        session.generator = drawn
    session.skip_rebases()
