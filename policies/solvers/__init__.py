"""Pure tensor functions, one algorithm per file; they need no cache, no model and no other part of agentmem.

| file | algorithm |
| --- | --- |
| ``solution.py`` | the result type of all other files |
| ``attention.py`` | attention of blocks of queries over one head's segment alone |
| ``selection.py`` | importance of slots over all queries, and the choice of the most important slots |
| ``pursuit.py`` | orthogonal matching pursuit: choice of slots, and weights that restore the attention mass |
| ``lots.py`` | random numbers for slots |
| ``redundancy.py`` | similarity of every key to the other keys |
| ``merging.py`` | merging of slots whose keys are similar |
| ``anchored.py`` | ridge regression anchored at a known point, from its normal equations |
| ``nonnegative.py`` | exact least squares with every unknown within bounds |
| ``mass.py`` | the β that restores the attention mass |
| ``values.py`` | the values that restore the attention output |
| ``refine.py`` | gradient steps on keys, β and values |

The caller bounds the working memory: queries are visited in blocks of rows, and no queries x slots matrix is made.
"""
