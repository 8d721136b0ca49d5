"""Plans of rows that are re-based: no more slots than a model has positions for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentmem import plugins
from agentmem.budget import make_plan
from agentmem.errors import SettingsRefused
from agentmem.settings import Settings
from agentmem.shape import LayerShape, ModelShape

LLAMA = ModelShape("small", (LayerShape(2, 4, 16, 16),) * 3, 4, hidden=64, intermediate=96, vocabulary=128)
KINDS = ("window", "heavy-hitters", "am-halving", "am-halving[probe=live]", "am-halving[budgets=global]", "summary-am")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_re_based_fit_the_model_s_positions(kind: str) -> None:
    """A full row and its probe stand on them, whatever the cap; without re-basing positions bound nothing."""
    shape = replace(LLAMA, positions=3000)
    on, off = (
        make_plan(shape, Settings.of(cap=1 << 30, rebase=rebase), plugins.policy(kind)) for rebase in (True, False)
    )

    assert on.capacity + on.probe_tokens <= 3000 < off.capacity
    assert make_plan(LLAMA, Settings.of(cap=1 << 30, rebase=True), plugins.policy(kind)).capacity == off.capacity


def test_fewer_positions_than_slots_are_refused() -> None:
    """Named with the settings that need them."""
    shape = replace(LLAMA, positions=200)
    with pytest.raises(SettingsRefused, match=r"rebase: 226 slots per head, the fewest .+ the model's 200 positions"):
        make_plan(shape, Settings.of(cap=10_000_000, rebase=True), plugins.policy("window"))
