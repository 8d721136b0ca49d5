"""How a forward reaches a memory: :class:`Append` for tokens that stay, :class:`Transient` for those that do not.

Both are called once a layer, with the model's own queries, keys and values (RoPE applied).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from agentmem.attention import Fresh, attend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from agentmem.memory import Memory
    from agentmem.row import Row


class Arriving(NamedTuple):
    """The tokens of one forward that belong to one row: their ids, positions, and columns in the batch."""

    ids: Sequence[int]
    positions: Sequence[int]
    columns: slice | torch.Tensor


class Append:
    """A forward whose tokens stay. ``commit`` or ``rollback`` ends it."""

    def __init__(self, memory: Memory, arriving: Sequence[Arriving]) -> None:
        """Room for the tokens must have been made."""
        self.memory, self.arriving = memory, arriving
        self.whole = all(isinstance(each.columns, slice) for each in arriving)
        self.columns = 0
        """Columns of the forward, pads included; set by whoever counts them."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Append the tokens' slots and attend: ``queries [B, Hq, q, d]`` → ``[B, q, Hq, dv]``."""
        memory = self.memory
        if len(self.arriving) == 1 and self.whole:
            output = memory.append_row(memory.rows[0], layer, queries[0], keys[0], values[0], scale)
            return output.transpose(0, 1).contiguous().unsqueeze(0)
        output = queries.new_zeros(queries.shape[0], queries.shape[2], queries.shape[1], values.shape[-1])
        for row, each in zip(memory.rows, self.arriving, strict=True):
            if each.ids:
                index, columns = row.index, each.columns
                part = memory.append_row(
                    row, layer, queries[index][:, columns], keys[index][:, columns], values[index][:, columns], scale
                )
                output[index, columns] = part.transpose(0, 1)
        return output

    def commit(self) -> None:
        """The forward ended well: the rows have consumed the tokens."""
        for row, each in zip(self.memory.rows, self.arriving, strict=True):
            row.tail.extend(each.positions)
            row.room -= len(each.ids)
            if each.positions:
                row.next_position = each.positions[-1] + 1
            row.ids.extend(each.ids)
        self.memory.appended(max(len(each.ids) for each in self.arriving), sum(len(each.ids) for each in self.arriving))

    def rollback(self) -> None:
        """The forward failed: take back what some layers had appended."""
        for row in self.memory.rows:
            for store in row.stores:
                if store is not None and store.seen > row.seen:
                    store.drop_tail(store.seen - row.seen)
            row.recount(self.memory.plan.capacity, self.memory.plan.scratch)


class Scratch:
    """Forwards of one row whose slots stay until :meth:`rollback`: what the model writes for itself.

    The slots are those that the plan keeps free; nothing is scored, sampled or recorded.
    """

    def __init__(self, memory: Memory, row: Row) -> None:
        """Nothing is appended yet."""
        self.memory, self.row = memory, row

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Append and attend: ``queries [1, Hq, q, d]`` → ``[1, q, Hq, dv]``."""
        output = self.memory.append_row(self.row, layer, queries[0], keys[0], values[0], scale, scratch=True)
        return output.transpose(0, 1).contiguous().unsqueeze(0)

    def rollback(self) -> None:
        """Take back all that was appended."""
        for store in self.row.stores:
            if store is not None and store.seen > self.row.seen:
                store.drop_tail(store.seen - self.row.seen)


class Transient:
    """A forward that leaves nothing behind: one row's slots and, causally, the tokens' own keys and values.

    ``visit(layer, queries [Hq, q, d])`` is called before a layer attends, so what it commits is what is attended.
    """

    def __init__(self, memory: Memory, row: Row, visit: Callable[[int, torch.Tensor], None]) -> None:
        """Nothing is allocated here."""
        self.memory, self.row, self.visit = memory, row, visit

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend without appending: ``queries [1, Hq, q, d]`` → ``[1, q, Hq, dv]``."""
        self.visit(layer, queries[0])
        shape = self.memory.shape.layers[layer]
        store = self.row.stores[layer]
        runs = [] if store is None else store.runs(shape.window and shape.window - 1, scored=False)
        self.memory.ledger.touch(self.memory.plan.forward_bytes, "attention of a probe")
        output, _ = attend(queries[0], runs, Fresh(keys[0], values[0]), scale, window=shape.window)
        return output.transpose(0, 1).contiguous().unsqueeze(0)
