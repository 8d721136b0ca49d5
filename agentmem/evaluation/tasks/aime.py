r"""``aime``: competition problems under a strict cap in mid-thought, as in "Fast KV Compaction via Attention Matching".

The protocol of arXiv:2602.16284's online experiment, and where each part of it is set:

- physical size in slots or bytes, halved each time it fills: ``-M slots=2048 -M target=0.5`` (or ``cap``);
- at most N compactions: ``-M max_compactions=6``; full again after the last, thinking ends;
- only the last 20 tokens are protected, the prompt is compacted too: ``-M keep_first=0 -M keep_recent=20``;
- uniform budgets, highest attention, β in [−3, 3], 2 projected-gradient steps, queries from repeating the text:
  ``-M "policy=am-halving[probe=repeat]"``;
- an answer is forced where thinking did not end: "I need to respond with the answer.", the end of thinking, "Final
  Answer:", and 16 tokens, all of it inside the physical size;
- samples by temperature 0.6 and top-p 0.95, several epochs; tokens generated are reported.

Data: JSON lines with ``problem`` and ``answer``, an integer from 0 to 999, and perhaps ``id``.
"""

from __future__ import annotations

import re
from random import Random

from inspect_ai import Epochs, Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, Scorer, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState
from pydantic import Field

from agentmem.evaluation.tasks.records import Record, read_records
from agentmem.evaluation.tasks.replies import named, reply

PROMPT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
FORCED = "\nI need to respond with the answer.\n{end}\n\nFinal Answer:"
ANSWER_TOKENS = 16
_BOXED = re.compile(r"\\boxed\s*\{\s*(-?\d[\d,]*)\s*\}")
_NUMBER = re.compile(r"-?\d[\d,]*")


class Problem(Record):
    """One problem."""

    problem: str = Field(min_length=1)
    answer: int
    id: int | str | None = None


@task(name=named("aime"))
def aime(
    data: str | None = None,
    problems: int | None = None,
    epochs: int = 4,
    max_tokens: int = 8192,
    temperature: float = 0.6,
    top_p: float = 0.95,
    end_of_thinking: str = "</think>",
    seed: int = 0,
) -> Task:
    """Problems whose answer is an integer, thought about under the cap of the model's arguments.

    Args:
        data: a file of problems; without it two easy ones that are made from ``seed``.
        problems: the first so many; all without it.
        epochs: samples of each problem.
        max_tokens: that are thought at most, whatever the cap: the effective size.
        temperature: 0 is greedy.
        top_p: the nucleus that is sampled from.
        end_of_thinking: the model's own mark; an answer is forced where it was not written.
        seed: of the sampling, and of the problems that are made.

    """
    found = made(seed) if data is None else read_records(data, Problem)
    samples = [
        Sample(
            id=str(number if each.id is None else each.id),
            input=PROMPT.format(problem=each.problem),
            target=str(each.answer),
        )
        for number, each in enumerate(found[:problems])
    ]
    forced = {"text": FORCED.format(end=end_of_thinking), "end": end_of_thinking, "tokens": ANSWER_TOKENS}
    return Task(
        dataset=MemoryDataset(samples, name="aime"),
        solver=reply(),
        scorer=integer(),
        epochs=Epochs(epochs, "mean"),
        config=GenerateConfig(
            temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed, extra_body={"forced": forced}
        ),
    )


def made(seed: int) -> list[Problem]:
    """Two problems that need no idea, for trying the task without data."""
    random = Random(seed)  # noqa: S311  # a quiz, no secret
    base, power, low = random.randint(3, 9), random.randint(20, 60), random.randint(10, 60)
    total = sum(number for number in range(low, low + 40) if number % 7 == 0)
    return [
        Problem(problem=f"Find the remainder when ${base}^{{{power}}}$ is divided by 1000.", answer=base**power % 1000),
        Problem(problem=f"Find the sum of all multiples of 7 from {low} to {low + 39}.", answer=total),
    ]


@scorer(metrics=[accuracy(), stderr()])
def integer() -> Scorer:
    """Right if the last boxed integer is, or the first one behind "Final Answer:"."""

    async def score(state: TaskState, target: Target) -> Score:
        said = answered(state.output.completion)
        return Score(value="C" if said == int(target.text) else "I", answer=None if said is None else str(said))

    return score


def answered(text: str) -> int | None:
    """The integer that a reply gives as its answer."""
    _, mark, last = text.rpartition("Final Answer:")
    boxed = _BOXED.findall(last if mark else text) or (_NUMBER.findall(last)[:1] if mark else [])
    return int(boxed[-1].replace(",", "")) if boxed else None
