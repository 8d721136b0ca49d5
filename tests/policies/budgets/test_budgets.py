"""Head budgets: the invariants of allocating, and what each kind allocates."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentmem.contracts import BudgetRequest, ModelIdentity, Survey
from agentmem.hf.fingerprint import fingerprint
from agentmem.policies.budgets.head_table import read_table, shipped_tables
from agentmem.policies.budgets.registry import NAMES, by_name
from agentmem.policies.budgets.sensitivity import Sensitivity
from agentmem.policies.budgets.water_filling import allocate, proportional

Held = tuple[tuple[int, ...], ...]
MODEL = ModelIdentity("some/model", "f" * 64, (2, 2))

counts = st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4).map(tuple)
weights = st.lists(st.floats(0, 5), min_size=16, max_size=16)


@st.composite
def requests(draw: st.DrawFn) -> BudgetRequest:
    """Any request, ceilings that bind and floors that do not fit included."""
    return BudgetRequest(
        held=draw(counts),
        total=draw(st.integers(0, 300)),
        floor=draw(st.integers(0, 6)),
        ceiling=draw(st.integers(1, 40)),
        layer_ceiling=draw(st.integers(1, 100)),
    )


def shares(held: Held, numbers: list[float]) -> list[list[float]]:
    """The numbers in the shape of the heads."""
    supply = iter(numbers)
    return [[next(supply) for _ in layer] for layer in held]


def allocated(request: BudgetRequest, numbers: list[float], fraction: float = 0.0) -> Held:
    """Slots in proportion to the numbers."""
    return allocate(request, [list(map(proportional, layer)) for layer in shares(request.held, numbers)], fraction)


def most(request: BudgetRequest) -> int:
    """What held slots and ceilings allow together."""
    layers = (sum(min(held, request.ceiling) for held in layer) for layer in request.held)
    return sum(min(layer, request.layer_ceiling) for layer in layers)


@given(request=requests(), numbers=weights, fraction=st.sampled_from([0.0, 0.3, 1.0]))
def test_the_sum_is_exact_and_nobody_gets_more_than_it_may(
    request: BudgetRequest, numbers: list[float], fraction: float
) -> None:
    """The sum is the total or the most that is possible; held slots and both ceilings bind; it is always the same."""
    result = allocated(request, numbers, fraction)

    assert sum(map(sum, result)) == min(request.total, most(request))
    for given_slots, held in zip(result, request.held, strict=True):
        assert sum(given_slots) <= request.layer_ceiling
        assert all(0 <= got <= min(had, request.ceiling) for got, had in zip(given_slots, held, strict=True))
    assert result == allocated(request, numbers, fraction)


@given(request=requests(), numbers=weights)
def test_every_head_gets_its_floor_if_the_total_allows_it(request: BudgetRequest, numbers: list[float]) -> None:
    """Where floors fit, all are met; where they do not, no head is above its floor and they are levelled."""
    request = replace(request, layer_ceiling=1 << 40)
    floors = [min(held, request.floor, request.ceiling) for layer in request.held for held in layer]
    result = list(itertools.chain(*allocated(request, numbers)))

    if sum(floors) <= request.total:
        assert all(got >= floor for got, floor in zip(result, floors, strict=True))
    else:
        assert all(got <= floor for got, floor in zip(result, floors, strict=True))
        short = [got for got, floor in zip(result, floors, strict=True) if got < floor]
        assert max(result) - min(short) <= 1


@given(request=requests(), numbers=weights, fraction=st.sampled_from([0.0, 0.4, 1.0]))
def test_a_larger_total_takes_from_no_head(request: BudgetRequest, numbers: list[float], fraction: float) -> None:
    """One slot more in total goes to one head, and all others keep theirs (a fraction needs roomy layers for that)."""
    if fraction:
        request = replace(request, layer_ceiling=1 << 40)
    less = allocated(request, numbers, fraction)
    more = allocated(replace(request, total=request.total + 1), numbers, fraction)

    assert all(one <= other for one, other in zip(itertools.chain(*less), itertools.chain(*more), strict=True))


@given(request=requests(), numbers=st.lists(st.floats(0.01, 5), min_size=16, max_size=16))
def test_shares_are_kept_as_well_as_integers_can(request: BudgetRequest, numbers: list[float]) -> None:
    """No slot of one head would be better placed at another: Webster's condition for every pair that may exchange."""
    request = replace(request, floor=0)
    result, wanted = allocated(request, numbers), shares(request.held, numbers)
    heads = [(layer, head) for layer, row in enumerate(request.held) for head in range(len(row))]
    full = [sum(row) == request.layer_ceiling for row in result]

    for (layer, head), (other, donor) in itertools.permutations(heads, 2):
        has_room = result[layer][head] < min(request.held[layer][head], request.ceiling)
        if has_room and result[other][donor] > 0 and (layer == other or not full[layer]):
            gain = wanted[layer][head] / (result[layer][head] + 0.5)
            loss = wanted[other][donor] / (result[other][donor] - 0.5)
            assert gain <= loss * (1 + 1e-9)


def test_a_head_without_a_share_comes_last() -> None:
    """It gets slots when all others hold all that they may."""
    request = BudgetRequest(((10, 10, 10),), 12, 0)

    assert allocated(request, [1.0, 0.0, 1.0]) == ((6, 0, 6),)
    assert allocated(replace(request, total=25), [1.0, 0.0, 1.0]) == ((10, 5, 10),)


def test_many_slots_take_no_longer_than_few() -> None:
    """A terabyte of slots is allocated exactly: nothing is done slot by slot."""
    request = BudgetRequest(((1 << 40,) * 8,) * 8, 1 << 42, 1)

    assert sum(map(sum, allocated(request, [0.1 + head for head in range(64)]))) == 1 << 42


# ---- by name


def test_unknown_names_and_options_are_refused_with_the_nearest() -> None:
    """The message has the name that was probably meant, and all there are."""
    with pytest.raises(ValueError, match=r"did you mean 'calibrated'.*uniform, global, calibrated"):
        by_name("calibrate")
    with pytest.raises(ValueError, match=r"budgets 'pyramid' has no option 'steepnes'; did you mean 'steepness'"):
        by_name("pyramid", steepnes=3)


@pytest.mark.parametrize("name", NAMES)
def test_ceilings_are_at_least_an_equal_share(name: str) -> None:
    """The plan counts workspace for them; uniform needs one share, no other more than 4, nor 2 for a layer."""
    budgets = by_name(name)

    assert 1 <= budgets.layer_ceiling <= 2
    assert budgets.layer_ceiling <= budgets.head_ceiling <= 4
    assert (budgets.head_ceiling == 1) == (name == "uniform")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("global", "floor", 1.5),
        ("global", "head_ceiling", 0.5),
        ("pyramid", "steepness", 0.9),
        ("calibrated", "floor", -0.1),
        ("sensitivity", "layer_ceiling", math.inf),
    ],
)
def test_values_that_cannot_work_are_refused(name: str, option: str, value: float) -> None:
    """The message names the option and its value."""
    with pytest.raises(ValueError, match=f"{option}: {value}"):
        by_name(name, **{option: value})


# ---- pyramid and global


def test_a_pyramid_falls_arithmetically() -> None:
    """From 2 - 1/s to 1/s equal shares; one layer alone gets one share; steepness 1 is uniform."""
    request = BudgetRequest(((100, 100),) * 5, 400, 0)

    assert by_name("pyramid", steepness=4).allocate(request) == ((70,) * 2, (55,) * 2, (40,) * 2, (25,) * 2, (10,) * 2)
    assert by_name("pyramid", steepness=1).allocate(request) == ((40, 40),) * 5
    assert by_name("pyramid", steepness=4).allocate(BudgetRequest(((100, 100),), 50, 0)) == ((25, 25),)


@given(data=st.data(), held=counts, total=st.integers(0, 120))
def test_global_budgets_are_the_highest_scores(data: st.DataObject, held: Held, total: int) -> None:
    """Without a floor, a head gets as many slots as it has scores among the ``total`` highest of all."""
    numbers = st.lists(
        st.floats(0, 1, width=32), min_size=sum(map(sum, held)), max_size=sum(map(sum, held)), unique=True
    )
    supply = iter(data.draw(numbers))
    scores = [[[next(supply) for _ in range(slots)] for slots in layer] for layer in held]
    surveys = tuple(Survey(index, tuple(map(torch.tensor, layer))) for index, layer in enumerate(scores))
    flat = sorted(
        ((score, layer, head) for layer, row in enumerate(scores) for head, each in enumerate(row) for score in each),
        reverse=True,
    )[:total]
    expected = tuple(
        tuple(sum(found[1:] == (layer, head) for found in flat) for head in range(len(row)))
        for layer, row in enumerate(scores)
    )

    assert by_name("global", floor=0).allocate(BudgetRequest(held, total, 0, surveys)) == expected


def test_global_budgets_leave_every_head_its_floor() -> None:
    """A head without a high score keeps half an equal share; without surveys there is nothing to compare."""
    low, high = torch.zeros(20), torch.ones(20)
    request = BudgetRequest(((20, 20), (20, 20)), 40, 1, (Survey(0, (low, low)), Survey(1, (high, low))))

    assert by_name("global").allocate(request) == ((10, 5), (20, 5))
    with pytest.raises(ValueError, match="0 surveys for 2 layers"):
        by_name("global").allocate(replace(request, surveys=()))


# ---- tables


def write(path: Path, **changes: Any) -> str:
    """A small table on disk; heads 0.0 and 1.1 matter."""
    table: dict[str, Any] = {
        "version": 1,
        "method": "fisher",
        "model": {"name": MODEL.name, "fingerprint": MODEL.fingerprint, "kv_heads": list(MODEL.kv_heads)},
        "shares": [[2.0, 0.5], [0.0, 1.5]],
        "curves": {
            "fractions": [0.25, 0.5],
            "errors": [[[0.8, 0.1], [0.2, 0.05]], [[0.0, 0.0], [0.6, 0.3]]],
        },
    }
    path.write_text(json.dumps(table | changes), encoding="utf-8")
    return str(path)


def test_calibrated_budgets_follow_the_shares(tmp_path: Path) -> None:
    """Whatever the total; a head with no share gets the floor; the ceilings are the table's largest shares."""
    budgets = by_name("calibrated", table=write(tmp_path / "t.json"), floor=0.2)
    held = ((100, 100), (100, 100))

    assert (budgets.head_ceiling, budgets.layer_ceiling) == (2.0, 1.25)
    assert budgets.allocate(BudgetRequest(held, 40, 1)) == ((19, 5), (2, 14))
    assert budgets.allocate(BudgetRequest(held, 200, 1)) == ((95, 24), (10, 71))
    assert by_name("calibrated", table=write(tmp_path / "t.json"), head_ceiling=1.2).head_ceiling == 1.2


@pytest.mark.parametrize("name", ["calibrated", "sensitivity"])
def test_a_table_of_another_model_is_refused(tmp_path: Path, name: str) -> None:
    """Other weights or other heads: the message names both models and how to make a table."""
    budgets = by_name(name, table=write(tmp_path / "t.json"))
    others = (replace(MODEL, name="other", fingerprint="0" * 64), replace(MODEL, name="other", kv_heads=(2, 2, 2)))

    for other in others:
        with pytest.raises(ValueError, match=r"for other .*t\.json for some/model.*`agentmem calibrate"):
            budgets.check(other)
    by_name(name, table=write(tmp_path / "t.json"), any_weights=True).check(others[0])
    budgets.check(replace(MODEL, fingerprint=None))
    budgets.check(replace(MODEL, name="the same, elsewhere"))


def test_budgets_serve_one_model(tmp_path: Path) -> None:
    """Two models of one shape cannot share the object: the second would be allocated the first one's table."""
    budgets = by_name("calibrated", table=write(tmp_path / "t.json"), any_weights=True)
    budgets.check(MODEL)

    with pytest.raises(ValueError, match="serve some/model already, and other is another"):
        budgets.check(replace(MODEL, name="other", fingerprint="0" * 64))


def test_a_table_is_needed_before_dealing(tmp_path: Path) -> None:
    """Without a file and a model there is none; a file's does not fit every shape."""
    request = BudgetRequest(((5,),), 3, 1)

    with pytest.raises(ValueError, match="no table was chosen for 1 layers; call check"):
        by_name("calibrated").allocate(request)
    with pytest.raises(ValueError, match=r"is for heads \(2, 2\), not \(1,\)"):
        by_name("calibrated", table=write(tmp_path / "t.json")).allocate(request)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"version": 2}, "its version is 2, not 1"),
        ({"shares": [[1.0, 1.0]]}, "shares of"),
        ({"shares": [[1.0, -1.0], [1.0, 1.0]]}, "negative"),
        ({"shares": [[0.0, 0.0], [0.0, 0.0]]}, "all are 0"),
        ({"shares": 3}, "not iterable"),
        ({"curves": {"fractions": [0.5], "errors": [[[0.1], [0.1]]]}}, "curves of"),
        ({"curves": {"fractions": [0.5, 0.5], "errors": [[[1, 1]] * 2] * 2}}, "do not rise"),
        ({"curves": {"fractions": [0.5], "errors": [[[1, 1]] * 2] * 2}}, "2 errors for 1"),
        ({"model": {}}, "it has no 'name'"),
    ],
)
def test_a_broken_table_is_refused(tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    """The message names the file, the fault and the remedy."""
    with pytest.raises(ValueError, match=rf"t\.json' is no table of head shares: .*{fault}.*agentmem calibrate"):
        read_table(write(tmp_path / "t.json", **changes))


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """So is a text that is no JSON."""
    with pytest.raises(ValueError, match="cannot be read"):
        by_name("calibrated", table=tmp_path / "none.json")
    (tmp_path / "t.json").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="is no table"):
        by_name("calibrated", table=tmp_path / "t.json")


def test_the_default_model_has_a_shipped_table(
    default_model: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    """It is found by the weights, has curves, and its ceilings are known once it is found."""
    model = ModelIdentity("here", fingerprint(default_model[0]), (3,) * 30)
    budgets = by_name("calibrated")
    budgets.check(model)
    by_name("sensitivity").check(model)

    assert 1 < budgets.layer_ceiling <= 2 < budgets.head_ceiling <= 4
    with pytest.raises(ValueError, match=r"no table of head shares for here.*SmolLM2"):
        by_name("calibrated").check(replace(model, fingerprint="0" * 64))


def test_shipped_shares_are_equal_shares() -> None:
    """Their mean is 1, and the commands that made them are in the files."""
    tables = shipped_tables()

    assert tables
    for table in tables:
        heads = [share for layer in table.shares for share in layer]
        assert sum(heads) / len(heads) == pytest.approx(1, abs=1e-3)


# ---- sensitivity


def curve(fractions: list[float], errors: list[float], slots: int) -> list[float]:
    """Errors at 0 .. slots, in plain loops: geometric between points, linear to 0 at 1, going on at 0."""
    found = []
    for kept in range(slots + 1):
        x = kept / slots
        if x >= fractions[-1]:
            found.append(errors[-1] * (1 - x) / (1 - fractions[-1]))
            continue
        index = next(i for i in range(1, len(fractions)) if x < fractions[i])
        along = (x - fractions[index - 1]) / (fractions[index] - fractions[index - 1])
        found.append(errors[index - 1] * (errors[index] / errors[index - 1]) ** along)
    return found


def exchanged(curves: list[list[float]], start: list[int]) -> list[int]:
    """The greedy exchange of the paper: move a slot from the head that loses least to the one that gains most."""
    slots = list(start)
    while True:
        gains = [
            errors[n] - errors[n + 1] if n + 1 < len(errors) else -1.0 for errors, n in zip(curves, slots, strict=True)
        ]
        losses = [errors[n - 1] - errors[n] if n else math.inf for errors, n in zip(curves, slots, strict=True)]
        taker, giver = gains.index(max(gains)), losses.index(min(losses))
        if taker == giver or gains[taker] <= losses[giver] * (1 + 1e-9):
            return slots
        slots[taker] += 1
        slots[giver] -= 1


@pytest.mark.parametrize("total", [8, 16, 40, 60])
def test_sensitivity_ends_where_the_greedy_exchange_ends(tmp_path: Path, total: int) -> None:
    """At every ratio: the sum of predicted errors is that of the exchange from a uniform start."""
    fractions, slots = [0.05, 0.2, 0.5], 20
    errors = [[0.8, 0.2, 0.01], [0.2, 0.06, 0.005], [0.1, 0.02, 0.001], [0.5, 0.3, 0.12]]
    curves = {"fractions": fractions, "errors": [errors[:2], errors[2:]]}
    budgets = by_name("sensitivity", table=write(tmp_path / "t.json", curves=curves), floor=0)
    result = list(itertools.chain(*budgets.allocate(BudgetRequest(((slots,) * 2,) * 2, total, 0))))
    dense = [curve(fractions, each, slots) for each in errors]
    expected = exchanged(dense, [total // 4] * 4)

    def summed(kept: list[int]) -> float:
        return sum(each[n] for each, n in zip(dense, kept, strict=True))

    assert sum(result) == total
    assert summed(result) == pytest.approx(summed(expected), rel=0.05)
    assert summed(result) < summed([total // 4] * 4)


def test_sensitivity_follows_the_ratio(tmp_path: Path) -> None:
    """A head whose error falls late gains share as slots grow; a head without error gets the floor alone."""
    curves = {"fractions": [0.1, 0.4], "errors": [[[1.0, 1e-4], [0.02, 0.015]], [[0.0, 0.0], [0.02, 0.015]]]}
    budgets = by_name("sensitivity", table=write(tmp_path / "t.json", curves=curves), floor=0.25)
    held = ((100, 100), (100, 100))
    few, many = (budgets.allocate(BudgetRequest(held, total, 1)) for total in (80, 240))

    assert few[0][0] / 80 > 0.3 > many[0][0] / 240
    assert (few[1][0], many[1][0]) == (5, 15)


def test_sensitivity_needs_curves(tmp_path: Path) -> None:
    """A table of shares alone is refused with the method that makes curves."""
    with pytest.raises(ValueError, match=r"has no error curves: its method is 'attention'.*--method fisher"):
        Sensitivity(write(tmp_path / "t.json", curves=None, method="attention"))
