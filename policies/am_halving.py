"""AM halving: each time the memory fills, Attention Matching halves it with equal slots per head.

Source: arXiv:2602.16284, the online experiment on AIME (uniform budgets, highest attention). How much a compaction
leaves is the memory's ``target``; half is its default.
"""

from __future__ import annotations

from typing import Literal, get_args

from agentmem.contracts import Policy, Queries
from agentmem.policies.attention_matching import AttentionMatching
from agentmem.policies.solvers.selection import Score
from agentmem.policies.uniform import Uniform

Probe = Literal["replay", "repeat", "live"]


def am_halving(
    *,
    probe: Probe = "replay",
    probe_tokens: int | None = None,
    score: Score = AttentionMatching.score,
    ridge_mass: float = AttentionMatching.ridge_mass,
    ridge_values: float = AttentionMatching.ridge_values,
    beta_bound: float = AttentionMatching.beta_bound,
    steps: int = AttentionMatching.steps,
) -> Policy:
    """Attention Matching with uniform budgets; the fit's options are those of :class:`AttentionMatching`.

    ``probe`` says where reference queries come from and ``probe_tokens`` how many; ``None`` lets the plan choose.

    Raises:
        ValueError: an option's value cannot work.

    """
    if probe not in get_args(Probe):
        raise ValueError(f"probe: {probe!r} is unknown; choose one of {', '.join(get_args(Probe))}")
    if probe_tokens is not None and probe_tokens < 1:
        raise ValueError(f"probe_tokens: {probe_tokens} is too few; give at least 1, or None to let the plan choose")
    return Policy(
        name="am-halving",
        summary="Attention Matching on the most attended keys, equal slots per head",
        source="arXiv:2602.16284",
        compactor=AttentionMatching(score, ridge_mass, ridge_values, beta_bound, steps),
        budgets=Uniform(),
        queries=Queries(source=probe, tokens=probe_tokens),
    )
