"""The demos' maths problems: what is made has the answer that it says, and replies are read as they were meant."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from support.problems import Problem, extract, generated, read, same

DATA = Path(__file__).parents[3] / "shared" / "data"


def numbers(text: str) -> list[int]:
    """Every integer in a text."""
    return [int(found) for found in re.findall(r"\d+", text)]


def purchase(text: str) -> int:
    """What is paid less the sum of number times price."""
    *pairs, paid = numbers(text)
    return paid - sum(pairs[i] * pairs[i + 1] for i in range(0, len(pairs), 2))


def journey(text: str) -> int:
    """The sum of hours times speed."""
    found = numbers(text)
    return sum(found[i] * found[i + 1] for i in range(0, len(found), 2))


def meeting(text: str) -> int:
    """The first minute that every period divides."""
    minute = 1
    while any(minute % period for period in numbers(text)):
        minute += 1
    return minute


def power(text: str) -> int:
    """Multiplied out, step by step."""
    base, exponent, modulus = numbers(text)
    left = 1
    for _ in range(exponent):
        left = left * base % modulus
    return left


def multiples(text: str) -> int:
    """Each number counted once."""
    limit, first, second = numbers(text)
    return sum({*range(first, limit, first), *range(second, limit, second)})


def divisors(text: str) -> int:
    """Both of every pair of divisors."""
    (number,) = numbers(text)
    root = math.isqrt(number)
    return 2 * sum(number % divisor == 0 for divisor in range(1, root + 1)) - (root * root == number)


def remainders(text: str) -> int:
    """The first number that leaves them all."""
    found = numbers(text)
    number = 1
    while any(number % found[i + 1] != found[i] for i in range(0, len(found), 2)):
        number += 1
    return number


def committees(text: str) -> int:
    """Products of falling factorials, divided."""
    women, men, some, others = numbers(text)
    ways = math.prod(range(women - some + 1, women + 1)) * math.prod(range(men - others + 1, men + 1))
    return ways // (math.factorial(some) * math.factorial(others))


def recurrence(text: str) -> int:
    """The terms one by one."""
    found = re.search(r"x_1 = (\d+) and x_2 = (\d+).* x_n = (\d+)·x_\(n-1\) \+ (\d+)·x_.* when x_(\d+)", text)
    assert found
    first, second, a, b, last = map(int, found.groups())
    terms = [first, second]
    while len(terms) < last:
        terms.append(a * terms[-1] + b * terms[-2])
    return terms[last - 1] % 1000


ORACLES: dict[str, Callable[[str], int]] = {
    oracle.__name__: oracle
    for oracle in (purchase, journey, meeting, power, multiples, divisors, remainders, committees, recurrence)
}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_answers_are_right(seed: int) -> None:
    """Every problem of every kind and level, worked out from its words alone, has the answer that it says."""
    made = generated(81, seed)

    assert {problem.source for problem in made} == {f"{kind} {level}" for kind in ORACLES for level in (1, 2, 3)}
    for problem in made:
        assert problem.answer == ORACLES[problem.source.split()[0]](problem.question), problem
        assert isinstance(problem.answer, int)


def test_the_same_seed_makes_the_same_problems() -> None:
    """The list depends on the seed alone, and a shorter one is the start of a longer one."""
    assert generated(30, 5) == generated(30, 5)
    assert generated(30, 5)[:10] == generated(10, 5)
    assert generated(30, 5) != generated(30, 6)
    assert len({problem.question for problem in generated(200)}) > 190
    assert generated(0) == []
    with pytest.raises(ValueError, match="count -1 is negative; ask for 0"):
        generated(-1)


# --------------------------------------------------------------------------------------------------- replies

REPLIES: list[tuple[str, int | str | None]] = [
    (r"so \boxed{42}.", 42),
    (r"\boxed{1}, no: \boxed{2}. Check: 3", 2),
    (r"AIME wants three digits: \boxed{025}", 25),
    (r"\boxed{000}", 0),
    (r"\boxed{1,234}", 1234),
    (r"\boxed{1{,}234{,}567}", 1234567),
    (r"\boxed{12\,345}", 12345),
    (r"\boxed{ -17 }", -17),
    ("\\boxed{−17}", -17),
    (r"\boxed{+17}", 17),
    (r"\boxed{\text{42}}", 42),
    (r"\boxed{42\text{ apples}}", 42),
    (r"\boxed{42\,\mathrm{cm}^2}", 42),
    (r"\boxed{42 cm}", 42),
    (r"\boxed{\$18}", 18),
    (r"\boxed{$18$}", 18),
    (r"\boxed{50\%}", 50),
    (r"\boxed{60^\circ}", 60),
    (r"\boxed{60^{\circ}}", 60),
    (r"\boxed{x = 7}", 7),
    (r"\boxed{70.0}", 70),
    (r"\boxed{7.}", 7),
    (r"\boxed{0.5}", "0.5"),
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
    (r"\boxed{\frac12}", "1/2"),
    (r"\boxed{\frac{6}{3}}", 2),
    (r"\boxed{3\frac12}", "3 1/2"),
    (r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
    (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{\left\{1, 2\right\}}", r"\{1, 2\}"),
    (r"\boxed{(3, 4)}", "(3, 4)"),
    (r"\boxed{10^5}", "10^5"),
    (r"\boxed{B}", "B"),
    (r"\boxed{2x}", "2x"),
    (r"\boxed{2^{10}}", "2^{10}"),
    (r"\boxed{2\pi}", r"2\pi"),
    (r"\boxed {9}", 9),
    (r"\fbox{9} and \framebox{10}", 10),
    (r"\boxed{}  the total is 8", 8),
    (r"I will use \boxed{5}. Then \boxed{7", 5),
    ("Final Answer: \\boxed{204", 204),
    ("Final Answer: 204", 204),
    ("**Final Answer:** 204.", 204),
    ("**Final Answer**\n\n025 is it", 25),
    ("Final Answer: The final answer is $\\frac{1}{3}$. I hope it is correct.", "1/3"),
    ("The final answer is $204$ and not 5.", 204),
    ("Give the final answer as an integer. We find 3 + 4, which makes 7", 7),
    ("The answer is 12. There were 30 at first.", 12),
    ("The answer is: **12**", 12),
    ("the answer is 12 because 3 times 4 = 12 and 5 = 5.", 12),
    ("The answer is 3 + 4 = 7.", 7),
    ("The answer to the 2nd problem is 5", 5),
    ("The answer is $18.", 18),
    ("The answer is \\(18\\), out of 20.", 18),
    ("The answer is -3", -3),
    ("The answer is 12cm", 12),
    ("The answer is 5 m.", 5),
    ("The answer is 1,234.50 dollars", "1234.50"),
    ("Answer: 9\nCheck: 3 * 3 = 9, 2 * 2 = 4", 9),
    ("Answer = 9", 9),
    ("The answer is B.", "B"),
    ("The answer is 2x", "2x"),
    ("The answer is clear: add 3 and 4 to get 7", 7),
    ("The answer is 4. No, wait. The answer is 5.", 5),
    ("Sum up.\n#### 18", 18),
    ("#### 1,000", 1000),
    ("#### Step 3: add\nwhich gives 11", 11),
    ("so 5-3 leaves 2", 2),
    ("so it is 5-3", 3),
    ("it drops to -3", -3),
    ("1,2,3", 3),
    ("there are 1,000,000 of them", 1000000),
    ("so 3/4 of it", "3/4"),
    ("so 8/4 of it", 2),
    ("<think>\\boxed{1} maybe</think>It is 2.", 2),
    ("<think>The answer is 3</think>That is all.", 3),
    ("<think>still 5 or 6", 6),
    ("", None),
    ("I do not know.", None),
    ("x2 and y", None),
]


@pytest.mark.parametrize(("reply", "answer"), REPLIES)
def test_a_reply_is_read_as_it_was_meant(reply: str, answer: int | str | None) -> None:
    """Boxes go before words, words before the last number, and the last of each before the others."""
    extracted = extract(reply)

    assert extracted == answer
    assert type(extracted) is type(answer)


def test_long_and_hostile_replies_are_read_in_no_time() -> None:
    """Endless repetition, open boxes and huge numbers cost no more than their length."""
    assert extract("\\boxed{" * 20_000) is None
    assert extract("the answer is " * 20_000 + "3") == 3
    assert extract("9" * 10_000) == "9" * 10_000
    assert extract("(" * 50_000 + "1,") == 1
    assert not same("1e999999999", 1)


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        (25, "025", True),
        ("025", 25, True),
        (25, 25, True),
        (25, 26, False),
        (None, 0, False),
        ("0.75", "3/4", True),
        ("3/4", r"\frac{3}{4}", True),
        ("1/3", "0.333", False),
        (2, "6/3", True),
        ("b", "B", True),
        (r"\sqrt{ 2 }", r"\sqrt{2}", True),
        (r"\sqrt{2}", 2, False),
        ("1/0", "1/0", True),
        ("70 degrees", 70, True),
        (0, "", False),
    ],
)
def test_equal_answers_are_the_same(answer: int | str | None, truth: int | str, right: bool) -> None:
    """Numbers are compared by value, the rest as text without case and space; no answer is never right."""
    assert same(answer, truth) is right


# ----------------------------------------------------------------------------------------------------- files


def test_both_names_of_a_question_are_read(tmp_path: Path) -> None:
    """A problem or a question; an answer as a number, in digits, or at the end of a worked solution."""
    path = tmp_path / "some.jsonl"
    rows = [
        {"problem": "a", "answer": 70, "id": 1},
        {"problem": "b", "question": "not b", "answer": "025"},
        {"question": "c", "answer": "2 * 1,000 = 2,000\n#### 2,000"},
        {"question": "d", "answer": 3.5},
    ]
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")

    assert read(path) == [
        Problem("a", 70, "some.jsonl:1"),
        Problem("b", 25, "some.jsonl:3"),
        Problem("c", 2000, "some.jsonl:5"),
        Problem("d", "3.5", "some.jsonl:7"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "some.jsonl:2: not JSON .*; a line looks like"),
        ("[1]", "some.jsonl:2: a list in place of an object; a line"),
        ('{"answer": 1}', "some.jsonl:2: no text under 'problem' or 'question'; a line"),
        ('{"problem": " ", "answer": 1}', "some.jsonl:2: no text under 'problem' or 'question'; a line"),
        ('{"problem": "a"}', "some.jsonl:2: None under 'answer' is neither number nor text; a line"),
        ('{"problem": "a", "answer": [1]}', r"some.jsonl:2: \[1\] under 'answer' is neither number nor text"),
        ('{"problem": "a", "answer": true}', "some.jsonl:2: True under 'answer' is neither number nor text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    """The file, the line, what is wrong with it, and what a good one looks like."""
    path = tmp_path / "some.jsonl"
    path.write_text('{"problem": "a", "answer": 1}\n' + line, encoding="utf-8")

    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    """An empty file, one that is not text, and one that is not there."""
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{}")

    with pytest.raises(ValueError, match="empty holds no problem; each of its lines"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="bytes is not UTF-8 at byte 0; save it"):
        read(tmp_path / "bytes")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")


@pytest.mark.parametrize(("name", "count"), [("aime24", 30), ("aime25", 30), ("gsm8k_test", 1319)])
def test_public_files_are_read(name: str, count: int) -> None:
    """Every answer of the competition is an integer from 0 to 999, every one of GSM8K an integer."""
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name} beside the repository")
    found = read(path)

    assert len(found) == count
    assert all(isinstance(problem.answer, int) for problem in found)
    if name.startswith("aime"):
        assert all(0 <= int(problem.answer) <= 999 for problem in found)
