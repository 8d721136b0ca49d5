"""Measure how many slots each head of a model needs, and write a table for calibrated or sensitivity budgets.

A head's *share* is the number of slots that it should get, as a multiple of an equal share. Its *error curve* has the
errors in nats per token if the head keeps only some fractions of its slots.

| file | what |
| --- | --- |
| ``terms.py`` | the settings of a calibration |
| ``windows.py`` | a window of text as the model reads it, and compacting heads in it |
| ``attention.py`` | shares from attention scores: seconds per window, no gradient |
| ``fisher.py`` | error curves of all heads from gradients, in one pass |
| ``loss.py`` | error curves by measurement, one head at a time |
| ``shares.py`` | the conversion of scores or curves to shares |
| ``methods.py`` | the three methods as units of work |
| ``partial.py`` | results on disk, to resume from |
| ``table.py`` | the file that a calibration writes |
| ``run.py`` | a whole calibration, resumable, on one process or several |

The package imports no policy: the compactor to measure is found by the policy's name.
"""

from agentmem.calibration.run import Team, calibrate
from agentmem.calibration.table import Origin
from agentmem.calibration.terms import METHODS, Method, Terms

__all__ = ["METHODS", "Method", "Origin", "Team", "Terms", "calibrate"]
