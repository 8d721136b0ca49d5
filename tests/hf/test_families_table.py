"""The table of families in docs/models.md: every column of every family, and the page is what they came to."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentmem.hf import COVERED
from support import families, families_page

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("family", families.TABLE)
def test_a_family_passes_every_column(family: str, tmp_path: Path) -> None:
    """Stock below the cap, an oracle after compactions, forks and snapshots, bfloat16; re-basing as the page says."""
    rebasing = families.passed(family, tmp_path)

    assert rebasing == families_page.rebasing_of(families_page.PAGE.read_text(encoding="utf-8"))[family]


def test_the_page_is_what_the_generator_writes() -> None:
    """Rows, refusals and their reasons; run ``PYTHONPATH=tests .venv/bin/python -m support.families_page``."""
    page = families_page.PAGE.read_text(encoding="utf-8")

    assert page == families_page.render(families_page.rebasing_of(page))


def test_the_families_that_need_no_check_are_those_of_the_table() -> None:
    """What the package takes as tested is tested, and the README says how many there are."""
    assert families.TABLE.keys() == COVERED
    assert f"| families | {len(COVERED)} tested" in README.read_text(encoding="utf-8")
