"""The common base of budgets that follow a table of head shares: it chooses the table that fits the model."""

from __future__ import annotations

from pathlib import Path

from agentmem.contracts import BudgetRequest, Budgets, ModelIdentity
from agentmem.policies.budgets.head_table import HeadTable, fitting, read_table, shipped_tables

HEAD_CEILING = 4.0
"""Default maximum of one head's share, as a multiple of an equal share (the share of a head if all heads get as many).

Larger shares of a table are cut. The plan sizes every head's workspace for this maximum."""
LAYER_CEILING = 2.0
"""Default maximum of the mean share of a layer's heads, as a multiple of an equal share; larger shares are cut."""


class Tabled(Budgets):
    """Follows the table of a given file, or the package's own table of the model that :meth:`check` receives.

    ``floor`` is the fraction of an equal share that every head gets at least. ``any_weights`` accepts a table made for
    other weights with equal KV heads, such as those of a fine-tune's base model. ``head_ceiling`` and
    ``layer_ceiling`` are the largest share of a head and the largest mean share of a layer's heads, as multiples of an
    equal share.

    Raises:
        ValueError: the file is not a table or lacks what these budgets need, or an option's value cannot work.

    """

    def __init__(
        self,
        table: str | Path = "",
        *,
        floor: float = 0.25,
        head_ceiling: float = HEAD_CEILING,
        layer_ceiling: float = LAYER_CEILING,
        any_weights: bool = False,
    ) -> None:
        if not 0 <= floor <= 1:
            raise ValueError(f"floor: {floor!r} is no fraction of an equal share; give 0 to 1")
        for name, value in (("head_ceiling", head_ceiling), ("layer_ceiling", layer_ceiling)):
            if not 1 <= value < float("inf"):
                raise ValueError(f"{name}: {value!r} equal shares cannot be allocated; give 1 or more")
        self.floor, self.any_weights = floor, any_weights
        self.head_ceiling, self.layer_ceiling = head_ceiling, layer_ceiling
        self._most = (head_ceiling, layer_ceiling)
        self._table: HeadTable | None = None
        self._model: ModelIdentity | None = None
        if not str(table):
            self._tables = tuple(found for found in shipped_tables() if not self.lacks(found))
            return
        self._tables = (read_table(table),)
        if lacking := self.lacks(self._tables[0]):
            raise ValueError(lacking)
        self._choose(self._tables[0])

    def lacks(self, table: HeadTable) -> str:  # noqa: ARG002  # those that need nothing but shares ask nothing
        """Return a message on what the table lacks for these budgets, or an empty string if nothing is missing."""
        return ""

    def ceilings(self, table: HeadTable) -> tuple[float, float]:  # noqa: ARG002  # the same
        """Return the most slots that the table can give to one head, and to a layer as the mean of its heads.

        Both are multiples of an equal share, which is the number of slots of a head if all heads get as many.
        """
        return self._most

    def _choose(self, table: HeadTable) -> None:
        self._table = table
        asked = self.ceilings(table)
        self.head_ceiling, self.layer_ceiling = (max(1.0, min(pair)) for pair in zip(asked, self._most, strict=True))

    def check(self, model: ModelIdentity) -> None:
        """Choose the model's table.

        Raises:
            ValueError: no table fits the model, or these budgets serve another model already.

        """
        served = self._model
        known = model.fingerprint is not None  # a plan made from a config alone has no weights to fingerprint
        if served is not None and (
            served.kv_heads != model.kv_heads or (known and served.fingerprint != model.fingerprint)
        ):
            raise ValueError(f"these budgets serve {served.name} already, and {model.name} is another; make new ones")
        self._choose(fitting(self._tables, model, any_weights=self.any_weights))
        self._model = model if known else served

    def table_for(self, request: BudgetRequest) -> HeadTable:
        """Return the chosen table after a check that its KV heads are those of the request.

        Raises:
            ValueError: the heads differ, or no table was chosen yet.

        """
        heads = tuple(map(len, request.held))
        if self._table is None:
            raise ValueError(
                f"no table was chosen for {len(heads)} layers; call check(model) first, or give table=FILE"
            )
        if self._table.model.kv_heads != heads:
            raise ValueError(f"table {self._table.source!r} is for heads {self._table.model.kv_heads}, not {heads}")
        return self._table
