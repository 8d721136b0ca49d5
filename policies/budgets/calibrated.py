"""Calibrated budgets: slots in proportion to a table of head shares that was made for the model.

A head's *share* is its number of slots divided by the mean number of slots per head. The same table is used however
many slots a compaction leaves.

Source: arXiv:2602.16284, nonuniform head budgets: "one ratio-agnostic table per model".
"""

from __future__ import annotations

from agentmem.contracts import BudgetRequest
from agentmem.policies.budgets.head_table import HeadTable
from agentmem.policies.budgets.tabled import Tabled
from agentmem.policies.budgets.water_filling import allocate, proportional


class Calibrated(Tabled):
    """Allocates slots in proportion to the shares in a table.

    A head's share is its number of slots divided by the mean number of slots per head. Two ceilings limit the
    allocation:

    - The share of a single head is at most the option ``head_ceiling``, and at most the largest share in the table.
    - The mean share of a layer's heads is at most the option ``layer_ceiling``, and at most the largest such mean in
      the table.

    However, no ceiling is below 1. The attributes ``head_ceiling`` and ``layer_ceiling`` hold the options at first.
    Once a table is chosen, they hold the resulting ceilings.
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
