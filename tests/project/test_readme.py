"""README.md and the guide are executed: their blocks run, and what they show is what comes out.

- A ``python`` block runs in the namespace of those before it; a ``text`` block right after it is its output.
- In a ``console`` block each ``$ command`` must exit with 0; the lines under it, if any, are its output.
- ``...`` in shown output stands for anything; ``<!-- no-run: reason -->`` above a block skips it.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from agentmem import models
from support import forked

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
SECONDS = 240
FENCE = re.compile(
    r"(?P<unrun><!-- no-run: (?P<reason>.+?) -->\s*\n)?^```(?P<language>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block that is to be run, with the output that the text shows for it (empty: none is shown)."""

    language: str
    line: int
    body: str
    shown: str = ""


def blocks(text: str) -> Iterator[Block]:
    """The python and console blocks of a text in order, without those that say why they are not run."""
    fences = list(FENCE.finditer(text))
    for fence, after in zip_longest(fences, fences[1:]):
        if fence["unrun"] or fence["language"] not in {"python", "console"}:
            continue
        adjacent = after is not None and after["language"] == "text" and not text[fence.end() : after.start()].strip()
        shown = after["body"] if after is not None and adjacent and fence["language"] == "python" else ""
        yield Block(fence["language"], text.count("\n", 0, fence.start("body")) + 1, fence["body"], shown)


def commands(body: str) -> list[tuple[str, str]]:
    """Each ``$ command`` of a console block, lines continued by a backslash joined, with the output shown under it."""
    found: list[tuple[str, str]] = []
    for line in body.replace("\\\n", "").splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif found:
            command, shown = found[-1]
            found[-1] = (command, f"{shown}{line}\n")
    return found


def differs(shown: str, actual: str) -> str:
    """Empty when ``actual`` is what is shown (``...`` stands for anything, runs of blanks are one), else both."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not shown.strip() or doctest.OutputChecker().check_output(shown, actual, flags):
        return ""
    return f"shown:\n{shown}\nactual:\n{actual}"


def run_python(block: Block, namespace: dict[str, Any]) -> str:
    """Run a python block; what it printed."""
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.body, "<page>", "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed):
        exec(code, namespace)  # noqa: S102 - running the README is the point
    return printed.getvalue()


def run_command(command: str) -> str:
    """Run one console command with the tested interpreter's scripts first on the path; its standard output."""
    script = "import sys; from agentmem.cli import main; sys.exit(main())"
    if (words := shlex.split(command))[0] == "agentmem" and not set("|&;<>$`") & set(command):
        done = forked.run([sys.executable, "-c", script, *words[1:]], text=True)
    else:
        done = in_a_shell(command)
    assert done.returncode == 0, f"`{command}` exited with {done.returncode}:\n{done.stderr}"
    return str(done.stdout)


def in_a_shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run any other command."""
    paths = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return subprocess.run(
        command,
        shell=True,  # a README shows pipes and quotes as a shell reads them
        env={**os.environ, "PATH": paths},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )


def run(text: str, name: str = "page") -> None:
    """Run every block of a text from top to bottom, in the current folder."""
    namespace: dict[str, Any] = {"__name__": "__readme__"}
    for block in blocks(text):
        if block.language == "python":
            wrong = differs(block.shown, run_python(block, namespace))
            assert not wrong, f"{name}:{block.line}: {wrong}"
            continue
        for command, shown in commands(block.body):
            wrong = differs(shown, run_command(command))
            assert not wrong, f"{name}:{block.line}: `{command}`: {wrong}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page has python blocks, all its blocks run from top to bottom, and shown output is actual output."""
    text = page.read_text(encoding="utf-8")
    assert any(block.language == "python" for block in blocks(text)), f"{page.name} shows no python block that runs"
    assert models.is_fetched(), "the pages use the default model: run `agentmem model fetch` once"
    monkeypatch.chdir(tmp_path)

    run(text, page.name)


PASSING = """
```python
a = 20
```
```python
print(a + 1, "then 3.14 seconds")
```

```text
21 then ... seconds
```

<!-- no-run: needs a network -->
```console
$ false
```

```console
$ echo one \\
    two
one two
$ true
```
"""


def test_a_text_that_tells_the_truth_passes() -> None:
    """Blocks share a namespace, output may hold ``...``, and a block with a reason is skipped."""
    run(PASSING)


@pytest.mark.parametrize(
    ("true", "false"),
    [("a = 20", "a = 22"), ("a = 20", "b = 20"), ("one two\n", "one three\n"), ("$ true", "$ false"), ("needs", "")],
)
def test_a_text_that_lies_fails(true: str, false: str) -> None:
    """A wrong result, a missing name, a wrong line, a failing command and a skip without its reason are found."""
    lie = PASSING.replace(true, false) if false else PASSING.replace("<!-- no-run: needs a network -->", "")

    with pytest.raises((AssertionError, NameError)):
        run(lie)
