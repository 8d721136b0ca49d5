"""Run ablations: read a grid of policies, caps and settings from one file, measure it, and report the results.

An *instrument* is a kind of measurement: fidelity, recall or a task. A *cell* is one combination of the grid, measured
by one instrument.

| file | what |
| --- | --- |
| ``config.py`` | the configuration of an ablation |
| ``source.py`` | reading the configuration from YAML; errors name line and field |
| ``grid.py`` | the cells of the grid, in order; a cell is one instrument with one combination of settings |
| ``bench.py`` | keys and measurements of the cells of one loaded model |
| ``rows.py`` | results on disk, one line (a row) per finished cell |
| ``run.py`` | a whole ablation, resumable, on one process or several |
| ``scores.py`` | the scores of cells, one for each unit, such as a fact or a sample |
| ``intervals.py`` | bootstrap confidence intervals |
| ``lines.py`` | the lines of the tables, which pool cells that differ only in text and seed |
| ``tables.py`` | tables as CSV and Markdown |
| ``figures.py``, ``report.py`` | the HTML report |

The package needs the extra ``eval``.
"""

from agentmem.evaluation.ablation.config import Ablation
from agentmem.evaluation.ablation.grid import Cell, cells
from agentmem.evaluation.ablation.lines import Line, lines
from agentmem.evaluation.ablation.rows import Provenance, Row
from agentmem.evaluation.ablation.run import finished, run
from agentmem.evaluation.ablation.source import read_config

__all__ = ["Ablation", "Cell", "Line", "Provenance", "Row", "cells", "finished", "lines", "read_config", "run"]
