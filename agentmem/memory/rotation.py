"""Re-basing: compute the lower positions of slots, and rotate their stored keys to these positions.

RoPE rotates pairs of a key's dims by position times frequency. A stored key can therefore be moved to another position
by a further rotation. YaRN also scales keys by an attention factor, which does not change how they rotate. This module
does not know models or stores: callers pass the model's frequencies and the slots' positions.
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
    """The frequencies with which RoPE rotates the keys of one layer.

    Dims ``i`` and ``i + width / 2`` form a pair, as in Llama models; dims from ``width`` on do not rotate.
    ``frequencies [width / 2]`` are the model's own, in radians per position, as float64 on the CPU. Source:
    arXiv:2104.09864, section 3.4.
    """

    frequencies: torch.Tensor

    @property
    def width(self) -> int:
        """The number of dims that rotate; fewer than the dims of a key if the model's rotary embedding is partial."""
        return 2 * self.frequencies.shape[0]


@dataclass(frozen=True, slots=True)
class Positions:
    """The number of positions that a model has (``limit``), and the rotation of each layer's keys."""

    limit: int
    rotations: tuple[Rotation, ...]


# ---- keys


def shift_keys(
    keys: torch.Tensor, positions: torch.Tensor, deltas: torch.Tensor, rotation: Rotation, *, block: int = BLOCK
) -> None:
    """Rotate keys in place from ``positions`` to ``positions + deltas``.

    The function allocates at most :func:`agentmem.planning.rebasing.shift_scratch` bytes.

    Args:
        keys: [n, d] in any floating dtype, post-RoPE. A row whose delta is 0 keeps its bits.
        positions: [n] int32, the positions of the stored keys; not changed.
        deltas: [n] int32, how far each key moves; not changed; may be an expanded scalar.
        rotation: the rotation of the layer; ``rotation.width <= d``.
        block: the number of keys that are rotated at once.

    A model rounds an angle, the product of position and frequency, to float32. At position 100,000 this is an error of
    up to 0.004 radians. The function therefore rounds the old and the new angle as the model does, and computes their
    difference in float64. The moved key then has the angle that the model itself would give it at the new position, and
    the errors of repeated moves do not add up. The rotation is computed in float32 (float64 for float64 keys) and
    rounded once to the keys' dtype.
    """
    for begin in range(0, keys.shape[0], block):
        span = slice(begin, begin + block)
        _shift_block(keys[span], positions[span], deltas[span], rotation)


def _shift_block(keys: torch.Tensor, positions: torch.Tensor, deltas: torch.Tensor, rotation: Rotation) -> None:
    rows = deltas.nonzero()[:, 0]
    if not rows.shape[0]:
        return
    dtype = torch.promote_types(keys.dtype, torch.float32)
    # Computed on the CPU whatever the device of the keys: not every device has float64, and all get equal angles.
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
    """Return cosine and sine ``[m, width / 2]`` of the angles by which keys rotate when they move by ``deltas``."""
    angles = _angles(positions + deltas, frequencies)
    angles -= _angles(positions, frequencies)
    return angles.cos().to(dtype), angles.sin_().to(dtype)


def _angles(positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Compute the rotation angles ``[m, width / 2]`` of ``m`` positions in float32, as models do; return float64."""
    return (positions.float()[:, None] * frequencies.float()).double()


# ---- positions


def widest_gap(heads: Iterable[torch.Tensor], start: int, span: int) -> int:
    """Return the largest gap, a limit on distances, with which the slots of every head fit into ``span`` positions.

    The gap limits the distance between the positions of neighbouring slots of a head: larger distances shrink to the
    gap, and smaller distances stay. The smaller the gap, the fewer positions the slots need.

    Args:
        heads: for each head, the positions [n] (int32) of its slots between the prefix and the recent window. These
            positions are distinct and below ``start``, in any order (pinned slots may come before older slots). The
            heads are read one after the other; each takes :func:`agentmem.planning.rebasing.map_scratch` temporary
            bytes.
        start: the position at which the recent window begins, in every head; the next position if the window is empty.
        span: the number of positions from the end of the prefix to the new beginning of the recent window.

    Returns:
        The gap to pass to :func:`rebased`, at least 1; it is ``span`` (at least 1) if no distance has to shrink.

    Raises:
        ValueError: a head has more slots than ``span``, or its positions are not as described.

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
    """Return the largest gap, at most ``gap``, with which the slots of one head fit into ``span`` positions.

    A gap is a limit on the distance between the positions of neighbouring slots: larger distances shrink to the gap.
    ``positions [n]`` (int32) are the positions of the head's slots, and ``start`` is the position at which the recent
    window begins after them. The tensors of one head are freed when this function returns, before the next head is
    read.
    """
    steps = _steps(positions.sort().values, start)
    if _reach(steps, gap) <= span:
        return gap
    return bisect_right(range(1, gap), span, key=lambda wide: _reach(steps, wide))


def rebased(positions: torch.Tensor, start: int, end: int, gap: int) -> torch.Tensor:
    """Return how far each slot of one head moves when the recent window moves from ``start`` to ``end``.

    The new positions are laid out downwards from ``end``, in the order of the old positions. Each slot keeps its
    distance to the next higher slot if this is at most ``gap``; a larger distance becomes ``gap``. The distance from
    the highest slot to the recent window is treated in the same way. No slot moves up: where the layout would give a
    slot a higher position than its old one, this slot and all slots below it stay where they are.

    Args:
        positions: [n] int32, the positions of the head's slots between the prefix and the recent window. They are
            distinct and below ``start``, in any order.
        start: the position at which the recent window begins; the window moves to ``end`` as a whole.
        end: the position at which the recent window will begin; at most ``start``.
        gap: the limit on distances, from :func:`widest_gap`. Its ``span`` must be the number of positions from the end
            of the prefix to ``end``.

    Returns:
        The numbers [n] (int32, 0 or negative) to add to the positions. All are 0 if ``start == end``. The function
        allocates at most :func:`agentmem.planning.rebasing.map_scratch` bytes, including the result.

    Raises:
        ValueError: ``end`` is greater than ``start``, or the positions are not as described.

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
    """Return the distance from each slot to the next, [n] int32.

    After the last slot comes the recent window, whose first position is ``start``.

    Raises:
        ValueError: two positions are equal, or a position is not below ``start``.

    """
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
    """Return how many positions a head's slots need if the distances between neighbours are at most ``gap``.

    ``steps`` has the distance from each slot to the next, and from the last slot to the recent window; see
    :func:`_steps`. Distances above ``gap`` count as ``gap``. The result is the sum of the distances.
    """
    return int(steps.clamp(max=gap).sum(dtype=steps.dtype))
