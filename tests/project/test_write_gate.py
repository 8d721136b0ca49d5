"""What a row holds is changed by one method, and what it has consumed by one assignment."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import agentmem
from support import tiny

SOURCES = sorted(Path(agentmem.__file__).parent.rglob("*.py"))


def test_only_the_row_replaces_its_stores() -> None:
    """No file but sequence.py assigns stores, and it does so in one method beside the constructor."""
    written = re.compile(r"(\b_?stores(\[[^\]]*\])? = |\bstores\[[^\]]*\], .* = )")
    found = [
        (source.name, line.strip())
        for source in SOURCES
        for line in source.read_text().splitlines()
        if written.search(line) and re.search(r"(row|self)\._?stores", line.split(" = ")[0])
    ]
    assert found == [("sequence.py", "self._stores = (*self._stores[:layer], store, *self._stores[layer + 1 :])")]


def test_what_a_row_holds_cannot_be_assigned() -> None:
    """Its stores are a tuple without a setter."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(20))
        row = memory.memory.sequences[0]
        with pytest.raises(TypeError):
            row.stores[0] = None  # type: ignore[index]  # what is refused
        with pytest.raises(AttributeError):
            row.stores = ()  # type: ignore[misc]  # the same


def test_replacing_a_store_frees_the_old_one() -> None:
    """The account has the new one alone."""
    with tiny.capped_by(tiny.KINDS["window"]) as memory:
        tiny.feed(memory, tiny.ids(20))
        row = memory.memory.sequences[0]
        old = row.stores[0]
        assert old is not None
        row.replace(0, old.resized(old.capacities))
        tiny.audit(memory.memory)
        assert old.held_bytes == 0
