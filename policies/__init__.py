"""The catalogue: one method a file, named as the field names it, with one paper each.

| file | policy | method | paper |
| --- | --- | --- | --- |
| ``am_halving.py`` | ``am-halving`` | Attention Matching, equal slots per head | arXiv:2602.16284 |
| ``am_calibrated.py`` | ``am-calibrated`` | the same, head budgets by the model's table | arXiv:2602.16284 |
| ``am_pursuit.py`` | ``am-pursuit`` | slots chosen by matching pursuit, head budgets by the table | arXiv:2602.16284 |
| ``am_recall.py`` | ``am-recall`` | the same, importance carried, probe of the whole text | arXiv:2602.16284 |
| ``window.py`` | ``window`` | prefix and most recent slots | StreamingLLM, arXiv:2309.17453 |
| ``heavy_hitters.py`` | ``heavy-hitters`` | slots with the most attention so far | H2O, arXiv:2306.14048 |
| ``snapkv.py`` | ``snapkv`` | what the newest tokens attend to, with neighbours | SnapKV, arXiv:2404.14469 |
| ``tova.py`` | ``tova`` | what the newest token attends to | TOVA, arXiv:2401.06104 |
| ``keydiff.py`` | ``keydiff`` | keys least like the mean key | KeyDiff, arXiv:2504.15364 |
| ``key_norm.py`` | ``key-norm`` | shortest keys | arXiv:2406.11430 |
| ``r_kv.py`` | ``r-kv`` | attended, less what repeats | R-KV, arXiv:2505.24133 |
| ``g_kv.py`` | ``g-kv`` | the same with carried scores | G-KV, arXiv:2512.00504 |
| ``head_roles.py`` | ``head-roles`` | heterogeneous heads keep all | Task-KV, arXiv:2501.15113 |
| ``random_subset.py`` | ``random-subset`` | by lot | arXiv:2609.03430 |
| ``merge.py`` | ``merge`` | similar slots become one | D2O, arXiv:2406.13035 |
| ``full.py`` | ``full`` | never compacts | - |

Policies are composed of parts. ``compactors/``: Attention Matching, eviction, and the selectors of slots (highest
attention, pursuit, random). ``budgets/``, by the names in its ``registry.py``:

| file | budgets | slots of a head | paper |
| --- | --- | --- | --- |
| ``uniform.py`` | ``uniform`` | equal | - |
| ``global_budgets.py`` | ``global`` | its scores among the highest of all heads and layers | Ada-KV, arXiv:2407.11550 |
| ``calibrated.py`` | ``calibrated`` | the model's table of shares | arXiv:2602.16284 |
| ``sensitivity.py`` | ``sensitivity`` | by the model's curves of loss against slots | arXiv:2602.16284 |
| ``pyramid.py`` | ``pyramid`` | fewer in higher layers | PyramidKV, arXiv:2406.02069 |
| ``adaptive.py`` | ``adaptive`` | as many as an error target needs | - |

``solvers/`` holds the mathematics: pure tensor functions without a cache or a model.
"""
