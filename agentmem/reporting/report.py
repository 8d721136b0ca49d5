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
    """Relative L2 error of the attention output over the segment alone; ``None`` without reference queries."""
    log_mass_error: float | None
    """Mean absolute error of the log-mass: the log of the sum of ``exp(logit)`` over the segment; ``None`` without
    reference queries."""
    bias_min: float
    bias_max: float
    condition: float
    fallbacks: Annotated[tuple[str, ...], FailFast()] = ()
    outcome: Outcome = "compacted"


class SpanError(_Report):
    """Describe the errors of one span of the transcript, the tokens ``start`` to ``stop - 1``.

    The errors are measured on held-out queries of these tokens, in all layers together.
    """

    start: int
    stop: int
    output_error: float
    log_mass_error: float


class SummaryReport(_Report):
    """Describe a summary, written by the model, that replaced a segment before the compaction."""

    text: str
    tokens: int
    """Tokens of the summary and of the text before it (``Rewrite.lead``). Each token takes one slot per head until the
    summary is compacted."""
    start: int
    stop: int
    """The summary replaced the tokens ``start .. stop`` of the transcript."""
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
    """Bytes of the whole memory: resident bytes (R) before and after the compaction, and the peak of resident plus
    temporary bytes (R + T) during the compaction."""
    queries: str = "none"
    """The sources of the reference queries."""
    outside_cap: bool = False
    """True if reference queries came from a ``transcript`` probe, whose bytes do not count under the cap."""
    probe_tokens: int
    """Tokens of the transient forward that computed reference queries."""
    seconds: float
    seconds_by_stage: dict[str, float]
    """Seconds by the name of the stage.

    ``probe text`` is the choice of the probe's tokens. ``probe`` is the probe's forward: all seconds that the other
    stages do not take. ``fit`` runs the compactor, ``check`` measures held-out errors, ``commit`` replaces slots, and
    ``headroom`` adds free slots. ``survey`` is missing unless the budgets compare heads; ``summary`` is missing unless
    the policy asks for a summary.
    """
    layers: Annotated[tuple[LayerReport, ...], FailFast()]
    faults: Annotated[tuple[str, ...], FailFast()] = ()
    """Faults that were repaired during the compaction, one line each."""
    summary: SummaryReport | None = None
    """The summary that replaced the segment; ``None`` if the policy asked for none or the summary was rejected."""
    worst_spans: tuple[SpanError, ...] = ()
    """The spans of the transcript with the greatest errors, among those that have held-out queries; worst first."""

    def brief(self) -> CompactionReport:
        """Return a copy of this report without its ``layers`` and ``worst_spans``."""
        return self.model_copy(update={"layers": (), "worst_spans": ()})

    @property
    def output_error(self) -> float | None:
        """Return the mean of :attr:`LayerReport.output_error` over layers; ``None`` if no layer has one."""
        return _mean([layer.output_error for layer in self.layers])

    @property
    def log_mass_error(self) -> float | None:
        """Return the mean of :attr:`LayerReport.log_mass_error` over layers; ``None`` if no layer has one."""
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
    """The limit on the distance between the positions of neighbouring slots. Larger distances shrank to this limit."""
    kl: float | None
    """KL(before ‖ after) in nats per token, between the next-token distributions before and after the re-basing.

    To compute the distributions, the newest tokens are run again. The value is ``None`` if the token ids are not known,
    or if this re-basing finished an interrupted one.
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
    total_slots: int
    """Filled slots of all layers and KV heads together."""
    capacity: int
    """Slots per KV head and row when the memory is full."""
    rows: int
    num_compactions: int
    num_prompt_tokens: int
    """Tokens consumed in forwards of more than one token, summed over rows."""
    num_new_tokens: int
    """Tokens consumed one at a time, summed over rows. A turn's last sampled token is consumed by the next turn."""
    seconds_compacting: float
    stopped: str | None = None
    """Reason why generation was stopped early; ``None`` if it was not."""
    compactions: Annotated[tuple[CompactionReport, ...], FailFast()] = ()
    """Reports of all compactions; only the newest 128 contain ``layers`` and ``worst_spans``."""
    rebases: Annotated[tuple[RebaseReport, ...], FailFast()] = ()


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
