"""What happened, as pydantic models with stable JSON keys. Values only: no tensors, no I/O."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Outcome = Literal["compacted", "retried", "evicted"]


class _Report(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerReport(_Report):
    """One layer of one compaction. Errors are measured on reference queries held out from the fit."""

    layer: int
    slots_before: int
    slots_after: int
    output_error: float | None
    """Relative L2 error of the segment's local attention output; ``None`` without reference queries."""
    log_mass_error: float | None
    """Mean absolute error of the log of the segment's attention mass."""
    bias_min: float
    bias_max: float
    condition: float
    fallbacks: tuple[str, ...] = ()
    outcome: Outcome = "compacted"


class SpanError(_Report):
    """Tokens ``start .. stop`` of the transcript, and the errors of their held-out queries over all layers."""

    start: int
    stop: int
    output_error: float
    log_mass_error: float


class SummaryReport(_Report):
    """A summary that replaced a segment before it was compacted."""

    text: str
    tokens: int
    """Of the summary with its lead: one slot per head each, before the compactor had its turn."""
    start: int
    stop: int
    """The tokens of the transcript that it stands for, ``start .. stop``."""
    position: int
    """Of its first slot."""
    slots_before: int
    slots_after: int
    """Slots of the whole row, before and after the segment was replaced."""


class CompactionReport(_Report):
    """One compaction of one row."""

    index: int
    row: int
    policy: str
    tokens_seen: int
    """Tokens that the row had consumed when it was compacted."""
    slots_before: int
    slots_after: int
    """Sums over layers and KV heads."""
    bytes_before: int
    bytes_after: int
    bytes_peak: int
    """Allocated bytes of the whole memory (R + T) before, after and at the peak of this compaction."""
    queries: str = "none"
    """The sources of the reference queries."""
    outside_cap: bool = False
    """Whether the reference queries came from an oracle whose cost the cap does not bound."""
    probe_tokens: int
    """Tokens of the transient forward."""
    seconds: float
    seconds_by_stage: dict[str, float]
    """``probe`` (the transient forward: what the other stages leave), ``probe text`` (finding what it reads), ``fit``,
    ``check`` (held-out errors), ``commit``, ``headroom``; ``survey`` (budgets that compare heads) and ``summary``
    (writing one) where there are any."""
    layers: tuple[LayerReport, ...]
    faults: tuple[str, ...] = ()
    """What went wrong and was repaired, one line each."""
    summary: SummaryReport | None = None
    """What the model wrote in place of the segment, where the policy asked for it and it was accepted."""
    worst_spans: tuple[SpanError, ...] = ()
    """Where the compacted memory answers worst, among the spans whose queries were held out."""

    def brief(self) -> CompactionReport:
        """The same without what it says of single layers and spans."""
        return self.model_copy(update={"layers": (), "worst_spans": ()})

    @property
    def output_error(self) -> float | None:
        """Mean over layers of the held-out output error; ``None`` where nothing is said of layers."""
        return _mean([layer.output_error for layer in self.layers])

    @property
    def log_mass_error(self) -> float | None:
        """Mean over layers of the held-out log-mass error."""
        return _mean([layer.log_mass_error for layer in self.layers])


class RebaseReport(_Report):
    """One re-basing of one row: its slots moved to lower positions."""

    row: int
    tokens_seen: int
    position_before: int
    """The next position before and after."""
    position_after: int
    gap: int
    """The most positions between neighbouring slots that were left, in the head where it had to be least."""
    kl: float | None
    """KL(before ‖ after), nats a token, of what follows the newest tokens when they are read again; ``None`` where
    there are no ids, or an interrupted re-basing went on."""
    seconds: float


class RunReport(_Report):
    """The life of one memory so far."""

    model: str
    policy: str
    cap_bytes: int
    peak_bytes: int
    """The most that R + T ever came to, by the ledger."""
    resident_bytes: int
    held_slots: int
    capacity: int
    """Slots per KV head and row when the memory is full."""
    rows: int
    num_compactions: int
    num_prompt_tokens: int
    """Tokens consumed in forwards of more than one token, all rows together."""
    num_new_tokens: int
    """Tokens consumed one at a time, all rows together; a turn's last sampled token is consumed by the next turn."""
    seconds_compacting: float
    stopped: str | None = None
    """Why generation was stopped early, if it was."""
    compactions: tuple[CompactionReport, ...] = ()
    """All of them; only the newest 128 say something of single layers and spans."""
    rebases: tuple[RebaseReport, ...] = ()


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
