"""Define one function for each log event of the library; the library never configures logging.

Every event has the names of the memory that it is about: those of the session and of the runtime that use it. A memory
without a session, as of :func:`agentmem.capped`, has none.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeAlias

import structlog

if TYPE_CHECKING:
    from collections.abc import Mapping

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

Names: TypeAlias = "Mapping[str, str]"
"""What an event is about: ``session`` and ``runtime``, each with its name, or nothing."""


def memory_planned(names: Names, *, cap_bytes: int, capacity: int, rows: int, policy: str) -> None:
    """Log ``memory_planned``: the plan for a cap was made; ``capacity`` is in slots per KV head and row."""
    _LOG.info("memory_planned", **names, cap_bytes=cap_bytes, capacity=capacity, rows=rows, policy=policy)


def compaction_started(names: Names, *, row: int, policy: str, tokens_seen: int, slots: int) -> None:
    """Log ``compaction_started``: a row is about to be compacted."""
    _LOG.debug("compaction_started", **names, row=row, policy=policy, tokens_seen=tokens_seen, slots=slots)


def compaction_finished(names: Names, report: CompactionReport) -> None:
    """Log ``compaction_finished``: a row was compacted."""
    _LOG.info(
        "compaction_finished",
        **names,
        row=report.row,
        policy=report.policy,
        tokens_seen=report.tokens_seen,
        slots_before=report.slots_before,
        slots_after=report.slots_after,
        seconds=round(report.seconds, 4),
        output_error=report.output_error,
        log_mass_error=report.log_mass_error,
    )


def rebased(names: Names, report: RebaseReport) -> None:
    """Log ``rebased``: a row's slots moved to lower positions."""
    _LOG.info(
        "rebased",
        **names,
        row=report.row,
        tokens_seen=report.tokens_seen,
        position_before=report.position_before,
        position_after=report.position_after,
        gap=report.gap,
        kl=report.kl,
    )


def positions_passed(names: Names, *, row: int, tokens_seen: int, positions: int) -> None:
    """Log ``positions_passed``: a row without re-basing has reached positions beyond those the model was made for."""
    remedy = "rebase=True moves slots to lower positions before"
    _LOG.warning("positions_passed", **names, row=row, tokens_seen=tokens_seen, positions=positions, remedy=remedy)


def request_not_pinned(names: Names, *, tokens: int, most: int) -> None:
    """Log ``request_not_pinned``: a reply begins, and its request may be compacted before the reply ends.

    The request is not pinned because it was compacted already, or because it has more than ``most`` tokens.
    """
    _LOG.info("request_not_pinned", **names, tokens=tokens, most=most)


def compaction_fault(names: Names, *, row: int, layer: int | None, policy: str, error: str, remedy: str) -> None:
    """Log ``compaction_fault``: a layer could not be compacted as asked; ``remedy`` is what was done instead."""
    _LOG.warning("compaction_fault", **names, row=row, layer=layer, policy=policy, error=error, remedy=remedy)


def session_opened(names: Names, *, lease_bytes: int) -> None:
    """Log ``session_opened``: a session was made; it may use ``lease_bytes`` of the runtime's cap."""
    _LOG.info("session_opened", **names, lease_bytes=lease_bytes)


def session_closed(names: Names) -> None:
    """Log ``session_closed``: a session was closed."""
    _LOG.info("session_closed", **names)


def session_forked(names: Names, *, source: str) -> None:
    """Log ``session_forked``: a session was made that continues from the session named ``source``."""
    _LOG.info("session_forked", **names, source=source)


def session_saved(names: Names, *, place: str) -> None:
    """Log ``session_saved``: a session was saved at ``place``."""
    _LOG.info("session_saved", **names, place=place)


def session_loaded(names: Names, *, place: str) -> None:
    """Log ``session_loaded``: a session was loaded from ``place``."""
    _LOG.info("session_loaded", **names, place=place)


def memory_spilled(names: Names, *, freed_bytes: int) -> None:
    """Log ``memory_spilled``: an idle memory was moved to disk, which freed ``freed_bytes``."""
    _LOG.info("memory_spilled", **names, freed_bytes=freed_bytes)


def memory_restored(names: Names, *, held_bytes: int) -> None:
    """Log ``memory_restored``: a memory on disk was read again; it holds ``held_bytes``."""
    _LOG.info("memory_restored", **names, held_bytes=held_bytes)
