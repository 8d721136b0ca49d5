"""Pure tensor functions, one algorithm a file: no cache, no model, nothing of agentmem.

| file | algorithm |
| --- | --- |
| ``solution.py`` | no algorithm: the result type of all that fit or choose |
| ``attention.py`` | attention of blocks of queries over one head's segment alone |
| ``selection.py`` | importance of slots over all queries, and the top of it |
| ``pursuit.py`` | orthogonal matching pursuit: slots and weights that together restore the mass |
| ``lots.py`` | random numbers for slots |
| ``redundancy.py`` | how much every key repeats the others |
| ``merging.py`` | grouping slots whose keys are alike |
| ``anchored.py`` | ridge regression anchored at a known point, from its normal equations |
| ``nonnegative.py`` | least squares within bounds, exact |
| ``mass.py`` | the β that restores the attention mass |
| ``values.py`` | the values that restore the attention output |
| ``refine.py`` | gradient steps on keys, β and values |

Working memory is bounded by the caller: queries are visited in blocks of rows, and no queries x slots matrix exists.
"""
