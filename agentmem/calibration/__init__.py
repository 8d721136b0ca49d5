"""Measure how many slots each head of a model needs, and write a table for calibrated or sensitivity budgets.

A head's *share* is the number of slots that the head should get, divided by the mean number of slots per head. Its
*error curve* lists the head's errors, in nats per token, one for each of several fractions of slots that are kept.

| file | content |
| --- | --- |
| ``terms.py`` | the settings of a calibration |
| ``windows.py`` | reading a window of text with the model, and compacting heads in this window |
| ``attention.py`` | shares from attention scores: seconds per window, no gradient |
| ``fisher.py`` | error curves of all heads from gradients, in one pass |
| ``loss.py`` | error curves by measurement, one head at a time |
| ``shares.py`` | the conversion of scores or curves to shares |
| ``methods.py`` | the three methods, each divided into units of work (one window, or one head in one window) |
| ``partial.py`` | results on disk, so that a calibration can be resumed |
| ``table.py`` | the file that a calibration writes |
| ``run.py`` | a whole calibration, resumable, on one process or several |

The package imports no policy; the compactor to measure is found by the policy's name.
"""

from agentmem.calibration.run import Team, calibrate
from agentmem.calibration.table import Origin
from agentmem.calibration.terms import METHODS, Method, Terms

__all__ = ["METHODS", "Method", "Origin", "Team", "Terms", "calibrate"]
