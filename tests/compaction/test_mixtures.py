"""Mixtures of reference queries on tiny models: what a compactor is given, what the report says, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from agentmem.contracts import Compaction, Compactor, HeadCompaction, Policy, Queries, Segment, SegmentShape
from agentmem.errors import SettingsRefused
from agentmem.hf import CappedCache
from agentmem.memory import forwards
from agentmem.memory.memory import Memory
from agentmem.planning.pricing import HELD_OUT
from support import tiny

WORDY = {name: policy.queries for name, policy in tiny.KINDS.items() if policy.queries.parts}
MIXTURES: dict[str, Queries] = WORDY | {
    "all but an oracle": Queries.of("replay+spread+live+context+random+repeat+focus", 80, focus=tiny.FOCUS),
    "transcript": Queries.of("transcript"),
    "transcript+live": Queries.of("transcript+live*2", 24),
}
EVERY = pytest.mark.parametrize("name", MIXTURES)


@dataclass
class Spy(Compactor):
    """Another compactor that remembers what it was asked to fit to: source, weight, tokens and span of every part."""

    inner: Compactor
    seen: list[list[tuple[str, float, int, tuple[int, int] | None]]] = field(default_factory=list)
    queries: list[list[torch.Tensor]] = field(default_factory=list)

    def workspace(self, shape: SegmentShape) -> int:
        """What the other needs."""
        return self.inner.workspace(shape)

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """Look, then hand over."""
        self.seen.append([(part.source, part.weight, part.tokens, part.span) for part in segment.references])
        self.queries.append([part.queries.clone() for part in segment.references])
        return self.inner.compact(segment, slots)


def policy(name: str) -> Policy:
    """AM halving with that mixture."""
    return replace(tiny.KINDS["replay"], queries=MIXTURES[name])


def spied(queries: Queries) -> tuple[Spy, Policy]:
    """AM halving with these queries, and who watches it."""
    halving = tiny.KINDS["replay"]
    assert halving.compactor is not None
    spy = Spy(halving.compactor)
    return spy, replace(halving, compactor=spy, queries=queries)


def exact(made: Policy, **settings: Any) -> Any:
    """The smallest cap that the plan of 48 slots per head asks for; a fault is an error."""
    settings = {"on_failure": "raise"} | settings
    return tiny.capped_by(made, cap=tiny.need(made, tiny.llama(), **settings), **settings)


def slots(memory: CappedCache) -> list[torch.Tensor]:
    """Keys, values and β of every layer of row 0."""
    runs = [run for store in memory.memory.sequences[0].stores if store is not None for run in store.runs()]
    return [tensor.clone() for run in runs for tensor in (run.keys, run.values, run.bias) if tensor is not None]


# ---- what every mixture keeps


@EVERY
def test_a_mixture_runs_under_the_smallest_cap_and_says_what_it_was(name: str) -> None:
    """Three compactions without a fault; the ledger's peak is within the cap; the report names the sources."""
    with exact(policy(name)) as memory:
        tiny.feed(memory, tiny.ids(100))
        assert memory.report().num_compactions == 3
        assert memory.report().peak_bytes <= memory.plan.cap_bytes
        for report in memory.compactions:
            assert report.faults == ()
            assert report.queries == str(MIXTURES[name])
            assert report.outside_cap == ("transcript" in name)
            assert report.output_error is not None
            assert 0 <= report.output_error < 1


@EVERY
def test_a_mixture_is_deterministic(name: str) -> None:
    """The same tokens give the same slots to the bit."""
    runs = []
    for _ in range(2):
        with tiny.capped_by(policy(name)) as memory:
            tiny.feed(memory, tiny.ids(100))
            runs.append(slots(memory))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["all but an oracle", "transcript+live", "random"])
def test_a_row_in_a_batch_is_the_row_alone(name: str) -> None:
    """Rows share nothing: each has its own probe, samples and random draws, and gives what it gives alone."""
    settings = {"max_new_tokens": 40, "do_sample": False}
    prompts = torch.cat([tiny.ids(60, seed=1), tiny.ids(60, seed=2)])
    with tiny.capped_by(policy(name)) as memory:
        together = tiny.llama().generate(prompts, past_key_values=memory, **settings)
        assert memory.report().num_compactions >= 4
    for row in range(2):
        with tiny.capped_by(policy(name)) as memory:
            alone = tiny.llama().generate(prompts[row : row + 1], past_key_values=memory, **settings)
        assert together[row].tolist() == alone[0].tolist()


def test_a_seed_draws_the_random_queries_and_nothing_else() -> None:
    """Another seed gives other slots where queries are drawn, and the same where none are."""
    for name, differ in (("random", True), ("live+replay", False)):
        runs = []
        for seed in (0, 1):
            with tiny.capped_by(policy(name), seed=seed) as memory:
                tiny.feed(memory, tiny.ids(60))
                runs.append(slots(memory))
        assert any(not torch.equal(one, other) for one, other in zip(*runs, strict=True)) == differ


# ---- what a compactor is given


def test_parts_arrive_with_their_weights_sources_and_spans() -> None:
    """Pieces of the probe in its order, then the stored parts; each without its oldest eighth, which is held out."""
    words = len(tiny.tokenizer(tiny.FOCUS, add_special_tokens=False)["input_ids"])
    spy, made = spied(Queries.of("replay:2*3+live*0.5+focus+spread:4+random", 90, focus=tiny.FOCUS))
    with tiny.capped_by(made, chunk=96) as memory:
        tiny.feed(memory, tiny.ids(49))
        plan = memory.plan
    assert plan.probe_tokens == 70
    assert (len(spy.seen), plan.stored[0], plan.drawn_tokens) == (2, 10, 10)
    first = [("focus", 1.0, words, None)]
    spread, replay = spy.seen[0][1], spy.seen[0][2]
    assert [part[0] for part in spy.seen[0]] == ["focus", "spread", "replay", "live", "random"]
    assert spy.seen[0][:1] == first
    assert spread[3] is not None
    assert replay[3] is not None
    assert spread[3][0] >= 4 + (spread[3][1] - 4) // HELD_OUT, "the prefix is never run again"
    assert spread[3][1] <= replay[3][0]
    assert replay[3][1] == 48
    assert (spread[1], replay[1]) == (1.0, 3.0)
    for source, size in (("live", 10), ("random", 10)):
        part = next(part for part in spy.seen[0] if part[0] == source)
        assert part == (source, 0.5 if source == "live" else 1.0, size - size // HELD_OUT, None)
    assert spy.seen[1] == spy.seen[0], "every layer is given the same parts"


def test_live_queries_are_those_that_the_model_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compactor is given the newest tokens' own queries of its layer, post-RoPE, bit for bit."""
    asked: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    append = forwards.append_one

    def watched(memory: Memory, row: Any, layer: int, queries: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked[layer].append(queries.detach().clone())
        return append(memory, row, layer, queries, *rest)

    monkeypatch.setattr(forwards, "append_one", watched)
    spy, made = spied(Queries.of("live", 6))
    with tiny.capped_by(made) as memory:
        tiny.feed(memory, tiny.ids(48), pieces=7)
        memory.compact()
    for layer, (given,) in enumerate(spy.queries):
        newest = torch.cat(asked[layer], 1)[:, -6:]
        assert given.shape == newest.shape
        assert sorted(given[0].tolist()) == sorted(newest[0].tolist())
        assert sorted(given[3].tolist()) == sorted(newest[3].tolist())


def test_context_is_a_sample_of_everything_read() -> None:
    """After many compactions its queries still come from the first token on."""
    spy, made = spied(Queries.of("context", 16))
    with tiny.capped_by(made) as memory:
        tiny.feed(memory, tiny.ids(200))
        (sample,) = memory.memory.sequences[0].samples[0]
        assert memory.report().num_compactions >= 5
        assert sample.stride * sample.filled >= 200 - sample.stride
        assert 8 <= sample.filled <= 16
    firsts = {tuple(given[0][0, 0].tolist()) for given in spy.queries[2::2]}
    assert len(firsts) <= 3, "the oldest kept token stays the same while the sample thins out"


def test_spread_spans_move_and_the_report_names_the_worst() -> None:
    """Every compaction runs other spans again; spans that answer badly are in its report, worst first."""
    spy, made = spied(Queries.of("spread:7+replay", 160))
    with tiny.capped_by(made, chunk=200, max_slots=300) as memory:
        tiny.feed(memory, tiny.ids(900))
        reports = memory.compactions
    assert len(reports) >= 4
    spans = [tuple(part[3] for part in layer if part[0] == "spread") for layer in spy.seen[::2]]
    assert len(set(spans)) == len(spans)
    for report, held in zip(reports, spans, strict=True):
        worst = report.worst_spans
        assert len(worst) == 3 or len(worst) == len(held) + 1
        assert [each.output_error for each in worst] == sorted((each.output_error for each in worst), reverse=True)
        assert all(0 <= each.start < each.stop <= report.tokens_seen for each in worst)


def test_a_replay_alone_names_no_worst_span() -> None:
    """There is nothing to compare it with."""
    with tiny.capped_by(policy("replay")) as memory:
        tiny.feed(memory, tiny.ids(60))
        assert memory.compactions[0].worst_spans == ()


# ---- the oracle


def test_a_transcript_is_run_whole_and_said_to_be_outside_the_cap() -> None:
    """Every token that the row has seen, however many; R stays under the cap; the plan counts a chunk's probe only."""
    with exact(policy("transcript")) as memory:
        tiny.feed(memory, tiny.ids(120), pieces=5)
        report = memory.report()
        assert [each.probe_tokens for each in report.compactions] == [each.tokens_seen for each in report.compactions]
        assert report.compactions[-1].probe_tokens > memory.plan.probe_tokens == tiny.SETTINGS["chunk"]
        assert all(each.outside_cap for each in report.compactions)
        assert report.peak_bytes <= report.cap_bytes


# ---- texts


def test_texts_need_a_tokenizer() -> None:
    """Without one the parts that say something are refused by name, before any work."""
    with pytest.raises(SettingsRefused, match=r"'am-halving'.*'focus'.*needs a tokenizer.*'replay'"):
        tiny.agentmem.api.wrap(tiny.llama(), cap="1MiB", policy=policy("focus+replay"))


class Nothing(Compactor):
    """Keeps the newest slots and takes no queries."""

    def workspace(self, shape: SegmentShape) -> int:
        """The indices."""
        return shape.heads * shape.budget * 8 + 1024

    def compact(self, segment: Segment, slots: Sequence[int]) -> Compaction:
        """The last slots."""
        assert segment.references == ()
        pairs = zip(segment.heads, slots, strict=True)
        return Compaction(tuple(HeadCompaction(torch.arange(head.slots - n, head.slots)) for head, n in pairs))


def test_a_policy_without_parts_runs_no_probe() -> None:
    """Its report says so, and has no errors."""
    made = replace(tiny.KINDS["window"], compactor=Nothing())
    with exact(made) as memory:
        tiny.feed(memory, tiny.ids(60))
        (report,) = memory.compactions
    assert (report.queries, report.probe_tokens, report.outside_cap) == ("none", 0, False)
    assert (report.output_error, report.log_mass_error, report.worst_spans) == (None, None, ())
