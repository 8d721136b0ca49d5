"""Measuring which heads of a model need how many slots: tables for the calibrated and sensitivity budgets.

| file | what |
| --- | --- |
| ``terms.py`` | what is asked for |
| ``windows.py`` | a stretch of text as the model reads it, and heads of it compacted |
| ``attention.py`` | shares from attention scores: seconds a window, no gradient |
| ``fisher.py`` | error curves of all heads from gradients: one pass |
| ``loss.py`` | error curves by measurement: one head at a time |
| ``shares.py`` | from scores or curves to shares |
| ``methods.py`` | the three methods as units of work |
| ``partial.py`` | what was measured so far, on disk |
| ``table.py`` | the file that is made |
| ``run.py`` | all of it, resumable, on one process or several |

It imports no policy: the compactor that is measured comes in by its name.
"""

from agentmem.calibration.run import Team, calibrate
from agentmem.calibration.table import Origin
from agentmem.calibration.terms import METHODS, Method, Terms

__all__ = ["METHODS", "Method", "Origin", "Team", "Terms", "calibrate"]
