"""The path of a compaction that docs/architecture.md shows is the one that the code goes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType

from agentmem import plugins
from support import tiny

PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
SELDOM = {"Rewriting.run", "LayerStore.resized"}
"""A policy with a rewrite; a layer whose commit could not give headroom."""


def shown() -> list[tuple[str, str | None]]:
    """Each function of the page's tree with the one that calls it, in the page's order."""
    block = PAGE.read_text(encoding="utf-8").partition("## One compaction\n\n```text\n")[2].partition("```")[0]
    found, above = list[tuple[str, str | None]](), dict[int, str]()
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        words = re.split(r"\s{2,}", line.strip())[0]
        names = words.partition(": ")[2] or words
        owner = names.partition(".")[0]
        first, *others = names.split(", ")
        for name in (first, *(f"{owner}.{other}" for other in others)):
            caller = max((each for each in above if each < depth), default=None)
            found.append((name, None if caller is None else above[caller]))
        above = {each: name for each, name in above.items() if each < depth} | {depth: found[-1][0]}
    return found


def gone(names: set[str]) -> list[tuple[str, str | None]]:
    """Those functions as a compaction calls them, each with the innermost of them that runs at that time."""
    found, running = list[tuple[str, str | None]](), list[str]()

    def visit(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_qualname
        if name.endswith(".compact") and "policies" in frame.f_code.co_filename:
            name = "Compactor.compact"
        if name in names and event == "call":
            found.append((name, running[-1] if running else None))
            running.append(name)
        elif name in names and event == "return":
            running.pop()

    with tiny.capped_by(plugins.policy("am-halving")) as memory:
        tiny.feed(memory, tiny.ids(60))
        sys.setprofile(visit)
        try:
            memory.compact()
        finally:
            sys.setprofile(None)
    return found


def test_a_compaction_goes_the_documented_path() -> None:
    """Every function of the tree is called by the one above it, in this order, layer after layer."""
    wanted = [each for each in shown() if each[0] not in SELDOM]
    assert len(wanted) > 12

    seen = gone({name for name, _ in wanted})

    assert list(dict.fromkeys(seen)) == wanted
