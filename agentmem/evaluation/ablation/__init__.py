"""Ablations: a grid of policies, caps and settings from one file, measured, tabled and drawn.

| file | what |
| --- | --- |
| ``config.py`` | what is asked for |
| ``source.py`` | the same from YAML; refusals name line and field |
| ``grid.py`` | its cells, in order |
| ``bench.py`` | one model: keys and measurements of cells |
| ``rows.py`` | what was measured, on disk: one line per finished cell |
| ``run.py`` | all of it, resumable, on one process or several |
| ``scores.py`` | from rows to scores, unit by unit |
| ``intervals.py`` | bootstrap intervals |
| ``lines.py`` | cells that differ in text and seed alone, pooled |
| ``tables.py`` | CSV and Markdown |
| ``figures.py``, ``report.py`` | the HTML report |

It needs the extra ``eval``.
"""

from agentmem.evaluation.ablation.config import Ablation
from agentmem.evaluation.ablation.grid import Cell, cells
from agentmem.evaluation.ablation.lines import Line, lines
from agentmem.evaluation.ablation.rows import Provenance, Row
from agentmem.evaluation.ablation.run import finished, run
from agentmem.evaluation.ablation.source import read_config

__all__ = ["Ablation", "Cell", "Line", "Provenance", "Row", "cells", "finished", "lines", "read_config", "run"]
