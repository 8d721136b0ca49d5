"""Let the model summarise the segment, and replace the segment's slots by the slots of the summary.

The summary is written in scratch slots: slots that the plan keeps free for texts that the model writes during a
compaction. A second forward over the summary's tokens then makes the slots that replace the segment.

Source: arXiv:2602.16284 summarises before compaction, offline; this module does it during generation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from agentmem.compaction.request import Request
from agentmem.compaction.writing import write
from agentmem.contracts import MIN_SUMMARY
from agentmem.memory.forwards import Adopt
from agentmem.memory.pinning import settle
from agentmem.planning.pricing import MAX_REQUEST
from agentmem.reporting.report import SummaryReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.contracts import Rewrite
    from agentmem.language import Language
    from agentmem.memory.forwards import Forwards
    from agentmem.memory.jobs import Job
    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence
    from agentmem.memory.store import LayerStore

NO_REPEAT = 8
"""A summary never contains a run of this many tokens twice; otherwise greedy decoding could repeat itself endlessly."""
VARIETY = 0.4
"""The least ratio of distinct tokens to all tokens in a summary."""
_ENDS = (".", "!", "?", "\n", "\u3002", "\uff01", "\uff1f")  # full-width ones too


class SummaryRefused(Exception):  # internal: the compaction then goes on without a summary
    """Raised if a summary cannot be used; the message states why."""


class Rewriting:
    """Replace the segment of one compaction by a summary that the model writes."""

    def __init__(
        self,
        memory: Memory,
        forwards: Forwards,
        sequence: TokenSequence,
        job: Job,
        rewrite: Rewrite,
        language: Language,
    ) -> None:
        """Keep the arguments; write nothing yet."""
        self.forwards = forwards
        self.memory, self.sequence, self.job, self.rewrite, self.language = memory, sequence, job, rewrite, language

    def run(self) -> Request:
        """Let the model write a summary, and put the summary's slots in place of the segment.

        The summary's slots get consecutive positions before the recent window. These positions must be free: no slot
        outside the segment may have them.

        Returns:
            The request to compact the summary's slots. The caller must run this compaction next.

        Raises:
            SummaryRefused: the summary cannot be used, or its instruction is too long; nothing was changed. A summary
                cannot be used in these cases: it is empty, too short, too long or repetitive; too few positions are
                free.

        """
        before, written = self.sequence.held, self._written(self._instruction())
        lead = self.language.write(self.rewrite.lead)
        ids = (*lead, *written)
        self._check_shorter(len(ids))
        position = self._place(len(ids))
        self._adopt(ids, position)
        summary = SummaryReport(
            text=self._text(written),
            tokens=len(ids),
            start=min(self.memory.plan.prefix, self.sequence.seen),
            stop=self.sequence.seen - self.job.recent,
            position=position,
            slots_before=before,
            slots_after=self.sequence.held,
        )
        full_at = self.sequence.measured(self.memory.plan.capacity, self.memory.plan.scratch)
        self.sequence.change(job=None, summary=summary, full_at=full_at)
        recent = tuple(self.sequence.ids[self.sequence.seen - self.job.recent :])
        slots = max(1, round(self.rewrite.keep * len(ids)))
        return Request(slots=min(slots, max(1, self.job.each)), text=ids + recent)

    def _instruction(self) -> tuple[int, ...]:
        instruction = tuple(self.language.ask(self.rewrite.instruction))
        if len(instruction) > MAX_REQUEST:
            raise SummaryRefused(f"its instruction has {len(instruction)} tokens, {MAX_REQUEST} at most; shorten it")
        return instruction

    def _written(self, instruction: tuple[int, ...]) -> tuple[int, ...]:
        """Let the model write the summary and return its ids, cut to whole sentences if the model did not end it.

        Raises:
            SummaryRefused: the summary is too short, empty or repetitive.

        """
        plan = self.job.plan
        most = len(instruction) + min(
            plan.scratch - MAX_REQUEST, plan.chunk - len(self.language.write(self.rewrite.lead))
        )
        found = write(self.memory, self.forwards, self.sequence, instruction, most, no_repeat=NO_REPEAT)[
            len(instruction) :
        ]
        ended = bool(found) and found[-1] in self.language.ends
        written = found[:-1] if ended else self._whole_sentences(found)
        if len(written) < MIN_SUMMARY or not self._text(written).strip():
            why = "empty" if ended or not found else "a runaway that never ends a sentence"
            raise SummaryRefused(f"it is {why}: {len(found)} tokens were written, {len(written)} can be used")
        if len(set(written)) < VARIETY * len(written):
            raise SummaryRefused(
                f"it is a runaway that goes round in circles: {len(set(written))} different tokens of {len(written)}"
            )
        return written

    def _whole_sentences(self, found: tuple[int, ...]) -> tuple[int, ...]:
        pieces = self.language.read(found)
        ends = [index for index, piece in enumerate(pieces) if piece.rstrip(" ").endswith(_ENDS)]
        return found[: ends[-1] + 1] if ends else ()

    def _text(self, ids: Sequence[int]) -> str:
        return "".join(self.language.read(ids))

    def _stores(self) -> list[tuple[int, LayerStore]]:
        """Return the layers to compact and their stores; first write the positions of all slots into the stores."""
        stores = self.sequence.full()
        for _, store in stores:
            settle(self.sequence, store)
        return stores

    def _check_shorter(self, count: int) -> None:
        held = [slots for index, store in self._stores() for slots in self.job.held(index, store)]
        if count * len(held) >= sum(held):
            raise SummaryRefused(f"its {count} tokens are no fewer than the {sum(held) / len(held):g} slots per head")

    def _place(self, count: int) -> int:
        """Return the first of ``count`` consecutive free positions before the recent window.

        The positions of the slots at the front (prefix and pinned slots) are not free. Re-basing can move pinned slots
        differently in each head, so the positions of all heads are checked.

        Raises:
            SummaryRefused: there are no such positions.

        """
        found: set[int] = set()
        stop = self.sequence.next_position
        for index, store in self._stores():
            for head, (begin, length) in enumerate(zip(self.job.begins[index], store.lengths, strict=True)):
                found.update(store.part(head, 0, length - begin).positions.tolist())
                stop = min([stop, *store.part(head, length - self.job.recent, 0).positions[:1].tolist()])
        fixed = sorted(found)
        while fixed:
            last = fixed.pop()
            if stop - last - 1 >= count:
                return stop - count
            stop = last
        if stop < count:
            raise SummaryRefused(f"there are no {count} free positions in a row before the recent window")
        return stop - count

    def _adopt(self, ids: tuple[int, ...], position: int) -> None:
        """Replace the segments by the slots of the summary, layer by layer.

        An interrupt or an error can stop this after some layers. The sequence then keeps an unfinished compaction that
        can be resumed. In this compaction, every head's segment has the same budget: ``job.each`` slots, at least 1. A
        segment that the summary has not replaced is compacted without a summary. If no layer was replaced before the
        stop, the sequence is unchanged.
        """
        memory, sequence, before = self.memory, self.sequence, self._stores()
        positions = torch.arange(position, position + len(ids), dtype=torch.int32)
        step = Adopt(memory, sequence, self.job.begins, self.job.recent, positions)
        each, intact = max(1, self.job.each), sequence.intact
        budgets = tuple((each,) * len(heads) for heads in self.job.begins)
        sequence.change(job=replace(self.job, budgets=budgets), intact=sequence.seen - self.job.recent)
        try:
            with torch.no_grad():
                self.forwards.run(ids, position, step)
        except BaseException:
            if all(sequence.stores[index] is store for index, store in before):
                sequence.change(job=None, intact=intact)
            raise
