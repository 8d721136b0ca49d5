"""Display during generation: the text streams to stdout, and one progress line is shown on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Group
from rich.live import Live
from rich.text import Text

from agentmem.cli.console import ERR, OUT
from agentmem.cli.printable import printable
from agentmem.reporting.report import CompactionReport, RebaseReport
from agentmem.settings import format_bytes

if TYPE_CHECKING:
    from agentmem.reporting.trace import UsageLike

_BAR = 8
_REFRESH = 6


class Display:
    """Display of a generation: streams text to stdout, and shows a progress line if stderr is a terminal.

    With ``streaming=False`` no text is written to stdout, because the command then writes JSON to stdout.
    """

    def __init__(self, *, streaming: bool, cap_bytes: int | None, max_new_tokens: int) -> None:
        """Prepare the display; nothing is shown before the display's ``with`` block begins."""
        self.streaming, self.cap_bytes, self.max_new_tokens = streaming, cap_bytes, max_new_tokens
        self.tokens = self.read = self.used = self.compactions = 0
        self._first: float | None = None
        # If both streams go to a terminal, the unfinished line of text is drawn above the progress line.
        self._shared = streaming and ERR.is_terminal and OUT.is_terminal
        self._open = ""
        self._written = False
        self._live = Live(
            get_renderable=self._render, console=ERR, refresh_per_second=_REFRESH, transient=True, redirect_stdout=False
        )

    def __enter__(self) -> Self:
        """Show the progress line on a terminal."""
        if ERR.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the progress line and end the text with a newline."""
        self._live.stop()
        if self._shared:
            OUT.file.write(self._open)
        if self.streaming and self._written:
            OUT.file.write("\n")
            OUT.file.flush()

    def text(self, piece: str) -> None:
        """Show a piece of generated text; control characters are replaced by visible ones."""
        if not self.streaming or not piece:
            return
        self._written, piece = True, printable(piece)
        if not self._shared:
            OUT.file.write(piece)
            OUT.file.flush()
            return
        *lines, self._open = (self._open + piece).split("\n")
        for line in lines:
            self._live.console.print(line, markup=False, soft_wrap=True)
        if len(self._open) > ERR.width > (cut := self._open.rfind(" ", 0, ERR.width)) > 0:
            self._live.console.print(self._open[:cut], markup=False, soft_wrap=True)
            self._open = self._open[cut + 1 :]

    def token(self) -> None:
        """Count a generated token."""
        self._first = self._first or time.perf_counter()
        self.tokens += 1

    def event(self, event: CompactionReport | RebaseReport | UsageLike) -> None:
        """Update the progress line from an event of the memory; pass this method to ``memory.subscribe``."""
        if isinstance(event, CompactionReport):
            self.compactions += 1
        elif not isinstance(event, RebaseReport):
            self.read, self.used = event.tokens_seen, event.used_bytes

    def _render(self) -> Group:
        lines = [Text(self._open)] if self._shared else []
        return Group(*lines, Text(self._status(), style="dim", no_wrap=True, overflow="ellipsis"))

    def _status(self) -> str:
        if self._first is None:
            return f"reading: {self.read} tokens"
        speed = self.tokens / max(1e-3, time.perf_counter() - self._first)
        parts = [f"{self.tokens}/{self.max_new_tokens} tokens", f"{speed:.1f} tokens/s"]
        if self.cap_bytes is None:
            return "full memory: " + " · ".join(parts)
        filled = min(_BAR, round(_BAR * self.used / self.cap_bytes))
        bar = "━" * filled + "╌" * (_BAR - filled)
        parts.append(f"{bar} {format_bytes(self.used)} of {format_bytes(self.cap_bytes)}")
        parts.append(f"{self.compactions} compaction{'' if self.compactions == 1 else 's'}")
        return " · ".join(parts)
