"""Selectors and fits on one head's real keys, values and queries: time, and errors on a true continuation.

    python -m benchmarks.solvers [--heads 4] [--repeats 3] [--prefix 0] [--no-oracles]

One JSON object a line: ``name, slots, kept, median_ms, cpu_ms, select_ms, select_cpu_ms, ratio, log_mass_error,
output_error``, a head each. ``median_ms`` is selection, weights and values together, ``select_ms`` without the values;
``cpu_ms`` is the time of the processor, summed over threads, which other programs disturb less. ``ratio`` is that of
``select_cpu_ms`` to one float32 product [N, d] x [d, T] timed in the same run, in turns. The queries to fit on are
those of the same tokens read again behind the context; the errors, mean |log mass' - log mass| and relative L2, are
those of the text's true next tokens. Without the default model the problems are random.

Oracles, in float64 and orthogonal (every fit by QR of the chosen columns, no Gram): ``oracle-fast`` solves what
``pursuit-fast`` solves; ``oracle-clamped`` is the published way, least squares without bounds or anchor, then clamped.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from agentmem import models
from agentmem.policies.solvers.attention import LocalAttention
from agentmem.policies.solvers.mass import fit_mass
from agentmem.policies.solvers.merging import merge
from agentmem.policies.solvers.nonnegative import bounded_least_squares
from agentmem.policies.solvers.pursuit import EXACT, FAST, PROGRESSIVE, Schedule, pursue, relative_gram
from agentmem.policies.solvers.refine import refine
from agentmem.policies.solvers.selection import importance, top
from agentmem.policies.solvers.values import fit_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SLOTS = 1024
KEPT = (512, 128)
ROWS = 128
PURSUIT_RIDGE = 1e-4
Cache = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Kept keys [t, d], their β [t] and values [t, dv]."""
Times = tuple[float, float, float, float]
"""Milliseconds of the choice by the clock and by the processor, and the same of all."""


@dataclass(frozen=True)
class Problem:
    """One KV head: its slots, the queries to fit on and those to judge by, ``[group, n, d]`` each."""

    keys: torch.Tensor
    values: torch.Tensor
    fit: torch.Tensor
    judge: torch.Tensor
    scale: float

    def attention(self) -> LocalAttention:
        """Of the queries to fit on, over all slots."""
        return LocalAttention((self.fit,), self.keys, torch.zeros(len(self.keys)), self.scale, ROWS)

    def errors(self, cache: Cache) -> tuple[float, float]:
        """Mean error of the log mass and relative L2 error of the output, on the queries to judge by."""
        keys, bias, values = cache
        whole = LocalAttention((self.judge,), self.keys, torch.zeros(len(self.keys)), self.scale, ROWS)
        kept = whole.over(keys, bias)
        missed = wanted = lost = 0.0
        for _, block in whole.blocks():
            weights, log_mass = whole.weights(block)
            output = weights @ self.values
            weights, kept_mass = kept.weights(block)
            missed += float((weights @ values - output).square().sum())
            wanted += float(output.square().sum())
            lost += float((kept_mass - log_mass).abs().sum())
        return lost / whole.count, math.sqrt(missed / wanted)


# ---- problems


def captured(count: int, prefix: int) -> Iterator[Problem]:
    """``count`` heads of the default model, spread over its layers, on the shipped pages."""
    from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
    from transformers.masking_utils import sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from agentmem.evaluation.passage import default_text, passage

    model, tokenizer = models.load(dtype=torch.float32)
    ids = passage(tokenizer, default_text(), offset=0, tokens=2 * SLOTS)[None, : 2 * SLOTS]
    seen: dict[int, tuple[torch.Tensor, ...]] = {}
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        seen[module.layer_idx] = (query[0], key[0], value[0])
        return plain(module, query, key, value, *rest, **more)

    AttentionInterface.register("benchmark_solvers", attend)
    AttentionMaskInterface.register("benchmark_solvers", sdpa_mask)
    model.set_attn_implementation("benchmark_solvers")
    asked = []
    for behind in (ids[:, :SLOTS], ids[:, SLOTS:]):  # the replay, the continuation
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            for piece in (ids[:, :SLOTS], behind):
                model(input_ids=piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        asked.append(dict(seen))
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    group = model.config.num_attention_heads // heads
    for index in range(count):
        layer, head = index * (layers - 1) // max(1, count - 1), index % heads
        (fit, keys, values), (judge, *_) = asked[0][layer], asked[1][layer]
        own, members = slice(prefix, SLOTS), slice(head * group, (head + 1) * group)
        own_keys, own_values = keys[head, own].clone(), values[head, own].clone()
        yield Problem(own_keys, own_values, fit[members].clone(), judge[members].clone(), keys.shape[-1] ** -0.5)


def random_problems(count: int) -> Iterator[Problem]:
    """Heads without a model: clustered keys, and queries that are drawn alike for fitting and judging."""
    for seed in range(count):
        draw = torch.Generator().manual_seed(seed)
        centres = torch.randn(32, 64, generator=draw)
        keys = centres[torch.randint(32, (SLOTS,), generator=draw)] + torch.randn(SLOTS, 64, generator=draw)
        values = torch.randn(SLOTS, 64, generator=draw)
        fit, judge = torch.randn(2, 3, SLOTS, 64, generator=draw)
        yield Problem(keys, values, fit, judge, 64**-0.5)


# ---- methods


@dataclass(frozen=True)
class Chosen:
    """Which slots stay, their β, and the values that the fit of the values starts from."""

    kept: torch.Tensor
    bias: torch.Tensor
    anchor: torch.Tensor


@dataclass(frozen=True)
class Method:
    """A row of the table. What is slow runs ``once`` a head."""

    name: str
    choose: Callable[[Problem, int], Chosen]
    fits_values: bool = True
    refines: bool = False
    once: bool = False
    times: list[Times] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)

    def run(self, problem: Problem, count: int) -> tuple[Cache, Times]:
        """The kept slots, and what they took."""
        began = clocks()
        chosen = self.choose(problem, count)
        chosen_at = clocks()
        keys, bias, values = problem.keys[chosen.kept], chosen.bias, chosen.anchor
        whole = problem.attention()
        if self.fits_values:
            values = fit_values(whole, whole.over(keys, bias), problem.values, values, ridge=3e-3, bound=2.0).value
        if self.refines:
            keys, bias, values = refine(whole, whole.over(keys, bias), problem.values, values).value
        ended = clocks()
        times = (chosen_at[0] - began[0], chosen_at[1] - began[1], ended[0] - began[0], ended[1] - began[1])
        return (keys, bias, values), times


def clocks() -> tuple[float, float]:
    """Milliseconds of the clock on the wall and of the processor."""
    return 1000 * time.perf_counter(), 1000 * time.process_time()


def eviction(problem: Problem, count: int) -> Chosen:
    """Highest attention, β and values as they were."""
    kept = top(importance(problem.attention()).scores, count)
    return Chosen(kept, torch.zeros(count), problem.values[kept])


def highest_attention(problem: Problem, count: int) -> Chosen:
    """The most attended slots, β fitted to the mass."""
    whole = problem.attention()
    found = importance(whole)
    kept = top(found.scores, count)
    plain = whole.over(problem.keys[kept], torch.zeros(count))
    fitted = fit_mass(plain, found.log_mass, ridge=1e-2, bound=3.0, steps=2)
    return Chosen(kept, fitted.value, problem.values[kept])


def highest_attention_exact(problem: Problem, count: int) -> Chosen:
    """The most attended slots, β by the exact bounded fit with the same ridge."""
    whole = problem.attention()
    found = importance(whole)
    kept = top(found.scores, count)
    gram, pull, _ = relative_gram(whole.over(problem.keys[kept], torch.zeros(count)), found.log_mass)
    fitted = bounded_least_squares(gram, pull, low=math.exp(-3), high=math.exp(3), ridge=1e-2)
    return Chosen(kept, fitted.value.log().float(), problem.values[kept])


def merged(problem: Problem, count: int) -> Chosen:
    """The most attended slots; every other one joins the nearest of them, weighted by its mean attention."""
    whole = problem.attention()
    scores = importance(whole).scores
    mean = importance(whole, "mean").scores.clamp_(min=1e-12).log_()
    bias = torch.zeros(len(scores))
    found = merge(problem.keys, problem.values, bias, scores, count, threshold=0.99, log_weights=mean, rest="nearest")
    return Chosen(*found.value)


def merged_prior(problem: Problem, count: int) -> Chosen:
    """The same, and then β fitted with the merged slots as the anchor."""
    start = merged(problem, count)
    whole = problem.attention()
    log_mass = importance(whole).log_mass
    plain = whole.over(problem.keys[start.kept], start.bias)
    fitted = fit_mass(plain, log_mass, ridge=1e-2, bound=3.0, steps=2)
    return Chosen(start.kept, start.bias + fitted.value, start.anchor)


def pursuit(schedule: Schedule, *, margin: int | None = None) -> Callable[[Problem, int], Chosen]:
    """Orthogonal matching pursuit, over all slots or over the ``margin`` most attended ones beyond the count."""

    def choose(problem: Problem, count: int) -> Chosen:
        whole = problem.attention()
        found = importance(whole)
        likely = top(found.scores, len(found.scores) if margin is None else count + margin)
        part = whole.over(problem.keys[likely], torch.zeros(len(likely)))
        pursued = pursue(part, found.log_mass, count, schedule=schedule, ridge=PURSUIT_RIDGE)
        kept = likely[pursued.value.kept]
        return Chosen(kept, pursued.value.log_weights, problem.values[kept])

    return choose


def oracle(fit: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]) -> Callable[[Problem, int], Chosen]:
    """Pursuit of the fast schedule in float64 on the triangular factor of Φ, which has the same inner products."""

    def choose(problem: Problem, count: int) -> Chosen:
        logits = problem.fit.flatten(0, 1).double() @ problem.keys.double().T * problem.scale
        phi = torch.softmax(logits, dim=-1)
        both = torch.linalg.qr(torch.cat((phi, torch.ones(len(phi), 1, dtype=phi.dtype)), dim=1)).R
        phi, ones = both[:, :-1], both[:, -1]
        firm = PURSUIT_RIDGE * float(phi.square().sum()) / phi.shape[1]
        kept: list[int] = []
        weights = phi.new_zeros(0)
        while len(kept) < count:
            descent = phi.T @ (ones - phi[:, kept] @ weights)
            descent[kept] = -math.inf
            kept += top(descent, min(FAST.batch(len(kept)), count - len(kept))).tolist()
            weights = fit(phi[:, kept], ones, firm)
        order = torch.tensor(kept).argsort()
        index = torch.tensor(kept)[order]
        return Chosen(index, weights[order].log().float(), problem.values[index])

    return choose


def bounded_fit(phi: torch.Tensor, ones: torch.Tensor, firm: float) -> torch.Tensor:
    """Anchored at 1 and within bounds: an active set in which every step is an orthogonal least squares."""
    low, high = math.exp(-7), math.exp(7)
    size = phi.shape[1]
    design = torch.cat((phi, firm**0.5 * torch.eye(size, dtype=phi.dtype)))
    target = torch.cat((ones, torch.full((size,), firm**0.5, dtype=phi.dtype)))
    state = torch.zeros(size, dtype=torch.int8)
    for _ in range(100):
        weights = torch.where(state < 0, low, high).to(phi.dtype)
        free = state == 0
        right = target - design[:, ~free] @ weights[~free]
        weights[free] = torch.linalg.lstsq(design[:, free], right[:, None], driver="gels").solution.squeeze(-1)
        slope = design.T @ (design @ weights - target)
        below, above = free & (weights < low), free & (weights > high)
        inward = (state < 0) & (slope < -1e-12) | (state > 0) & (slope > 1e-12)
        if not bool((below | above | inward).any()):
            break
        state[inward] = 0
        state[below], state[above] = -1, 1
    return weights.clamp(low, high)


def clamped_fit(phi: torch.Tensor, ones: torch.Tensor, _firm: float) -> torch.Tensor:
    """Least squares by QR with pivoting, clamped."""
    weights: torch.Tensor = torch.linalg.lstsq(phi, ones[:, None], driver="gelsy").solution.squeeze(-1)
    return weights.clamp(1e-12, math.exp(7))


def methods(*, oracles: bool) -> list[Method]:
    """All rows."""
    rows = [
        Method("eviction", eviction, fits_values=False),
        Method("highest-attention", highest_attention),
        Method("highest-attention-exact", highest_attention_exact),
        Method("highest-attention-refined", highest_attention, refines=True, once=True),
        Method("merged", merged, fits_values=False),
        Method("merged-prior", merged_prior),
        Method("pursuit-fast", pursuit(FAST)),
        Method("pursuit-fast-likely", pursuit(FAST, margin=256)),
        Method("pursuit-progressive", pursuit(PROGRESSIVE)),
        Method("pursuit-exact", pursuit(EXACT), once=True),
        Method("pursuit-fast-refined", pursuit(FAST), refines=True, once=True),
    ]
    if oracles:
        rows.append(Method("oracle-fast", oracle(bounded_fit), once=True))
        rows.append(Method("oracle-clamped", oracle(clamped_fit), once=True))
    return rows


# ---- the table


def product_ms(problem: Problem) -> float:
    """Processor's milliseconds of one float32 product of all queries and all keys."""
    queries, keys = problem.fit.flatten(0, 1), problem.keys.T
    began = clocks()
    torch.mm(queries, keys)
    return clocks()[1] - began[1]


def measure(problems: list[Problem], count: int, repeats: int, *, oracles: bool) -> list[dict[str, float | str]]:
    """One row a method."""
    table = methods(oracles=oracles)
    products = [product_ms(problems[0]) for _ in range(3)][1:]
    for turn in range(repeats):
        for problem in problems:
            for method in table:
                if turn and method.once:
                    continue
                cache, times = method.run(problem, count)
                method.times.append(times)
                products.append(product_ms(problem))
                if not turn:
                    method.errors.append(problem.errors(cache))
    unit = statistics.median(products)
    return [_row(method, len(problems[0].keys), count, unit) for method in table]


def _row(method: Method, slots: int, count: int, unit: float) -> dict[str, float | str]:
    chosen, chosen_cpu, whole, whole_cpu = (statistics.median(times) for times in zip(*method.times, strict=True))
    mass, output = (statistics.mean(errors) for errors in zip(*method.errors, strict=True))
    return {
        "name": method.name,
        "slots": slots,
        "kept": count,
        "median_ms": round(whole, 1),
        "cpu_ms": round(whole_cpu, 1),
        "select_ms": round(chosen, 1),
        "select_cpu_ms": round(chosen_cpu, 1),
        "ratio": round(chosen_cpu / unit, 2),
        "log_mass_error": round(mass, 5),
        "output_error": round(output, 5),
    }


def main() -> int:
    """Print all rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prefix", type=int, default=0, help="first slots that are left out, as a memory's prefix is")
    parser.add_argument("--no-oracles", action="store_true", help="they take most of the time")
    given = parser.parse_args()
    fetched = models.is_fetched()
    problems = list(captured(given.heads, given.prefix) if fetched else random_problems(given.heads))
    for count in KEPT:
        for row in measure(problems, count, given.repeats, oracles=not given.no_oracles):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
