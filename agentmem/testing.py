"""Provide helpers for tests: check the invariants of policies, measure allocated bytes exactly, make tiny models."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

from agentmem.compaction.budgets import check_budgets
from agentmem.compaction.checks import validate
from agentmem.contracts import (
    BudgetRequest,
    Budgets,
    Compaction,
    Compactor,
    Curve,
    HeadCompaction,
    HeadSegment,
    ModelIdentity,
    Policy,
    Reference,
    Segment,
    SegmentShape,
    Survey,
)
from agentmem.errors import PolicyContractBroken, SettingsRefused
from agentmem.plugins import policy as named_policy


def peak_allocated(call: Callable[[], object]) -> int:
    """Return the most bytes that ``call`` held allocated in PyTorch's CPU memory at one moment, its result included.

    The number is exact: it is the highest running sum of the allocations that PyTorch's profiler records. Buffers that
    other libraries allocate themselves, such as those of BLAS, are not counted. Freeing a block that was allocated
    before the call does not lower the sum. Other threads must not allocate during the call.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else profiles write to stderr; read once, by the first profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        first = torch.empty(1)
        call()  # its result is freed within the profile, so that every block of the call has its release
    recorded = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None  # noqa: S101, PT018  # set by the context's exit
    events = sorted(_allocations(recorded.kineto_results.experimental_event_tree()), key=lambda event: event.time)
    start = next(event.total for event in events if event.address == first.data_ptr() and event.size > 0)
    return _peak(events, start)


class _Allocation(NamedTuple):
    """An allocation, or with a negative size a release: time in ns, address, bytes, PyTorch's total after it."""

    time: int
    address: int
    size: int
    total: int


def _peak(events: Sequence[_Allocation], start: int) -> int:
    """Return the highest total of the events above ``start``, as if older blocks had not been released.

    PyTorch computes the totals under a lock. A sum in the order of time would be wrong where the clocks of two cores
    differ: a block's release would then come after the next block's allocation. A block is older than the call if its
    address has more releases than allocations.
    """
    excess = Counter[int]()
    for event in events:
        excess[event.address] += -1 if event.size > 0 else 1
    older, peak = 0, 0
    for event in events:
        if event.size < 0 and excess[event.address] > 0:
            excess[event.address] -= 1
            older -= event.size
        peak = max(peak, event.total - start + older)
    return peak


def _allocations(events: Sequence[_ProfilerEvent]) -> Iterator[_Allocation]:
    """Yield every allocation and release in the events."""
    for event in events:
        found = event.extra_fields
        if isinstance(found, _ExtraFields_Allocation):
            yield _Allocation(event.start_time_ns, found.ptr, found.alloc_size, found.total_allocated)
        yield from _allocations(event.children)


# ---- tiny models

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"]


def tiny_model(family: Family, *, seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> Any:
    """Make a tiny random model of a family, seeded by ``seed``, in eval mode.

    The model has 2 layers, 4 query heads and 2 KV heads of dimension 16, a vocabulary of 128 tokens, 4,096 positions
    and no end token. Its weights are spread widely, so that attention is not uniform. ``config`` overrides fields of
    its configuration, such as ``num_hidden_layers``, ``sliding_window`` or ``layer_types``. The global random state is
    left unchanged.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, object] = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if family == "gemma3_text":
        fields |= {"query_pre_attn_scalar": 16, "sliding_window": 32}
        fields["layer_types"] = ["sliding_attention", "full_attention"]
    settings = AutoConfig.for_model(family, **(fields | config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(settings, dtype=dtype).eval()


# ---- the invariants of a policy


@dataclass(frozen=True)
class Case:
    """A segment for :func:`check_policy`: KV head ``h`` has ``held[h]`` slots, which are compacted to ``slots[h]``."""

    name: str
    held: tuple[int, ...] = (40, 40, 40)
    slots: tuple[int, ...] = (20, 20, 20)
    group: int = 3
    queries: int = 64
    key_dim: int = 16
    value_dim: int = 16
    dtype: torch.dtype = torch.float32
    spread: float = 1.0
    """Factor on the keys: with 1,000 the logits are huge and each query attends to one slot only."""
    bias: float = 0.0
    """Standard deviation of the random β that the slots have before the compaction."""
    duplicates: bool = False
    """Whether every key of the second half repeats a key of the first half."""
    equal_queries: bool = False
    """Whether all queries of a query head are equal."""
    weights: tuple[float, ...] = (1.0,)
    """The weight of each part of the queries; the queries are split evenly into as many parts as there are weights."""

    @property
    def shape(self) -> SegmentShape:
        """Return the sizes that a plan would pass to ``Compactor.workspace`` for this case."""
        return SegmentShape(
            heads=len(self.held),
            group=self.group,
            slots=max(self.held),
            budget=max(self.slots),
            queries=self.queries,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            itemsize=self.dtype.itemsize,
        )


CASES = (
    Case("equal heads"),
    Case("ragged heads, one query head each", held=(40, 7, 23), slots=(11, 7, 1), group=1),
    Case("seven query heads a KV head", held=(24, 24), slots=(12, 12), group=7, queries=16),
    Case("one query", group=1, queries=1),
    Case("fewer queries than slots", group=1, queries=5),
    Case("equal queries", equal_queries=True),
    Case("three parts of other weights", weights=(1.0, 0.25, 3.0)),
    Case("duplicate keys", duplicates=True),
    Case("old β", bias=2.0),
    Case("huge logits", spread=1e3),
    Case("bfloat16", dtype=torch.bfloat16),
    Case("float16", dtype=torch.float16),
    Case("keys wider than values", key_dim=24, value_dim=8),
    Case("all slots kept", slots=(40, 40, 40)),
    Case("one slot kept", slots=(1, 1, 1)),
    Case("512 slots halved", held=(512, 512), slots=(256, 256), queries=256, key_dim=64, value_dim=64),
)


@dataclass(frozen=True, slots=True)
class InvariantResult:
    """The result of checking one invariant on one case; ``broken`` describes a violation or is ``None``."""

    invariant: str
    case: str
    broken: str | None


@dataclass(frozen=True)
class PolicyCheck:
    """The results for every invariant on every case. ``str()`` gives a line per invariant and a line per violation."""

    policy: str
    results: tuple[InvariantResult, ...]

    @property
    def broken(self) -> tuple[InvariantResult, ...]:
        """Return the results whose invariant did not hold."""
        return tuple(result for result in self.results if result.broken is not None)

    def raise_if_broken(self) -> None:
        """Raise :class:`PolicyContractBroken` with ``str(self)`` if any invariant did not hold."""
        if self.broken:
            raise PolicyContractBroken(str(self))

    def __str__(self) -> str:
        """Write the results as text: a line per invariant and a line per violation."""
        by_invariant = defaultdict(list)
        for result in self.results:
            by_invariant[result.invariant].append(result)
        lines = [f"policy {self.policy!r}: {len(self.results)} checks, {len(self.broken)} broken"]
        for invariant, results in by_invariant.items():
            breaches = [result for result in results if result.broken is not None]
            lines.append(f"  {'BROKEN' if breaches else 'held'}: {invariant} ({len(results)} cases)")
            lines += [f"    {breach.case}: {breach.broken}" for breach in breaches]
        return "\n".join(lines if self.results else [*lines, "  it never compacts, so there is nothing to hold"])


def check_policy(policy: str | Policy, *, shapes: Sequence[Case] = CASES, seed: int = 0) -> PolicyCheck:
    """Check a policy against the invariants of :class:`agentmem.contracts.Compactor` and of ``Budgets``.

    The compactor is checked on the cases in ``shapes``, with random segments seeded by ``seed``; its allocated bytes
    are measured with :func:`peak_allocated`. The budgets are checked on a few fixed examples, which give the number of
    slots of each head in each layer. In a test, call ``check_policy("my-policy").raise_if_broken()``.
    """
    made = named_policy(policy)
    results: list[InvariantResult] = []
    if made.compactor is not None:
        for case in shapes:
            results += _compactor_laws(made, made.compactor, case, seed)
    if made.budgets is not None:
        results += _budget_invariants(made.budgets)
    return PolicyCheck(made.name, tuple(results))


def make_segment(case: Case, policy: Policy, *, seed: int = 0) -> Segment:
    """Make a random segment for a case, with reference queries and scores if the policy uses them."""
    compactor = policy.compactor
    if compactor is None:
        raise SettingsRefused(f"policy {policy.name!r} never compacts, so it has no segment; give one that compacts")
    generator = torch.Generator().manual_seed(seed)
    heads = tuple(_make_head(case, held, generator, scores=compactor.scores != "none") for held in case.held)
    references = _make_references(case, len(heads), generator) if policy.queries.parts else ()
    workspace = compactor.workspace(case.shape)
    return Segment(0, heads, references, case.key_dim**-0.5, torch.Generator().manual_seed(seed), workspace)


def _make_references(case: Case, heads: int, generator: torch.Generator) -> tuple[Reference, ...]:
    queries = torch.randn(case.queries, heads * case.group, case.key_dim, generator=generator)
    if case.equal_queries:
        queries = queries[:1].repeat(case.queries, 1, 1)
    # The runtime passes queries as a transposed view like this one.
    queries = queries.to(case.dtype).transpose(0, 1)
    marks = [case.queries * part // len(case.weights) for part in range(len(case.weights) + 1)]
    spans = zip(pairwise(marks), case.weights, strict=True)
    return tuple(Reference(queries[:, start:stop], weight) for (start, stop), weight in spans)


def _make_head(case: Case, held: int, generator: torch.Generator, *, scores: bool) -> HeadSegment:
    keys = torch.randn(held, case.key_dim, generator=generator) * case.spread
    if case.duplicates:
        keys[held - held // 2 :] = keys[: held // 2]
    return HeadSegment(
        keys=keys.to(case.dtype),
        values=torch.randn(held, case.value_dim, generator=generator).to(case.dtype),
        bias=torch.randn(held, generator=generator) * case.bias,
        positions=torch.arange(16, 16 + held, dtype=torch.int32),
        scores=torch.rand(held, generator=generator) if scores else None,
    )


def _compactor_laws(policy: Policy, compactor: Compactor, case: Case, seed: int) -> Iterator[InvariantResult]:
    def result(invariant: str, broken: str | None) -> InvariantResult:
        return InvariantResult(invariant, case.name, broken)

    segment, untouched = (make_segment(case, policy, seed=seed) for _ in range(2))
    global_state = torch.get_rng_state()
    try:
        first = compactor.compact(segment, case.slots)
    except Exception as error:  # noqa: BLE001 - whatever a policy raises is its verdict
        yield result("compact() ends", f"{type(error).__name__}: {error}")
        return
    yield result("compact() ends", None)
    yield result("the contract of every commit", _broken_contract(first, segment, case, policy.name))
    yield result("the segment is not written", None if _equal(segment, untouched) else "a tensor was changed")
    yield result(
        "only the segment's generator is used",
        None if torch.equal(global_state, torch.get_rng_state()) else "the global random state moved",
    )
    again = compactor.compact(untouched, case.slots)
    yield result("the same segment gives the same result", None if _same(first, again) else "it differs")
    yield result(
        "permuting the KV heads permutes the result", _broken_permutation(compactor, first, case, policy, seed)
    )
    yield result("what is allocated stays within workspace()", _broken_workspace(compactor, case, policy, seed))
    if type(compactor).survey is not Compactor.survey:
        surveyed = make_segment(case, policy, seed=seed)
        yield result("a survey scores every slot", _broken_survey(compactor, surveyed, compactor.workspace(case.shape)))


def _broken_contract(compaction: Compaction, segment: Segment, case: Case, name: str) -> str | None:
    try:
        validate(compaction, segment, case.slots, policy=name)
    except PolicyContractBroken as error:
        return str(error)
    return None


def _broken_permutation(
    compactor: Compactor, straight: Compaction, case: Case, policy: Policy, seed: int
) -> str | None:
    segment = make_segment(case, policy, seed=seed)
    references = tuple(replace(part, queries=_heads_turned(part.queries, case)) for part in segment.references)
    turned = replace(segment, heads=segment.heads[::-1], references=references)
    heads = compactor.compact(turned, case.slots[::-1]).heads
    same = _same(Compaction(heads[::-1]), straight, tolerance=1e-4)
    return None if same else "reversed heads gave other slots, β or values"


def _heads_turned(queries: torch.Tensor, case: Case) -> torch.Tensor:
    per_head = queries.reshape(len(case.held), case.group, *queries.shape[1:])
    return per_head.flip(0).reshape(queries.shape)


def _broken_workspace(compactor: Compactor, case: Case, policy: Policy, seed: int) -> str | None:
    segment = make_segment(case, policy, seed=seed)
    promised = compactor.workspace(case.shape)
    peak = peak_allocated(lambda: compactor.compact(segment, case.slots))
    return None if peak <= promised else f"{peak} bytes were allocated, workspace() promises {promised}"


def _broken_survey(compactor: Compactor, segment: Segment, promised: int) -> str | None:
    peak = peak_allocated(lambda: compactor.survey(segment))
    if peak > promised:
        return f"{peak} bytes were allocated, workspace() promises {promised}"
    scores = compactor.survey(segment).scores
    if [score.shape for score in scores] != [head.bias.shape for head in segment.heads]:
        return f"scores of {[list(score.shape) for score in scores]} for {[head.slots for head in segment.heads]} slots"
    finite = all(bool(torch.isfinite(score).all()) for score in scores)
    return None if finite else "a score is not finite"


def _equal(left: Segment, right: Segment) -> bool:
    def tensors(segment: Segment) -> Iterator[torch.Tensor | None]:
        yield from (part.queries for part in segment.references)
        for head in segment.heads:
            yield from (head.keys, head.values, head.bias, head.positions, head.scores)

    return all(_close(one, other) for one, other in zip(tensors(left), tensors(right), strict=True))


def _same(left: Compaction, right: Compaction, tolerance: float = 0.0) -> bool:
    def tensors(head: HeadCompaction) -> tuple[torch.Tensor | None, ...]:
        return (head.bias, head.values, head.keys, head.scores)

    return all(
        torch.equal(one.kept, other.kept)
        and all(_close(a, b, tolerance) for a, b in zip(tensors(one), tensors(other), strict=True))
        for one, other in zip(left.heads, right.heads, strict=True)
    )


def _close(left: torch.Tensor | None, right: torch.Tensor | None, tolerance: float = 0.0) -> bool:
    if left is None or right is None:
        return left is right
    return left.shape == right.shape and torch.allclose(left, right, rtol=tolerance, atol=tolerance)


_TABLES: Mapping[str, tuple[tuple[int, ...], ...]] = {
    "equal heads": ((20, 20, 20), (20, 20, 20)),
    "ragged heads": ((3, 40, 17), (0, 9, 1)),
    "one head": ((12,),),
}


def _budget_invariants(budgets: Budgets) -> Iterator[InvariantResult]:
    for name, held in _TABLES.items():
        try:
            budgets.check(ModelIdentity("the kit's", None, tuple(map(len, held))))
        except ValueError:  # budgets made for another model's heads must refuse this table
            yield InvariantResult("budgets for other heads are refused at once", name, None)
            continue
        full = sum(map(sum, held))
        for total in (0, 1, full // 3, full - 1, full, full + 5):
            case = f"{name}, {total} of {full} slots"
            surveys = _surveys(held) if budgets.needs_survey or budgets.needs_curves else ()
            request = BudgetRequest(held, total, 0, surveys)
            try:
                allocated = budgets.allocate(request)
                again = budgets.allocate(request)
            except Exception as error:  # noqa: BLE001 - whatever a policy raises is its verdict
                yield InvariantResult("allocate() ends", case, f"{type(error).__name__}: {error}")
                continue
            yield InvariantResult(
                "the invariants of every allocation", case, _broken_budgets(budgets, request, allocated)
            )
            yield InvariantResult(
                "the same request gives the same budgets", case, None if allocated == again else "it differs"
            )


def _broken_budgets(budgets: Budgets, request: BudgetRequest, allocated: tuple[tuple[int, ...], ...]) -> str | None:
    try:
        check_budgets("this", budgets, request, allocated)
    except PolicyContractBroken as error:
        return str(error)
    return None


def _surveys(held: tuple[tuple[int, ...], ...]) -> tuple[Survey, ...]:
    """Make deterministic surveys: scores fall from slot to slot, and errors fall with the number of kept slots."""
    return tuple(
        Survey(
            layer,
            tuple(torch.linspace(1, 0, slots) / math.sqrt(head + 1) for head, slots in enumerate(row)),
            tuple(Curve((1, max(2, slots)), (1.0 / (head + 1), 0.0), (0.5, 0.0)) for head, slots in enumerate(row)),
        )
        for layer, row in enumerate(held)
    )
