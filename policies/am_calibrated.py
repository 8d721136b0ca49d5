"""AM with calibrated head budgets: Attention Matching where every head gets its share from the model's table.

Source: arXiv:2602.16284, nonuniform head budgets. The default model's table ships; `agentmem calibrate` makes
others, and ``budgets="global"`` needs none.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

am_calibrated = preset(
    "am-calibrated",
    "Attention Matching, slots per head by the model's calibrated table",
    budgets="calibrated",
)
"""The options of :func:`am_halving`, with calibrated budgets."""
