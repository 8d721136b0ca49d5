"""What a sequence holds is changed by one method, and what it has consumed by one assignment."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import agentmem
from support import tiny

SOURCES = sorted(Path(agentmem.__file__).parent.rglob("*.py"))


def writes(source: str) -> list[str]:
    """The statements of a source that assign or delete ``stores`` or ``_stores`` of any object, or a part of them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        parts = [part for each in targets if isinstance(each, ast.AST) for part in ast.walk(each)]
        if any(isinstance(part, ast.Attribute) and part.attr in {"stores", "_stores"} for part in parts):
            found.append(ast.unparse(node))
    return found


def test_only_the_sequence_replaces_its_stores() -> None:
    """No file but sequence.py assigns stores, and it does so in one method beside the constructor."""
    found = [(source.name, each) for source in SOURCES for each in writes(source.read_text(encoding="utf-8"))]
    assert found == [
        ("sequence.py", "self._stores: tuple[LayerStore | None, ...] = (None,) * layers"),
        ("sequence.py", "self._stores = (*self._stores[:layer], store, *self._stores[layer + 1:])"),
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "sequence._stores = ()",
        "memory.sequences[0].stores[2] = store",
        "one, other.stores[0] = pair",
        "row._stores += (store,)",
        "del self._stores[0]",
        "for each.stores in them: pass",
    ],
)
def test_any_other_write_would_be_found(statement: str) -> None:
    """Whatever the object is called."""
    assert writes(statement) == [ast.unparse(ast.parse(statement).body[0])]


def test_what_a_sequence_holds_cannot_be_assigned() -> None:
    """Its stores are a tuple without a setter."""
    with tiny.capped("window") as memory:
        tiny.feed(memory, tiny.ids(20))
        sequence = memory.memory.sequences[0]
        with pytest.raises(TypeError):
            sequence.stores[0] = None  # type: ignore[index]  # what is refused
        with pytest.raises(AttributeError):
            sequence.stores = ()  # type: ignore[misc]  # the same


def test_replacing_a_store_frees_the_old_one() -> None:
    """The account has the new one alone."""
    with tiny.capped_by(tiny.KINDS["window"]) as memory:
        tiny.feed(memory, tiny.ids(20))
        sequence = memory.memory.sequences[0]
        old = sequence.stores[0]
        assert old is not None
        sequence.replace(0, old.resized(old.capacities))
        tiny.audit(memory.memory)
        assert old.held_bytes == 0
