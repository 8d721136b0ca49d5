"""Define one function for each log event of the library; the library never configures logging."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:
    from agentmem.reporting.report import CompactionReport, RebaseReport

_STDLIB = logging.getLogger("agentmem")
_STDLIB.addHandler(logging.NullHandler())

# Wrapped explicitly: an unconfigured structlog.get_logger() prints to stdout, which belongs to the user.
_LOG = structlog.wrap_logger(
    _STDLIB,
    processors=[structlog.stdlib.filter_by_level, structlog.stdlib.render_to_log_kwargs],
    wrapper_class=structlog.stdlib.BoundLogger,
    context_class=dict,
)


def memory_planned(*, cap_bytes: int, capacity: int, rows: int, policy: str) -> None:
    """Log ``memory_planned``: the plan for a cap was made; ``capacity`` is in slots per KV head and row."""
    _LOG.info("memory_planned", cap_bytes=cap_bytes, capacity=capacity, rows=rows, policy=policy)


def compaction_started(*, row: int, policy: str, tokens_seen: int, slots: int) -> None:
    """Log ``compaction_started``: a row is about to be compacted."""
    _LOG.debug("compaction_started", row=row, policy=policy, tokens_seen=tokens_seen, slots=slots)


def compaction_finished(report: CompactionReport) -> None:
    """Log ``compaction_finished``: a row was compacted."""
    _LOG.info(
        "compaction_finished",
        row=report.row,
        policy=report.policy,
        tokens_seen=report.tokens_seen,
        slots_before=report.slots_before,
        slots_after=report.slots_after,
        seconds=round(report.seconds, 4),
        output_error=report.output_error,
        log_mass_error=report.log_mass_error,
    )


def rebased(report: RebaseReport) -> None:
    """Log ``rebased``: a row's slots moved to lower positions."""
    _LOG.info(
        "rebased",
        row=report.row,
        tokens_seen=report.tokens_seen,
        position_before=report.position_before,
        position_after=report.position_after,
        gap=report.gap,
        kl=report.kl,
    )


def positions_passed(*, row: int, tokens_seen: int, positions: int) -> None:
    """Log ``positions_passed``: a row without re-basing has reached positions beyond those the model was made for."""
    remedy = "rebase=True moves slots to lower positions before"
    _LOG.warning("positions_passed", row=row, tokens_seen=tokens_seen, positions=positions, remedy=remedy)


def request_not_pinned(*, session: str, tokens: int, most: int) -> None:
    """Log ``request_not_pinned``: a reply begins, and its request may be compacted before the reply ends.

    The request is not pinned because it was compacted already, or because it has more than ``most`` tokens.
    """
    _LOG.info("request_not_pinned", session=session, tokens=tokens, most=most)


def compaction_fault(*, row: int, layer: int | None, policy: str, error: str, remedy: str) -> None:
    """Log ``compaction_fault``: a layer could not be compacted as asked; ``remedy`` is what was done instead."""
    _LOG.warning("compaction_fault", row=row, layer=layer, policy=policy, error=error, remedy=remedy)
