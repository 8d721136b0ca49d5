"""The cap against every allocation of a process, native libraries' own included."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks.allocation_cases import CASES
from benchmarks.allocations import SMALL, measured

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux",
    reason="the account is compiled, and counts glibc's allocations",
)
def test_all_allocations_beyond_a_plain_forward_fit_under_the_cap(tmp_path: Path) -> None:
    """bfloat16, every case of the benchmark, each in a cap that was planned to suffice."""
    cells = list(measured(tmp_path, *SMALL))
    assert len(cells) == len(CASES)
    assert {cell["name"]: cell["peak"] for cell in cells if cell["peak"] > cell["cap"]} == {}
