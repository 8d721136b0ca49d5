"""``agentmem chat`` at a terminal: a person types, and presses Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agentmem.testing import tiny_model
from support import forked
from support.shell import save_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no pseudo-terminal")

CTRL_C, CTRL_D = "\x03", "\x04"
PATIENCE = 120.0  # seconds; far more than a busy machine takes
AGAIN = 10.0  # seconds until a person presses a key again


class Terminal:
    """A pseudo-terminal on which ``agentmem chat`` runs."""

    def __init__(self, *options: str) -> None:
        """Start it."""
        import pty

        own = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"  # so that its Ctrl-C is a signal,
        own += "; import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # in background jobs too
        program = f"{own}; from agentmem.cli import main; sys.exit(main())"
        self._keys, theirs = pty.openpty()
        self.process = forked.Popen(
            [sys.executable, "-c", program, "chat", *options],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._unread = b""

    def close(self) -> None:
        """End whatever still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self._keys)

    def see(self, text: str, seconds: float = PATIENCE) -> bool:
        """Read on until ``text`` has come; whether it came in time."""
        until = time.monotonic() + seconds
        while text.encode() not in self._unread:
            ready, _, _ = select.select([self._keys], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                return False
            self._unread += os.read(self._keys, 1 << 12)
        self._unread = self._unread.partition(text.encode())[2]
        return True

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._keys, keys.encode())

    def press_until(self, keys: str, text: str) -> bool:
        """Press once, and again if nothing came of it: readline misses a signal just before it waits for a key."""
        for _ in range(int(PATIENCE / AGAIN)):
            self.press(keys)
            if self.see(text, AGAIN):
                return True
        return False

    def leave(self) -> int | None:
        """Press Ctrl-D until the program has ended; its exit code."""
        for _ in range(int(PATIENCE / AGAIN)):
            self.press(CTRL_D)
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=AGAIN)
        return None


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """A chat with a model that has no end token, and so never ends by itself."""
    save_tokenizer(tmp_path)
    tiny_model("llama", vocab_size=257).save_pretrained(tmp_path)
    made = Terminal("--model", str(tmp_path), "--cap", "2MiB", "--max-new-tokens", "1000000")
    yield made
    made.close()


def test_a_person_at_a_terminal(terminal: Terminal) -> None:
    """Ctrl-C ends a reply, or begins the line again; what is refused costs nothing; Ctrl-D leaves."""
    assert terminal.see("you> ")

    terminal.press("hello\n")
    assert terminal.see("tokens/s")  # the progress line of a reply that runs
    terminal.press(CTRL_C)
    assert terminal.see("stopped")
    assert terminal.see("you> ")

    terminal.press("half a li")
    assert terminal.see("half a li")
    assert terminal.press_until(CTRL_C, "Ctrl-D leaves")
    assert terminal.see("you> ")

    assert terminal.press_until("/nonsense\n", "/nonsense is no command")
    assert terminal.see("you> ")
    assert terminal.leave() == 0
