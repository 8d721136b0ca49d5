"""Re-basing: move a sequence's slots to lower positions when its next position nears the end of the model's positions.

The prefix keeps its positions. The slots of the recent window all move by the same distance. The slots between the
prefix and the recent window move closer together: distances of at most ``gap`` positions between neighbouring slots
stay as they are, and larger distances shrink to ``gap``. Each head has its own ``gap``: the largest with which the
head's slots fit between the prefix and the moved recent window. The order of the slots is kept. The stored keys are
rotated to their new positions. Each layer's store is replaced as a whole, and an interrupted re-basing is finished
before the next forward.
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
"""How many of the newest tokens are run again before and after a re-basing, to measure the change of their logits."""


def measured_tokens(memory: Memory) -> int:
    """Return how many of the newest tokens a re-basing runs again to measure its effect.

    At most ``chunk`` tokens are run, the most that the plan allows in one forward.
    """
    return min(ASKED, memory.plan.chunk)


def rebase(memory: Memory, forwards: Forwards, sequence: TokenSequence, tokens: int = 0) -> None:
    """Re-base a sequence, so that ``tokens`` more tokens fit into the model's positions, and record a report.

    Slots of an uncommitted forward are dropped first. Nothing else happens if the recent window cannot move to lower
    positions. An interrupted re-basing of the sequence is finished instead of starting a new one.
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
    report = RebaseReport(
        row=sequence.index,
        tokens_seen=sequence.seen,
        position_before=position,
        position_after=position - move.start + move.end,
        gap=move.gap,
        kl=None,
        seconds=time.perf_counter() - began,
    )
    shift = sequence.shift + move.start - move.end
    sequence.change(moves=sequence.moves + 1, moving=None, shift=shift, report=report)
    if before is not None:
        divergence = _divergence(before, _next_log_probabilities(memory, forwards, sequence))
        report = report.model_copy(update={"kl": divergence, "seconds": time.perf_counter() - began})
        sequence.change(report=report)
    memory.record(report)
    log_events.rebased(memory.names, report)
    memory.publish(report)


def _move(memory: Memory, sequence: TokenSequence, tokens: int) -> Move:
    """Return how a re-basing must move the slots, so that ``tokens`` more tokens fit after the recent window.

    The result has three numbers. The recent window begins at position ``start`` now, and will begin at ``end``. The
    older slots of each head move closer together: the head gets a limit, and larger distances between neighbouring
    slots shrink to this limit. ``gap`` is the smallest limit of all heads; it is only reported.

    The recent window moves down so far that two conditions hold. It ends in the first half of the model's positions. At
    least ``tokens`` positions, plus the number that :func:`spare_positions` returns, are free after its end. There is
    one exception: each slot of a head needs a position of its own, so the recent window never moves below the positions
    that the fullest head needs. The recent window never moves up; if it cannot move down, ``start == end``.
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
    """Return the numbers of slots in the prefix and in the recent window; both numbers are equal for all heads."""
    prefix = min(memory.plan.prefix, sequence.seen)
    return prefix, min(memory.plan.recent, sequence.seen - prefix)


def _move_layer(memory: Memory, sequence: TokenSequence, layer: int, old: LayerStore) -> None:
    """Replace a layer's store by a new store with lower positions and rotated keys."""
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
    if memory.shape.layers[layer].window is not None:  # a sliding window holds the newest tokens and no positions
        keys = store.part(head, 0, 0).keys
        positions = torch.arange(sequence.next_position - length, sequence.next_position, dtype=torch.int32)
        store.spec.shift(keys, positions, torch.tensor(delta, dtype=torch.int32).expand(length), rotation)
        return
    prefix, recent = _ends(memory, sequence)
    middle, newest = store.part(head, prefix, recent), store.part(head, length - recent, 0)
    if middle.slots:
        gap = widest_gap([middle.positions], move.start, move.end - prefix)  # for this head alone
        deltas = rebased(middle.positions, move.start, move.end, gap)
        store.spec.shift(middle.keys, middle.positions, deltas, rotation)
        middle.positions.add_(deltas)
    if newest.slots:
        delta_of_each = torch.tensor(delta, dtype=torch.int32).expand(recent)
        store.spec.shift(newest.keys, newest.positions, delta_of_each, rotation)
        newest.positions.add_(delta)


def _move_samples(sequence: TokenSequence, rotations: tuple[Rotation, ...], move: Move) -> None:
    """Rotate the sequence's stored queries by as many positions as the recent window moves.

    The distance between these queries and the slots of the recent window therefore stays the same.
    """
    for layer, samples in enumerate(sequence.samples):
        for sample in () if layer in move.turned else samples:
            positions = sample.tokens(sequence.seen).sub_(sequence.shift)
            deltas = torch.tensor(move.end - move.start, dtype=torch.int32).expand(sample.filled)
            for head in sample.queries[:, : sample.filled]:
                shift_keys(head, positions, deltas, rotations[layer])
        move.turned.add(layer)


def _next_log_probabilities(memory: Memory, forwards: Forwards, sequence: TokenSequence) -> torch.Tensor | None:
    """Run the ``n`` newest tokens again, and return the log-probabilities ``[n, V]`` of the token after each of them.

    ``n`` is :func:`measured_tokens`, or less in a shorter sequence. Return ``None`` if embeddings were fed instead of
    ids. The cap includes neither the bytes of the log-probabilities nor the model's own activations.
    """
    ids = tuple(sequence.ids[-measured_tokens(memory) :])
    if min(ids, default=-1) < 0:
        return None  # embeddings were fed, which have no ids
    logits = forwards.logits(ids, sequence.next_position, Transient(memory, sequence)).float()
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def _divergence(before: torch.Tensor, after: torch.Tensor | None) -> float:
    assert after is not None  # noqa: S101  # the same ids gave logits before
    differences = after.neg_().add_(before)  # in place, so that no third set of logits is allocated
    return float(before.exp_().flatten().dot(differences.flatten())) / before.shape[0]
