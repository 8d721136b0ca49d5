"""Attention Matching (AM) for recall: old text stays recallable, at a bounded cost per compaction.

The preset ``am-halving`` probes with recent text alone. Hardly any reference query then attends to old slots, and a few
compactions remove them. This preset changes four things:

- A part of the probe consists of spans from all over the transcript; every compaction takes different spans.
- Up to half of the tokens of these spans are details: matches of ``pattern`` (numbers, identifiers, names), each with
  a few tokens before it. A query of a matching token weighs ``pattern_weight`` times as much as another query, because
  such queries attend to the slots of details. Hardly any other query attends to these slots before a question asks for
  the detail. Without the larger weight, the slots of details would therefore seem unimportant.
- Part of a slot's importance is carried from one compaction to the next.
- A table made for the model sets how many slots each head keeps; the numbers are not equal.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

CRITICAL = r"\d+|[A-Z][\w'-]+|(?<![^\W\d])\w*[_\d]\w*"
"""Regular expression for numbers, capitalised words and identifiers. A search takes linear time, because the pattern
does not try to match an identifier at every letter of a word."""

am_recall = preset(
    "am-recall",
    "Attention Matching with carried importance and a probe of the whole text, calibrated budgets",
    probe="replay+spread",
    carry=0.95,
    pattern=CRITICAL,
    pattern_weight=16.0,
    budgets="calibrated",
)
"""Factory of the policy; takes the options of :func:`am_halving`, with the default options above."""
