"""AM by pursuit: orthogonal matching pursuit chooses the slots and fits β, every head by the model's calibrated table.

Source: arXiv:2602.16284, section 3.3 (OMP, fast) and nonuniform head budgets. The nearest to full memory of all presets
here on text that goes on; what was said long ago is ``am-recall``'s affair.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

am_pursuit = preset(
    "am-pursuit",
    "Attention Matching by orthogonal matching pursuit, calibrated budgets",
    selector="omp-fast",
    budgets="calibrated",
)
"""The options of :func:`am_halving`, with other defaults."""
