"""The base class of budgets that follow a table of head shares; it chooses the table that was made for the model."""

from __future__ import annotations

from pathlib import Path

from agentmem.contracts import BudgetRequest, Budgets, ModelIdentity
from agentmem.policies.budgets.head_table import HeadTable, fitting, read_table, shipped_tables

HEAD_CEILING = 4.0
"""Default maximum of a head's share: its number of slots divided by the mean number of slots per head.

Larger shares of a table are cut. The plan sizes every head's workspace for this maximum."""
LAYER_CEILING = 2.0
"""Default maximum of the mean share of a layer's heads; larger mean shares of a table are cut."""


class Tabled(Budgets):
    """Follows a table of head shares; a share is a head's number of slots divided by the mean number of slots per head.

    The table is read from the file ``table``. If no file is given, :meth:`check` chooses one of the package's tables.
    ``floor`` is the smallest share that a head gets, and ``head_ceiling`` is the largest share. ``layer_ceiling``
    limits the mean share of the heads of each layer. ``any_weights`` accepts a table made for a model with other
    weights but equal KV heads, such as the base model of a fine-tuned model.

    Raises:
        ValueError: the file is not a table or lacks what these budgets need, or an option is out of range.

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

    def lacks(self, table: HeadTable) -> str:  # noqa: ARG002  # every table has shares
        """Return a message if the table lacks something that these budgets need, else an empty string."""
        return ""

    def ceilings(self, table: HeadTable) -> tuple[float, float]:  # noqa: ARG002  # subclasses use the table
        """Return two limits of the allocation: the largest share of a head, and the largest mean share of a layer.

        A head's share is its number of slots divided by the mean number of slots per head. The mean share of a layer is
        the mean over the layer's heads. A subclass may take the limits from ``table``; here the limits are the options
        ``head_ceiling`` and ``layer_ceiling``.
        """
        return self._most

    def _choose(self, table: HeadTable) -> None:
        self._table = table
        asked = self.ceilings(table)
        self.head_ceiling, self.layer_ceiling = (max(1.0, min(pair)) for pair in zip(asked, self._most, strict=True))

    def check(self, model: ModelIdentity) -> None:
        """Choose the table that was made for ``model``; the plan calls this method before any allocation.

        Raises:
            ValueError: no table fits the model, or these budgets already follow the table of another model.

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
        """Check that the chosen table has the KV heads of the request, and return the table.

        Raises:
            ValueError: the KV heads differ, or no table was chosen yet.

        """
        heads = tuple(map(len, request.held))
        if self._table is None:
            raise ValueError(
                f"no table was chosen for {len(heads)} layers; call check(model) first, or give table=FILE"
            )
        if self._table.model.kv_heads != heads:
            raise ValueError(f"table {self._table.source!r} is for heads {self._table.model.kv_heads}, not {heads}")
        return self._table
