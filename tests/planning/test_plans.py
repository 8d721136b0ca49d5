"""Plans of several policies for one memory: one capacity, which the first one's storage and every workspace fit."""

from __future__ import annotations

import re

import pytest

from agentmem import plugins
from agentmem.errors import CapTooSmall, SettingsRefused
from agentmem.planning.capacity import make_plan, make_plans
from agentmem.planning.model_shape import LayerShape, ModelShape
from agentmem.settings import Settings

LLAMA = ModelShape("small", (LayerShape(2, 4, 16, 16),) * 3, 4, hidden=64, intermediate=96, vocabulary=128)
SHARED = "am-halving[probe=live+replay]"
PAIRS = [("window", "am-halving"), ("am-halving", "window"), (SHARED, "am-halving"), ("heavy-hitters", "keydiff")]


@pytest.mark.parametrize("names", PAIRS)
def test_the_smallest_cap_serves_all_and_one_byte_less_names_it(names: tuple[str, str]) -> None:
    """What the refusal asks for is enough; both plans have one capacity, and both fit."""
    policies = [plugins.policy(name) for name in names]
    with pytest.raises(CapTooSmall, match=r"is too small: .+ need \d+ bytes") as refusal:
        make_plans(LLAMA, Settings.of(cap=10_000), policies)
    needed = int(re.findall(r"need (\d+) bytes", str(refusal.value))[0])
    plans = make_plans(LLAMA, Settings.of(cap=needed), policies)
    (cap,) = re.findall(r"raise cap to ([\d.]+.iB), or", str(refusal.value))

    assert needed <= Settings.of(cap=cap).cap < 1.1 * needed
    assert plans[0].capacity == plans[1].capacity
    assert plans[0].resident_bytes + max(plan.workspace_bytes for plan in plans) <= needed
    with pytest.raises(CapTooSmall):
        make_plans(LLAMA, Settings.of(cap=needed - 1), policies)


@pytest.mark.parametrize("names", PAIRS)
def test_one_slot_more_would_not_fit(names: tuple[str, str]) -> None:
    """The capacity is the largest; a policy beside another never enlarges it."""
    policies = [plugins.policy(name) for name in names]
    plans = make_plans(LLAMA, Settings.of(cap=4_000_000), policies)
    more = Settings.of(cap=1 << 30, max_slots=plans[0].capacity + 1)
    larger = make_plans(LLAMA, more, policies)

    assert plans[0].capacity <= make_plan(LLAMA, Settings.of(cap=4_000_000), policies[0]).capacity
    if not plans[0].stored:  # stored queries take a share of the cap, which is another one there
        assert larger[0].resident_bytes + max(plan.workspace_bytes for plan in larger) > 4_000_000


def test_what_the_memory_does_not_keep_is_refused() -> None:
    """A policy beside one that keeps no scores cannot have them."""
    with pytest.raises(SettingsRefused, match=r"'heavy-hitters' needs scores that are .+ under 'window' does not keep"):
        make_plans(LLAMA, Settings.of(cap=4_000_000), [plugins.policy("window"), plugins.policy("heavy-hitters")])
