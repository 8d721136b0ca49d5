"""A window of a text as the model reads it: context, replay, and what comes next; and heads of it compacted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from agentmem.compaction.checks import validate
from agentmem.contracts import Compaction, HeadSegment, Reference, Segment, blocks
from agentmem.errors import SettingsRefused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agentmem.calibration.terms import Terms
    from agentmem.contracts import Compactor
    from agentmem.hf.capture import AttentionCall, Reader, Reading


def cut(ids: torch.Tensor, terms: Terms) -> list[torch.Tensor]:
    """The text in windows one after the other; what does not fill one is left out.

    Raises:
        SettingsRefused: there is not even one.

    """
    found = [ids[part] for part in blocks(len(ids), terms.window) if part.stop - part.start == terms.window]
    if not found:
        raise SettingsRefused(
            f"text: {len(ids)} tokens are fewer than one window of {terms.window}; give a longer text or more tokens"
        )
    return found


@dataclass
class Window:
    """One window, read when first needed."""

    reader: Reader
    ids: torch.Tensor
    terms: Terms

    @cached_property
    def context(self) -> Reading:
        """The context alone."""
        return self.reader.read(self.ids[: self.terms.context])

    @cached_property
    def replay(self) -> Reading:
        """The context read again behind itself: its queries are the reference queries."""
        ids = self.ids[: self.terms.context]
        return self.reader.read(ids, start=len(ids), past=self.context.layers)

    @cached_property
    def ahead(self) -> Reading:
        """What comes next, with logits that can be differentiated for every layer's attention output."""
        return self.read_ahead(self.context.layers, gradient=True)

    @cached_property
    def untouched(self) -> Reading:
        """What comes next, without a graph of it."""
        return self.read_ahead(self.context.layers)

    def read_ahead(self, past: Sequence[AttentionCall], *, gradient: bool = False) -> Reading:
        """Read what comes next against a past, with logits."""
        context = self.terms.context
        return self.reader.read(self.ids[context:], start=context, past=past, logits=True, gradient=gradient)

    @property
    def span(self) -> slice:
        """Where the segment lies in the context."""
        return slice(self.terms.keep_first, self.terms.context - self.terms.keep_recent)

    def segment(self, layer: int, *, scores: bool = False) -> Segment:
        """A layer's segment as a compactor gets it, with the replay's queries; a score column is all 0, as at first."""
        context, span = self.context.layers[layer], self.span
        positions = torch.arange(span.start, span.stop, dtype=torch.int32, device=context.keys.device)
        zeros = torch.zeros(len(positions), device=context.keys.device)
        heads = tuple(
            HeadSegment(keys[span], values[span], zeros, positions, zeros if scores else None)
            for keys, values in zip(context.keys, context.values, strict=True)
        )
        return Segment(
            layer=layer,
            heads=heads,
            references=(Reference(self.replay.layers[layer].queries),),
            scale=context.scale,
            generator=torch.Generator().manual_seed(self.terms.seed),
            workspace_bytes=1 << 40,
        )

    def kept(self, fraction: float) -> int:
        """Slots of a head that are this fraction of its segment, at least one."""
        return max(1, round(fraction * self.terms.segment))

    def compact(self, segment: Segment, compactor: Compactor, slots: Sequence[int]) -> AttentionCall:
        """A layer's context with its heads compacted to ``slots``.

        Raises:
            PolicyContractBroken: what the compactor returns must not be used.

        """
        compaction = compactor.compact(segment, slots)
        validate(compaction, segment, slots, policy=self.terms.policy)
        return self.compacted(segment.layer, compaction)

    def compacted(self, layer: int, compaction: Compaction) -> AttentionCall:
        """A layer's context with this compaction in place: slots that are gone are hidden by a β of -inf."""
        context, span = self.context.layers[layer], self.span
        keys, values = context.keys.clone(), context.values.clone()
        bias = torch.zeros(keys.shape[:2], device=keys.device)
        bias[:, span] = float("-inf")
        for index, head in enumerate(compaction.heads):
            kept = head.kept + span.start
            bias[index, kept] = 0.0 if head.bias is None else head.bias
            if head.values is not None:
                values[index, kept] = head.values.to(values.dtype)
            if head.keys is not None:
                keys[index, kept] = head.keys.to(keys.dtype)
        return replace(context, keys=keys, values=values, bias=bias)
