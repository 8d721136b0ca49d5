"""Re-basing: when the next position nears the end of a model's positions, a sequence's slots move to lower ones.

The prefix stays. The recent window moves as one block; in each head's segment, slots at most ``gap`` apart move
together and wider gaps are closed to it, so that order is kept and no more distance is lost than must be. Kept keys are
turned exactly from where they are. A layer is replaced as a whole, and a re-basing that was interrupted goes on before
the next forward.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from agentmem.memory.forwards import Forwards, Transient
from agentmem.memory.jobs import Move
from agentmem.memory.pinning import settle
from agentmem.memory.rotation import rebased, shift_keys, widest_gap
from agentmem.memory.torch_state import own_state
from agentmem.planning.model_shape import MIN_SPARE, spare_positions
from agentmem.planning.rebasing import layer_scratch, map_scratch
from agentmem.reporting import log_events
from agentmem.reporting.report import RebaseReport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agentmem.memory.memory import Memory
    from agentmem.memory.rotation import Rotation
    from agentmem.memory.sequence import TokenSequence
    from agentmem.memory.store import LayerStore

ASKED = MIN_SPARE
"""Newest tokens that are run again before and after, to measure what re-basing changed."""


def measured_tokens(memory: Memory) -> int:
    """Tokens that a re-basing runs again to measure itself: no more than scratch is planned for."""
    return min(ASKED, memory.plan.chunk)


def rebase(memory: Memory, forwards: Forwards, sequence: TokenSequence, tokens: int = 0) -> None:
    """Move a sequence's slots to lower positions now, and report it; nothing is done where they are lowest already.

    ``tokens`` are to fit behind them. A forward that was interrupted is taken back first.
    """
    with own_state():
        _rebase(memory, forwards, sequence, tokens)


def _rebase(memory: Memory, forwards: Forwards, sequence: TokenSequence, tokens: int) -> None:
    assert memory.positions is not None  # noqa: S101  # the caller has checked
    memory.take_back()
    began, position = time.perf_counter(), sequence.next_position
    move = sequence.moving or _move(memory, sequence, tokens)
    if move.start == move.end:
        return
    before = None if sequence.moving else _next_log_probabilities(memory, forwards, sequence)
    sequence.change(moving=move)
    for layer, store in enumerate(sequence.stores):
        if store is not None and store.moves == sequence.moves:
            _move_layer(memory, sequence, layer, store)
    _move_samples(sequence, memory.positions.rotations, move)
    sequence.change(moves=sequence.moves + 1, moving=None, shift=sequence.shift + move.start - move.end)
    report = RebaseReport(
        row=sequence.index,
        tokens_seen=sequence.seen,
        position_before=position,
        position_after=sequence.next_position,
        gap=move.gap,
        kl=None if before is None else _divergence(before, _next_log_probabilities(memory, forwards, sequence)),
        seconds=time.perf_counter() - began,
    )
    memory.rebases.append(report)
    log_events.rebased(report)
    memory.publish(report)


def _move(memory: Memory, sequence: TokenSequence, tokens: int) -> Move:
    """Where the recent block begins and is to begin.

    It is to end in the first half of the model's positions, and so that ``tokens`` and some more have a place.
    """
    assert memory.positions is not None  # noqa: S101  # the caller has checked
    first, recent = _ends(memory, sequence)  # positions 0 .. first - 1 are the prefix's
    start = sequence.next_position - recent
    longest = max((max(store.lengths) - first - recent for _, store in sequence.full()), default=0)
    limit = memory.positions.limit
    end = min(limit // 2, limit - spare_positions(limit) - tokens)
    span = min(start - first, max(longest, end - first - recent))
    with memory.ledger.borrow(map_scratch(max(1, longest)), "finding gaps"):
        gap = widest_gap(_heads(memory, sequence), start, span)
    return Move(start, first + span, gap)


def _heads(memory: Memory, sequence: TokenSequence) -> Iterator[torch.Tensor]:
    prefix, recent = _ends(memory, sequence)
    for _, store in sequence.full():
        settle(sequence, store)
        for head in range(len(store.lengths)):
            yield store.part(head, prefix, recent).positions


def _ends(memory: Memory, sequence: TokenSequence) -> tuple[int, int]:
    """Slots of the prefix, and of the recent block: tokens in a row at the end that every head has."""
    prefix = min(memory.plan.prefix, sequence.seen)
    return prefix, min(memory.plan.recent, sequence.seen - prefix)


def _move_layer(memory: Memory, sequence: TokenSequence, layer: int, old: LayerStore) -> None:
    """Build the layer anew with other positions and turned keys, then swap."""
    assert memory.positions is not None and sequence.moving is not None  # noqa: S101, PT018  # the caller has set them
    move, shape = sequence.moving, memory.shape.layers[layer]
    if shape.window is None:
        settle(sequence, old)
    scratch = layer_scratch(shape, max(old.lengths), old.spec.dtype.itemsize)
    with memory.ledger.borrow(scratch, "turning keys"):
        new = old.resized(old.capacities)
        for head in range(len(new.lengths)):
            _move_head(memory, sequence, new, head, layer, move)
    new.moves = sequence.moves + 1
    sequence.replace(layer, new)


def _move_head(memory: Memory, sequence: TokenSequence, store: LayerStore, head: int, layer: int, move: Move) -> None:
    assert memory.positions is not None  # noqa: S101  # the caller has checked
    rotation, delta = memory.positions.rotations[layer], move.end - move.start
    length = store.lengths[head]
    if memory.shape.layers[layer].window is not None:  # the newest tokens, whose positions are not kept here
        keys = store.part(head, 0, 0).keys
        positions = torch.arange(sequence.next_position - length, sequence.next_position, dtype=torch.int32)
        store.spec.shift(keys, positions, torch.tensor(delta, dtype=torch.int32).expand(length), rotation)
        return
    prefix, recent = _ends(memory, sequence)
    middle, newest = store.part(head, prefix, recent), store.part(head, length - recent, 0)
    if middle.slots:
        gap = widest_gap([middle.positions], move.start, move.end - prefix)  # its own: it need not suffer for others
        deltas = rebased(middle.positions, move.start, move.end, gap)
        store.spec.shift(middle.keys, middle.positions, deltas, rotation)
        middle.positions.add_(deltas)
    if newest.slots:
        delta_of_each = torch.tensor(delta, dtype=torch.int32).expand(recent)
        store.spec.shift(newest.keys, newest.positions, delta_of_each, rotation)
        newest.positions.add_(delta)


def _move_samples(sequence: TokenSequence, rotations: tuple[Rotation, ...], move: Move) -> None:
    """Turn stored queries along, so that they ask from as far as they did."""
    for layer, samples in enumerate(sequence.samples):
        for sample in () if layer in move.turned else samples:
            positions = sample.tokens(sequence.seen).sub_(sequence.shift)
            deltas = torch.tensor(move.end - move.start, dtype=torch.int32).expand(sample.filled)
            for head in sample.queries[:, : sample.filled]:
                shift_keys(head, positions, deltas, rotations[layer])
        move.turned.add(layer)


def _next_log_probabilities(memory: Memory, forwards: Forwards, sequence: TokenSequence) -> torch.Tensor | None:
    """Log-probabilities ``[n, V]`` of what follows the newest tokens when they are read again; the model's own work."""
    ids = tuple(sequence.ids[-measured_tokens(memory) :])
    if min(ids, default=-1) < 0:
        return None  # embeddings were fed, which have no ids
    logits = forwards.logits(ids, sequence.next_position, Transient(memory, sequence)).float()
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _divergence(before: torch.Tensor, after: torch.Tensor | None) -> float:
    assert after is not None  # noqa: S101  # the same ids gave logits before
    differences = after.neg_().add_(before)  # in place: beside the slots two sets of logits are enough
    return float(before.exp_().flatten().dot(differences.flatten())) / before.shape[0]
