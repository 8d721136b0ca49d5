"""Servers whose own limits of time no machine reaches, however busy it is."""

from __future__ import annotations

import pytest

from agentmem.serving import attendance, tools
from support.waiting import LIMIT


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is answered by what it says, not by how soon its turn began or a pattern was searched for."""
    monkeypatch.setattr(attendance, "GRACE", LIMIT)
    monkeypatch.setattr(tools, "_SEARCH", LIMIT)
