"""Filtering of a reply: the client gets the text without tool calls, and cut before the first stop sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from agentmem.serving.tool_calls import Accepts, ToolCall, ToolFormat


class ReplyText:
    """Filter of one reply, which takes the reply's text piece by piece and returns the text for the client.

    Text that may be the beginning of a stop sequence or of a tool call is held back until later text decides.
    """

    def __init__(
        self, stop: Sequence[str] = (), writes: ToolFormat | None = None, accepts: Accepts | None = None
    ) -> None:
        """Set the stop sequences, and how to find tool calls.

        ``writes`` is the format of tool calls, and ``accepts`` decides which calls are valid. If either is missing,
        calls are treated as text.
        """
        self._stop, self._format, self._accepts = tuple(stop), writes if accepts else None, accepts
        self._text, self._shown, self._call_at = "", 0, -1
        self.stopped = False
        """True if a stop sequence was found; the text then ends before the sequence."""
        self.calls: list[ToolCall] = []
        """Tool calls of the reply; complete after :meth:`end`."""
        self.sent = ""
        """All text that :meth:`push` and :meth:`end` have returned so far."""

    def push(self, text: str) -> str:
        """Add a piece of decoded text, and return the text that can now be sent to the client."""
        if self.stopped:
            return ""
        start = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += text
        places = [place for stop in self._stop if (place := self._text.find(stop, start)) >= 0]
        if places:
            self._text, self.stopped = self._text[: min(places)], True
        return self._show(self._safe())

    def end(self) -> str:
        """Finish the reply: fill :attr:`calls`, and return the text that is still to be sent."""
        self._find_call()
        if self._call_at >= 0 and self._format is not None and self._accepts is not None:
            found = self._format.calls(self._text[self._call_at :], self._accepts)
            if found is not None:
                self.calls, rest = found
                self._text = self._text[: self._call_at].rstrip() + rest
        return self._show(len(self._text))

    def _show(self, stop: int) -> str:
        piece = self._text[self._shown : stop]
        self._shown, self.sent = max(stop, self._shown), self.sent + piece
        return piece

    def _safe(self) -> int:
        """Return the index up to which the text can be sent now, whatever text follows."""
        waiting = self._stop if not self.stopped else ()
        if self._format is not None:
            self._find_call()
            if self._call_at >= 0:
                return max(self._shown, len(self._text[: self._call_at].rstrip()))
            waiting = (*waiting, *self._format.openers)
        safe = min((_begun(self._text, each) for each in waiting), default=len(self._text))
        if self._format is not None:  # white space before a call is left out
            safe = max(self._shown, len(self._text[:safe].rstrip()))
        return max(self._shown, safe)

    def _find_call(self) -> None:
        if self._format is None or self._call_at >= 0:
            return
        places = [place for each in self._format.openers if (place := self._text.find(each)) >= 0]
        if self._format.bare and self._text.lstrip().startswith("{"):
            places.append(0)
        self._call_at = min(places, default=-1)


def _begun(text: str, word: str) -> int:
    """If ``text`` ends with an incomplete ``word``, return the index at which the word begins, else ``len(text)``."""
    for size in range(min(len(word) - 1, len(text)), 0, -1):
        if text.endswith(word[:size]):
            return len(text) - size
    return len(text)
