"""Run ablations: read a grid of policies, caps and settings from one file, measure it, and report the results.

An *instrument* is a kind of measurement: fidelity, recall or a task. A *cell* is one combination of the grid's
settings, measured by one instrument. A *row* is the result of a cell. A *line* of a table pools the rows that differ
only in text and seed.

| file | contents |
| --- | --- |
| ``config.py`` | the configuration of an ablation |
| ``source.py`` | reading the configuration from YAML; errors name line and field |
| ``grid.py`` | the list of all cells |
| ``bench.py`` | measuring the cells of one loaded model |
| ``rows.py`` | the rows, which are kept on disk |
| ``run.py`` | a whole ablation, which can be resumed, in one process or several |
| ``scores.py`` | the scores of a cell, one for each unit, such as a fact or a sample |
| ``intervals.py`` | bootstrap confidence intervals |
| ``lines.py`` | the lines of the tables |
| ``tables.py`` | the tables as CSV and Markdown |
| ``figures.py``, ``report.py`` | the HTML report |

This subpackage needs the optional dependencies ``eval``.
"""

from agentmem.evaluation.ablation.config import Ablation
from agentmem.evaluation.ablation.grid import Cell, cells
from agentmem.evaluation.ablation.lines import Line, lines
from agentmem.evaluation.ablation.rows import Provenance, Row
from agentmem.evaluation.ablation.run import finished, run
from agentmem.evaluation.ablation.source import read_config

__all__ = ["Ablation", "Cell", "Line", "Provenance", "Row", "cells", "finished", "lines", "read_config", "run"]
