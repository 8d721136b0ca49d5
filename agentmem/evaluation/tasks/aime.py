r"""Define the task ``aime``: competition problems, whose long reasoning is compacted while it is generated.

The protocol is that of the online experiment in "Fast KV Compaction via Attention Matching", arXiv:2602.16284. These
arguments of ``inspect eval`` set up the memory as in the paper:

- ``-M slots=2048 -M target=0.5``: the memory has 2048 slots, and each compaction halves a full memory. Instead of
  ``slots``, a ``cap`` in bytes may be given.
- ``-M max_compactions=6``: there are at most 6 compactions. When the memory is full again after the last one,
  reasoning ends.
- ``-M keep_first=0 -M keep_recent=20``: only the last 20 tokens are protected; the prompt is compacted too.
- ``-M "policy=am-halving[probe=repeat]"``: uniform budgets, keys with the highest attention, β in [−3, 3], 2
  projected-gradient steps, and reference queries from repeating the text.

The task itself does the rest. If the model did not end its reasoning, an answer is forced: "I need to respond with the
answer.", the mark that ends reasoning, and "Final Answer:" are appended, and 16 tokens are generated. With
``max_compactions``, reasoning is ended while the memory still has free slots for all of this. Samples are drawn with
temperature 0.6 and top-p 0.95 in several epochs, and the number of generated tokens is reported.

Data files have one JSON object per line with ``problem``, ``answer`` (an integer from 0 to 999) and optionally ``id``.
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
    """Record of the data file: a problem with an integer as its answer."""

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
    """Return the task: problems with integer answers, on which the model reasons with a capped memory.

    The cap is given by the arguments of the model; see :mod:`agentmem.evaluation.tasks.provider`.

    Args:
        data: a file of problems; without a file, two easy problems are made from ``seed``.
        problems: number of problems to use, from the first on; ``None`` uses all.
        epochs: number of times that each problem is answered.
        max_tokens: the most tokens of reasoning, whatever the cap; arXiv:2602.16284 calls this the effective size.
        temperature: sampling temperature; 0 is greedy.
        top_p: probability mass of the most likely tokens, from which tokens are sampled.
        end_of_thinking: the text with which the model ends its reasoning; if a reply lacks it, an answer is forced.
        seed: random seed of the sampling, and of the problems that are made.

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
    """Make two easy problems from ``seed``, for trying the task without data."""
    random = Random(seed)  # noqa: S311  # a quiz, no secret
    base, power, low = random.randint(3, 9), random.randint(20, 60), random.randint(10, 60)
    total = sum(number for number in range(low, low + 40) if number % 7 == 0)
    return [
        Problem(problem=f"Find the remainder when ${base}^{{{power}}}$ is divided by 1000.", answer=base**power % 1000),
        Problem(problem=f"Find the sum of all multiples of 7 from {low} to {low + 39}.", answer=total),
    ]


@scorer(metrics=[accuracy(), stderr()])
def integer() -> Scorer:
    """Return the scorer, which marks a reply right if the integer found by :func:`answered` equals the target."""

    async def score(state: TaskState, target: Target) -> Score:
        said = answered(state.output.completion)
        return Score(value="C" if said == int(target.text) else "I", answer=None if said is None else str(said))

    return score


def answered(text: str) -> int | None:
    """Return the integer that a reply gives as its answer; ``None`` if it gives none.

    The answer is the last integer in a LaTeX box. If the reply contains "Final Answer:", only the text after these
    words is searched, and without a box its first integer is the answer.
    """
    _, mark, last = text.rpartition("Final Answer:")
    boxed = _BOXED.findall(last if mark else text) or (_NUMBER.findall(last)[:1] if mark else [])
    return int(boxed[-1].replace(",", "")) if boxed else None
