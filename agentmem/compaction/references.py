"""Obtain the reference queries of one compaction from a probe (a transient forward) and from stored queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agentmem.compaction.writing import write
from agentmem.memory.forwards import Transient
from agentmem.queries import MAX_INSTRUCTION
from agentmem.reference_queries.probe import Probe, make_probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from agentmem.contracts import Reference
    from agentmem.memory.forwards import Forwards
    from agentmem.memory.jobs import Job
    from agentmem.memory.memory import Memory
    from agentmem.memory.sequence import TokenSequence
    from agentmem.queries import Queries

    Visit = Callable[[int, tuple[Reference, ...]], None]


class References:
    """Obtain the reference queries of each layer from the sources that the policy names."""

    def __init__(self, memory: Memory, forwards: Forwards, sequence: TokenSequence, job: Job) -> None:
        """Keep the arguments; run nothing yet. The probe is empty until :meth:`prepare` is called."""
        self.memory, self.forwards, self.sequence, self.job = memory, forwards, sequence, job
        queries = job.policy.queries
        self.queries: Queries = queries.focused() if job.focus and queries.probing else queries
        self.probe = Probe((), ())

    def prepare(self) -> None:
        """Choose the probe's tokens; if the policy asks for ``self-study``, the model itself writes some of them."""
        memory, sequence = self.memory, self.sequence
        queries, turn = self.queries, sequence.compactions
        if not queries.probing:
            return
        own = memory.words.get(self.job.policy.name, {})
        words = {source: texts[turn % len(texts)] for source, texts in own.items()}
        if "self-study" in words and sequence.job is None:  # a half compacted sequence has no room to write
            words["self-study"] = write(
                memory, self.forwards, sequence, words["self-study"][:MAX_INSTRUCTION], self.job.plan.scratch
            )
        if self.job.focus:
            words["focus"] = self.job.focus
        first = 0 if self.job.text else self.job.first
        self.probe = make_probe(
            self.job.text or sequence.ids,
            queries,
            self.job.plan.probe_tokens,
            words,
            prefix=first,
            start=0 if first <= memory.plan.prefix else first,
            turn=turn,
            marks=() if self.job.text else memory.marks(sequence, queries.pattern),
        )

    def each(self, layers: Sequence[int], visit: Visit, before: Callable[[], None] = lambda: None) -> None:
        """Call ``visit(layer, references)`` for each of ``layers`` in order, with that layer's reference queries.

        If there is a probe, the calls are made during the forward of the probe. ``before()`` is called before each
        ``visit`` and may raise to interrupt. Reference queries that the policy wants drawn at random are drawn after
        ``before()``. If ``before()`` raises, a later attempt therefore draws the same queries.
        """
        if not self.probe.ids:
            for layer in layers:
                before()
                self._visit(layer, (), visit)
            return
        wanted = set(layers)

        def on_layer(layer: int, asked: torch.Tensor) -> None:
            if layer in wanted:
                before()
                self._visit(layer, self.probe.references(asked), visit)

        self.run(on_layer)

    def run(self, visit: Callable[[int, torch.Tensor], None]) -> None:
        """Run the probe at the sequence's next positions; call ``visit(layer, queries)`` before each layer attends."""
        self.forwards.run(self.probe.ids, self.sequence.next_position, Transient(self.memory, self.sequence, visit))

    def _visit(self, layer: int, probed: tuple[Reference, ...], visit: Visit) -> None:
        """Call ``visit`` with all reference queries of a layer: those of the probe (``probed``), then the stored ones.

        If the policy asks for random queries, they are drawn here. The ledger counts the bytes of these random queries
        until ``visit`` returns.
        """
        plan, sequence = self.job.plan, self.sequence
        with self.memory.ledger.borrow(plan.draw_bytes, "random queries"):
            samples = (sample.reference(sequence.generator, plan.drawn_tokens) for sample in sequence.samples[layer])
            visit(layer, probed + tuple(sample for sample in samples if sample is not None))
