"""Summary + AM: the model summarises the segment in words, and Attention Matching compacts the summary's slots.

Source: arXiv:2602.16284 (summarise, prefill the summary, compact that: offline there). Online, the summary is written
in slots that stay free for it and takes the segment's place in mid-memory; where it is empty or runs away, matching
compacts the segment itself and the report says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agentmem.contracts import Policy, Rewrite
from agentmem.policies.am_halving import am_halving


def summary_am(
    *,
    instruction: str = Rewrite.instruction,
    lead: str = Rewrite.lead,
    summary_tokens: int | None = None,
    keep: float = 0.5,
    **options: Any,
) -> Policy:
    """A summary of at most ``summary_tokens`` (``None``: the plan chooses), of whose slots matching leaves ``keep``.

    ``instruction`` asks for it and ``lead`` stands before it; ``options`` are those of
    :func:`agentmem.policies.am_halving.am_halving`, for matching.

    Raises:
        ValueError: an option's value cannot work.

    """
    return replace(
        am_halving(**options),
        name="summary-am",
        summary="a summary in the model's own words, its slots compacted by Attention Matching",
        rewrite=Rewrite(instruction, lead, summary_tokens, keep),
    )
