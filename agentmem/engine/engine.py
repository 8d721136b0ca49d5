"""The engine of one memory: it makes room before a forward, compacts, re-bases and commits.

The engine has no code for particular models. It runs forwards through the protocol :class:`Forwards`. During a forward,
each layer of the model calls ``attend`` of an :class:`Append` (the tokens are kept) or of a :class:`Transient` (the
tokens are not kept).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.compaction.request import USUAL, Request
from agentmem.compaction.run import SequenceCompaction
from agentmem.errors import MemoryCapExceeded, SettingsRefused
from agentmem.memory.forwards import Append, Transient
from agentmem.memory.positions import measured_tokens, rebase
from agentmem.planning.pricing import window_slots
from agentmem.reporting import log_events

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from agentmem.memory.forwards import Arriving, Forwards
    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence
    from agentmem.reporting.report import CompactionReport


class Engine:
    """Run one memory with the forwards of one model."""

    def __init__(self, memory: Memory, forwards: Forwards) -> None:
        """Keep the memory and the model's forwards; run nothing yet."""
        self.memory, self.forwards = memory, forwards
        self._pending: Append | None = None

    # ---- forwards

    @property
    def most_tokens(self) -> int:
        """The most tokens that one forward may have: ``chunk``, or fewer if a sliding layer has less room."""
        chunk = self.memory.plan.chunk
        windows = [layer.window for layer in self.memory.shape.layers if layer.window]
        return min([chunk, *(window_slots(window, chunk) - window + 1 for window in windows)])

    def piece(self, arriving: Sequence[Sequence[bool]], limit: int) -> int:
        """Return how many columns of a batch fit before any sequence needs a compaction, at most ``limit``.

        ``arriving`` has one row per sequence, which is true in each column that holds a token (not padding). Sequences
        that are full already are compacted first, so the result is at least 1. Because a batch is cut exactly at the
        column in which a sequence fills up, the moments of compaction depend only on the tokens, not on how the caller
        has cut the prompt.
        """
        sequences = self.memory.sequences
        for sequence, valid in zip(sequences, arriving, strict=True):
            if sequence.room < 1 and any(valid):
                self._free_slots(sequence, 1)
        limit = min(limit, self.most_tokens)
        return max(
            1, min(_columns(valid, sequence.room, limit) for sequence, valid in zip(sequences, arriving, strict=True))
        )

    def begin(self, arriving: Sequence[Arriving]) -> Append:
        """Make room for all arriving tokens, then start a forward that keeps them.

        Raises:
            MemoryClosed: the memory was closed.
            MemoryCapExceeded: see :meth:`make_room`.
            CompactionFailed: see :class:`agentmem.compaction.run.SequenceCompaction`.

        """
        self.memory.open_or_raise()
        self.abandon()
        for sequence, each in zip(self.memory.sequences, arriving, strict=True):
            if each.ids:
                self.make_room(sequence, len(each.ids))
        self._pending = Append(self.memory, arriving)
        return self._pending

    def commit(self) -> None:
        """Record that the forward that was begun has succeeded: its tokens now count as consumed."""
        if self._pending is not None:
            self._pending.commit()
            self._pending = None
            self.memory.publish_usage()

    def abandon(self) -> None:
        """Drop a forward that was begun and never committed, whether an interrupt or an error ended it.

        Every operation that starts something new calls this method first. Afterwards no forward is in progress, and the
        ledger counts no temporary bytes for a forward.
        """
        self._pending = None
        self.memory.take_back()

    def peek(self, ids: Sequence[int], index: int) -> torch.Tensor:
        """Return the logits ``[n, V]`` after each of ``ids``, as if they followed sequence ``index``.

        The slots of ``ids`` are not kept.

        Raises:
            MemoryClosed: the memory was closed.
            SettingsRefused: ``ids`` is empty, or the sequence has read nothing.
            MemoryCapExceeded: there are more ids than ``chunk``; the plan counts temporary bytes for ``chunk`` tokens.

        """
        memory, most, sequences = self.memory, self.memory.plan.chunk, self.memory.sequences
        memory.open_or_raise()
        if not 0 <= index < len(sequences) or not sequences[index].seen:
            raise SettingsRefused(
                f"peek: row {index} of {len(sequences)} has read nothing that ids could go on from; feed it"
            )
        if not ids:
            raise SettingsRefused("peek: there are no ids; give at least 1")
        if len(ids) > most:
            raise MemoryCapExceeded(
                f"peek: {len(ids)} ids in one forward, but scratch is planned for {most}; give fewer, or raise chunk"
            )
        self.abandon()
        self._keep_in_reach(sequences[index], len(ids))
        return self.forwards.logits(ids, sequences[index].next_position, Transient(memory, sequences[index]))

    # ---- room

    @property
    def automatic(self) -> bool:
        """True if the engine compacts a full sequence without being asked."""
        return self.memory.policy.compactor is not None and self.memory.settings.mode == "auto"

    def make_room(self, sequence: TokenSequence, tokens: int) -> None:
        """Make room for ``tokens`` more: compact the sequence if it is full, then re-base it if positions run out.

        Compaction comes first, because re-basing moves slots into the gaps that compactions leave.

        Raises:
            MemoryCapExceeded: the policy never compacts, compaction is not automatic, or ``tokens`` is too large.
            CompactionFailed: see :class:`agentmem.compaction.run.SequenceCompaction`.

        """
        self._free_slots(sequence, tokens)
        self._keep_in_reach(sequence, tokens)

    def finish(self, sequence: TokenSequence) -> None:
        """Drop an interrupted forward of a sequence, and finish its interrupted compaction and re-basing.

        Raises:
            CompactionFailed: see :class:`agentmem.compaction.run.SequenceCompaction`.

        """
        self.abandon()
        if sequence.job is not None:
            self.compact(sequence)
        if sequence.moving is not None:
            rebase(self.memory, self.forwards, sequence)

    def _free_slots(self, sequence: TokenSequence, tokens: int) -> None:
        if sequence.room >= tokens and sequence.job is None:
            return
        if sequence.job is None and not self.automatic:
            raise MemoryCapExceeded(_full(self.memory, sequence, tokens))
        self.compact(sequence)
        if sequence.room < tokens:
            raise MemoryCapExceeded(
                f"a forward of {tokens} tokens does not fit: a sequence of {self.memory.plan.capacity} slots per head "
                f"has room for {sequence.room} after a compaction; feed at most so many at once (generate does so), "
                "or raise cap"
            )

    def _keep_in_reach(self, sequence: TokenSequence, tokens: int) -> None:
        """Re-base a sequence if ``tokens`` more (of a forward or a probe) would exceed the model's positions.

        A re-basing that was interrupted is finished, too.

        Raises:
            MemoryCapExceeded: even after the re-basing, ``tokens`` more exceed the model's positions.

        """
        memory, positions = self.memory, self.memory.positions
        if positions is None:
            return
        if sequence.moving is None and sequence.next_position + tokens + measured_tokens(memory) <= positions.limit:
            return
        rebase(memory, self.forwards, sequence, tokens)
        if sequence.next_position + tokens > positions.limit:
            raise MemoryCapExceeded(
                f"re-basing left position {sequence.next_position}, and {tokens} tokens more do not fit the model's "
                f"{positions.limit} positions; lower the cap or chunk, or feed fewer tokens at once"
            )

    # ---- compaction

    def compact(self, sequence: TokenSequence, request: Request = USUAL) -> CompactionReport | None:
        """Compact one sequence now and return the report, or ``None`` if there is nothing to reclaim.

        An interrupted compaction is finished first; if nothing is left to reclaim after it, its report is returned.

        Raises:
            SettingsRefused: ``mode="off"``.
            CompactionFailed: see :class:`agentmem.compaction.run.SequenceCompaction`.

        """
        report: CompactionReport | None = None
        for each in in_turn(sequence, request):
            compaction = self.prepare(sequence, each)
            if compaction is not None:
                report = self.run(compaction)
        return report

    def prepare(self, sequence: TokenSequence, request: Request = USUAL) -> SequenceCompaction | None:
        """Return a compaction of a sequence for :meth:`run`, or ``None`` if there is nothing to reclaim.

        Raises:
            SettingsRefused: ``mode="off"``.

        """
        memory = self.memory
        memory.open_or_raise()
        self.abandon()
        policy = sequence.job.policy if sequence.job is not None else request.policy or memory.policy
        plan = memory.plan_of(policy)
        self._keep_in_reach(sequence, plan.probe_tokens + plan.scratch)
        if memory.settings.mode == "off":
            raise SettingsRefused("mode='off' never compacts; open the memory with mode='manual' to compact by hand")
        compaction = SequenceCompaction(memory, self.forwards, sequence, request)
        return compaction if compaction.worthwhile else None

    def run(self, compaction: SequenceCompaction) -> CompactionReport:
        """Run a compaction that :meth:`prepare` returned; record and return its report.

        Raises:
            CompactionFailed: see :class:`agentmem.compaction.run.SequenceCompaction`.

        """
        report = compaction.run()
        self.memory.record(report)
        log_events.compaction_finished(report)
        self.memory.publish(report)
        return report


def in_turn(sequence: TokenSequence, request: Request) -> tuple[Request, ...]:
    """Return the requests to run for ``request``.

    If the sequence has an unfinished compaction, :data:`USUAL` comes first: the engine then finishes that compaction
    with its original request.
    """
    return (USUAL, request) if sequence.job is not None and request is not USUAL else (request,)


def _full(memory: Memory, sequence: TokenSequence, tokens: int) -> str:
    """Return the error message: why a sequence cannot take more tokens, and what would help."""
    mode, plan = memory.settings.mode, memory.plan
    why = f"mode={mode!r} does not compact by itself"
    if memory.policy.compactor is None:
        why = f"policy {memory.policy.name!r} never compacts"
    by_hand = ", or call memory.compact()" if mode == "manual" else ""
    return (
        f"row {sequence.index} holds {plan.capacity - sequence.room} of {plan.capacity} slots per head under a cap of "
        f"{plan.cap_bytes} bytes and cannot take {tokens} more token(s): {why}; raise cap, or choose another policy or "
        f"mode{by_hand}"
    )


def _columns(valid: Sequence[bool], room: int, limit: int) -> int:
    """Return the length, at most ``limit``, of the longest start of ``valid`` with at most ``room`` true entries."""
    count = 0
    for column, present in enumerate(valid[:limit]):
        count += present
        if count > room:
            return column
    return min(limit, len(valid))
