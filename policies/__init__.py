"""The catalogue: one method a file, named as the field names it, with one paper each.

| file | policy | method | paper |
| --- | --- | --- | --- |
| ``am_halving.py`` | ``am-halving`` | Attention Matching, equal slots per head | arXiv:2602.16284 |
| ``window.py`` | ``window`` | prefix and most recent slots | StreamingLLM, arXiv:2309.17453 |
| ``heavy_hitters.py`` | ``heavy-hitters`` | slots with the most attention so far | H2O, arXiv:2306.14048 |
| ``full.py`` | ``full`` | never compacts | - |

``attention_matching.py`` is the compactor and ``uniform.py`` the budgets that ``am-halving`` composes;
``solvers/`` holds the mathematics: pure tensor functions without a cache or a model.
"""
