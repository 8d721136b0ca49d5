"""AM for recall: what was said long ago stays recallable, at a bounded cost per compaction.

A probe of recent text gives old slots no evidence, and in a few compactions they are gone. Here a part of the probe
comes from spans all over the transcript, other ones at every compaction; what a slot was worth once travels with it;
and spans that match ``pattern`` (numbers, identifiers, names) come first and weigh more, because their tokens attract
no more attention than any others until somebody asks for them.
"""

from __future__ import annotations

from agentmem.policies.am_halving import preset

CRITICAL = r"\d+|[A-Z][\w'-]+|(?<![^\W\d])\w*[_\d]\w*"
"""Numbers, capitalised words, identifiers. An identifier is looked for once in a word, so the search is linear."""

am_recall = preset(
    "am-recall",
    "Attention Matching with carried importance and a probe of the whole text, calibrated budgets",
    probe="replay+spread",
    carry=0.95,
    pattern=CRITICAL,
    pattern_weight=16.0,
    budgets="calibrated",
)
"""The options of :func:`am_halving`, with other defaults."""
