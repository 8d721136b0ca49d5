"""Parameters of a test: each value with each value of every other parameter, or all combinations with ``--exhaustive``.

A fault that shows for one value, or for two together, shows in either. The rest is evidence: ``make test-all``.
A parameter whose values can be wrong only by themselves is taken :func:`in_turn`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

EXHAUSTIVE = "--exhaustive"
whole = False
"""Whether all combinations are made; set by ``tests/conftest.py`` before tests are collected."""


def matrix(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """A parametrisation by these names: each value with each of every other."""
    return _parametrised(values, pairwise(list(values.values())))


def in_turn(**values: Sequence[Any]) -> pytest.MarkDecorator:
    """A parametrisation by these names: each value once at least."""
    rounds = range(max(map(len, values.values())))
    return _parametrised(values, [tuple(each[at % len(each)] for each in values.values()) for at in rounds])


def _parametrised(values: Mapping[str, Sequence[Any]], few: Sequence[tuple[Any, ...]]) -> pytest.MarkDecorator:
    made = list(product(*values.values())) if whole else few
    return pytest.mark.parametrize(tuple(values), made, ids=["-".join(map(_named, each)) for each in made])


def _named(value: Any) -> str:
    return str(getattr(value, "name", value))


def pairwise(values: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Few combinations in which each value stands beside each value of every other parameter; always the same ones."""
    places = list(product(*(range(len(each)) for each in values)))
    missing = set[object]().union(*map(_pairs, places))
    chosen = []
    while missing:
        best = max(places, key=lambda each: len(_pairs(each) & missing))
        missing -= _pairs(best)
        chosen.append(tuple(each[at] for each, at in zip(values, best, strict=True)))
    return chosen


def _pairs(places: tuple[int, ...]) -> set[object]:
    """The pairs of values of one combination, or its values where there is but one parameter."""
    return set(combinations(enumerate(places), min(2, len(places))))
