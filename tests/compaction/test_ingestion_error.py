"""An error target for what is read: a policy with adaptive budgets leaves of every piece what its errors allow."""

from __future__ import annotations

from agentmem.reporting.report import CompactionReport
from support import talk, tiny

FACT = "The quick brown fox jumps over the lazy dog while it rains. "


def adaptive(error: float) -> str:
    """AM halving that holds both errors under a target."""
    return f"am-halving[budgets=adaptive[output_error={error},log_mass_error={error}]]"


def read(error: float, target: float = 0.25) -> tuple[float, tuple[CompactionReport, ...]]:
    """The part of a document that an error target left, and the reports."""
    policy = adaptive(error)
    with talk.session(policy="am-halving", extra_policies=(policy,), max_slots=512, chunk=64) as session:
        session.append("system", "You are terse.")
        begin = len(session.ids)
        reports = session.append("tool", FACT * 20, compact="after", target=target, policy=policy)
        span = reports[-1].tokens_seen - 8 - begin
        freed = sum(report.slots_before - report.slots_after for report in reports)
        tiny.audit(session.memory)
        return 1 - freed / (4 * span), reports


def test_a_smaller_error_target_leaves_more() -> None:
    """From all of the document to little of it; the errors that are reported stay near the target."""
    parts = {error: read(error) for error in (1e-4, 0.05, 0.3, 2.0)}
    left = [part for part, _ in parts.values()]
    assert left == sorted(left, reverse=True)
    assert left[0] == 1.0
    assert 0.6 < left[1] < 1.0
    assert left[2] < left[1]
    assert left[3] < 0.25
    for error, (_, reports) in parts.items():
        assert not any(report.faults for report in reports)
        assert all((report.output_error or 0.0) <= 2 * error for report in reports)


def test_the_error_target_stands_for_the_fraction() -> None:
    """What stays does not depend on ``target``."""
    assert read(0.3, 0.1)[0] == read(0.3, 0.9)[0]
