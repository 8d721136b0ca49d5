"""Re-basing: which slots go to which lower positions, and the rotation that takes their stored keys along.

RoPE turns pairs of a key's dims by position times frequency, so a stored key reaches another position by a further
turn. The attention factor of YaRN stretches what is stored and commutes with turning. Only torch is needed here: what
a model's frequencies are, and which slots there are, is for others to say.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from agentmem.planning.rebasing import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How the keys of one layer turn: dims ``i`` and ``i + width / 2`` together, those from ``width`` on never.

    ``frequencies [width / 2]`` are float64 radians a position on the CPU, with the values that the model multiplies by.
    Source: arXiv:2104.09864, section 3.4, with the pairs of the Llama family.
    """

    frequencies: torch.Tensor

    @property
    def width(self) -> int:
        """The dims that turn; fewer than a key has where rotary is partial."""
        return 2 * self.frequencies.shape[0]


@dataclass(frozen=True, slots=True)
class Positions:
    """How a model counts: so many positions, and how each layer's keys turn with them."""

    limit: int
    rotations: tuple[Rotation, ...]


# ---- keys


def shift_keys(
    keys: torch.Tensor, positions: torch.Tensor, deltas: torch.Tensor, rotation: Rotation, *, block: int = BLOCK
) -> None:
    """Turn keys in place so that they are those of ``positions + deltas``; allocates :func:`shift_scratch` at most.

    Args:
        keys: [n, d] in any floating dtype, post-RoPE. A row whose delta is 0 keeps its bits.
        positions: [n] int32, where the keys were stored; they are not written.
        deltas: [n] int32, likewise; an expanded scalar will do.
        rotation: of the layer; ``rotation.width <= d``.
        block: slots that are turned at once.

    A model rounds the product of position and frequency to float32, which at position 100,000 is off by up to 0.004
    radians. Both ends of the turn are therefore rounded as the model rounds them, and their difference is taken in
    float64: a key arrives where the model itself would have put it, and moving it again adds no error of phase. The
    turn is computed in float32 (float64 for float64 keys) and rounded to the keys' dtype once.
    """
    for begin in range(0, keys.shape[0], block):
        span = slice(begin, begin + block)
        _shift_block(keys[span], positions[span], deltas[span], rotation)


def _shift_block(keys: torch.Tensor, positions: torch.Tensor, deltas: torch.Tensor, rotation: Rotation) -> None:
    rows = deltas.nonzero()[:, 0]
    if not rows.shape[0]:
        return
    dtype = torch.promote_types(keys.dtype, torch.float32)
    # On the CPU wherever the keys are: not every device has float64, and all get the same angles.
    turns = _turns(positions[rows].cpu(), deltas[rows].cpu(), rotation.frequencies, dtype)
    cos, sin = (turn.to(keys.device) for turn in turns)
    del turns
    first, second = keys[:, : rotation.width].chunk(2, dim=1)
    low, high = first.index_select(0, rows).to(dtype), second.index_select(0, rows).to(dtype)
    first.index_copy_(0, rows, (low * cos).addcmul_(high, sin, value=-1).to(keys.dtype))
    second.index_copy_(0, rows, high.mul_(cos).addcmul_(low, sin).to(keys.dtype))


def _turns(
    positions: torch.Tensor, deltas: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``[m, width / 2]`` of the angles from each position to the one ``deltas`` further."""
    angles = _angles(positions + deltas, frequencies)
    angles -= _angles(positions, frequencies)
    return angles.cos().to(dtype), angles.sin_().to(dtype)


def _angles(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """The model's own angles: the product, rounded to float32, as float64."""
    return (positions.float()[:, None] * frequencies.float()).double()


# ---- positions


def widest_gap(heads: Iterable[torch.Tensor], start: int, span: int) -> int:
    """The greatest distance between neighbours with which every head's slots take ``span`` positions at most.

    Args:
        heads: each the positions of one head's slots between prefix and recent, [n] int32, all different and below
            ``start``, in any order: pinned slots may stand before older ones. They are read one after the other,
            each with :func:`map_scratch` bytes of scratch.
        start: where the recent block begins, which is the same for all heads; the next position where there is none.
        span: positions from the end of the prefix to where the recent block is to begin.

    Returns:
        The gap for :func:`rebased`: ``span`` where nothing is too wide, and never less than 1.

    Raises:
        ValueError: a head has more slots than ``span``, or its positions are not as they should be.

    """
    gap = max(1, span)
    for positions in heads:
        slots = positions.shape[0]
        if slots > span:
            raise ValueError(
                f"{slots} slots cannot be re-based into {span} positions, even without gaps; leave at least one "
                "position a slot: compact to fewer slots first, or give them more positions"
            )
        if slots:
            gap = _narrowed(gap, positions, start, span)
    return gap


def _narrowed(gap: int, positions: torch.Tensor, start: int, span: int) -> int:
    """The greatest gap up to ``gap`` with which one head fits; a function of its own, to free one before the next."""
    steps = _steps(positions.sort().values, start)
    if _reach(steps, gap) <= span:
        return gap
    return bisect_right(range(1, gap), span, key=lambda wide: _reach(steps, wide))


def rebased(positions: torch.Tensor, start: int, end: int, gap: int) -> torch.Tensor:
    """How far each slot of one head goes when the recent block goes from ``start`` to ``end``.

    Slots are lined up below the recent block in their order: neighbours no further than ``gap`` apart move together,
    others are put at that distance. No slot goes up: those that the line would bring closer to the recent block than
    they are stay, which leaves a head with few slots most of its distances.

    Args:
        positions: as one of the ``heads`` of :func:`widest_gap`.
        start: where the recent block begins; it goes to ``end`` as a whole, and so does a sliding window.
        end: where it is to begin, ``start`` at most.
        gap: of :func:`widest_gap`, for the span that ends at ``end``.

    Returns:
        [n] int32, what is to be added to the positions, never more than 0; all zeros where ``start == end``, so slots
        that were re-based stay where they are. Allocates :func:`map_scratch` bytes at most, the result included.

    Raises:
        ValueError: ``end`` is beyond ``start``, or positions are not as they should be.

    """
    if end > start:
        raise ValueError(
            f"the recent block begins at position {start} and cannot be re-based to {end}: positions only go down; "
            "choose a lower end, or leave the positions as they are"
        )
    if not positions.shape[0]:
        return torch.empty_like(positions)
    ascending, order = positions.sort()
    deltas = _steps(ascending, start).sub_(gap).clamp_(min=0)
    del ascending
    below = deltas.cumsum(0, dtype=deltas.dtype)
    deltas.sub_(below).add_(end - start + int(below[-1])).clamp_(max=0)
    return below.scatter_(0, order, deltas)


def _steps(ascending: torch.Tensor, start: int) -> torch.Tensor:
    """The distance from each slot to the next, [n] int32; from the last one to the recent block."""
    steps = torch.empty_like(ascending)
    torch.sub(ascending[1:], ascending[:-1], out=steps[:-1])
    steps[-1] = start - int(ascending[-1])
    least = int(steps.min())
    if least < 1:
        raise ValueError(
            f"two slots of a head are {least} positions apart; they must differ and lie below {start}, where the "
            "recent block begins. Pass one head's slots at a time, without those of the recent block"
        )
    return steps


def _reach(steps: torch.Tensor, gap: int) -> int:
    """Positions from the first slot to the recent block when no distance is greater than ``gap``."""
    return int(steps.clamp(max=gap).sum(dtype=steps.dtype))
