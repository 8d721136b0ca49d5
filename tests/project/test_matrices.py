"""Few combinations of parameters stand for all: no two values that are never together, and all on request."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from support import matrices

VALUES = {"letter": ["a", "b", "c"], "number": [1, 2, 3, 4], "flag": [False, True], "one": [None]}


def made(mark: pytest.MarkDecorator) -> list[tuple[object, ...]]:
    """The combinations of a parametrisation."""
    return list(mark.args[1])


@pytest.mark.parametrize("names", [("letter",), ("letter", "flag"), tuple(VALUES)])
def test_each_two_values_are_together_once_at_least(names: tuple[str, ...]) -> None:
    """In fewer combinations than there are, which are always the same."""
    values = {name: VALUES[name] for name in names}
    found = made(matrices.matrix(**values))

    for one, other in combinations(range(len(names)), 2):
        pairs = {(each[one], each[other]) for each in found}
        assert pairs == set(product(values[names[one]], values[names[other]]))
    assert {each[0] for each in found} == set(VALUES["letter"])
    assert found == made(matrices.matrix(**values))
    assert len(names) < 3 or len(found) < len(list(product(*values.values())))


def test_values_in_turn_are_each_there_in_the_fewest_combinations() -> None:
    """As many as the longest list has values."""
    found = made(matrices.in_turn(**VALUES))

    assert len(found) == 4
    assert [set(each) for each in zip(*found, strict=True)] == [set(each) for each in VALUES.values()]


@pytest.mark.parametrize("how", [matrices.matrix, matrices.in_turn])
def test_all_combinations_come_on_request(how: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--exhaustive`` takes none away."""
    monkeypatch.setattr(matrices, "whole", True)

    assert set(made(how(**VALUES))) == set(product(*VALUES.values()))  # type: ignore[operator]  # one of two functions
