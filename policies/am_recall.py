"""AM for recall: old text stays recallable, at a bounded cost per compaction.

With a probe of recent text alone, no reference query attends to old slots, and a few compactions remove them. This
preset differs in three ways. A part of the probe comes from spans all over the transcript, and every compaction takes
different spans. A slot's importance is carried from one compaction to the next. Spans that match ``pattern`` (numbers,
identifiers, names) come first and weigh more, because their tokens attract no more attention than other tokens until a
question asks for them.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

CRITICAL = r"\d+|[A-Z][\w'-]+|(?<![^\W\d])\w*[_\d]\w*"
"""Matches numbers, capitalised words and identifiers. The pattern does not try to match an identifier at every letter
of a word, so that the search takes linear time."""

am_recall = preset(
    "am-recall",
    "Attention Matching with carried importance and a probe of the whole text, calibrated budgets",
    probe="replay+spread",
    carry=0.95,
    pattern=CRITICAL,
    pattern_weight=16.0,
    budgets="calibrated",
)
"""Factory of the policy; takes the options of :func:`am_halving`, with the defaults above."""
