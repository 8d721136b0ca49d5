"""Prometheus metrics of bytes, conversations, tokens, compactions and times; each server has its own registry."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from agentmem import specs

if TYPE_CHECKING:
    from agentmem import CompactionReport, Runtime
    from agentmem.serving.conversations import Conversations
    from agentmem.serving.pieces import Usage
    from agentmem.sessions import RuntimeStats

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_ERRORS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


class _Moment(Collector):
    """Collector of gauges whose values are read from the server whenever the metrics are requested."""

    def __init__(self, runtime: Runtime, conversations: Conversations, turns: Sized) -> None:
        self._runtime, self._conversations, self._turns = runtime, conversations, turns

    def collect(self) -> Iterable[GaugeMetricFamily]:
        stats = self._runtime.stats
        held = sum(each.bytes for each in self._conversations)
        for name, text, value in (
            ("agentmem_cap_bytes", "The cap.", stats.cap_bytes),
            (
                "agentmem_charged_bytes",
                "Of the cap: leases of running turns, and what idle memories hold.",
                stats.charged_bytes,
            ),
            ("agentmem_held_bytes", "Of all conversations when they were used last, in memory and on disk.", held),
            ("agentmem_conversations", "Held, in memory, on disk or kept.", len(self._conversations)),
            ("agentmem_turns", "Requests to the model that run or wait.", len(self._turns)),
            ("agentmem_waiting", "Turns that wait for their lease.", stats.waiting),
            ("agentmem_feeding", "Turns that wait for the next forward.", stats.feeding),
            ("agentmem_sequences_per_forward", "Sessions that a forward fed, lately.", stats.sequences_per_forward),
            ("agentmem_tokens_per_second", "Fed to the model, lately, while it ran.", stats.tokens_per_second),
            ("agentmem_pause_p95_seconds", "Compactions, lately: 95th percentile.", stats.pause_p95_seconds),
        ):
            yield GaugeMetricFamily(name, text, value)
        yield _bytes(stats)
        sessions = GaugeMetricFamily("agentmem_sessions", "Sessions by state.", labels=["state"])
        for state in ("active", "idle", "on_disk"):
            sessions.add_metric([state], getattr(stats, state))
        yield sessions


def _bytes(stats: RuntimeStats) -> GaugeMetricFamily:
    made = GaugeMetricFamily("agentmem_bytes", "Of the cap, by what they are charged for.", labels=["kind"])
    for kind in ("running", "running_room", "idle", "idle_room"):
        made.add_metric([kind], getattr(stats, f"{kind}_bytes"))
    made.add_metric(["free"], stats.cap_bytes - stats.charged_bytes)
    return made


class Metrics:
    """The metrics of one server: counters and histograms, and gauges of its present state."""

    def __init__(self, runtime: Runtime, conversations: Conversations, turns: Sized) -> None:
        """Begin with empty counters; ``turns`` is the live collection of turns that run or wait."""
        self.registry = CollectorRegistry()
        self.registry.register(_Moment(runtime, conversations, turns))
        own = self.registry
        self.requests = Counter("agentmem_requests", "HTTP requests.", ["method", "route", "status"], registry=own)
        self._tokens = Counter("agentmem_tokens", "Read, found in a memory, and written.", ["kind"], registry=own)
        self._compactions = Counter("agentmem_compactions", "By policy.", ["policy"], registry=own)
        self._seconds = Histogram("agentmem_compaction_seconds", "Of one compaction.", registry=own, buckets=_SECONDS)
        self._errors = Histogram(
            "agentmem_compaction_output_error",
            "Relative error of the attention output, on queries held out from the fit; mean over layers.",
            registry=own,
            buckets=_ERRORS,
        )
        self._first = Histogram(
            "agentmem_first_token_seconds", "From a request to its first token.", registry=own, buckets=_SECONDS
        )
        self._rate = Histogram(
            "agentmem_reply_tokens_per_second", "Of one reply, after its first token.", registry=own, buckets=_RATES
        )

    def turn(self, usage: Usage, reports: Sequence[CompactionReport]) -> None:
        """Count the tokens and compactions of a turn that ended."""
        for kind, count in (("read", usage.prompt - usage.cached), ("cached", usage.cached), ("written", usage.reply)):
            self._tokens.labels(kind).inc(max(0, count))
        for report in reports:
            self._compactions.labels(specs.plain_name(report.policy)).inc()
            self._seconds.observe(report.seconds)
            if report.output_error is not None:
                self._errors.observe(report.output_error)

    def reply(self, first: float, rest: float, tokens: int) -> None:
        """Record the speed of a reply that ended.

        ``first`` is the time from the request to the first token and ``rest`` the time after that, both in seconds;
        ``tokens`` counts all tokens of the reply.
        """
        self._first.observe(first)
        if tokens > 1 and rest > 0:
            self._rate.observe((tokens - 1) / rest)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
