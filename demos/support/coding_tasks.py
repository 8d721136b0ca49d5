"""Small programming tasks with tests, in the form of HumanEval, and the code that a reply holds.

code = code_in(reply, entry_point=task.entry_point)
outcome = sandbox.check(task.solution(code), task.tests, entry_point=task.entry_point)
"""

from __future__ import annotations

import ast
import gzip
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agentmem.untrusted.json_text import json_value

_MAX_LINE = 8 << 20  # bytes of a task in a file
_MAX_LINES = 200  # of a reply without a fence that are looked through


@dataclass(frozen=True)
class Task:
    """A function to write. ``prompt`` is its head with a docstring, ``tests`` define ``check(candidate)``."""

    name: str
    prompt: str
    entry_point: str
    tests: str

    def solution(self, code: str) -> str:
        """A whole program from what was written: the prompt's imports and helpers before it, or all of the prompt.

        ``code`` that does not define the entry point is taken for the body of it.
        """
        if _defines(code, self.entry_point):
            return self._preamble() + code
        body = textwrap.dedent(code.strip("\n"))
        return f"{self.prompt.rstrip()}\n{textwrap.indent(body, '    ')}\n"

    def _preamble(self) -> str:
        return self.prompt[: self.prompt.rfind(f"def {self.entry_point}(")]


def _task(head: str, description: str, *asserts: str) -> Task:
    name = head[: head.index("(")]
    tests = "\n".join(f"    assert {line}" for line in asserts)
    return Task(name, f'def {head}:\n    """{description}"""\n', name, f"def check(candidate):\n{tests}\n")


TASKS = (
    _task(
        "add_all(numbers: list[int]) -> int",
        "Return the sum of all numbers in the list; 0 for an empty list.",
        "candidate([1, 2, 3]) == 6",
        "candidate([]) == 0",
        "candidate([-5, 5, 7]) == 7",
        "candidate([10]) == 10",
    ),
    _task(
        "is_palindrome(text: str) -> bool",
        "Whether the text reads the same forwards and backwards, ignoring case and everything but letters and digits.",
        "candidate('level') is True",
        "candidate('A man, a plan, a canal: Panama!') is True",
        "candidate('palindrome') is False",
        "candidate('') is True",
        "candidate('ab') is False",
        "candidate('1a1') is True",
    ),
    _task(
        "largest_gap(numbers: list[int]) -> int",
        "The largest difference between neighbours in the sorted list; 0 when there are fewer than two numbers.",
        "candidate([1, 9, 3]) == 6",
        "candidate([5]) == 0",
        "candidate([]) == 0",
        "candidate([4, 4]) == 0",
        "candidate([-3, 10, 2, -8]) == 8",
    ),
    _task(
        "count_words(text: str) -> dict[str, int]",
        "How often each word occurs, in lower case. Words are separated by white space.",
        "candidate('a b A') == {'a': 2, 'b': 1}",
        "candidate('') == {}",
        "candidate('  one\\ttwo\\none ') == {'one': 2, 'two': 1}",
        "candidate('Yes yes YES') == {'yes': 3}",
    ),
    _task(
        "primes_below(limit: int) -> list[int]",
        "All prime numbers that are less than the limit, in increasing order.",
        "candidate(10) == [2, 3, 5, 7]",
        "candidate(2) == []",
        "candidate(0) == []",
        "candidate(3) == [2]",
        "candidate(30) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]",
    ),
    _task(
        "flatten(nested: list) -> list",
        "All that is in the lists within lists, however deep, in one flat list in the same order.",
        "candidate([1, [2, [3, [4]]], 5]) == [1, 2, 3, 4, 5]",
        "candidate([]) == []",
        "candidate([[], [[]]]) == []",
        "candidate(['ab', ['cd']]) == ['ab', 'cd']",
    ),
    _task(
        "to_roman(number: int) -> str",
        "The Roman numeral of a number from 1 to 3999.",
        "candidate(1) == 'I'",
        "candidate(4) == 'IV'",
        "candidate(1994) == 'MCMXCIV'",
        "candidate(3999) == 'MMMCMXCIX'",
        "candidate(58) == 'LVIII'",
        "candidate(400) == 'CD'",
    ),
    _task(
        "balanced(text: str) -> bool",
        "Whether the brackets (), [] and {} in the text open and close in the right order; ignore all else.",
        "candidate('f(a[0]) + {1}') is True",
        "candidate('(]') is False",
        "candidate('([)]') is False",
        "candidate('((') is False",
        "candidate(')(') is False",
        "candidate('') is True",
    ),
    _task(
        "merge_spans(spans: list[tuple[int, int]]) -> list[tuple[int, int]]",
        "Merge the spans (start, end) that overlap or touch; the result is sorted by start.",
        "candidate([(1, 3), (2, 5), (8, 9)]) == [(1, 5), (8, 9)]",
        "candidate([(5, 6), (1, 2)]) == [(1, 2), (5, 6)]",
        "candidate([(1, 2), (2, 3)]) == [(1, 3)]",
        "candidate([(1, 9), (2, 3)]) == [(1, 9)]",
        "candidate([]) == []",
    ),
)


def read_tasks(path: str | Path) -> list[Task]:
    """Tasks from a file in HumanEval's form: JSON lines, plain or .gz, with task_id, prompt, entry_point and test.

    Raises ValueError with the line and what is missing; OSError when the file cannot be read.
    """
    path = Path(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            rows = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; give JSON lines as UTF-8, packed only if .gz") from error
    if not rows:
        raise ValueError(f"{path} holds no task; each of its lines should be an object as JSON")
    return [_read_task(f"{path.name}:{number}", line) for number, line in rows]


def _read_task(place: str, line: str) -> Task:
    try:
        row = json_value(line.encode(), _MAX_LINE, strict=False)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}); give one object a line, as HumanEval has them") from error
    wanted = ("task_id", "prompt", "entry_point", "test")
    missing = [key for key in wanted if not isinstance(row, dict) or not isinstance(row.get(key), str)]
    if missing:
        raise ValueError(f"{place}: no text under {', '.join(missing)}; a task needs {', '.join(wanted)}")
    return Task(*(row[key] for key in wanted))


# ------------------------------------------------------------------------------------------------ code in replies

_FENCE = re.compile(r"^[ ]{0,3}(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+.-]*)[^\n`]*\n", re.MULTILINE)
_PYTHON = {"python", "py", "python3", "pycon"}
_STARTS = re.compile(r"(def|class|import|from|async def|@\w)\b|@\w")


def code_in(text: str, *, entry_point: str | None = None) -> str:
    """The code of a reply: its last Python block, or its longest stretch of lines that parses; "" without any.

    With ``entry_point``, a block that defines it goes before one that does not. A block may be cut off.
    """
    blocks = [*_blocks(text)]
    found = [code for language, code in blocks if language in _PYTHON]
    found = found or [code for language, code in blocks if not language]
    defining = [code for code in found if entry_point and _defines(code, entry_point)]
    if found:
        return (defining or found)[-1]
    return _longest(text.splitlines()[:_MAX_LINES])


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """The language and content of every fenced block, in order."""
    at = 0
    while opened := _FENCE.search(text, at):
        closed = re.compile(rf"^[ ]{{0,3}}{opened['fence']}[`~]*[ \t]*$", re.MULTILINE).search(text, opened.end())
        at = closed.end() if closed else len(text)
        code = text[opened.end() : closed.start() if closed else len(text)]
        yield opened["language"].lower(), textwrap.dedent(code)


def _longest(lines: list[str]) -> str:
    best: list[str] = []
    for start, line in enumerate(lines):
        if not _STARTS.match(line):
            continue
        for end in range(len(lines), start + len(best), -1):
            if lines[end - 1].strip() and _parses("\n".join(lines[start:end])):
                best = lines[start:end]
                break
    return "\n".join(best) + "\n" if best else ""


def _parses(code: str) -> bool:
    return _parsed(code) is not None


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # of deep nesting, the last two
        return None


def _defines(code: str, name: str) -> bool:
    """Whether the code defines a function at its top, or looks like it where it does not parse."""
    tree = _parsed(code)
    if tree is None:
        return re.search(rf"^(async )?def {re.escape(name)}\(", code, re.MULTILINE) is not None
    nodes = (ast.FunctionDef, ast.AsyncFunctionDef)
    return any(isinstance(node, nodes) and node.name == name for node in tree.body)
