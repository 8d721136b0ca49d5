"""AM calibrated: Attention Matching in which a table made for the model sets how many slots each head keeps.

Source: arXiv:2602.16284, nonuniform head budgets. The package contains the table of the default model;
`agentmem calibrate` makes tables of other models. The option ``budgets="global"`` needs no table.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

am_calibrated = preset(
    "am-calibrated",
    "Attention Matching, slots per head by the model's calibrated table",
    budgets="calibrated",
)
"""Factory of the policy; takes the options of :func:`am_halving`, but the default of ``budgets`` is "calibrated"."""
