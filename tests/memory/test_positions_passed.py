"""A memory that is not re-based says once that it has passed the model's positions."""

from __future__ import annotations

import logging

import pytest

from support import tiny
from support.few_positions import LIMIT, model


@pytest.mark.parametrize(("rebase", "said"), [(False, 1), (True, 0)])
def test_a_warning_comes_once(rebase: bool, said: int, caplog: pytest.LogCaptureFixture) -> None:  # a parameter
    """With the positions and the remedy, at the forward that passes them and at no other."""
    with caplog.at_level(logging.WARNING, "agentmem"), tiny.capped("window", model(), rebase=rebase) as memory:
        tiny.feed(memory, tiny.ids(LIMIT), 4, model=model())
        assert not caplog.records
        tiny.feed(memory, tiny.ids(90, seed=1), 9, model=model())
    found = [record for record in caplog.records if record.message == "positions_passed"]
    assert len(found) == said
    for record in found:
        assert record.positions == LIMIT < record.tokens_seen <= LIMIT + 10  # type: ignore[attr-defined]
        assert "rebase=True" in record.remedy  # type: ignore[attr-defined]
