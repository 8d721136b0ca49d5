"""Measure recall: read documents with planted facts into a capped memory, and ask for each fact at the end.

Every policy reads the same documents with the same settings of its memory (:class:`Terms`). After a document, each
question is run with its right answer in a forward that leaves the memory unchanged, so questions do not affect each
other. An answer counts as exact if, after the question, each token of the right answer is the most likely next token.
Greedy decoding would then write this answer.

Two reference memories are always measured as well: ``window``, which drops old tokens completely, and ``full``, which
keeps all tokens. The score ``recovered`` = (policy − window) / (full − window) compares a policy with these references:
0 equals window, and 1 equals full memory. Each name in the formula stands for the mean log-probability of the right
answers with this memory.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from agentmem.evaluation.facts import Document, Format, Planted
from agentmem.evaluation.full_logits import model_digest, passage_key
from agentmem.evaluation.kept import load, save, settings_key
from agentmem.evaluation.terms import Equal, Frozen, Reader, Source, Spent, Terms

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.contracts import Policy
    from agentmem.hf import CappedCache

FULL, WINDOW = "full", "window"
LEAST_GAP = 0.1
"""Nats by which full memory must be better than window for ``recovered`` to be computed."""
_FULL_CHUNK = 256
"""``chunk`` of full memory, fixed so that one measurement of full memory can be used with all settings of policies."""


class Answer(Frozen):
    """The model's answer to the question about one fact."""

    format: Format
    depth: float
    """Planned beginning of the fact, as a fraction of the document."""
    start: int
    """Token at which the fact begins."""
    compactions: int
    """Number of compactions that could change the fact: those at which all of it was older than the recent window."""
    log_prob: float
    """Log-probability of the right answer, summed over its ``tokens`` tokens, in nats."""
    tokens: int
    exact: bool


class Recalled(Spent):
    """The answers of one policy about one document, with the slots, bytes and seconds of reading the document."""

    policy: str
    document: int
    num_compactions: int
    answers: tuple[Answer, ...]


class Score(Frozen):
    """The scores of one policy over a group of facts."""

    facts: int
    exact: float
    """Share of the facts whose greedy answer equals the right one."""
    log_prob: float
    """Mean over the facts of the right answer's log-probability, in nats."""
    log_prob_per_token: float
    """Log-probability of the right answers divided by the number of their tokens, in nats."""
    recovered: float | None
    """(policy − window) / (full − window) of ``log_prob`` over the same facts: 0 equals window, 1 equals full memory.

    ``None`` if full memory is at most 0.1 nats better than window.
    """


class RecallRow(Score, Source):
    """One line of the recall table: the scores of one policy over all facts, and over groups of facts."""

    policy: str
    """Name or spec of the policy as the caller gave it; the table always contains ``full`` and ``window``."""
    equal: Equal
    documents: int
    by_depth: dict[str, Score]
    """Scores by the planned depth of the facts, such as ``"0.3"``."""
    by_format: dict[str, Score]
    """Scores by the format of the facts."""
    by_compactions: dict[str, Score]
    """Scores by the number of compactions that could change the fact; see :attr:`Answer.compactions`."""
    num_compactions: int
    """The most compactions in one document."""
    capacity: int
    held: int
    bytes: int
    """The greatest peak of the documents, resident and temporary bytes together."""
    seconds: float
    compact_seconds: float
    """Seconds spent compacting. Like ``seconds``, this is a sum over the documents and does not count the questions."""
    total_compactions: int

    @property
    def seconds_each(self) -> float:
        """Return the mean seconds per compaction; 0 if there was no compaction."""
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
    """Read a document into a capped memory, ask for its facts, and return the answers.

    ``progress`` is called with the number of tokens read so far.

    Raises:
        AgentmemError: the settings in ``terms`` do not fit the model or the policy, or a question is longer than
            ``chunk``.

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
    """Measure every policy on every document, and yield the results.

    Full memory is measured first, then the policy ``window`` as a baseline, then ``policies`` in their order.
    Each result is saved in ``cache_dir`` before it is yielded. If a result of the same model, document, settings and
    code was saved earlier, it is loaded instead of being measured again; with ``fresh``, it is measured again.
    ``progress`` is called with the policy's name and the number of tokens that the policy has read so far.

    Raises:
        AgentmemError: see :func:`measure`; results that were saved before stay on disk.

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
    """Return the settings of full memory: enough slots for the longest document, so that nothing is compacted."""
    longest = max(len(document.ids) for document in documents)
    return Terms(slots=longest + _FULL_CHUNK, keep_first=0, keep_recent=0, chunk=_FULL_CHUNK)


def _everything(document: Document) -> torch.Tensor:
    """Return everything that identifies a document, its ids and facts, as one tensor from which a key can be made."""
    planted = [(fact.start, fact.stop, fact.answer, *fact.asked) for fact in document.facts]
    return torch.cat([document.ids, *(torch.tensor([len(numbers), *numbers]) for numbers in planted)])


# ---- rows


def rows(
    found: Sequence[Recalled],
    equal: Equal,
    documents: int,
    source: Source = Source(),  # noqa: B008  # frozen
) -> tuple[RecallRow, ...]:
    """Return the recall table for the results found so far under one limit, one line per policy.

    ``documents`` is the number of documents, and ``source`` is copied into the rows. A policy that was not yet measured
    on all documents is left out. The table is empty until the policies ``full`` and ``window``, with which the others
    are compared, have been measured.
    """
    by_policy: dict[str, dict[int, Recalled]] = {}
    for each in found:
        by_policy.setdefault(each.policy, {})[each.document] = each
    whole = {name: tuple(runs.values()) for name, runs in by_policy.items() if len(runs) == documents}
    if not {FULL, WINDOW} <= whole.keys():
        return ()
    ends = (_answers(whole[WINDOW]), _answers(whole[FULL]))
    return tuple(_row(name, runs, equal, ends, source) for name, runs in whole.items())


def _answers(runs: Sequence[Recalled]) -> list[Answer]:
    return [answer for run in runs for answer in run.answers]


Ends = tuple[list[Answer], list[Answer]]
"""The answers of window and of full memory to the same questions."""


def _row(name: str, runs: Sequence[Recalled], equal: Equal, ends: Ends, source: Source) -> RecallRow:
    answers = _answers(runs)
    return RecallRow(
        **dict(source),
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
