"""Define the reports on compactions, re-basings and runs: pydantic models of plain values with stable JSON keys."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast

Outcome = Literal["compacted", "retried", "evicted"]


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerReport(_Report):
    """Describe how one compaction changed one layer; its errors are measured on queries held out from the fit."""

    layer: int
    slots_before: int
    slots_after: int
    output_error: float | None
    """Relative L2 error of the segment's local attention output; ``None`` without reference queries."""
    log_mass_error: float | None
    """Mean absolute error of the log of the segment's attention mass; ``None`` without reference queries."""
    bias_min: float
    bias_max: float
    condition: float
    fallbacks: Annotated[tuple[str, ...], FailFast()] = ()
    outcome: Outcome = "compacted"


class SpanError(_Report):
    """Give the errors of the held-out queries of the transcript's tokens ``start .. stop``, over all layers."""

    start: int
    stop: int
    output_error: float
    log_mass_error: float


class SummaryReport(_Report):
    """Describe a summary that the model wrote, and that replaced a segment before the segment was compacted."""

    text: str
    tokens: int
    """Tokens of the summary and its lead. Each takes one slot per head until the compactor runs."""
    start: int
    stop: int
    """The summary stands for the tokens ``start .. stop`` of the transcript."""
    position: int
    """Position of the summary's first slot."""
    slots_before: int
    slots_after: int
    """Slots of the whole row before and after the summary replaced the segment."""


class CompactionReport(_Report):
    """Describe one compaction of one row."""

    index: int
    row: int
    policy: str
    tokens_seen: int
    """Tokens that the row had consumed when it was compacted."""
    slots_before: int
    slots_after: int
    """Slots of the row before and after the compaction, summed over layers and KV heads."""
    bytes_before: int
    bytes_after: int
    bytes_peak: int
    """Allocated bytes of the whole memory, resident and temporary, before, after and at the peak of the compaction."""
    queries: str = "none"
    """The sources of the reference queries."""
    outside_cap: bool = False
    """True if the reference queries came from an oracle whose memory the cap does not bound."""
    probe_tokens: int
    """Tokens of the transient forward that computed reference queries."""
    seconds: float
    seconds_by_stage: dict[str, float]
    """Seconds by the name of the stage.

    ``probe`` is the transient forward, measured as the time that the other stages leave over; ``probe text`` chooses
    the tokens that it reads; ``check`` measures held-out errors; the others are ``fit``, ``commit`` and ``headroom``.
    ``survey`` (only for budgets that compare heads) and ``summary`` (only if one was asked for) may be missing.
    """
    layers: Annotated[tuple[LayerReport, ...], FailFast()]
    faults: Annotated[tuple[str, ...], FailFast()] = ()
    """Faults that were repaired during the compaction, one line each."""
    summary: SummaryReport | None = None
    """The summary that replaced the segment; ``None`` if the policy asked for none or the summary was rejected."""
    worst_spans: tuple[SpanError, ...] = ()
    """The spans with the greatest errors, among the spans whose queries were held out."""

    def brief(self) -> CompactionReport:
        """Return a copy of this report without its ``layers`` and ``worst_spans``."""
        return self.model_copy(update={"layers": (), "worst_spans": ()})

    @property
    def output_error(self) -> float | None:
        """Return the mean held-out output error over layers; ``None`` if no layer has one."""
        return _mean([layer.output_error for layer in self.layers])

    @property
    def log_mass_error(self) -> float | None:
        """Return the mean held-out log-mass error over layers; ``None`` if no layer has one."""
        return _mean([layer.log_mass_error for layer in self.layers])


class RebaseReport(_Report):
    """Describe one re-basing of one row, which moved the row's slots to lower positions."""

    row: int
    tokens_seen: int
    position_before: int
    """Position of the next token before the re-basing."""
    position_after: int
    """Position of the next token after the re-basing."""
    gap: int
    """Greatest distance in positions that neighbouring slots kept; the least such value over all heads."""
    kl: float | None
    """KL(before ‖ after) in nats per token of the next-token distributions when the newest tokens are read again.

    ``None`` if the token ids are not known, or if this re-basing finished one that was interrupted.
    """
    seconds: float


class RunReport(_Report):
    """Summarise everything that one memory has done so far."""

    model: str
    policy: str
    cap_bytes: int
    peak_bytes: int
    """The greatest sum of resident and temporary bytes so far, by the ledger."""
    resident_bytes: int
    held_slots: int
    capacity: int
    """Slots per KV head and row when the memory is full."""
    rows: int
    num_compactions: int
    num_prompt_tokens: int
    """Tokens consumed in forwards of more than one token, summed over rows."""
    num_new_tokens: int
    """Tokens consumed one at a time, summed over rows; the next turn consumes a turn's last sampled token."""
    seconds_compacting: float
    stopped: str | None = None
    """Reason why generation was stopped early; ``None`` if it was not."""
    compactions: Annotated[tuple[CompactionReport, ...], FailFast()] = ()
    """Reports of all compactions; only the newest 128 contain ``layers`` and ``worst_spans``."""
    rebases: Annotated[tuple[RebaseReport, ...], FailFast()] = ()


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
