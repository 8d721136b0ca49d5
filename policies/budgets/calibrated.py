"""Calibrated budgets: slots in proportion to a table of head shares that was made for the model.

A head's *share* is a multiple of an equal share, which is the number of slots of a head if all heads get equally many.
The same table is used however many slots a compaction leaves.

Source: arXiv:2602.16284, nonuniform head budgets: "one ratio-agnostic table per model".
"""

from __future__ import annotations

from agentmem.contracts import BudgetRequest
from agentmem.policies.budgets.head_table import HeadTable
from agentmem.policies.budgets.tabled import Tabled
from agentmem.policies.budgets.water_filling import allocate, proportional


class Calibrated(Tabled):
    """Allocates slots in proportion to the shares in a table.

    Once a table is chosen, ``head_ceiling`` becomes the table's largest share of a single head. ``layer_ceiling`` is
    derived from the mean share of the heads of each layer: it becomes the largest of these means. If the option of the
    same name is smaller, the option's value is used instead.
    """

    def ceilings(self, table: HeadTable) -> tuple[float, float]:
        """Return the largest share of a single head in the table, and the largest mean share of a layer.

        The mean share of a layer is the mean over its heads.
        """
        return table.head_ceiling, table.layer_ceiling

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate slots in proportion to the shares, within the floor and the ceilings."""
        shares = self.table_for(request).shares
        return allocate(request, [list(map(proportional, layer)) for layer in shares], self.floor)
