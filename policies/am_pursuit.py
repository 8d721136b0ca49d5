"""AM pursuit: Attention Matching in which orthogonal matching pursuit (OMP) chooses the slots and fits their β.

A table made for the model sets how many slots each head keeps. Of all ``am_*`` presets, this one is closest to full
memory when the model continues a text; ``am-recall`` is the better preset for recalling old facts.

Source: arXiv:2602.16284, section 3.3 (the fast variant of OMP) and nonuniform head budgets.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

am_pursuit = preset(
    "am-pursuit",
    "Attention Matching by orthogonal matching pursuit, calibrated budgets",
    selector="omp-fast",
    budgets="calibrated",
)
"""Factory of the policy; takes the options of :func:`am_halving`, with the default options above."""
