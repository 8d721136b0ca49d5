"""Summary + AM: the model summarises the segment in words, and Attention Matching compacts the summary's slots.

Source: arXiv:2602.16284. In the paper, the summary is written, prefilled and compacted before generation begins. Here
these three steps happen during generation: the model writes the summary into slots reserved for it, and the summary
then replaces the segment. If the summary is empty, repetitive or otherwise unusable, Attention Matching compacts the
segment itself, and the report records this.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agentmem.contracts import Policy, Rewrite
from agentmem.policies.am_halving import also_takes, am_halving


@also_takes(am_halving)
def summary_am(
    *,
    instruction: str = Rewrite.instruction,
    lead: str = Rewrite.lead,
    summary_tokens: int | None = None,
    keep: float = 0.5,
    **options: Any,
) -> Policy:
    """Make a policy that replaces the segment by a summary, and then compacts the slots of the summary.

    ``instruction`` is the text that asks the model for the summary. ``lead`` is the text that precedes the summary in
    the memory. The summary has at most ``summary_tokens`` tokens (``None``: the plan chooses this number). Attention
    Matching then keeps the fraction ``keep`` of the summary's slots. ``options`` set Attention Matching; they are the
    options of :func:`agentmem.policies.am_halving.am_halving`.

    Raises:
        ValueError: an option's value is unknown or out of range.

    """
    return replace(
        am_halving(**options),
        name="summary-am",
        summary="a summary in the model's own words, its slots compacted by Attention Matching",
        rewrite=Rewrite(instruction, lead, summary_tokens, keep),
    )
