"""Summary: the model summarises the segment in words, and the summary's slots replace the segment's, unchanged.

Source: text compaction as agent frameworks do it, here inside the memory. If a summary is unusable, Attention Matching
compacts the segment instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agentmem.contracts import Policy, Rewrite
from agentmem.policies.summary_am import summary_am


def summary(
    *,
    instruction: str = Rewrite.instruction,
    lead: str = Rewrite.lead,
    summary_tokens: int | None = None,
    **options: Any,
) -> Policy:
    """Replace the segment by a summary of at most ``summary_tokens`` (``None``: the plan chooses); keep all its slots.

    The options are those of :func:`agentmem.policies.summary_am.summary_am`.

    Raises:
        ValueError: an option's value cannot work.

    """
    return replace(
        summary_am(instruction=instruction, lead=lead, summary_tokens=summary_tokens, keep=1.0, **options),
        name="summary",
        summary="a summary in the model's own words in place of the segment",
    )
