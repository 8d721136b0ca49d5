"""Measure how much quality compaction loses, with the same measurements for every policy.

The measurements are fidelity (KL from full memory), a single compaction, and the recall of planted facts.
"""

from __future__ import annotations

from agentmem.evaluation.facts import Document, Quiz, documents
from agentmem.evaluation.fidelity import FidelityRow, Measurement, measure, rows, stream
from agentmem.evaluation.one_shot import OneShotRow, Shot
from agentmem.evaluation.passage import default_text, passage, read_text
from agentmem.evaluation.recall import Recalled, RecallRow
from agentmem.evaluation.terms import Source, Terms

__all__ = [
    "Document",
    "FidelityRow",
    "Measurement",
    "OneShotRow",
    "Quiz",
    "RecallRow",
    "Recalled",
    "Shot",
    "Source",
    "Terms",
    "default_text",
    "documents",
    "measure",
    "passage",
    "read_text",
    "rows",
    "stream",
]
