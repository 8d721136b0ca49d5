"""AM by pursuit: orthogonal matching pursuit chooses slots and fits β; the model's table sets the head budgets.

Source: arXiv:2602.16284, section 3.3 (OMP, fast) and nonuniform head budgets. Of all presets here this one is closest
to full memory when the model continues a text. For recalling old facts, ``am-recall`` is the better preset.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

am_pursuit = preset(
    "am-pursuit",
    "Attention Matching by orthogonal matching pursuit, calibrated budgets",
    selector="omp-fast",
    budgets="calibrated",
)
"""Factory of the policy; takes the options of :func:`am_halving`, with the defaults above."""
