"""Define the task ``qa``: multiple-choice questions about a long document that was read into a capped memory.

Data files are in QuALITY's format: JSON objects, one per line or in a list, with ``article``, ``question``, ``options``
(a list of texts) and ``gold_label`` (1 for the first option). Each article is read once for all questions about it.
"""

from __future__ import annotations

from random import Random

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match
from pydantic import Field, model_validator

from agentmem.evaluation.tasks.records import Record, read_records
from agentmem.evaluation.tasks.replies import named, question, reply, shared

_LETTERS = "ABCDEFGH"
_PEOPLE = ("Ada", "Bruno", "Cora", "Dimitri", "Elsa", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kira", "Luis")
_CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Quito", "Dublin", "Hanoi")


class Question(Record):
    """Record of the data file: a multiple-choice question about an article."""

    article: str = Field(min_length=1)
    question: str
    options: list[str] = Field(min_length=2, max_length=len(_LETTERS))
    gold_label: int = Field(ge=1)

    @model_validator(mode="after")
    def _among_the_options(self) -> Question:
        if self.gold_label > len(self.options):
            raise ValueError(f"gold_label: {self.gold_label} is beyond the {len(self.options)} options")
        return self


@task(name=named("qa"))
def qa(data: str | None = None, questions: int | None = None, seed: int = 0) -> Task:
    """Return the task: multiple-choice questions about long documents.

    Args:
        data: a file in QuALITY's format; without a file, an article about twelve journeys is made from ``seed``.
        questions: number of questions to use, from the first on; ``None`` uses all.
        seed: random seed of the article made without a file.

    """
    found = made(seed) if data is None else read_records(data, Question)
    kept = sorted(found[:questions], key=lambda each: each.article)  # questions of one article stand together
    samples = [
        Sample(
            id=str(number), input=question(f"{each.article}\n\n", _asked(each)), target=_LETTERS[each.gold_label - 1]
        )
        for number, each in enumerate(kept)
    ]
    return Task(
        dataset=MemoryDataset(samples, name="qa"),
        solver=reply(),
        scorer=match(location="begin"),
        config=shared(1),
    )


def _asked(each: Question) -> str:
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, each.options, strict=False))
    return f"Question: {each.question}\n{options}\nAnswer:"


def made(seed: int) -> list[Question]:
    """Make an article about people who travelled to cities, and ask for each person's destination."""
    random = Random(seed)  # noqa: S311  # a quiz, no secret
    journeys = [(person, random.choice(_CITIES)) for person in random.sample(_PEOPLE, len(_PEOPLE))]
    article = " ".join(
        f"In the {number}th week {person} packed two bags, locked the house and travelled to {city}. The weather was "
        f"mild, the train was late, and a letter home described the harbour, the market and the food of {city}."
        for number, (person, city) in enumerate(journeys, start=4)
    )
    found = []
    for person, city in journeys:
        options = [city, *random.sample([other for other in _CITIES if other != city], 3)]
        random.shuffle(options)
        asked = f"Where did {person} travel?"
        found.append(Question(article=article, question=asked, options=options, gold_label=options.index(city) + 1))
    return found
