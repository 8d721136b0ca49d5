"""AM with calibrated head budgets: Attention Matching where every head gets its share from the model's table.

Source: arXiv:2602.16284, nonuniform head budgets. The table of the default model is part of the package;
`agentmem calibrate` makes tables of other models. ``budgets="global"`` needs no table.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

am_calibrated = preset(
    "am-calibrated",
    "Attention Matching, slots per head by the model's calibrated table",
    budgets="calibrated",
)
"""Factory of the policy; takes the options of :func:`am_halving`, but ``budgets`` is calibrated by default."""
