"""Define the task ``needle``: facts are inserted into a real text, and questions after the text ask for the facts.

The facts and questions are made as for ``agentmem eval recall``; see :mod:`agentmem.evaluation.facts`.
"""

from __future__ import annotations

from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match

from agentmem.evaluation.facts import Quiz, facts
from agentmem.evaluation.passage import default_text, read_text
from agentmem.evaluation.tasks.replies import named, question, reply, shared

_ENDS = (". ", ".\n")
_TOKENS = 12
"""The most tokens of an answer, enough for names, which are the longest answers."""


@task(name=named("needle"))
def needle(characters: int = 6000, documents: int = 4, seed: int = 0, text: str | None = None) -> Task:
    """Return the task: questions about facts at four depths of a document, asked after the document.

    Args:
        characters: number of characters in every document, without its facts.
        documents: number of documents; they are successive parts of the text, with four facts each.
        seed: random seed of the facts.
        text: path of a UTF-8 file; without it, the pages that ship with the package are used.

    """
    words = default_text() if text is None else read_text(Path(text))
    samples = [sample for index in range(documents) for sample in _samples(words, characters, index, seed)]
    return Task(
        dataset=MemoryDataset(samples, name="needle"),
        solver=reply(),
        scorer=match(location="begin"),
        config=shared(_TOKENS, stop="\n"),
    )


def _samples(text: str, characters: int, index: int, seed: int) -> list[Sample]:
    quiz = Quiz(seed=seed)
    begin = (index * characters) % max(1, len(text) - characters)
    window, planted = text[begin : begin + characters], facts(quiz, index)
    for depth, (_, fact) in reversed(list(zip(quiz.depths, planted, strict=True))):
        place = _sentence_end(window, int(depth * len(window)))
        window = f"{window[:place]}{fact.statement}{window[place:]}"
    return [
        Sample(
            id=f"{index}-{depth}",
            input=question(window, fact.question),
            target=fact.answer.strip(),
            metadata={"document": index, "depth": depth, "format": name},
        )
        for depth, (name, fact) in zip(quiz.depths, planted, strict=True)
    ]


def _sentence_end(text: str, start: int) -> int:
    ends = [place for end in _ENDS if (place := text.find(end, start)) >= 0]
    return min(ends, default=len(text) - 1) + 1
