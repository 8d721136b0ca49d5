r"""Maths problems with one right answer, made or read from a file, and the answer that a reply gives to them.

problem = generated(1, seed=7)[0]
same(extract("... so the total is \boxed{042}."), problem.answer)
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from agentmem.untrusted.json_text import json_value

Answer = int | str  # an integer where it is one, else the text: "3/4", "\\sqrt{2}", "B"

_LEVELS = 3
_MAX_LINE = 1 << 20  # bytes of a problem in a file
_SHORT = 24  # characters of an answer in words
_LONGEST, _MOST_BOXES = 400, 100  # characters in a box, and how many boxes are opened


@dataclass(frozen=True)
class Problem:
    """A question in words, and its answer. ``source`` says where it is from: a kind and level, or a file and line."""

    question: str
    answer: Answer
    source: str


# ------------------------------------------------------------------------------------------------------- made


def generated(count: int, seed: int = 0) -> list[Problem]:
    """``count`` problems of all kinds in turn, each kind from easy to hard; the same for the same seed.

    The first n of a longer list are the list of n. Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"count {count} is negative; ask for 0 problems or more")
    source = random.Random(seed)  # noqa: S311 (no secret)
    made = []
    for index in range(count):
        kind = _KINDS[index % len(_KINDS)]
        level = index // len(_KINDS) % _LEVELS + 1
        question, answer = kind(source, level)
        made.append(Problem(question, answer, f"{kind.__name__.strip('_')} {level}"))
    return made


def _purchase(source: random.Random, level: int) -> tuple[str, int]:
    goods = source.sample(["pencil", "notebook", "ruler", "lamp", "basket", "kettle"], level + 1)
    bought = [(thing, source.randint(2, 9), source.randint(2, 25 * level)) for thing in goods]
    total = sum(number * price for _, number, price in bought)
    paid = total + source.randint(1, 40)
    items = ", ".join(f"{number} {thing}s at {price} dollars each" for thing, number, price in bought)
    return f"A teacher buys {items}. She pays with {paid} dollars. How many dollars does she get back?", paid - total


def _journey(source: random.Random, level: int) -> tuple[str, int]:
    legs = [(source.randint(2, 9), source.randrange(20, 100, 5)) for _ in range(level + 1)]
    told = ", then ".join(f"{hours} hours at {speed} kilometres per hour" for hours, speed in legs)
    return f"A train travels {told}. How many kilometres has it travelled?", sum(a * b for a, b in legs)


def _meeting(source: random.Random, level: int) -> tuple[str, int]:
    periods = source.sample(range(4, 10 + 8 * level), 1 + level)
    told = ", ".join(str(period) for period in periods[:-1]) + f" and {periods[-1]}"
    question = f"Bells ring every {told} minutes. They have just rung together."
    return f"{question} After how many minutes do they next all ring together?", math.lcm(*periods)


def _power(source: random.Random, level: int) -> tuple[str, int]:
    base, exponent, modulus = source.randint(2, 9 * level), source.randint(5, 40**level), source.randint(7, 40 * level)
    return f"What is the remainder when {base}^{exponent} is divided by {modulus}?", pow(base, exponent, modulus)


def _multiples(source: random.Random, level: int) -> tuple[str, int]:
    first, second = source.sample(range(3, 6 + 5 * level), 2)
    limit = source.randint(40, 10 ** (level + 1))
    answer = sum(number for number in range(1, limit) if number % first == 0 or number % second == 0)
    return f"Find the sum of all positive integers below {limit} that are divisible by {first} or by {second}.", answer


def _divisors(source: random.Random, level: int) -> tuple[str, int]:
    number = math.prod(source.choice([2, 3, 5, 7, 11][: level + 2]) for _ in range(2 + 2 * level))
    return f"How many positive divisors does {number} have?", _count(number)


def _count(number: int) -> int:
    """The number of divisors of a product of small primes, from its factors."""
    product = 1
    for prime in (2, 3, 5, 7, 11):
        exponent = 0
        while number % prime == 0:
            number, exponent = number // prime, exponent + 1
        product *= exponent + 1
    return product


def _remainders(source: random.Random, level: int) -> tuple[str, int]:
    moduli = sorted(source.sample([3, 5, 7, 8, 11, 13], level + 1))
    hidden = source.randint(1, math.prod(moduli))
    told = " and ".join(f"{hidden % modulus} when divided by {modulus}" for modulus in moduli)
    return f"Find the least positive integer that leaves a remainder of {told}.", hidden


def _committees(source: random.Random, level: int) -> tuple[str, int]:
    women, men = source.randint(3, 4 + 2 * level), source.randint(3, 4 + 2 * level)
    chosen = [source.randint(1, 3), source.randint(1, 2)]
    question = f"A club has {women} women and {men} men. In how many ways can one choose a committee of "
    question += f"{chosen[0]} of the women and {chosen[1]} of the men?"
    return question, math.comb(women, chosen[0]) * math.comb(men, chosen[1])


def _recurrence(source: random.Random, level: int) -> tuple[str, int]:
    a, b, first, second = (source.randint(1, 1 + level) for _ in range(4))
    steps = source.randint(4, 4 + 3 * level)
    question = (
        f"A sequence starts with x_1 = {first} and x_2 = {second}. From then on x_n = {a}·x_(n-1) + {b}·x_(n-2). "
    )
    for _ in range(steps - 2):
        first, second = second, a * second + b * first
    return f"{question}Find the remainder when x_{steps} is divided by 1000.", second % 1000


_Kind = Callable[[random.Random, int], tuple[str, int]]
_KINDS: tuple[_Kind, ...] = (
    *(_purchase, _journey, _meeting, _power, _multiples),
    *(_divisors, _remainders, _committees, _recurrence),
)


# ------------------------------------------------------------------------------------------------------- read


def read(path: str | Path) -> list[Problem]:
    """Problems from JSON lines: objects with "problem" or "question", and "answer" (of which "#### 18" may be the end).

    Raises ValueError with the line and what to do about it; OSError when the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    found = [_problem(f"{path.name}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no problem; each of its lines should be an object as JSON")
    return found


def _problem(place: str, line: str) -> Problem:
    remedy = 'a line looks like {"problem": "What is 6 times 7?", "answer": 42}'
    try:
        row = json_value(line.encode(), _MAX_LINE, strict=False)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error}); {remedy}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a {type(row).__name__} in place of an object; {remedy}")  # noqa: TRY004 (the file's fault)
    question = row.get("problem") or row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{place}: no text under 'problem' or 'question'; {remedy}")
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (int, float, str)) or answer == "":
        raise ValueError(f"{place}: {answer!r} under 'answer' is neither number nor text; {remedy}")
    return Problem(question, _normal(str(answer).rpartition("####")[2]), place)


# -------------------------------------------------------------------------------------------------- extracted

_NUMBER = r"(?:(?<![\w)\]}.])[-+−])?(?<![\w.])\d+(?:(?:,|\{,\}|\\,)\d{3}(?!\d))*(?:\.\d+)?(?:/\d+)?"
_UNIT = r"(?:[a-zA-Z]{2}[a-zA-Z\s./]*|[gmhsL])"  # other single letters are variables
_SAID = (
    re.compile(r"####[ \t]*(?=[-+$]?[\d,.]+[ \t]*$)", re.MULTILINE),
    re.compile(r"final\s+answer[*_ \t]*(?:\bis\b|[:=\n])", re.IGNORECASE),
    re.compile(r"answer(?:\s+(?:to|of|for)\b[^.:\n]{0,60}?)?[*_\s]*(?:\bis\b|[:=])", re.IGNORECASE),
)


def extract(text: str) -> Answer | None:
    r"""The answer that a reply ends with, or None.

    In this order: the last complete ``\boxed{...}``; what the last "####", "final answer" or "the answer is" says; the
    last number. What follows the end of thinking goes before what precedes it.
    """
    thought, end, reply = text.rpartition("</think>")
    for part in (reply, thought) if end else (text,):
        if (answer := _extracted(part)) is not None:
            return answer
    return None


def _extracted(text: str) -> Answer | None:
    boxes = [*re.finditer(r"\\(?:f?box|boxed|framebox)\s*\{", text)]
    for box in reversed(boxes[-_MOST_BOXES:]):
        if content := _braced(text[box.end() : box.end() + _LONGEST]).strip(" $"):
            return _normal(content)
    for pattern in _SAID:
        for found in reversed([*pattern.finditer(text)]):
            if (answer := _said(text[found.end() :])) is not None:
                return answer
    numbers = re.findall(_NUMBER, text)
    return _normal(numbers[-1]) if numbers else None


def _braced(text: str) -> str:
    """What stands before the brace that closes one opened before the text; "" if none does."""
    depth = 1
    for found in re.finditer(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[: found.start()]
    return ""


def _said(rest: str) -> Answer | None:
    """The answer at the start of what follows "the answer is"."""
    rest = re.sub(r"^[\s*_:`]+", "", rest)
    line = rest.partition("\n")[0]
    if formula := re.match(r"\$([^$]+)\$|\\[(\[](.+?)\\[)\]]", line):
        return _normal(formula[1] or formula[2])
    sentence = re.split(r"[.,:;!?](?:\s|$)|\b(?:because|since|as|where|which|so)\b", line)[0]
    number = rf"{_NUMBER}(?![\w^])"
    numbers = re.findall(number, sentence.rpartition("=")[2]) or re.findall(number, sentence)
    if numbers:
        return _normal(numbers[0])
    word = sentence.strip(" *_`\"'")
    is_answer = len(word) == 1 or re.fullmatch(rf"(?=.*[^a-zA-Z])\S{{2,{_SHORT}}}", word)  # "B" or "2x+1", not "clear"
    return _normal(word) if is_answer else None


_DRESSING = (  # what LaTeX and prose put round a number, in this order
    (r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[$,!;: ]|[~$`]|\*\*", lambda _: ""),
    (r"(?<=\d)\s*(?=\\[dt]?frac)", lambda _: " "),
    (r"\\[()\[\]]", lambda _: ""),
    (r"\{,\}", lambda _: ","),
    (r"−|–", lambda _: "-"),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", lambda found: f"{found[1]}/{found[2]}"),
    (r"\\[dt]?frac\s*(\d)\s*(\d)", lambda found: f"{found[1]}/{found[2]}"),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox|textrm|boxed)\s*\{([^{}]*)\}", lambda found: f" {found[1]} "),
    (r"\^\s*\{?\s*\\circ\s*\}?|°|\\?%|\\degree", lambda _: ""),
)


def _normal(text: str) -> Answer:
    """An integer, if the text is one in some dress, with or without a unit; else the text without the dress."""
    for pattern, plain in _DRESSING:
        text = re.sub(pattern, plain, text)
    text = text.strip().rstrip(".").strip()
    text = text.rpartition("=")[2].strip() or text
    found = re.match(rf"(?:[£€]\s*)?({_NUMBER})(?:\s*{_UNIT}(?:\^\{{?[23]\}}?)?)?$", text)
    if not found:
        return text
    plain_number = re.sub(r"[,+]|\{,\}|\\", "", found[1])
    value = _value(plain_number)
    return plain_number if value is None or value.denominator != 1 else int(value)


def _value(text: str) -> Fraction | None:
    if not re.fullmatch(r"-?\d+(?:\.\d+|/\d+)?", text):  # and no exponent, which could take all memory
        return None
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):  # too long for int, or 1/0
        return None


def same(answer: Answer | None, truth: Answer) -> bool:
    """Whether an answer is right: equal as numbers (3/4 and 0.75), or as texts but for case and space."""
    if answer is None:
        return False
    mine, theirs = (str(_normal(str(one))) for one in (answer, truth))
    values = _value(mine), _value(theirs)
    if None not in values:
        return values[0] == values[1]
    return re.sub(r"\s", "", mine).casefold() == re.sub(r"\s", "", theirs).casefold()
