"""The reference queries of one compaction: a probe's text, its transient forward, and what was stored."""

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
    """Obtains reference queries layer by layer, as the policy's mixture asks for them."""

    def __init__(self, memory: Memory, forwards: Forwards, sequence: TokenSequence, job: Job) -> None:
        """Nothing is run yet; the probe is empty until :meth:`prepare`."""
        self.memory, self.forwards, self.sequence, self.job = memory, forwards, sequence, job
        queries = job.policy.queries
        self.queries: Queries = queries.focused() if job.focus and queries.probing else queries
        self.probe = Probe((), ())

    def prepare(self) -> None:
        """Choose the probe's tokens; ``self-study`` has the model write them."""
        memory, sequence = self.memory, self.sequence
        queries, turn = self.queries, sequence.compactions
        if not queries.probing:
            return
        own = memory.words.get(self.job.policy.name, {})
        words = {source: texts[turn % len(texts)] for source, texts in own.items()}
        if "self-study" in words and sequence.job is None:  # half compacted, there is no room to write
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
        """Call ``visit(layer, references)`` for the layers in order; a probe's forward runs meanwhile.

        ``before`` comes before anything is drawn for a layer: what it raises leaves the sequence's generator to go on.
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
        """Run the probe's tokens at the following positions; ``visit(layer, queries)`` before a layer attends."""
        self.forwards.run(self.probe.ids, self.sequence.next_position, Transient(self.memory, self.sequence, visit))

    def _visit(self, layer: int, probed: tuple[Reference, ...], visit: Visit) -> None:
        """Add the stored queries; what is drawn at random lives as long as the visit."""
        plan, sequence = self.job.plan, self.sequence
        with self.memory.ledger.borrow(plan.draw_bytes, "random queries"):
            samples = (sample.reference(sequence.generator, plan.drawn_tokens) for sample in sequence.samples[layer])
            visit(layer, probed + tuple(sample for sample in samples if sample is not None))
