"""AM with calibrated head budgets: Attention Matching where every head gets its share from the model's table.

Source: arXiv:2602.16284, nonuniform head budgets. The default model's table ships; `agentmem calibrate` makes
others, and ``budgets="global"`` needs none.
"""

from __future__ import annotations

from functools import partial

from agentmem.policies.am_halving import am_halving

am_calibrated = partial(
    am_halving,
    budgets="calibrated",
    name="am-calibrated",
    summary="Attention Matching, slots per head by the model's calibrated table",
)
"""The options of :func:`am_halving`, with calibrated budgets."""
