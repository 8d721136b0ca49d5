"""The cap against every allocation of a process, native libraries' own included."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.allocations import CASES, measured

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux",
    reason="the account is compiled, and counts glibc's allocations",
)
def test_all_allocations_beyond_a_plain_forward_fit_under_the_cap(tmp_path: Path) -> None:
    """bfloat16: a long prompt, a batch, a padded one and sliding layers, each in a cap that was planned to suffice."""
    cells = measured(tmp_path, small=True)
    assert len(cells) == len(CASES)
    assert {cell["name"]: cell["peak"] for cell in cells if cell["peak"] > cell["cap"]} == {}
