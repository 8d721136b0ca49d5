"""The demos' programming tasks: right solutions pass in the sandbox, wrong ones fail, and code is found in replies."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from support.coding_tasks import TASKS, Task, code_in, read_tasks
from support.patient_sandbox import check

HUMANEVAL = Path(__file__).parents[3] / "shared" / "data" / "HumanEval.jsonl.gz"
BY_NAME = {task.name: task for task in TASKS}

RIGHT = {
    "add_all": "return sum(numbers)",
    "is_palindrome": "kept = [c for c in text.lower() if c.isalnum()]\nreturn kept == kept[::-1]",
    "largest_gap": "numbers = sorted(numbers)\nreturn max((b - a for a, b in zip(numbers, numbers[1:])), default=0)",
    "count_words": "words = text.lower().split()\nreturn {word: words.count(word) for word in words}",
    "primes_below": "return [n for n in range(2, limit) if all(n % d for d in range(2, n))]",
    "flatten": "return [x for n in nested for x in (flatten(n) if isinstance(n, list) else [n])]",
    "to_roman": """
signs = dict(M=1000, CM=900, D=500, CD=400, C=100, XC=90, L=50, XL=40, X=10, IX=9, V=5, IV=4, I=1)
said = ""
for sign, value in signs.items():
    said += sign * (number // value)
    number %= value
return said
""",
    "balanced": """
opened = []
for c in text:
    if c in "([{":
        opened.append(")]}"["([{".index(c)])
    elif c in ")]}" and (not opened or opened.pop() != c):
        return False
return not opened
""",
    "merge_spans": """
merged = []
for start, end in sorted(spans):
    if merged and start <= merged[-1][1]:
        merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
    else:
        merged.append((start, end))
return merged
""",
}
WRONG = {  # each the kind of mistake that a beginner makes
    "add_all": "total = 0\nfor n in numbers[1:]:\n    total += n\nreturn total",
    "is_palindrome": "return text == text[::-1]",
    "largest_gap": "return max(numbers) - min(numbers)",
    "count_words": "return {word: text.count(word) for word in text.split()}",
    "primes_below": "return [n for n in range(2, limit + 1) if all(n % d for d in range(2, n))]",
    "flatten": "return [x for n in nested for x in (n if isinstance(n, list) else [n])]",
    "to_roman": "return 'M' * (number // 1000) + 'C' * (number % 1000 // 100) + 'I' * (number % 10)",
    "balanced": "return all(text.count(a) == text.count(b) for a, b in ('()', '[]', '{}'))",
    "merge_spans": "return sorted(set(spans))",
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_right_solution_passes_and_a_wrong_one_fails(task: Task) -> None:
    """The tests of every task accept one solution and see through a likely mistake, in words that name it."""
    right = check(task.solution(RIGHT[task.name]), task.tests, entry_point=task.entry_point)
    wrong = check(task.solution(WRONG[task.name]), task.tests, entry_point=task.entry_point)
    empty = check(task.solution(""), task.tests, entry_point=task.entry_point)

    assert right.passed, right.text
    assert [wrong.status, empty.status] == ["failed", "failed"]
    assert "does not hold" in wrong.text or "Error: " in wrong.text


def test_there_is_a_handful_of_tasks() -> None:
    """Nine, each with its own name, and each known to this file."""
    assert len(TASKS) == len(BY_NAME) == 9
    assert RIGHT.keys() == WRONG.keys() == BY_NAME.keys()


# --------------------------------------------------------------------------------------------------- solutions

PROMPT = 'from typing import List\n\ndef help(x):\n    return x\n\ndef f(x: List[int]) -> int:\n    """Double."""\n'
LISTED = Task("t", PROMPT, "f", "")


def test_a_whole_function_gets_the_imports_and_helpers_of_the_prompt() -> None:
    """What the prompt defines before its own function is there for the answer."""
    assert LISTED.solution("def f(x):\n    return help(x)\n") == PROMPT[: PROMPT.index("def f")] + (
        "def f(x):\n    return help(x)\n"
    )


@pytest.mark.parametrize("body", ["return x", "    return x", "\n    return x\n", "        return x"])
def test_a_body_goes_below_the_prompt(body: str) -> None:
    """However it is indented, a body becomes that of the prompt's function."""
    assert LISTED.solution(body) == PROMPT + "    return x\n"


def test_another_function_is_no_solution() -> None:
    """Code that defines something else lands in the body, so that nothing is passed by accident."""
    assert LISTED.solution("def g(x): return x").startswith(PROMPT)


# ------------------------------------------------------------------------------------------------------ replies


REPLIES = [
    ("Here:\n```python\ndef f(): pass\n```\nDone.", "def f(): pass\n"),
    ("```py\nx = 1\n```", "x = 1\n"),
    ("```Python\nx = 1\n```", "x = 1\n"),
    ("~~~python\nx = '```'\n~~~", "x = '```'\n"),
    ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
    ("```python\na = 1\n```\nbetter:\n```python\nb = 2\n```", "b = 2\n"),
    ("```python\na = 1\n```\nrun it:\n```bash\npython a.py\n```", "a = 1\n"),
    ("```python\na = 1\n```\nprints\n```\n1\n```", "a = 1\n"),
    ("```\na = 1\n```", "a = 1\n"),
    ("```json\n{}\n```\nthat is all", ""),
    ("  ```python\n  def f():\n      pass\n  ```", "def f():\n    pass\n"),
    ("cut off:\n```python\ndef f():\n    return (1", "def f():\n    return (1"),
    ("```python title=a.py\na = 1\n```", "a = 1\n"),
    ("```python\r\na = 1\r\n```".replace("\r", ""), "a = 1\n"),
    ("Sure.\ndef f(x):\n    return x\n\nIt returns x.", "def f(x):\n    return x\n"),
    (
        "Sure.\nimport math\n\ndef f(x):\n    return math.pi\nEnjoy it!",
        "import math\n\ndef f(x):\n    return math.pi\n",
    ),
    ("def f(:\n    pass\ndef g(x):\n    return x", "def g(x):\n    return x\n"),
    ("Use `f(x)` for this.", ""),
    ("", ""),
    ("Import taxes are high. from here on it is prose", ""),
]


@pytest.mark.parametrize(("reply", "code"), REPLIES)
def test_the_code_of_a_reply_is_found(reply: str, code: str) -> None:
    """The last Python block, cut off or not; without a fence the longest stretch that parses."""
    assert code_in(reply) == code


def test_the_block_with_the_function_goes_before_its_use() -> None:
    """With the entry point's name, the usage example at the end is not taken for the solution."""
    reply = "```python\ndef f(): pass\n```\nUse it:\n```python\nprint(f())\n```"

    assert code_in(reply, entry_point="f") == "def f(): pass\n"
    assert code_in(reply) == code_in(reply, entry_point="g") == "print(f())\n"


def test_hostile_replies_end() -> None:
    """Deep nesting and many lines are looked through in bounded time."""
    assert code_in("```python\n" + "(" * 5000) == "(" * 5000
    assert code_in("def f(:\n" * 2000) == ""
    assert LISTED.solution("(" * 5000).startswith(PROMPT)


# ------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["tasks.jsonl", "tasks.jsonl.gz"])
def test_tasks_are_read_plain_and_packed(tmp_path: Path, name: str) -> None:
    """The four fields of HumanEval become a task."""
    row = {"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(c): pass", "more": 1}
    raw = (json.dumps(row) + "\n\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)

    assert read_tasks(tmp_path / name) == [Task("a/0", "def f():\n", "f", "def check(c): pass")]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b"{", "a.jsonl:1: not JSON .*; give one object a line"),
        ("a.jsonl", b"[]", "a.jsonl:1: no text under task_id, prompt, entry_point, test; a task needs task_id"),
        ("a.jsonl", b'{"task_id": "a", "prompt": "p", "test": 3}', "no text under entry_point, test; a task"),
        ("a.jsonl", b"\n", "a.jsonl holds no task; each of its lines"),
        ("a.jsonl", b"\xff", "a.jsonl cannot be read: .*; give JSON lines as UTF-8"),
        ("a.jsonl.gz", b"{}", "a.jsonl.gz cannot be read: .*; give JSON lines as UTF-8, packed only if .gz"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "a.jsonl.gz cannot be read: .*packed only if .gz"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    """The file and line, what is wrong, and what to give."""
    (tmp_path / name).write_bytes(raw)

    with pytest.raises(ValueError, match=message):
        read_tasks(tmp_path / name)


def test_human_eval_runs_in_the_sandbox() -> None:
    """Its 164 tasks are read; canonical solutions pass, empty ones fail."""
    if not HUMANEVAL.exists():
        pytest.skip(f"no {HUMANEVAL.name} beside the repository")
    tasks = read_tasks(HUMANEVAL)
    with gzip.open(HUMANEVAL, "rt", encoding="utf-8") as file:
        canonical = [json.loads(line)["canonical_solution"] for line in file]

    assert len(tasks) == 164
    for index in (0, 32, 38, 115):  # 32 and 38 need what their prompts define, 115 imports in its prompt
        task = tasks[index]
        assert check(task.solution(canonical[index]), task.tests, entry_point=task.entry_point).passed, task.name
        assert not check(task.solution("pass"), task.tests, entry_point=task.entry_point).passed
