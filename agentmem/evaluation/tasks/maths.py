r"""Define the task ``maths``: word problems, asked after examples with solutions; answers are numbers or expressions.

Data files are in GSM8K's format (``question``, and ``answer`` with the result after ``####``) or in MATH's format
(``problem``, and ``answer`` or a ``solution`` with ``\boxed{…}``). The package math-verify compares the answers.
"""

from __future__ import annotations

from random import Random
from typing import Self

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState
from math_verify import parse, verify
from pydantic import model_validator

from agentmem.errors import SettingsRefused
from agentmem.evaluation.tasks.records import Record, read_records
from agentmem.evaluation.tasks.replies import named, question, reply, shared

_GOODS = ("pencils", "apples", "stamps", "candles", "buttons", "marbles")
_PEOPLE = ("Nina", "Omar", "Petra", "Quentin", "Rosa", "Stefan")
_GIVEN = 64
"""Number of problems that are made if there is no data file, examples included."""


class Problem(Record):
    """Record of the data file: a problem in GSM8K's or MATH's format."""

    question: str = ""
    problem: str = ""
    answer: str = ""
    solution: str = ""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not (self.question or self.problem) or not (self.answer or self.solution):
            raise ValueError("a problem needs question or problem, and answer or solution")
        return self

    @property
    def asked(self) -> str:
        """Return the text of the problem."""
        return self.question or self.problem

    @property
    def worked(self) -> str:
        """Return the solution as it is shown in an example, with its result at the end."""
        return self.solution or self.answer

    @property
    def result(self) -> str:
        """Return the result with which replies are compared.

        This is the part of the answer after ``####``, or the whole answer if it has no such mark. If the record has no
        answer, its solution is used.
        """
        given = self.answer or self.solution
        return given.rpartition("####")[2].strip() if "####" in given else given


@task(name=named("maths"))
def maths(
    data: str | None = None, problems: int | None = 16, shots: int = 4, max_tokens: int = 200, seed: int = 0
) -> Task:
    """Return the task: word problems that are asked after examples with solutions.

    Args:
        data: a file in GSM8K's or MATH's format; without a file, problems about purchases are made from ``seed``.
        problems: number of problems to ask, taken from the records after the examples; ``None`` asks all.
        shots: number of examples, taken from the first records; choose so many that they do not fit under the cap.
        max_tokens: the most tokens of an answer. A question and its answer together may have at most ``chunk`` tokens,
            the most that a memory takes in one forward. Set it with ``-M chunk=N``.
        seed: random seed of the problems made without a file.

    """
    found = made(seed) if data is None else read_records(data, Problem)
    if len(found) <= shots:
        raise SettingsRefused(f"shots: {shots} examples leave none of {len(found)} problems; give fewer")
    context = "".join(f"{_asked(each)} {each.worked}\n\n" for each in found[:shots])
    last = None if problems is None else shots + problems
    samples = [
        Sample(id=str(number), input=question(context, _asked(each)), target=each.result)
        for number, each in enumerate(found[shots:last])
    ]
    return Task(
        dataset=MemoryDataset(samples, name="maths"),
        solver=reply(),
        scorer=equal(),
        config=shared(max_tokens, stop="\n\n"),
    )


def _asked(each: Problem) -> str:
    return f"Question: {each.asked}\nAnswer:"


def made(seed: int) -> list[Problem]:
    """Make 64 easy problems about purchases with the random seed ``seed``, for trying the task without a data file."""
    random, found = Random(seed), []  # noqa: S311  # a quiz, no secret
    for _ in range(_GIVEN):
        person, goods = random.choice(_PEOPLE), random.choice(_GOODS)
        had, more = random.randint(2, 40), random.randint(2, 40)
        asked = f"{person} has {had} {goods} and buys {more} more. How many {goods} does {person} have now?"
        found.append(Problem(question=asked, answer=f"{had} + {more} = {had + more}\n#### {had + more}"))
    return found


@scorer(metrics=[accuracy(), stderr()])
def equal() -> Scorer:
    """Return the scorer, which marks a reply right if math-verify finds its result equal to the target."""

    async def score(state: TaskState, target: Target) -> Score:
        said = state.output.completion.partition("\n\n")[0]
        said = said.rpartition("####")[2].strip() if "####" in said else said
        # No time limits: math-verify implements them by an alarm, which only the main thread may set.
        truth = parse(f"${target.text}$", parsing_timeout=None)
        found = parse(said, parsing_timeout=None) or parse(f"${said}$", parsing_timeout=None)
        right = bool(found) and bool(verify(truth, found, timeout_seconds=None))
        return Score(value="C" if right else "I", answer=said)

    return score
