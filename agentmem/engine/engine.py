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
from agentmem.settings import exact_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from agentmem.memory.forwards import Arriving, Forwards
    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence
    from agentmem.reporting.report import CompactionReport


class Engine:
    """The engine of one memory: it runs the forwards of one model, and compacts and re-bases the sequences."""

    def __init__(self, memory: Memory, forwards: Forwards) -> None:
        """Create the engine of ``memory``, which will run the model through ``forwards``; run nothing yet."""
        self.memory, self.forwards = memory, forwards
        self._pending: Append | None = None

    # ---- forwards

    @property
    def most_tokens(self) -> int:
        """The most tokens of one forward: ``chunk``, or fewer if the store of a sliding layer has no room for them."""
        chunk = self.memory.plan.chunk
        windows = [layer.window for layer in self.memory.shape.layers if layer.window]
        return min([chunk, *(window_slots(window, chunk) - window + 1 for window in windows)])

    def piece(self, arriving: Sequence[Sequence[bool]], limit: int) -> int:
        """Return how many columns of a batch fit before any sequence needs a compaction, at most ``limit``.

        ``arriving`` has one row per sequence: true for each column that holds a token, false for padding. Sequences
        that are already full are compacted first, so the result is at least 1. A batch is cut exactly at the column in
        which a sequence becomes full. The times of compactions therefore depend only on the tokens, and not on how the
        caller has cut the prompt into forwards.
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
        """Make room for all arriving tokens, and return the object through which a forward appends them.

        Run the model with this object, then call :meth:`commit`. ``arriving`` has one item per sequence.

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
        """Record the tokens of the current forward as consumed; call this after the forward has succeeded."""
        if self._pending is not None:
            self._pending.commit()
            self._pending = None
            self.memory.publish_usage()

    def abandon(self) -> None:
        """Drop the forward that was begun but not committed, together with its slots, if there is such a forward.

        An interrupt or an error may have ended that forward. Every operation that starts something new calls this
        method first. Afterwards no forward is in progress, and the ledger counts no temporary bytes.
        """
        self._pending = None
        self.memory.take_back()

    def peek(self, ids: Sequence[int], index: int) -> torch.Tensor:
        """Return the logits ``[n, V]`` after each of the ``n`` ids, as if the ids followed sequence ``index``.

        The ids are run in one forward, whose slots are not kept.

        Raises:
            MemoryClosed: the memory was closed.
            SettingsRefused: ``ids`` is empty, or the sequence does not exist or has read nothing.
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
        return self.compacts(self.memory)

    @staticmethod
    def compacts(memory: Memory) -> bool:
        """Return whether an engine of this memory compacts a full sequence without being asked."""
        return memory.policy.compactor is not None and memory.settings.mode == "auto"

    def check_room(self, sequence: TokenSequence, tokens: int) -> None:
        """Check that a memory that does not compact by itself has room for ``tokens`` more tokens.

        Raises:
            MemoryCapExceeded: there is too little room, and no unfinished compaction that could make more.

        """
        if not self.automatic and sequence.job is None and sequence.room < tokens:
            raise MemoryCapExceeded(_full(self.memory, sequence, tokens))

    def make_room(self, sequence: TokenSequence, tokens: int) -> None:
        """Make room for ``tokens`` more tokens: compact a full sequence, then re-base it if its positions run out.

        Compaction comes first, because re-basing moves slots into the gaps that compactions leave.

        Raises:
            MemoryCapExceeded: a full sequence cannot be compacted (the policy never compacts, or compaction is not
                automatic), or ``tokens`` is too large even after a compaction.
            CompactionFailed: see :class:`agentmem.compaction.run.SequenceCompaction`.

        """
        self._free_slots(sequence, tokens)
        self._keep_in_reach(sequence, tokens)

    def finish(self, sequence: TokenSequence) -> None:
        """Drop an interrupted forward, and finish the sequence's interrupted compaction and re-basing, if any.

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
        self.check_room(sequence, tokens)
        self.compact(sequence)
        if sequence.room < tokens:
            raise MemoryCapExceeded(
                f"a forward of {tokens} tokens does not fit: a sequence of {self.memory.plan.capacity} slots per head "
                f"has room for {sequence.room} after a compaction; feed at most so many at once (generate does so), "
                "or raise cap"
            )

    def _keep_in_reach(self, sequence: TokenSequence, tokens: int) -> None:
        """Re-base a sequence if ``tokens`` more tokens (of a forward or a probe) would exceed the model's positions.

        An interrupted re-basing is finished in any case.

        Raises:
            MemoryCapExceeded: ``tokens`` more tokens exceed the model's positions even after the re-basing.

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

        An interrupted compaction is finished first. If nothing is left to reclaim after that, the report of the
        finished compaction is returned.

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
        """Prepare a compaction of a sequence and return it for :meth:`run`; ``None`` if there is nothing to reclaim.

        If the sequence has an interrupted compaction, the result continues that one and ignores ``request``.

        Raises:
            SettingsRefused: ``mode="off"``.
            UnsupportedModel: the model is in training mode.
            UnsupportedGeneration: another thread runs this memory now.

        """
        with self.memory.owner.take():
            return self._prepare(sequence, request)

    def _prepare(self, sequence: TokenSequence, request: Request) -> SequenceCompaction | None:
        memory = self.memory
        memory.open_or_raise()
        self.forwards.check()
        self.abandon()
        policy = sequence.job.policy if sequence.job is not None else request.policy or memory.policy
        plan = memory.plan_of(policy)
        self._keep_in_reach(sequence, plan.probe_tokens + plan.scratch)
        if memory.settings.mode == "off":
            raise SettingsRefused("mode='off' never compacts; open the memory with mode='manual' to compact by hand")
        compaction = SequenceCompaction(memory, self.forwards, sequence, request)
        return compaction if compaction.worthwhile else None

    def run(self, compaction: SequenceCompaction) -> CompactionReport:
        """Run a compaction that :meth:`prepare` returned; record its report and return it.

        Raises:
            CompactionFailed: see :class:`agentmem.compaction.run.SequenceCompaction`.
            UnsupportedGeneration: another thread runs this memory now.

        """
        with self.memory.owner.take():
            return self._run(compaction)

    def _run(self, compaction: SequenceCompaction) -> CompactionReport:
        report = compaction.run()
        self.memory.record(report)
        log_events.compaction_finished(self.memory.names, report)
        self.memory.publish(report)
        return report


def in_turn(sequence: TokenSequence, request: Request) -> tuple[Request, ...]:
    """Return the requests to pass to :meth:`Engine.prepare`, one after the other, to fulfil ``request``.

    This is ``request`` alone, unless the sequence has an unfinished compaction. In that case :data:`USUAL` comes first:
    with it, the engine finishes that compaction as originally requested.
    """
    return (USUAL, request) if sequence.job is not None and request is not USUAL else (request,)


def _full(memory: Memory, sequence: TokenSequence, tokens: int) -> str:
    """Return the error message that states why a sequence cannot take ``tokens`` more tokens, and what would help."""
    mode, plan = memory.settings.mode, memory.plan
    why = f"mode={mode!r} does not compact by itself"
    if memory.policy.compactor is None:
        why = f"policy {memory.policy.name!r} never compacts"
    by_hand = ", or call memory.compact()" if mode == "manual" else ""
    return (
        f"row {sequence.index} holds {plan.capacity - sequence.room} of {plan.capacity} slots per head under a cap of "
        f"{exact_bytes(plan.cap_bytes)} and cannot take {tokens} more token(s): {why}; raise cap, or choose another "
        f"policy or mode{by_hand}"
    )


def _columns(valid: Sequence[bool], room: int, limit: int) -> int:
    """Return the largest ``n``, at most ``limit``, for which ``valid[:n]`` has at most ``room`` true entries."""
    count = 0
    for column, present in enumerate(valid[:limit]):
        count += present
        if count > room:
            return column
    return min(limit, len(valid))
