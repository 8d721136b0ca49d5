"""AM halving: each time the memory fills, Attention Matching halves it with equal slots per head.

Source: arXiv:2602.16284, the online experiment on AIME (uniform budgets, highest attention). How much a compaction
leaves is the memory's ``target``; half is its default. Every part of the composition is an option, so that an ablation
changes one thing: the presets beside this file are this one with other defaults.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

from agentmem.contracts import Policy, PolicyFactory, Queries
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.attention_matching import AttentionMatching, Mass, Values
from agentmem.policies.compactors.selectors import selector as selector_named
from agentmem.policies.solvers.selection import Score


def am_halving(
    *,
    probe: str = "replay",
    probe_tokens: int | None = None,
    focus: str = "",
    pattern: str = "",
    pattern_weight: float = 4.0,
    budgets: str = "uniform",
    selector: str = "highest",
    score: Score = AttentionMatching.score,
    mass: Mass = AttentionMatching.mass,
    values: Values = AttentionMatching.values,
    refine: int = AttentionMatching.refine,
    carry: float = AttentionMatching.carry,
    ridge_mass: float = AttentionMatching.ridge_mass,
    ridge_values: float = AttentionMatching.ridge_values,
    beta_bound: float = AttentionMatching.beta_bound,
    steps: int = AttentionMatching.steps,
) -> Policy:
    """Attention Matching, composed of queries (``probe``), ``budgets``, a ``selector`` and fits.

    ``probe`` is a mixture as :meth:`Queries.of` reads it, ``probe_tokens`` how many tokens (``None``: the plan
    chooses), ``focus`` the text of a ``focus`` part, ``pattern`` a regular expression for what must not be lost.
    ``budgets`` is read by :func:`agentmem.policies.budgets.registry.by_name`, options as in
    ``"calibrated[floor=0.5]"``; the rest are the options of :class:`AttentionMatching`.

    Raises:
        ValueError: an option's value cannot work.

    """
    return Policy(
        name="am-halving",
        summary="Attention Matching on the most attended keys, equal slots per head",
        source="arXiv:2602.16284",
        compactor=AttentionMatching(
            selector=selector_named(selector),
            score=score,
            mass=mass,
            values=values,
            refine=refine,
            carry=carry,
            ridge_mass=ridge_mass,
            ridge_values=ridge_values,
            beta_bound=beta_bound,
            steps=steps,
        ),
        budgets=by_name(budgets),
        queries=replace(Queries.of(probe, probe_tokens, focus=focus), pattern=pattern, pattern_weight=pattern_weight),
    )


def preset(name: str, summary: str, **defaults: Any) -> PolicyFactory:
    """A factory with the options of :func:`am_halving`, some of them with other defaults, under a name of its own."""
    composed = partial(am_halving, **defaults)

    def factory(**options: Any) -> Policy:
        return replace(composed(**options), name=name, summary=summary)

    factory.__signature__ = inspect.signature(composed)  # type: ignore[attr-defined]  # what callers may give
    return factory
