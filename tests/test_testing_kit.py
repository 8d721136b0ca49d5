"""The shipped kit finds every broken invariant, measures peaks exactly and makes tiny models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from agentmem import testing
from agentmem.compaction.checks import validate
from agentmem.contracts import (
    BudgetRequest,
    Budgets,
    Compaction,
    Compactor,
    HeadCompaction,
    Policy,
    Queries,
    Segment,
    SegmentShape,
    Survey,
)
from agentmem.errors import PolicyContractBroken, SettingsRefused
from agentmem.testing import Case, Family, check_policy, make_segment, peak_allocated, tiny_model

CASE = Case("small", held=(6, 9), slots=(3, 4), queries=4)
SMALL = (CASE,)


class Newest(Compactor):
    """Keeps the newest slots; ``spoil`` is what a broken policy does besides."""

    def __init__(self, spoil: Callable[[Segment, list[HeadCompaction]], object] | None = None) -> None:
        self.spoil = spoil

    def workspace(self, shape: SegmentShape) -> int:
        """Enough."""
        return 1 << 16

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """The last slots, then the spoiling."""
        pairs = zip(segment.heads, slots, strict=True)
        heads = [HeadCompaction(torch.arange(head.slots - count, head.slots)) for head, count in pairs]
        if self.spoil is not None:
            self.spoil(segment, heads)
        return Compaction(tuple(heads))


class Equal(Budgets):
    """Allocates what it is told to, or the whole to the heads in order."""

    def __init__(self, allocated: tuple[tuple[int, ...], ...] | None = None) -> None:
        self.allocated = allocated

    def allocate(self, request: BudgetRequest) -> tuple[tuple[int, ...], ...]:
        """In order."""
        if self.allocated is not None:
            return self.allocated
        left, rows = request.total, []
        for row in request.held:
            shares = []
            for held in row:
                shares.append(min(held, left))
                left -= shares[-1]
            rows.append(tuple(shares))
        return tuple(rows)


def policy(compactor: Compactor | None = None, budgets: Budgets | None = None) -> Policy:
    """A policy of these parts, correct where none is given."""
    return Policy("mine", "-", "-", compactor or Newest(), budgets or Equal(), Queries.of("replay"))


def laws_broken(checked: Policy) -> set[str]:
    """The invariants that the kit found broken."""
    return {result.invariant for result in check_policy(checked, shapes=SMALL).broken}


CALLS = iter(range(10**6))


@pytest.mark.parametrize(
    ("invariant", "spoil"),
    [
        ("compact() ends", lambda segment, heads: 1 / 0),
        ("the contract of every commit", lambda segment, heads: heads.pop()),
        ("the contract of every commit", lambda segment, heads: heads.__setitem__(0, HeadCompaction(torch.arange(2)))),
        ("the segment is not written", lambda segment, heads: segment.heads[1].values.add_(1)),
        ("the segment is not written", lambda segment, heads: segment.references[0].queries.zero_()),
        ("only the segment's generator is used", lambda segment, heads: torch.rand(1)),
        (
            "the same segment gives the same result",
            lambda segment, heads: heads.__setitem__(0, replace(heads[0], bias=torch.full((3,), float(next(CALLS))))),
        ),
        (
            "permuting the KV heads permutes the result",
            lambda segment, heads: heads.__setitem__(0, replace(heads[0], bias=torch.ones(len(heads[0].kept)))),
        ),
        ("what is allocated stays within workspace()", lambda segment, heads: torch.empty(1 << 17)),
    ],
)
def test_every_broken_law_of_a_compactor_is_found(invariant: str, spoil: Callable[..., object]) -> None:
    """A policy that breaks one invariant is told which."""
    assert invariant in laws_broken(policy(Newest(spoil)))


def test_a_correct_policy_holds_every_law() -> None:
    """The verdict is empty and its text says so."""
    check = check_policy(policy(), shapes=SMALL)

    assert check.broken == ()
    check.raise_if_broken()
    assert "held: what is allocated stays within workspace() (1 cases)" in str(check)


def test_a_bad_survey_is_found() -> None:
    """A survey that scores too few slots breaks its invariant."""

    class Surveying(Newest):
        def survey(self, segment: Segment) -> Survey:
            return Survey(segment.layer, (torch.zeros(1),))

    assert laws_broken(policy(Surveying())) == {"a survey scores every slot"}


@pytest.mark.parametrize(
    ("allocated", "value"),
    [
        (((100,),), "lies outside 0..held"),
        (((12,), (1,)), "have not the shape"),
        (((1,),), "sum to 1 slots instead of"),
    ],
)
def test_every_broken_law_of_budgets_is_found(allocated: tuple[tuple[int, ...], ...], value: str) -> None:
    """Budgets that allocate too much, to heads that do not exist, or another sum are told so."""
    broken = check_policy(policy(budgets=Equal(allocated)), shapes=SMALL).broken

    assert {result.invariant for result in broken} == {"the invariants of every allocation"}
    assert any(value in (result.broken or "") for result in broken)


def test_the_verdict_names_policy_law_case_and_value() -> None:
    """raise_if_broken() carries the whole text."""
    broken = Newest(lambda segment, heads: heads.__setitem__(1, HeadCompaction(torch.arange(3))))

    with pytest.raises(PolicyContractBroken, match=r"(?s)policy 'mine'.*small: .*head 1: .*exactly 4 slots.*got \[3\]"):
        check_policy(policy(broken), shapes=SMALL).raise_if_broken()


def test_a_policy_that_never_compacts_has_nothing_to_check() -> None:
    """The kit says so instead of passing silently, and makes no segment for it."""
    check = check_policy("full")

    assert check.results == ()
    assert "never compacts" in str(check)
    with pytest.raises(SettingsRefused, match="'full' never compacts"):
        make_segment(CASE, Policy("full", "-", "-", None))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (HeadCompaction(torch.arange(3, dtype=torch.int32)), "kept is int64, got torch.int32"),
        (HeadCompaction(torch.arange(4)), r"exactly 3 slots are kept, got \[4\]"),
        (HeadCompaction(torch.tensor([2, 1, 3])), "kept is strictly ascending"),
        (HeadCompaction(torch.tensor([1, 1, 3])), "kept is strictly ascending"),
        (HeadCompaction(torch.tensor([3, 5, 6])), "kept lies in 0 … 5, got 3 … 6"),
        (HeadCompaction(torch.tensor([-1, 2, 3])), "kept lies in 0 … 5, got -1 … 3"),
        (HeadCompaction(torch.arange(3), bias=torch.zeros(2)), r"bias is \[3\], got \[2\]"),
        (HeadCompaction(torch.arange(3), bias=torch.zeros(3).double()), "bias is float32, got torch.float64"),
        (HeadCompaction(torch.arange(3), values=torch.zeros(3, 16).half()), "values is float32, got torch.float16"),
        (HeadCompaction(torch.arange(3), keys=torch.zeros(3, 4)), r"keys is \[3, 16\], got \[3, 4\]"),
        (HeadCompaction(torch.arange(3), bias=torch.tensor([0, float("nan"), 0])), "bias is finite, got from nan"),
        (HeadCompaction(torch.arange(3), keys=torch.full((3, 16), float("inf"))), "keys is finite, got from inf"),
    ],
)
def test_what_must_not_be_committed_is_refused_by_name(head: HeadCompaction, message: str) -> None:
    """The error names policy, layer, head, invariant and value."""
    segment = make_segment(CASE, policy())
    compaction = Compaction((head, HeadCompaction(torch.arange(4))))

    with pytest.raises(PolicyContractBroken, match=f"policy 'mine', layer 0, head 0: the contract says that {message}"):
        validate(compaction, segment, CASE.slots, policy="mine")


def test_validation_itself_allocates_next_to_nothing() -> None:
    """At most one byte per kept slot: it runs while the memory is full."""
    made = policy()
    case = Case("wide", held=(600,), slots=(500,), key_dim=64, value_dim=64)
    segment = make_segment(case, made)
    head = HeadCompaction(torch.arange(500), torch.zeros(500), torch.zeros(500, 64), torch.zeros(500, 64))

    peak = peak_allocated(lambda: validate(Compaction((head,)), segment, case.slots, policy="mine"))

    assert peak <= 500 + 64


def test_peaks_are_exact() -> None:
    """Temporaries count while they live: 4,000 + 2,000 bytes, though 2,400 remain."""

    def call() -> list[torch.Tensor]:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return [second, torch.empty(100)]

    assert peak_allocated(call) == 6000
    assert peak_allocated(lambda: None) == 0


def test_what_was_there_before_does_not_lower_a_peak() -> None:
    """A block that an earlier measurement saw being born, freed in this one, hides nothing of what this one needs."""
    before: list[torch.Tensor] = []
    assert peak_allocated(lambda: before.append(torch.empty(1000))) == 4000

    def call() -> torch.Tensor:
        before.clear()
        return torch.empty(500)

    assert peak_allocated(call) == 2000


def test_a_clock_that_goes_back_does_not_change_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clocks of two cores can differ: two blocks that never lived together are not summed."""
    recorded = testing._allocations

    def disordered(events: Sequence[Any]) -> Iterator[testing._Allocation]:
        found = list(recorded(events))
        return (event._replace(time=event.time - 10**9 * (event.size == 2000)) for event in found)

    monkeypatch.setattr(testing, "_allocations", disordered)

    def call() -> None:
        torch.empty(1000)
        torch.empty(500)

    assert peak_allocated(call) == 4000


@pytest.mark.parametrize("family", get_args(Family))
def test_tiny_models_of_every_family_run_and_are_seeded(family: Family) -> None:
    """The same seed gives the same logits, another seed others, and the global random state stays."""
    ids = torch.arange(3, 15)[None]
    state = torch.get_rng_state()
    with torch.inference_mode():
        first, again, other = (tiny_model(family, seed=seed)(ids).logits for seed in (1, 1, 2))

    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert first.std() > 0.1


def test_tiny_models_take_configuration_fields() -> None:
    """Layers, windows and dtypes are the caller's."""
    model = tiny_model(
        "gemma3_text", num_hidden_layers=3, layer_types=["full_attention"] * 3, sliding_window=8, dtype=torch.bfloat16
    )

    assert model.config.layer_types == ["full_attention"] * 3
    assert model.config.sliding_window == 8
    assert model.dtype == torch.bfloat16
