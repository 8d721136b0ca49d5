"""``needle``: facts planted in real text, asked for at its end; the questions of ``agentmem eval recall`` as a task."""

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
"""Of an answer, at most: names are the longest."""


@task(name=named("needle"))
def needle(characters: int = 6000, documents: int = 4, seed: int = 0, text: str | None = None) -> Task:
    """Facts at four depths of a document, asked for behind it.

    Args:
        characters: of every document, facts not counted.
        documents: stretches of the text, one behind the other, with four facts each.
        seed: of the facts.
        text: a UTF-8 file; without it the pages that ship with the package.

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
