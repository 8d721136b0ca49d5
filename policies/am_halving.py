"""AM halving: each time the memory fills, Attention Matching halves it, with equally many slots for every head.

Source: arXiv:2602.16284, the online experiment on AIME (uniform budgets, highest attention). The memory's ``target``
sets how much of the memory a compaction leaves; the default is half. Every part of the policy is an option, so that an
ablation can change one part alone. The other ``am_*`` files are presets: this policy with other default options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from agentmem.contracts import Policy, PolicyFactory, Queries
from agentmem.policies.budgets.registry import by_name
from agentmem.policies.compactors.attention_matching import AttentionMatching, Mass, Values
from agentmem.policies.compactors.selectors import selector as selector_named
from agentmem.policies.solvers.selection import Score

Made = TypeVar("Made", bound=Callable[..., Policy])


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
    """Make a policy of Attention Matching; the options set its reference queries, head budgets, selector and fits.

    Attention Matching keeps some slots, and fits their β and values so that attention over them resembles attention
    over all slots. The memory's setting ``target`` says how much each compaction leaves. The default is half of the
    memory, so the policy is called halving.

    ``probe`` names the sources of reference queries, such as ``"replay+spread"``; :meth:`Queries.of` parses it.
    ``probe_tokens`` is the number of reference tokens (``None``: the plan chooses). ``focus`` is a text that must stay
    recallable. The queries of its tokens become reference queries if ``probe`` names the source ``focus``. ``pattern``
    is a regular expression; the queries of tokens that match it weigh ``pattern_weight`` times as much. ``budgets`` is
    a name or spec, such as ``"calibrated[floor=0.5]"``, that :func:`agentmem.policies.budgets.registry.by_name` parses.
    ``selector`` is a name in :data:`agentmem.policies.compactors.selectors.SELECTORS`. The other options are fields of
    :class:`AttentionMatching`.

    Raises:
        ValueError: an option's value is unknown or out of range.

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
    """Return a factory for the policy ``name``: :func:`am_halving` with ``defaults`` as its default options.

    ``summary`` is the policy's one-line description.
    """
    composed = partial(am_halving, **defaults)

    def factory(**options: Any) -> Policy:
        return replace(composed(**options), name=name, summary=summary)

    factory.__signature__ = inspect.signature(composed, eval_str=True)  # type: ignore[attr-defined]  # what callers may give
    return factory


def also_takes(other: PolicyFactory, *, without: tuple[str, ...] = ()) -> Callable[[Made], Made]:
    """Return a decorator for a factory that hands its ``**options`` on to another; its signature then names all."""

    def named(factory: Made) -> Made:
        own = inspect.signature(factory, eval_str=True)
        mine = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
        theirs = inspect.signature(other, eval_str=True).parameters
        names = {each.name for each in mine} | set(without)
        handed_on = [each for name, each in theirs.items() if name not in names]
        factory.__signature__ = own.replace(parameters=[*mine, *handed_on])  # type: ignore[attr-defined]  # the same
        return factory

    return named
