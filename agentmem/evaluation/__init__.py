"""Measuring what compaction costs: the instrument that every policy is judged by."""

from __future__ import annotations

from agentmem.evaluation.fidelity import FidelityRow, Measurement, Terms, measure, rows, stream
from agentmem.evaluation.passage import default_text, passage, read_text

__all__ = ["FidelityRow", "Measurement", "Terms", "default_text", "measure", "passage", "read_text", "rows", "stream"]
