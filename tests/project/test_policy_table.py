"""The README's table of policies is what the registry says."""

from __future__ import annotations

from pathlib import Path

from agentmem import plugins

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- policies:begin -->\n", "<!-- policies:end -->"


def test_the_readme_lists_every_built_in_policy_with_its_summary_and_source() -> None:
    """The table between the markers has one row per policy of this distribution, in the registry's words."""
    rows = [row for row in plugins.catalogue() if row.distribution.startswith("agentmem-runtime ")]
    wanted = ["| policy | keeps | source |", "| --- | --- | --- |"]
    wanted += [f"| `{row.name}` | {row.summary} | {row.source} |" for row in rows]
    text = README.read_text(encoding="utf-8")

    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()

    assert shown == wanted
