"""``instructions``: a rule given at the start must still be obeyed after a long text and many compactions.

The rule says how every answer begins and is never repeated; the questions at the end do not mention it.
"""

from __future__ import annotations

from random import Random

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match

from agentmem.evaluation.passage import default_text
from agentmem.evaluation.tasks.replies import named, question, reply, shared

_WORDS = ("Ahoy", "Indeed", "Listen", "Well", "Certainly", "Hello", "Okay", "Welcome")
_EXAMPLES = (
    ("What is two plus two?", "It is four."),
    ("Which colour has grass?", "It is green."),
    ("How many legs has a spider?", "It has eight."),
    ("What do bees make?", "They make honey."),
    ("Where does the sun rise?", "It rises in the east."),
)
_QUESTIONS = ("What is the capital of France?", "What is frozen water called?", "Which month follows May?")


@task(name=named("instructions"))
def instructions(characters: int = 6000, rules: int = 4, examples: int = 5, seed: int = 0) -> Task:
    """Questions behind a long text; the answer must begin as a rule in front of the text says.

    Args:
        characters: of the text between rule and questions.
        rules: different ones, each with a text of its own and three questions.
        examples: of its use, from 0 to 5, given with the rule.
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
    shown = "".join(
        f"{_asked(asked)} {word}, {answer[0].lower()}{answer[1:]}\n\n" for asked, answer in _EXAMPLES[:examples]
    )
    begin = (number * characters) % max(1, len(text) - characters)
    rule = f'Rule: Every answer begins with the word "{word}".\n\n'
    return f"{rule}{shown}Text: {text[begin : begin + characters].strip()}\n\n"


def _asked(asked: str) -> str:
    return f"Question: {asked}\nAnswer:"
