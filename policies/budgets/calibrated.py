"""Calibrated budgets: one table of head shares per model, which applies at every compaction ratio.

Source: arXiv:2602.16284, nonuniform head budgets: "one ratio-agnostic table per model".
"""

from __future__ import annotations

from agentmem.contracts import BudgetRequest
from agentmem.policies.budgets.head_table import HeadTable
from agentmem.policies.budgets.tabled import Tabled
from agentmem.policies.budgets.water_filling import allocate, proportional


class Calibrated(Tabled):
    """Allocates slots in proportion to a table's shares; once a table is chosen, its largest shares are the ceilings.

    Neither ceiling exceeds the option ``head_ceiling`` or ``layer_ceiling``, respectively.
    """

    def ceilings(self, table: HeadTable) -> tuple[float, float]:
        """Return the table's largest share of a head and its largest mean share of a layer."""
        return table.head_ceiling, table.layer_ceiling

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """Allocate slots in proportion to the shares, within the floor and the ceilings."""
        shares = self.table_for(request).shares
        return allocate(request, [list(map(proportional, layer)) for layer in shares], self.floor)
