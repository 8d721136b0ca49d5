"""Define the task ``many_shot``: in-context classification whose examples do not fit under the cap.

Every word has an arbitrary label, which can be learned only from the examples. The examples come in blocks: the words
of a block are shown several times, and then never again. With a memory that keeps only the newest examples, a model
knows only the labels of the last block.
"""

from __future__ import annotations

from random import Random

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match

from agentmem.errors import SettingsRefused
from agentmem.evaluation.tasks.replies import named, question, reply, shared

# Single tokens for most vocabularies, so that an answer is one step.
_LABELS = ("blue", "seven", "north", "silver", "maple", "copper")
# fmt: off
_WORDS = (
    "dog", "horse", "cat", "lion", "tiger", "wolf", "sheep", "goat", "rabbit", "fox", "bear", "deer", "mouse", "cow",
    "pig", "elephant", "monkey", "camel", "otter", "whale", "hammer", "saw", "drill", "wrench", "shovel", "rake", "axe",
    "spade", "file", "plane", "clamp", "ladder", "anvil", "apple", "pear", "plum", "cherry", "lemon", "orange", "grape",
    "melon", "peach", "fig", "mango", "banana", "kiwi", "lime", "date", "berry", "rain", "snow", "hail", "storm", "fog",
    "wind", "thunder", "frost", "breeze", "cloud", "mist", "violin", "piano", "flute", "drum", "harp", "trumpet",
    "guitar", "organ", "tuba", "horn", "fiddle", "chair", "table", "sofa", "bed", "desk", "shelf", "bench", "couch",
)
# fmt: on


@task(name=named("many_shot"))
def many_shot(words: int = 40, block: int = 10, rounds: int = 3, labels: int = 6, seed: int = 0) -> Task:
    """Return the task: questions for the labels of words that were shown with their labels as examples.

    Args:
        words: number of words; a question is asked about each.
        block: number of words in a block.
        rounds: number of times that the words of a block are shown, each time in another order.
        labels: number of different labels, from 2 to 6.
        seed: random seed for choosing the words, their labels and their order.

    """
    if not 1 <= words <= len(_WORDS) or not 2 <= labels <= len(_LABELS) or block < 1 or rounds < 1:  # noqa: PLR2004  # two labels, or there is nothing to tell
        raise SettingsRefused(
            f"words={words}, labels={labels}, block={block}, rounds={rounds}: give 1 to {len(_WORDS)} words, "
            f"2 to {len(_LABELS)} labels, and at least 1 of the others"
        )
    random = Random(seed)  # noqa: S311  # a quiz, no secret
    pairs = [(word, random.choice(_LABELS[:labels])) for word in random.sample(_WORDS, words)]
    context = "".join(f"{_asked(word)} {label}\n\n" for word, label in _shown(pairs, block, rounds, random))
    samples = [
        Sample(id=word, input=question(context, _asked(word)), target=label, metadata={"block": index // block})
        for index, (word, label) in enumerate(pairs)
    ]
    return Task(
        dataset=MemoryDataset(samples, name="many_shot"),
        solver=reply(),
        scorer=match(location="begin"),
        config=shared(1),
    )


def _shown(pairs: list[tuple[str, str]], block: int, rounds: int, random: Random) -> list[tuple[str, str]]:
    found = []
    for start in range(0, len(pairs), block):
        for _ in range(rounds):
            some = pairs[start : start + block]
            random.shuffle(some)
            found += some
    return found


def _asked(word: str) -> str:
    return f"Word: {word}\nLabel:"
