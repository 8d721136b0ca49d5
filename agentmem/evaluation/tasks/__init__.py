"""Define tasks for inspect_ai whose questions a model answers with a capped memory.

The scores show how much compaction impairs the answers. A *shared context* is a text that is read once for several
questions.

| file | contents |
| --- | --- |
| ``provider.py`` | ``agentmem/MODEL``: a model in this process whose KV memory is capped |
| ``generation.py`` | generating replies, forced answers, and answers about shared contexts |
| ``many_shot.py`` | in-context classification whose examples do not fit under the cap |
| ``instructions.py`` | a rule given at the start of a long text |
| ``needle.py`` | facts planted in real text |
| ``qa.py`` | questions about a long document |
| ``maths.py`` | word problems after long examples |
| ``aime.py`` | competition problems, with long reasoning in a capped memory |
| ``records.py``, ``replies.py`` | reading data files, and functions that several tasks use |
| ``run.py``, ``attempt.py`` | running a task on a loaded model, and its results |
| ``registry.py`` | the entry point by which inspect_ai finds the provider and the tasks |

This subpackage needs the optional dependencies ``eval``.
"""
