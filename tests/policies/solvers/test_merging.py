"""Merging similar slots against an oracle in plain loops, and what it keeps exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from agentmem.policies.solvers.merging import Merged, Rest, merge, merging_bytes
from agentmem.policies.solvers.solution import Solution
from agentmem.testing import peak_allocated
from oracles import matching
from oracles import pursuit as oracle


@dataclass(frozen=True)
class Problem:
    """Slots with their importance."""

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor
    importance: torch.Tensor

    def merge(self, count: int, **options: object) -> Solution[Merged]:
        """With options by name."""
        return merge(self.keys, self.values, self.bias, self.importance, count, **options)  # type: ignore[arg-type]  # options by name


def problem(name: str = "well posed", slots: int = 16) -> Problem:
    """A named problem: ``slots`` of width 4."""
    generator = torch.Generator().manual_seed(41)
    keys, values = torch.randn(slots, 4, generator=generator), torch.randn(slots, 3, generator=generator)
    bias, importance = torch.randn(slots, generator=generator), torch.rand(slots, generator=generator)
    if name == "clusters":
        keys = keys[: slots // 4].repeat(4, 1) + 0.2 * keys
    if name == "equal importance":
        importance = torch.ones(slots)
    if name == "a zero key":
        keys[3] = 0
    if name == "huge keys":
        keys *= 1e15
    return Problem(keys, values, bias, importance)


PROBLEMS = ("well posed", "clusters", "equal importance", "huge keys")


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [1, 5, 12])
@pytest.mark.parametrize("rows", [1, 5, 128])
def test_merging_is_that_of_the_plain_loops(name: str, threshold: float, count: int, rows: int) -> None:
    """Who stays, their β and their values are the oracle's: the most similar pairs first, then the least important."""
    given = problem(name)
    found = given.merge(count, threshold=threshold, rows=rows)
    joined, stay = oracle.merge(given.keys.double().tolist(), given.importance.tolist(), count, threshold)

    assert found.value.kept.tolist() == stay
    assert (found.stats["merged"], found.stats["evicted"]) == (len(joined), 16 - len(stay) - len(joined))
    for place, slot in enumerate(stay):
        group = [slot, *(member for member, lead in joined.items() if lead == slot)]
        log_weight, mean = oracle.pooled(group, given.bias.double().tolist(), given.values.double().tolist())
        assert float(found.value.bias[place]) == pytest.approx(log_weight, abs=1e-5)
        torch.testing.assert_close(found.value.values[place], torch.tensor(mean), atol=1e-5, rtol=0)


def test_slots_with_equal_keys_merge_without_loss() -> None:
    """Where every group has one key, each query's mass and output over the merged slots are those over all."""
    generator = torch.Generator().manual_seed(2)
    kinds = torch.randn(5, 4, generator=generator)
    given = problem(slots=20)
    given = Problem(kinds[torch.arange(20) % 5], given.values, given.bias * 2, given.importance)
    found = given.merge(5, threshold=0.999)
    queries = torch.randn(7, 4, generator=generator).tolist()
    whole = (given.keys.tolist(), given.bias.tolist())
    merged = (given.keys[found.value.kept].tolist(), found.value.bias.double().tolist())

    assert found.stats["evicted"] == 0
    assert found.stats["merged"] == 15
    assert matching.log_mass(queries, *merged, 0.5) == pytest.approx(matching.log_mass(queries, *whole, 0.5), abs=1e-5)
    torch.testing.assert_close(
        torch.tensor(matching.output(queries, *merged, found.value.values.tolist(), 0.5)),
        torch.tensor(matching.output(queries, *whole, given.values.tolist(), 0.5)),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("name", [*PROBLEMS, "a zero key"])
@pytest.mark.parametrize("rest", ["evict", "nearest"])
@pytest.mark.parametrize("count", [0, 1, 7, 16, 30])
def test_exactly_count_slots_stay(name: str, rest: str, count: int) -> None:
    """min(count, T) ascending slots with finite β and values; what left is merged or evicted."""
    found = problem(name).merge(count, threshold=0.8, rest=rest)
    kept = found.value.kept.tolist()

    assert kept == sorted(set(kept))
    assert len(kept) == min(count, 16)
    assert len(kept) + found.stats["merged"] + found.stats["evicted"] == 16
    assert bool(found.value.bias.isfinite().all())
    assert bool(found.value.values.isfinite().all())


def test_nothing_to_do_changes_nothing() -> None:
    """With room for all slots, β and values are bit for bit what they were, or to rounding of one weight."""
    given = problem("clusters")
    found = given.merge(16, threshold=0.1)

    assert found.stats["merged"] == found.stats["evicted"] == 0
    torch.testing.assert_close(found.value.bias, given.bias)
    torch.testing.assert_close(found.value.values, given.values)


def test_the_more_important_slot_leads_and_of_equals_the_newer() -> None:
    """Of two equal keys the more important keeps its place; without any difference the later."""
    keys, values, bias = torch.ones(2, 4), torch.eye(2), torch.zeros(2)

    assert merge(keys, values, bias, torch.tensor([2.0, 1.0]), 1).value.kept.tolist() == [0]
    assert merge(keys, values, bias, torch.tensor([1.0, 1.0]), 1).value.kept.tolist() == [1]
    assert merge(keys, values, bias, torch.tensor([1.0, 1.0]), 1).value.values.tolist() == [[0.5, 0.5]]
    assert float(merge(keys, values, bias, torch.ones(2), 1).value.bias) == pytest.approx(math.log(2))


def test_no_chain_of_similar_slots_joins_dissimilar_ones() -> None:
    """On a fan of keys, each 10° from the next, every merged slot is within the threshold of the one it joined."""
    angles = torch.arange(18) * math.pi / 18
    keys = torch.stack((angles.cos(), angles.sin()), dim=-1)
    # The value of slot i is the i-th unit vector, so that a merged value names the members of its group.
    found = merge(keys, torch.eye(18), torch.zeros(18), torch.arange(18).float(), 9, threshold=math.cos(0.36))

    assert found.stats["evicted"] == 0
    for slot, members in zip(found.value.kept.tolist(), found.value.values, strict=True):
        for member in members.nonzero().squeeze(-1).tolist():
            assert float(keys[slot] @ keys[member]) >= math.cos(0.36) - 1e-6


def test_nearest_adopts_what_resembles_none() -> None:
    """Below the threshold, slots that must go join the most similar one that stays, with those that had joined them."""
    given = problem()
    found = given.merge(4, threshold=0.99, rest="nearest")
    stay = given.importance.topk(4).indices.sort().values
    unit = torch.nn.functional.normalize(given.keys, dim=-1)
    nearest = stay[(unit @ unit[stay].T).argmax(dim=-1)]

    assert found.stats["evicted"] == 0
    assert found.value.kept.tolist() == stay.tolist()
    for place, slot in enumerate(stay.tolist()):
        group = (nearest == slot).nonzero().squeeze(-1).tolist()
        log_weight, mean = oracle.pooled(group, given.bias.double().tolist(), given.values.double().tolist())
        assert float(found.value.bias[place]) == pytest.approx(log_weight, abs=1e-5)
        torch.testing.assert_close(found.value.values[place], torch.tensor(mean), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rest", ["evict", "nearest"])
def test_groups_leave_with_their_members(rest: Rest) -> None:
    """Slots that had joined one that must go share its fate: no trace, or a place in the nearest group."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    importance = torch.tensor([0.1, 0.2, 0.9])
    found = merge(keys, torch.eye(3), torch.zeros(3), importance, 1, threshold=0.9, rest=rest)
    members = 1 if rest == "evict" else 3

    assert found.value.kept.tolist() == [2]
    assert (found.stats["merged"], found.stats["evicted"]) == (members - 1, 3 - members)
    assert found.value.values[0].tolist() == pytest.approx([0.0, 0.0, 1.0] if members == 1 else [1 / 3] * 3)
    assert float(found.value.bias) == pytest.approx(math.log(members))


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_only_ratios_of_weights_matter(offset: float) -> None:
    """Log weights of any size give the same values and the same growth of β."""
    given = problem("clusters")
    weights = torch.linspace(-2, 2, 16)
    found = given.merge(6, threshold=0.5, log_weights=weights + offset)
    expected = given.merge(6, threshold=0.5, log_weights=weights)

    torch.testing.assert_close(found.value.values, expected.value.values, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.value.bias, expected.value.bias, atol=1e-2, rtol=0)


def test_an_unknown_rest_is_refused() -> None:
    """The message names the value and the choices."""
    with pytest.raises(ValueError, match=r"rest: 'keep' is unknown; choose one of evict, nearest"):
        problem().merge(3, rest="keep")


@pytest.mark.parametrize("slots", [16, 300])
@pytest.mark.parametrize("rest", ["evict", "nearest"])
@pytest.mark.parametrize("widths", [(4, 3), (8, 64)])
def test_working_memory_is_stated(slots: int, rest: str, widths: tuple[int, int]) -> None:
    """No more is allocated than :func:`merging_bytes` says."""
    generator = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(slots, width, generator=generator) for width in widths)
    bias, importance = torch.zeros(slots), torch.rand(slots, generator=generator)
    peaks = [
        peak_allocated(
            lambda count=count: merge(keys, values, bias, importance, count, threshold=0.5, rest=rest, rows=32)  # type: ignore[misc, arg-type]  # one of the two
        )
        for count in (slots // 2, slots - 1)
    ]

    assert max(peaks) <= merging_bytes(slots, 32, *widths)
