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

    Two ceilings limit the slots: one the share of a single head, the other the mean share of a layer's heads. Both may
    be given as options, ``head_ceiling`` and ``layer_ceiling``. The table has two such numbers as well: its largest
    share of a single head, and its largest mean share of a layer. Each ceiling is the smaller of the option and the
    table's number, but at least 1. The attributes ``head_ceiling`` and ``layer_ceiling`` hold the options until a table
    is chosen, and these ceilings from then on.
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
