"""Recall: facts are planted in real text, the text is streamed through capped memory, and each fact is asked for.

Every policy reads the same documents in the same pieces under the same :class:`Terms` (see
:mod:`agentmem.evaluation.fidelity`). At the end of a document each question is asked with its right answer in one
transient forward that leaves nothing behind, so questions do not see each other. An answer is exact when every token
of it is the most likely one behind the right tokens before it, which is what greedy decoding would write.

What a policy recovers is judged between two memories that are always measured: ``window`` remembers nothing that it
dropped, ``full`` all: recovered = (policy − window) / (full − window), in mean log-probability of the answers.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from agentmem.evaluation.facts import Document, Format, Planted
from agentmem.evaluation.full_logits import model_digest, passage_key
from agentmem.evaluation.kept import load, save, settings_key
from agentmem.evaluation.terms import Equal, Frozen, Reader, Spent, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.contracts import Policy
    from agentmem.hf import CappedCache

FULL, WINDOW = "full", "window"
LEAST_GAP = 0.1
"""Nats between window and full memory below which there is nothing to recover."""
_FULL_CHUNK = 256
"""Full memory's own terms depend on the document alone, so that it is measured once for all comparisons."""


class Answer(Frozen):
    """One fact, asked for at the end."""

    format: Format
    depth: float
    """Where the fact was meant to begin, as a fraction of the document."""
    start: int
    """The token at which it begins."""
    compactions: int
    """Compactions since then that found all of it behind the recent window."""
    log_prob: float
    """Of the right answer, summed over its ``tokens``, in nats."""
    tokens: int
    exact: bool


class Recalled(Spent):
    """One policy's answers about one document."""

    policy: str
    document: int
    num_compactions: int
    answers: tuple[Answer, ...]


class Score(Frozen):
    """Some facts together."""

    facts: int
    exact: float
    """Share of the facts whose greedy answer is right."""
    log_prob: float
    """Mean over the facts of the right answer's log-probability, in nats."""
    log_prob_per_token: float
    """The same per token of the answers."""
    recovered: float | None
    """(policy − window) / (full − window) of ``log_prob`` over the same facts: 0 is as window, 1 as full memory;
    ``None`` where full memory is not 0.1 nats better than window."""


class RecallRow(Score):
    """One line of the table; the scores in the keys of a group are over its facts alone."""

    policy: str
    """The name or spec as it was asked for; ``full`` and ``window`` are always there."""
    equal: Equal
    documents: int
    by_depth: dict[str, Score]
    """By the depth that was asked for, such as ``"0.3"``."""
    by_format: dict[str, Score]
    by_compactions: dict[str, Score]
    """By the number of compactions since the fact that found it behind the recent window."""
    num_compactions: int
    """In one document, at most."""
    capacity: int
    held: int
    bytes: int
    """At most, over the documents."""
    seconds: float
    compact_seconds: float
    """Sums over the documents; questions are left out."""
    total_compactions: int

    @property
    def seconds_each(self) -> float:
        """Seconds per compaction; 0 without any."""
        return self.compact_seconds / max(1, self.total_compactions)


# ---- measuring


def measure(
    model: PreTrainedModel,
    document: Document,
    policy: Policy,
    terms: Terms,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Recalled:
    """Stream a document through capped memory and ask for its facts.

    Raises:
        AgentmemError: the terms do not fit the model, the policy cannot serve them, or a question is longer than chunk.

    """
    with terms.memory(model, policy, tokenizer) as memory:
        reader = Reader(model, memory)
        for span, _ in reader.read(document.ids, every=False):
            progress(span.stop)
        return Recalled(
            **dict(reader.spent()),
            policy=policy.name,
            document=document.index,
            num_compactions=len(memory.compactions),
            answers=tuple(_answer(memory, fact) for fact in document.facts),
        )


def _answer(memory: CappedCache, fact: Planted) -> Answer:
    answer = torch.tensor(fact.asked[-fact.answer :])
    logits = memory.peek(fact.asked[:-1])[-fact.answer :].double().cpu()
    said = torch.log_softmax(logits, dim=-1)
    recent = memory.plan.recent
    return Answer(
        format=fact.format,
        depth=fact.depth,
        start=fact.start,
        compactions=sum(report.tokens_seen - recent >= fact.stop for report in memory.compactions),
        log_prob=float(said.gather(1, answer.unsqueeze(1)).sum()),
        tokens=fact.answer,
        exact=bool((logits.argmax(dim=-1) == answer).all()),
    )


def stream(
    model: PreTrainedModel,
    documents: Sequence[Document],
    policies: Sequence[str],
    terms: Terms,
    *,
    cache_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    fresh: bool = False,
    progress: Callable[[str, int], None] = lambda _name, _tokens: None,
) -> Iterator[Recalled]:
    """One :class:`Recalled` per policy and document: full memory first, then window, then the others.

    Each is saved in ``cache_dir`` before it is yielded. What was saved with the same model, document, settings and code
    is not measured again unless ``fresh``. ``progress`` is called with the policy's name and the number of tokens
    done so far.

    Raises:
        AgentmemError: see :func:`measure`; what was saved before stays.

    """
    plans = [(terms.policy(FULL), full_terms(documents))]
    plans += [(terms.policy(spec), terms) for spec in dict.fromkeys((WINDOW, *policies)) if spec != FULL]
    digest = model_digest(model)
    folders = [cache_dir / passage_key(model, _everything(document), digest) for document in documents]
    for policy, common in plans:
        key, before = settings_key(policy, common), 0
        for document, folder in zip(documents, folders, strict=True):
            path = folder / f"{key}.json"
            found = None if fresh else load(Recalled, path)
            if found is None:
                named = partial(_tell, progress, policy.name, before)
                found = measure(model, document, policy, common, tokenizer=tokenizer, progress=named)
                folder.mkdir(parents=True, exist_ok=True)
                save(found, path)
            before += len(document.ids)
            progress(policy.name, before)
            yield found.model_copy(update={"document": document.index})


def _tell(progress: Callable[[str, int], None], name: str, before: int, tokens: int) -> None:
    progress(name, before + tokens)


def full_terms(documents: Sequence[Document]) -> Terms:
    """Terms of full memory: it holds a whole document and pins nothing."""
    longest = max(len(document.ids) for document in documents)
    return Terms(slots=longest + _FULL_CHUNK, keep_first=0, keep_recent=0, chunk=_FULL_CHUNK)


def _everything(document: Document) -> torch.Tensor:
    """Document, facts' places and questions as one stretch of numbers, for its key."""
    planted = [(fact.start, fact.stop, fact.answer, *fact.asked) for fact in document.facts]
    return torch.cat([document.ids, *(torch.tensor([len(numbers), *numbers]) for numbers in planted)])


# ---- rows


def rows(found: Sequence[Recalled], equal: Equal, documents: int) -> tuple[RecallRow, ...]:
    """The table of one comparison. Policies that have not answered about every document yet are left out."""
    by_policy: dict[str, dict[int, Recalled]] = {}
    for each in found:
        by_policy.setdefault(each.policy, {})[each.document] = each
    whole = {name: tuple(runs.values()) for name, runs in by_policy.items() if len(runs) == documents}
    if not {FULL, WINDOW} <= whole.keys():
        return ()
    ends = (_answers(whole[WINDOW]), _answers(whole[FULL]))
    return tuple(_row(name, runs, equal, ends) for name, runs in whole.items())


def _answers(runs: Sequence[Recalled]) -> list[Answer]:
    return [answer for run in runs for answer in run.answers]


Ends = tuple[list[Answer], list[Answer]]
"""Window's and full memory's answers to the same questions."""


def _row(name: str, runs: Sequence[Recalled], equal: Equal, ends: Ends) -> RecallRow:
    answers = _answers(runs)
    return RecallRow(
        **dict(_score(answers, ends, range(len(answers)))),
        policy=name,
        equal=equal,
        documents=len(runs),
        by_depth=_groups(answers, ends, lambda answer: answer.depth),
        by_format=_groups(answers, ends, lambda answer: answer.format),
        by_compactions=_groups(answers, ends, lambda answer: answer.compactions),
        num_compactions=max(run.num_compactions for run in runs),
        capacity=runs[0].capacity,
        held=max(run.held for run in runs),
        bytes=max(run.bytes for run in runs),
        seconds=sum(run.seconds for run in runs),
        compact_seconds=sum(run.compact_seconds for run in runs),
        total_compactions=sum(run.num_compactions for run in runs),
    )


def _groups(answers: Sequence[Answer], ends: Ends, of: Callable[[Answer], Hashable]) -> dict[str, Score]:
    places: dict[Hashable, list[int]] = {}
    for place, answer in enumerate(answers):
        places.setdefault(of(answer), []).append(place)
    ordered = sorted(places, key=lambda key: (isinstance(key, str), key))
    return {str(key): _score(answers, ends, places[key]) for key in ordered}


def _score(answers: Sequence[Answer], ends: Ends, places: Sequence[int]) -> Score:
    chosen = [answers[place] for place in places]
    low, high = (_mean([end[place] for place in places]) for end in ends)
    log_prob = _mean(chosen)
    return Score(
        facts=len(chosen),
        exact=sum(answer.exact for answer in chosen) / len(chosen),
        log_prob=log_prob,
        log_prob_per_token=sum(each.log_prob for each in chosen) / sum(each.tokens for each in chosen),
        recovered=(log_prob - low) / (high - low) if high - low > LEAST_GAP else None,
    )


def _mean(answers: Sequence[Answer]) -> float:
    return sum(answer.log_prob for answer in answers) / len(answers)
