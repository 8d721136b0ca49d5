"""Tasks under a cap, on inspect_ai: what compaction costs an agent, beside what it costs a distribution.

| file | what |
| --- | --- |
| ``provider.py`` | ``agentmem/MODEL``: a model in this process whose KV memory is capped |
| ``generation.py`` | replies, forced answers and shared contexts under a cap |
| ``many_shot.py`` | in-context classification whose examples outgrow the cap |
| ``instructions.py`` | a rule given at the start |
| ``needle.py`` | facts planted in real text |
| ``qa.py`` | questions about a long document |
| ``maths.py`` | word problems behind long examples |
| ``aime.py`` | competition problems, thought about in a capped memory |
| ``records.py``, ``replies.py`` | data files; what tasks share |
| ``registry.py`` | what inspect_ai finds by the entry point |

It needs the extra ``eval``.
"""
