"""Make documents with planted facts, and the questions that ask for these facts at the end of a document.

A document is a window of a real text, into which invented facts are inserted: one fact for each depth. A depth is a
place in the document, given as a fraction of the document's length. The fact is inserted after the first sentence that
ends at this place or later. Text, tokenizer and :class:`Quiz` determine the documents completely.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal, get_args

import torch
from pydantic import Field, field_validator

from agentmem.errors import SettingsRefused
from agentmem.evaluation.terms import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

Format = Literal["codes", "names", "lists"]
FORMATS: tuple[Format, ...] = get_args(Format)
DEPTHS = (0.05, 0.25, 0.45, 0.7)
"""Default depths at which facts are planted, as fractions of the document.

In a document of 1,710 tokens with 512 slots that are halved each time, facts at these depths pass through 5, 4, 3 and 1
compactions, and the policy ``window`` has dropped all of them at the end.
"""
_SENTENCE = 48
"""The most tokens between a fact's planned place and the end of a sentence after which the fact is inserted."""
_ENDS = (".", "!", "?")


class Quiz(Frozen):
    """Settings of the documents and of the facts planted in them."""

    tokens: int = Field(default=1710, ge=1)
    """Tokens of every document, facts included."""
    facts: int = Field(default=40, ge=1)
    """The least number of facts over all documents; each document has one per depth."""
    depths: tuple[float, ...] = DEPTHS
    """Places where facts begin, as fractions of the document: ascending, at least 0 and below 1."""
    formats: tuple[Format, ...] = FORMATS
    seed: int = 0

    @field_validator("depths")
    @classmethod
    def _check_depths(cls, depths: tuple[float, ...]) -> tuple[float, ...]:
        if not depths or any(not 0 <= depth < 1 for depth in depths) or sorted(set(depths)) != list(depths):
            raise ValueError(f"depths: {list(depths)} must ascend and lie in 0 ≤ depth < 1; write 0.05,0.3,0.55")
        return depths

    @field_validator("formats")
    @classmethod
    def _check_formats(cls, formats: tuple[Format, ...]) -> tuple[Format, ...]:
        if not formats or len(set(formats)) < len(formats):
            raise ValueError(f"formats: {list(formats)} must be different ones of {', '.join(FORMATS)}")
        return formats

    @property
    def documents(self) -> int:
        """Return the number of documents needed for at least ``facts`` facts; each document has one fact per depth."""
        return -(-self.facts // len(self.depths))


@dataclass(frozen=True)
class Fact:
    """The texts of one fact.

    ``statement`` is planted in the document. ``question`` asks for the fact and ends with the beginning of the
    answering sentence, which ``answer`` completes.
    """

    statement: str
    question: str
    answer: str


@dataclass(frozen=True)
class Planted:
    """A fact that was planted in a document; its statement is the document's tokens ``start`` to ``stop - 1``.

    ``depth`` is the planned beginning of the statement, as a fraction of the document. ``asked`` has the ids of the
    question followed by those of the answer, and ``answer`` is the number of ids in the answer.
    """

    format: Format
    depth: float
    start: int
    stop: int
    asked: tuple[int, ...]
    answer: int


@dataclass(frozen=True, eq=False)
class Document:
    """A document with planted facts: its number, its ``ids [tokens]`` int64, and the facts in the order of the text."""

    index: int
    ids: torch.Tensor
    facts: tuple[Planted, ...]


# ---- facts

_PLACES = (
    "lighthouse", "harbour", "library", "chapel", "observatory", "windmill", "bakery", "theatre",
    "greenhouse", "station", "museum", "vineyard", "foundry", "orchard", "hospital", "brewery",
)  # fmt: skip
_SHIPS = (
    "Aurora", "Swallow", "Meridian", "Kestrel", "Juniper", "Halcyon", "Sparrow", "Tempest",
    "Corinna", "Nightingale", "Pelican", "Ondine", "Wanderer", "Marigold", "Falcon", "Bluebell",
)  # fmt: skip
_FIRST = (
    "Eleanor", "Martin", "Clara", "Hugo", "Beatrice", "Oscar", "Lydia", "Walter",
    "Sophie", "Victor", "Agnes", "Felix", "Helen", "Simon", "Laura", "Edgar",
)  # fmt: skip
_LAST = (
    "Finch", "Marlow", "Hastings", "Bennett", "Carver", "Doyle", "Fletcher", "Granger",
    "Holloway", "Lambert", "Porter", "Quinn", "Sutton", "Tanner", "Webster", "Barlow",
)  # fmt: skip
_VALUES = {
    "colour": ("green", "yellow", "purple", "orange", "silver", "brown", "white", "black"),
    "metal": ("iron", "copper", "tin", "gold", "lead", "nickel", "bronze", "zinc"),
    "animal": ("horse", "rabbit", "goat", "eagle", "salmon", "beetle", "camel", "otter"),
    "fruit": ("apple", "cherry", "lemon", "plum", "grape", "melon", "peach", "fig"),
}


def _code(random: Random, place: str) -> Fact:
    lead, code = f"The secret code of the {place} is", random.randrange(1000, 10000)
    return Fact(f" {lead} {code}.", _asked(f"What is the secret code of the {place}?", lead), f" {code}")


def _name(random: Random, ship: str) -> Fact:
    lead, name = f"The captain of the ship {ship} is named", f"{random.choice(_FIRST)} {random.choice(_LAST)}"
    return Fact(f" {lead} {name}.", _asked(f"What is the captain of the ship {ship} named?", lead), f" {name}")


def _list(random: Random, place: str) -> Fact:
    pairs = {key: random.choice(values) for key, values in _VALUES.items()}
    key, listed = random.choice(list(pairs)), "; ".join(f"{key} = {value}" for key, value in pairs.items())
    question = _asked(f"Which {key} is in the list of the {place}?", f"In the list of the {place}, {key} =")
    return Fact(f" The list of the {place}: {listed}.", question, f" {pairs[key]}")


def _asked(question: str, lead: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer: {lead}"


_MAKERS: dict[Format, tuple[Callable[[Random, str], Fact], tuple[str, ...]]] = {
    "codes": (_code, _PLACES),
    "names": (_name, _SHIPS),
    "lists": (_list, _PLACES),
}


def facts(quiz: Quiz, document: int) -> list[tuple[Format, Fact]]:
    """Return the facts of the document with the number ``document``: for each depth, a format and one fact.

    A format is a kind of fact. ``codes`` are secret codes of places, ``names`` are names of ships' captains, and
    ``lists`` are lists of words, each for one place. The formats take turns over the depths, and each document begins
    with the next format. With enough documents, every depth therefore gets facts of every format. Two facts of one
    format in one document are about different places or ships, if there are at most 16 depths.
    """
    random = Random(f"{quiz.seed}/{document}")  # noqa: S311  # a quiz, no secret
    subjects = {name: random.sample(_MAKERS[name][1], len(_MAKERS[name][1])) for name in FORMATS}
    found = []
    for index in range(len(quiz.depths)):
        name = quiz.formats[(document + index) % len(quiz.formats)]
        subject = subjects[name][index % len(subjects[name])]
        found.append((name, _MAKERS[name][0](random, subject)))
    return found


# ---- documents


def documents(
    tokenizer: PreTrainedTokenizerBase, text: str, quiz: Quiz, *, offset: int = 0, keep_first: int = 0
) -> tuple[Document, ...]:
    """Make the documents of a quiz from successive windows of ``text``, beginning at character ``offset``.

    The windows overlap if the text is too short. ``keep_first`` is the number of tokens in the prefix, which is never
    compacted and must therefore contain no fact.

    Raises:
        SettingsRefused: the text is shorter than one document, or a fact would lie in the prefix or past the end.

    """
    before = quiz.depths[0] * quiz.tokens
    if before < keep_first:
        raise SettingsRefused(
            f"depths: {quiz.depths[0]} of {quiz.tokens} tokens is token {int(before)}, inside the prefix of "
            f"{keep_first} that is never compacted; begin at {keep_first / quiz.tokens:.3f} or lower --keep-first"
        )
    source = _encode(tokenizer, text[offset:])
    if offset < 0 or len(source) < quiz.tokens:
        raise SettingsRefused(
            f"text: {len(source)} tokens from character {offset} on, but a document takes {quiz.tokens}; "
            "lower --tokens or --offset, or give a longer --text"
        )
    stride = min(quiz.tokens, (len(source) - quiz.tokens) // max(1, quiz.documents - 1))
    windows = (source[index * stride : index * stride + quiz.tokens] for index in range(quiz.documents))
    return tuple(_document(tokenizer, index, window, quiz) for index, window in enumerate(windows))


def _document(tokenizer: PreTrainedTokenizerBase, index: int, source: Sequence[int], quiz: Quiz) -> Document:
    ids, planted, taken = _beginning(tokenizer), [], 0
    for depth, (name, fact) in zip(quiz.depths, facts(quiz, index), strict=True):
        begin = int(depth * quiz.tokens)
        while len(ids) < begin + _SENTENCE and taken < len(source):
            if len(ids) >= begin and _ends_sentence(tokenizer, ids):
                break
            ids.append(source[taken])
            taken += 1
        start = len(ids)
        ids += _encode(tokenizer, fact.statement)
        planted.append(Planted(name, depth, start, len(ids), *_question(tokenizer, fact)))
    if len(ids) > quiz.tokens:
        raise SettingsRefused(
            f"depths: {list(quiz.depths)} leave no room for {len(quiz.depths)} facts, which end at token {len(ids)} "
            f"of {quiz.tokens}; give fewer or smaller depths, or more --tokens"
        )
    ids += source[taken : taken + quiz.tokens - len(ids)]
    return Document(index, torch.tensor(ids, dtype=torch.int64), tuple(planted))


def _question(tokenizer: PreTrainedTokenizerBase, fact: Fact) -> tuple[tuple[int, ...], int]:
    """Return the ids of the question followed by its answer, and the number of ids in the answer.

    Both texts are encoded together. The answer begins where the ids first differ from those of the question alone.
    """
    alone, whole = _encode(tokenizer, fact.question), _encode(tokenizer, fact.question + fact.answer)
    shared = next((at for at, (one, other) in enumerate(zip(alone, whole, strict=False)) if one != other), len(alone))
    return tuple(whole), len(whole) - shared


def _ends_sentence(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    return not ids or str(tokenizer.decode(ids[-1])).rstrip("\"'”’) \n").endswith(_ENDS)


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-text id as a list; the list is empty if the tokenizer adds no such id to texts."""
    first = tokenizer("", verbose=False)["input_ids"][:1]
    return list(first) if first and first[0] == tokenizer.bos_token_id else []


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
