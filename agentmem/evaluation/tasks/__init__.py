"""Run tasks on inspect_ai under a cap, to measure what compaction loses in the answers of a model.

| file | what |
| --- | --- |
| ``provider.py`` | ``agentmem/MODEL``: a model in this process whose KV memory is capped |
| ``generation.py`` | the generation of replies, forced answers and answers about shared contexts |
| ``many_shot.py`` | in-context classification whose examples do not fit under the cap |
| ``instructions.py`` | a rule given at the start of a long text |
| ``needle.py`` | facts planted in real text |
| ``qa.py`` | questions about a long document |
| ``maths.py`` | word problems after long examples |
| ``aime.py`` | competition problems, with long reasoning in a capped memory |
| ``records.py``, ``replies.py`` | the reading of data files, and parts that tasks share |
| ``run.py``, ``attempt.py`` | running a task on a loaded model, and its results |
| ``registry.py`` | the provider and tasks that inspect_ai finds by the entry point |

The package needs the extra ``eval``.
"""
