"""Define the task ``instructions``: a rule given at the start must still be obeyed after a long text.

The rule demands that every answer be a certain word. The rule and examples of its use come before the text. The
questions come after the text, and so after many compactions, and do not repeat the rule.
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
    """Return the task: a rule, a long text, and then questions that must be answered as the rule demands.

    Args:
        characters: length of the text between rule and questions.
        rules: number of different rules, at most 8; each rule has its own text and three questions.
        examples: number of examples that are given with the rule, from 0 to 6.
        seed: random seed for choosing the words of the rules.

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
    # The unusual heading keeps small models from answering as they usually answer questions, whatever the rule is.
    return f"### Question: {asked}\n### Rule says:"
