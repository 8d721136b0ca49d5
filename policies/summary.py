"""Summary: the model summarises the segment in words, and all slots of the summary replace the slots of the segment.

Source: agent frameworks replace old text by a summary of this text. Here the memory replaces slots instead of text. The
slots of the summary are not compacted. If a summary is unusable, Attention Matching compacts the segment instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agentmem.contracts import Policy, Rewrite
from agentmem.policies.am_halving import also_takes
from agentmem.policies.summary_am import summary_am


@also_takes(summary_am, without=("keep",))
def summary(
    *,
    instruction: str = Rewrite.instruction,
    lead: str = Rewrite.lead,
    summary_tokens: int | None = None,
    **options: Any,
) -> Policy:
    """Make a policy that replaces the segment by a summary and keeps all slots of the summary.

    The options are those of :func:`agentmem.policies.summary_am.summary_am`, except ``keep``.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    return replace(
        summary_am(instruction=instruction, lead=lead, summary_tokens=summary_tokens, keep=1.0, **options),
        name="summary",
        summary="a summary in the model's own words in place of the segment",
    )
