"""Read a window of a text with the model, and compact heads of the window's context.

A window is a context and the tokens that follow it. The *segment* is the part of the context that is compacted: all of
it except the first ``keep_first`` and the last ``keep_recent`` tokens. A *reading* is the record of one forward: the
attention calls of all layers, and the logits if requested. The context is read twice; the second reading is called the
replay.
"""

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
    """Cut the text into successive windows; tokens at the end that do not fill a window are left out.

    Raises:
        SettingsRefused: the text is shorter than one window.

    """
    found = [ids[part] for part in blocks(len(ids), terms.window) if part.stop - part.start == terms.window]
    if not found:
        raise SettingsRefused(
            f"text: {len(ids)} tokens are fewer than one window of {terms.window}; give a longer text or more tokens"
        )
    return found


@dataclass
class Window:
    """One window (piece of a text): a context, in which heads are compacted, and the tokens that follow it.

    The model is run over the tokens when a result is first needed. The recorded attention calls are then kept.
    """

    reader: Reader
    ids: torch.Tensor
    terms: Terms

    @cached_property
    def context(self) -> Reading:
        """Return the attention calls of all layers in a forward over the context, without compaction.

        The context is the first ``terms.context`` tokens of the window. An attention call has the queries, keys, values
        and output of one layer.
        """
        return self.reader.read(self.ids[: self.terms.context])

    @cached_property
    def replay(self) -> Reading:
        """Return the attention calls of all layers in a forward that repeats the tokens of the context.

        The repeated tokens follow the context and attend to it. Their queries are the reference queries.
        """
        ids = self.ids[: self.terms.context]
        return self.reader.read(ids, start=len(ids), past=self.context.layers)

    @cached_property
    def ahead(self) -> Reading:
        """Return the attention calls and logits of a forward over the tokens after the context, without compaction.

        The autograd graph is kept, so that gradients can be computed.
        """
        return self.read_ahead(self.context.layers, gradient=True)

    @cached_property
    def untouched(self) -> Reading:
        """Return the attention calls and logits of a forward over the tokens after the context, without compaction.

        No autograd graph is kept.
        """
        return self.read_ahead(self.context.layers)

    def read_ahead(self, past: Sequence[AttentionCall], *, gradient: bool = False) -> Reading:
        """Run the model over the tokens after the context, and return the attention calls of all layers and the logits.

        ``past`` has the context's keys and values for each layer, and β if heads were compacted. With ``gradient``, the
        autograd graph is kept, so that the logits can be differentiated with respect to the attention outputs.
        """
        context = self.terms.context
        return self.reader.read(self.ids[context:], start=context, past=past, logits=True, gradient=gradient)

    @property
    def span(self) -> slice:
        """Return the range of the context's tokens that form the segment."""
        return slice(self.terms.keep_first, self.terms.context - self.terms.keep_recent)

    def segment(self, layer: int, *, scores: bool = False) -> Segment:
        """Return a layer's segment as a compactor receives it.

        The reference queries come from :attr:`replay`, a forward that repeats the tokens of the context. With
        ``scores``, every slot has a score of 0, as in a new memory.
        """
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
        """Return ``fraction`` as a number of slots of a head's segment, rounded, at least 1."""
        return max(1, round(fraction * self.terms.segment))

    def compact(self, segment: Segment, compactor: Compactor, slots: Sequence[int]) -> AttentionCall:
        """Compact a layer's segment, and return keys, values and β of the layer's whole context afterwards.

        ``segment`` has the slots of each KV head that may be compacted; the context also has slots before and after
        them. The compactor leaves ``slots[h]`` slots in the segment of KV head number ``h``.

        Raises:
            PolicyContractBroken: the compactor returned an invalid result.

        """
        compaction = compactor.compact(segment, slots)
        validate(compaction, segment, slots, policy=self.terms.policy)
        return self.compacted(segment.layer, compaction)

    def compacted(self, layer: int, compaction: Compaction) -> AttentionCall:
        """Return keys, values and β of a layer's whole context after ``compaction`` of its segment.

        Dropped slots stay in place, with a β of -inf, so that no query attends to them.
        """
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
