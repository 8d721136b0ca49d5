"""The demos' sandbox with so much time that a busy machine does not end what is to end by itself."""

from __future__ import annotations

from typing import Any

from support import sandbox
from support.sandbox import Outcome
from support.waiting import LIMIT


def run(code: str, **options: Any) -> Outcome:
    """Run a program."""
    return sandbox.run(code, **{"seconds": LIMIT} | options)


def check(solution: str, tests: str, **options: Any) -> Outcome:
    """Run a solution against its tests."""
    return sandbox.check(solution, tests, **{"seconds": LIMIT} | options)
