"""``instructions``: a rule given at the start must still be obeyed after a long text and many compactions.

The rule says what every answer is; it stands in front of the text with examples of its use, and is never repeated. The
questions at the end do not say it.
"""

from __future__ import annotations

from random import Random

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match

from agentmem.evaluation.passage import default_text
from agentmem.evaluation.tasks.replies import named, question, reply, shared

_WORDS = ("Ahoy", "maple", "copper", "Indeed", "silver", "Listen", "north", "Welcome")
_EXAMPLES = (
    "What is two plus two?",
    "Which colour has grass?",
    "How many legs has a spider?",
    "What do bees make?",
    "Where does the sun rise?",
    "Who wrote Hamlet?",
)
_QUESTIONS = ("What is the capital of France?", "What is frozen water called?", "Which month follows May?")


@task(name=named("instructions"))
def instructions(characters: int = 6000, rules: int = 4, examples: int = 6, seed: int = 0) -> Task:
    """Questions behind a long text; the answer must be the word that a rule in front of the text names.

    Args:
        characters: of the text between rule and questions.
        rules: different ones, each with a text of its own and three questions.
        examples: of its use, from 0 to 6, given with the rule.
        seed: of the rules' words.

    """
    random, text = Random(seed), default_text()  # noqa: S311  # a quiz, no secret
    words = random.sample(_WORDS, min(rules, len(_WORDS)))
    samples = [
        Sample(
            id=f"{number}-{index}",
            input=question(_context(word, text, number, characters, examples), _asked(asked)),
            target=word,
        )
        for number, word in enumerate(words)
        for index, asked in enumerate(_QUESTIONS)
    ]
    return Task(
        dataset=MemoryDataset(samples, name="instructions"),
        solver=reply(),
        scorer=match(location="begin"),
        config=shared(4, stop="\n"),
    )


def _context(word: str, text: str, number: int, characters: int, examples: int) -> str:
    shown = "".join(f"{_asked(each)} {word}\n\n" for each in _EXAMPLES[:examples])
    begin = (number * characters) % max(1, len(text) - characters)
    rule = f'Rule: Answer every question with the word "{word}" and nothing else.\n\n'
    return f"{rule}{shown}### Text: {text[begin : begin + characters].strip()}\n\n"


def _asked(asked: str) -> str:
    # A head of its own: small models go on answering questions of the usual kind, whatever the rule says.
    return f"### Question: {asked}\n### Rule says:"
