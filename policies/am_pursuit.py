"""AM by pursuit: orthogonal matching pursuit chooses the slots and fits β, every head by the model's calibrated table.

Source: arXiv:2602.16284, section 3.3 (OMP, fast) and nonuniform head budgets. The nearest to full memory of all presets
here on text that goes on; what was said long ago is ``am-recall``'s affair.
"""

from __future__ import annotations

from functools import partial

from agentmem.policies.am_halving import am_halving

am_pursuit = partial(
    am_halving,
    selector="omp-fast",
    budgets="calibrated",
    name="am-pursuit",
    summary="Attention Matching by orthogonal matching pursuit, calibrated budgets",
)
"""The options of :func:`am_halving`, with other defaults."""
