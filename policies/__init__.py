"""The catalogue of policies: each file holds one method under its name in the literature, and cites its paper.

| file | policy | method | paper |
| --- | --- | --- | --- |
| ``am_halving.py`` | ``am-halving`` | Attention Matching, equal slots per head | arXiv:2602.16284 |
| ``am_calibrated.py`` | ``am-calibrated`` | Attention Matching, slots per head by a table | arXiv:2602.16284 |
| ``am_pursuit.py`` | ``am-pursuit`` | am-calibrated with slots chosen by matching pursuit | arXiv:2602.16284 |
| ``am_recall.py`` | ``am-recall`` | am-calibrated for recall: spans of the whole text are probed | arXiv:2602.16284 |
| ``window.py`` | ``window`` | prefix and most recent slots | StreamingLLM, arXiv:2309.17453 |
| ``heavy_hitters.py`` | ``heavy-hitters`` | slots with the most attention so far | H2O, arXiv:2306.14048 |
| ``snapkv.py`` | ``snapkv`` | slots that the newest tokens attend to, with neighbours | SnapKV, arXiv:2404.14469 |
| ``tova.py`` | ``tova`` | slots that the newest token attends to | TOVA, arXiv:2401.06104 |
| ``keydiff.py`` | ``keydiff`` | slots with the keys least like the mean key | KeyDiff, arXiv:2504.15364 |
| ``key_norm.py`` | ``key-norm`` | slots with the shortest keys | arXiv:2406.11430 |
| ``r_kv.py`` | ``r-kv`` | attended slots, except those whose keys resemble other keys | R-KV, arXiv:2505.24133 |
| ``g_kv.py`` | ``g-kv`` | r-kv with attention scores kept from one compaction to the next | G-KV, arXiv:2512.00504 |
| ``head_roles.py`` | ``head-roles`` | heads unlike the rest of their layer keep all slots | Task-KV, arXiv:2501.15113 |
| ``random_subset.py`` | ``random-subset`` | random slots | arXiv:2609.03430 |
| ``merge.py`` | ``merge`` | similar slots are merged into one | D2O, arXiv:2406.13035 |
| ``summary.py`` | ``summary`` | a summary by the model replaces the old text | - |
| ``summary_am.py`` | ``summary-am`` | as ``summary``, then Attention Matching of the summary | arXiv:2602.16284 |
| ``full.py`` | ``full`` | never compacts | - |

Policies are composed of parts. ``compactors/`` holds Attention Matching, eviction, and the selectors of slots (highest
attention, pursuit, random). ``budgets/`` holds the head budgets, which decide how many slots each head keeps.
``agentmem calibrate`` measures how many slots the heads of a model need, and writes a table of them:

| file | budgets | how many slots a head gets | paper |
| --- | --- | --- | --- |
| ``uniform.py`` | ``uniform`` | the same number as every other head | - |
| ``global_budgets.py`` | ``global`` | number of its slots with top scores among all heads | Ada-KV, arXiv:2407.11550 |
| ``calibrated.py`` | ``calibrated`` | its share in the model's table | arXiv:2602.16284 |
| ``sensitivity.py`` | ``sensitivity`` | as many as minimise the loss that the table predicts | arXiv:2602.16284 |
| ``pyramid.py`` | ``pyramid`` | fewer in higher layers | PyramidKV, arXiv:2406.02069 |
| ``adaptive.py`` | ``adaptive`` | as many as an error target needs | - |

``solvers/`` holds the mathematics, as pure tensor functions without a cache or a model.
"""
