"""Attention over ragged slots: the same numbers as a float64 oracle, within the promised bytes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from agentmem.attention import decode, ragged
from agentmem.attention.explicit import explicit_bytes
from agentmem.attention.ragged import attend, fused_bytes, local, local_bytes
from agentmem.attention.runs import Fresh, Run
from agentmem.planning.model_shape import LayerShape
from agentmem.testing import peak_allocated
from oracles import attention as reference
from support.matrices import matrix

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["as installed", "torch alone"], autouse=True)
def _kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler, or without AMX, torch's kernel serves and the same holds."""
    if request.param == "torch alone":
        monkeypatch.setattr(decode, "COMPILED", False)
        monkeypatch.setattr(ragged, "TILED", False)


@dataclass(frozen=True)
class Problem:
    """Random queries over KV heads that hold ``held[h]`` slots each, and ``fresh`` causal keys (0: none)."""

    name: str
    held: tuple[int, ...]
    group: int = 2
    tokens: int = 1
    fresh: bool = False
    biased: bool = False
    window: int | None = None
    key_dim: int = 16
    value_dim: int = 16

    @property
    def uniform(self) -> bool:
        """Whether one run holds all heads."""
        return len(set(self.held)) == 1

    def queries(self, dtype: torch.dtype) -> torch.Tensor:
        """``[Hq, q, d]``."""
        return _draw(1, len(self.held) * self.group, self.tokens, self.key_dim).to(dtype)

    def heads(self, dtype: torch.dtype) -> list[reference.Slots]:
        """Every head's slots."""
        return [
            reference.Slots(
                _draw(10 + head, slots, self.key_dim).to(dtype),
                _draw(20 + head, slots, self.value_dim).to(dtype),
                _draw(30 + head, slots) * 2 if self.biased else None,
            )
            for head, slots in enumerate(self.held)
        ]

    def own(self, dtype: torch.dtype) -> Fresh | None:
        """The fresh keys and values."""
        if not self.fresh:
            return None
        keys = _draw(2, len(self.held), self.tokens, self.key_dim).to(dtype)
        return Fresh(keys, _draw(3, len(self.held), self.tokens, self.value_dim).to(dtype))

    def runs(self, dtype: torch.dtype, *, scored: bool = False) -> list[Run]:
        """The same slots as the attention takes them."""
        heads = self.heads(dtype)
        if not self.uniform:
            return [_run(first, [head], scored=scored) for first, head in enumerate(heads)]
        return [_run(0, heads, scored=scored)]

    def answer(self, dtype: torch.dtype) -> reference.Answer:
        """The oracle's."""
        own = self.own(dtype)
        fresh = None if own is None else [reference.Slots(k, v) for k, v in zip(own.keys, own.values, strict=True)]
        return reference.attention(self.queries(dtype), self.heads(dtype), fresh, self.scale, self.window)

    @property
    def scale(self) -> float:
        """Of the logits; larger than usual, so that attention is peaked."""
        return 1.5 * self.key_dim**-0.5

    @property
    def layer(self) -> LayerShape:
        """As a plan describes it."""
        heads = len(self.held)
        return LayerShape(heads, heads * self.group, self.key_dim, self.value_dim, self.window)


def _draw(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def _run(first: int, heads: list[reference.Slots], *, scored: bool) -> Run:
    bias = None if heads[0].bias is None else torch.stack([head.bias for head in heads if head.bias is not None])
    scores = torch.zeros(len(heads), len(heads[0].keys)) if scored else None
    return Run(first, torch.stack([h.keys for h in heads]), torch.stack([h.values for h in heads]), bias, scores)


PROBLEMS = (
    Problem("decode", (19, 19)),
    Problem("decode with β", (19, 19), biased=True),
    Problem("decode, ragged", (3, 19, 8)),
    Problem("decode, ragged with β, one query head each", (3, 19, 8), group=1, biased=True),
    Problem("several queries that see all", (9, 9), tokens=5, biased=True),
    Problem("chunk", (11, 11), tokens=7, fresh=True),
    Problem("chunk with β", (11, 11), tokens=7, fresh=True, biased=True),
    Problem("chunk, ragged with β", (2, 13, 7), tokens=6, fresh=True, biased=True),
    Problem("chunk over a head without slots", (0, 6), tokens=4, fresh=True),
    Problem("first chunk", (0, 0), tokens=9, fresh=True),
    Problem("one fresh token", (5, 5), fresh=True),
    Problem("more queries than a block", (6,), group=1, tokens=133, fresh=True, biased=True),
    Problem("window inside the chunk", (12, 12), tokens=7, fresh=True, window=4),
    Problem("window into the slots", (12, 12), tokens=7, fresh=True, window=10),
    Problem("window wider than all", (12, 12), tokens=7, fresh=True, window=40),
    Problem("keys wider than values", (5, 5), tokens=3, fresh=True, biased=True, key_dim=24, value_dim=8),
    Problem("keys wider than values, ragged decode", (5, 2), key_dim=24, value_dim=8),
)  # fmt: skip
NAMES = [problem.name for problem in PROBLEMS]


def naive(problem: Problem, dtype: torch.dtype) -> torch.Tensor:
    """The same attention with every operation rounded to ``dtype``: what anybody would write."""
    queries, own = problem.queries(dtype), problem.own(dtype)
    rows = []
    for index in range(queries.shape[0]):
        head = problem.heads(dtype)[index // problem.group]
        keys, values = head.keys, head.values
        bias = torch.zeros(len(keys)) if head.bias is None else head.bias
        if own is not None:
            keys = torch.cat((keys, own.keys[index // problem.group]))
            values = torch.cat((values, own.values[index // problem.group]))
            bias = torch.cat((bias, torch.zeros(problem.tokens)))
        logits = (queries[index] @ keys.T) * problem.scale + bias.to(dtype)
        logits = logits.masked_fill(_hidden(problem, len(head.keys), len(keys)), -torch.inf)
        rows.append(logits.softmax(-1) @ values)
    return torch.stack(rows)


def _hidden(problem: Problem, slots: int, span: int) -> torch.Tensor:
    if not problem.fresh:
        return torch.zeros(problem.tokens, span, dtype=torch.bool)
    place = torch.arange(slots, span)[:, None]
    order = torch.arange(span)
    hidden = order > place
    return hidden if problem.window is None else hidden | (order <= place - problem.window)


def allowed(problem: Problem, dtype: torch.dtype, truth: torch.Tensor) -> float:
    """Twice the error that the naive computation in that dtype makes against float64."""
    largest = max(float(values.abs().max()) for _, values in tensors(problem))
    return max(rounding(problem) * largest, 2 * float((naive(problem, dtype).double() - truth).abs().max()))


def tensors(problem: Problem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All keys and values there are, slots and fresh ones."""
    own = problem.own(torch.float32)
    pairs = [(head.keys, head.values) for head in problem.heads(torch.float32) if len(head.keys)]
    return pairs if own is None else [*pairs, (own.keys, own.values)]


def rounding(problem: Problem) -> float:
    """What rounding the largest logit to float32 can change in a weight: naive arithmetic may be luckier than that."""
    longest = max(float(keys.norm(dim=-1).max()) for keys, _ in tensors(problem))
    logit = problem.scale * longest * float(problem.queries(torch.float32).norm(dim=-1).max())
    return torch.finfo(torch.float32).eps * (1 + logit)


@pytest.mark.parametrize("explicit", [False, True], ids=["fused", "explicit"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_attention_is_the_oracle_s(problem: Problem, dtype: torch.dtype, explicit: bool) -> None:
    """Both paths err at most twice as much as naive arithmetic of the same dtype."""
    truth = problem.answer(dtype).output
    output, _ = attend(
        problem.queries(dtype), problem.runs(dtype), problem.own(dtype), problem.scale,
        window=problem.window, explicit=explicit,
    )  # fmt: skip
    assert output.dtype == dtype
    assert output.shape == truth.shape
    assert float((output.double() - truth).abs().max()) <= allowed(problem, dtype, truth)


@pytest.mark.parametrize("problem", PROBLEMS, ids=NAMES)
def test_scores_sum_the_attention_that_slots_and_fresh_keys_receive(problem: Problem) -> None:
    """Accumulators grow by the weights summed over queries and query heads; pads, windows and the future get none."""
    truth, runs = problem.answer(torch.float32), problem.runs(torch.float32, scored=True)
    for run in runs:
        assert run.scores is not None
        run.scores.fill_(3.0)
    own = problem.own(torch.float32)
    _, received = attend(problem.queries(torch.float32), runs, own, problem.scale, window=problem.window, explicit=True)
    scores = [row - 3.0 for run in runs if run.scores is not None for row in run.scores]
    for mine, theirs in zip(scores, truth.old, strict=True):
        assert torch.allclose(mine.double(), theirs, atol=1e-5)
    assert (received is None) == (own is None)
    if received is not None:
        assert torch.allclose(received.double(), torch.stack(truth.own), atol=1e-5)
        assert float(received.sum()) + sum(float(row.sum()) for row in scores) == pytest.approx(
            len(problem.held) * problem.group * problem.tokens, rel=1e-5
        )


def test_a_window_hides_tokens() -> None:
    """The window of the oracle's problems matters: without it the numbers are others."""
    problem = PROBLEMS[NAMES.index("window into the slots")]
    wide = reference.attention(
        problem.queries(torch.float32), problem.heads(torch.float32),
        [reference.Slots(k, v) for k, v in zip(_own(problem).keys, _own(problem).values, strict=True)], problem.scale,
    )  # fmt: skip
    assert float((wide.output - problem.answer(torch.float32).output).abs().max()) > 1e-2


def _own(problem: Problem) -> Fresh:
    own = problem.own(torch.float32)
    assert own is not None
    return own


def test_a_chunk_equals_its_tokens_one_by_one() -> None:
    """Attending a chunk equals appending and attending each token alone."""
    problem = PROBLEMS[NAMES.index("chunk with β")]
    queries, own = problem.queries(torch.float32), _own(problem)
    whole, _ = attend(queries, problem.runs(torch.float32), own, problem.scale)
    run = problem.runs(torch.float32)[0]
    assert run.bias is not None
    for token in range(problem.tokens):
        keys = torch.cat((run.keys, own.keys[:, : token + 1]), 1)
        values = torch.cat((run.values, own.values[:, : token + 1]), 1)
        bias = torch.cat((run.bias, torch.zeros(run.heads, token + 1)), 1)
        alone, _ = attend(queries[:, token : token + 1], [Run(0, keys, values, bias)], None, problem.scale)
        assert torch.allclose(alone[:, 0], whole[:, token], atol=2e-6)


@pytest.mark.parametrize("dims", [(16, 16), (24, 8)], ids=["equal dims", "keys wider"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_local_attention_is_the_oracle_s(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """Output and log-mass over one head's slots alone."""
    problem = Problem("local", (17,), group=3, tokens=5, biased=True, key_dim=dims[0], value_dim=dims[1])
    queries, head = problem.queries(dtype), problem.heads(dtype)[0]
    assert head.bias is not None
    output, mass = local(queries, head.keys, head.values, head.bias, problem.scale)
    truth = problem.answer(dtype).output
    assert output.dtype == mass.dtype == torch.float32
    assert float((output.double() - truth).abs().max()) <= allowed(problem, dtype, truth)
    logits = (queries.reshape(-1, dims[0]) @ head.keys.T) * problem.scale + head.bias.to(dtype)
    masses = reference.log_mass(queries, head, problem.scale)
    naive_error = float((logits.logsumexp(-1).double() - masses.flatten()).abs().max())
    assert float((mass.double() - masses).abs().max()) <= max(rounding(problem), 2 * naive_error)


SHAPES = (
    Problem("decode of few", (64, 64), group=3, biased=True),
    Problem("decode, ragged", (10, 200, 64), biased=True),
    Problem("decode of many", (2000, 2000), group=4, biased=True, key_dim=64, value_dim=64),
    Problem("first chunk", (0, 0), tokens=96, fresh=True),
    Problem("chunk", (100, 100, 100), group=3, tokens=96, fresh=True, biased=True, key_dim=64, value_dim=64),
    Problem("chunk, ragged", (10, 300, 64), group=3, tokens=256, fresh=True, biased=True),
    Problem("long chunk", (700,), group=2, tokens=800, fresh=True, biased=True),
    Problem("one query head", (900,), group=1, tokens=512, fresh=True),
    Problem("window", (40, 40), tokens=33, fresh=True, window=20),
    Problem("decode of many query heads", (3000,), group=70, biased=True, key_dim=64, value_dim=64),
    Problem(
        "chunk over many slots", (3000,) * 2, group=7, tokens=200, fresh=True, biased=True, key_dim=80, value_dim=80
    ),
    Problem("32 heads", (2000,) * 8, group=4, tokens=512, fresh=True, biased=True, key_dim=64, value_dim=64),
)


def spent(problem: Problem, dtype: torch.dtype, *, explicit: bool) -> int:
    """Bytes at the peak of attending, the output itself left out."""
    queries, runs, own = problem.queries(dtype), problem.runs(dtype, scored=explicit), problem.own(dtype)
    peak = peak_allocated(lambda: attend(queries, runs, own, problem.scale, window=problem.window, explicit=explicit))
    return peak - queries.shape[0] * problem.tokens * problem.value_dim * dtype.itemsize


@matrix(problem=list(SHAPES), dtype=list(DTYPES), explicit=[False, True])
def test_attention_allocates_no_more_than_it_promises(problem: Problem, dtype: torch.dtype, explicit: bool) -> None:
    """The profiler's peak stays within the bytes that a plan sets aside."""
    slots = max(problem.held)
    promised = (
        explicit_bytes(problem.layer, problem.tokens, slots, dtype.itemsize)
        if explicit or problem.window
        else fused_bytes(problem.layer, problem.tokens, slots, dtype.itemsize)
    )
    assert spent(problem, dtype, explicit=explicit) <= promised


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "tokens"), [(1, 1), (4, 1), (70, 1), (3, 200)])
def test_what_the_fused_path_promises_does_not_grow_with_slots(group: int, tokens: int, dtype: torch.dtype) -> None:
    """Whatever copies of keys and values torch's kernel makes: a call of it sees a bounded number of slots."""
    layer = LayerShape(2, 2 * group, 64, 64)
    assert fused_bytes(layer, tokens, 1 << 20, dtype.itemsize) == fused_bytes(layer, tokens, 1 << 10, dtype.itemsize)
    few, many = (
        Problem("", (slots,) * 2, group, tokens, fresh=tokens > 1, biased=True) for slots in (1 << 10, 1 << 12)
    )
    assert spent(many, dtype, explicit=False) == spent(few, dtype, explicit=False)


@pytest.mark.parametrize("dims", [(16, 16), (24, 8)], ids=["equal dims", "keys wider"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "before", "after"), [(4, 40, 20), (128, 600, 300), (32, 10, 9)])
def test_comparing_local_attention_allocates_no_more_than_it_promises(
    queries: int, before: int, after: int, dtype: torch.dtype, dims: tuple[int, int]
) -> None:
    """Two local attentions, before and after, with both results alive."""
    problem = Problem("local", (before,), group=3, tokens=queries, biased=True, key_dim=dims[0], value_dim=dims[1])
    asked, head = problem.queries(dtype), problem.heads(dtype)[0]
    kept = torch.arange(after)
    assert head.bias is not None
    bias = head.bias

    def compare() -> object:
        first = local(asked, head.keys, head.values, bias, problem.scale)
        second = local(asked, head.keys[kept], head.values[kept], bias[kept], problem.scale)
        return first, second

    fused = dims[0] == dims[1]
    promised = local_bytes(problem.layer, queries, before, after, dtype.itemsize, fused=fused)
    assert peak_allocated(compare) <= promised
