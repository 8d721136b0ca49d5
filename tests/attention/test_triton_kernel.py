"""The kernel for CUDA, run by Triton's interpreter on CPU tensors: the same numbers as a float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from agentmem.attention import parts, ragged
from agentmem.attention.runs import Fresh, Run
from agentmem.planning.model_shape import LayerShape
from agentmem.testing import peak_allocated
from oracles import attention as reference

triton_kernel = pytest.importorskip("agentmem.attention.triton_kernel", exc_type=ImportError)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of outputs about 1 in size: weights and result are rounded to the dtype, half a unit each; sums are float32."""


@dataclass(frozen=True)
class Problem:
    """Random queries over KV heads that hold ``held[h]`` slots each, and as many causal fresh keys as tokens."""

    held: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    group: int = 2
    tokens: int = 1
    fresh: bool = False
    biased: bool = True
    window: int | None = None
    sinks: bool = False
    dims: tuple[int, int] = (16, 16)

    def draw(self, seed: int, *size: int) -> torch.Tensor:
        """Seeded normal numbers in the dtype."""
        return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    @property
    def queries(self) -> torch.Tensor:
        """``[Hq, q, d]``, as strided as a model's are."""
        return self.draw(1, self.tokens, len(self.held) * self.group, self.dims[0]).transpose(0, 1)

    @property
    def heads(self) -> list[reference.Slots]:
        """Every head's slots."""
        return [
            reference.Slots(
                self.draw(10 + head, slots, self.dims[0]),
                self.draw(20 + head, slots, self.dims[1]),
                self.draw(30 + head, slots).float() * 2 if self.biased else None,
            )
            for head, slots in enumerate(self.held)
        ]

    @property
    def own(self) -> Fresh | None:
        """The fresh keys and values."""
        keys, values = (self.draw(2 + i, len(self.held), self.tokens, dim) for i, dim in enumerate(self.dims))
        return Fresh(keys, values) if self.fresh else None

    @property
    def runs(self) -> list[Run]:
        """The same slots as the kernel takes them."""
        return [
            Run(first, head.keys[None], head.values[None], None if head.bias is None else head.bias[None])
            for first, head in enumerate(self.heads)
        ]

    def sink(self) -> torch.Tensor | None:
        """``[Hq]``."""
        return self.draw(5, len(self.held) * self.group) if self.sinks else None

    def expected(self) -> torch.Tensor:
        """The oracle's output; a sink is one more slot, whose logit is its β and whose value is 0."""
        own = self.own
        fresh = None if own is None else [reference.Slots(k, v) for k, v in zip(own.keys, own.values, strict=True)]
        output = reference.attention(self.queries, self.heads, fresh, self.dims[0] ** -0.5, self.window).output
        sink = self.sink()
        if sink is None:
            return output
        mass = reference_mass(self)
        return output * (mass - sink.double()[:, None]).sigmoid()[..., None]


def reference_mass(problem: Problem) -> torch.Tensor:
    """``log Σ exp(scale · q·k + β)`` over slots, for decode steps: ``[Hq, q]``."""
    grouped = problem.queries.reshape(len(problem.held), problem.group, problem.tokens, -1)
    scale = problem.dims[0] ** -0.5
    pairs = zip(grouped, problem.heads, strict=True)
    return torch.cat([reference.log_mass(queries, head, scale) for queries, head in pairs])


PROBLEMS = (
    Problem((3, 300, 8)),
    Problem((300, 17), torch.bfloat16, biased=False),
    Problem((40, 3), torch.float16, group=3),
    Problem((9, 4), tokens=5),
    Problem((19, 2), sinks=True),
    Problem((0, 13), tokens=20, fresh=True),
    Problem((2, 13), torch.bfloat16, tokens=7, fresh=True),
    Problem((5, 5), torch.float16, tokens=7, fresh=True, dims=(24, 8)),
    Problem((12, 12), tokens=7, fresh=True, window=4),
    Problem((150, 150), tokens=7, fresh=True, window=10),
    Problem((150,), group=1, tokens=131, fresh=True),
    Problem((5, 2), dims=(24, 8)),
)  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_the_kernel_gives_the_oracles_numbers(problem: Problem) -> None:
    """Every form of attention, within the rounding of its dtype; decode steps also return the log-sum-exp."""
    assert triton_kernel.supports(problem.queries, problem.runs, problem.own)

    output, lse = triton_kernel.attend(
        problem.queries, problem.runs, problem.own, problem.dims[0] ** -0.5, problem.window, problem.sink()
    )

    assert output.dtype == problem.dtype
    tolerance = TOLERANCE[problem.dtype]
    torch.testing.assert_close(output.double(), problem.expected(), rtol=tolerance, atol=2 * tolerance)
    if not problem.fresh:
        mass, sink = reference_mass(problem), problem.sink()
        expected = mass if sink is None else torch.logaddexp(mass, sink.double()[:, None])
        torch.testing.assert_close(lse.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", [Problem((300, 17, 3), dims=(64, 64)), Problem((150, 9), tokens=131, fresh=True)])
def test_a_plan_counts_what_a_launch_allocates(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts, log-sum-exps and the table of heads, and not twice as much; the interpreter's own copies are left out."""
    launches: list[object] = []

    class Kernel:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_tensors, **_constants: launches.append(grid)

    kernel = Kernel()
    monkeypatch.setattr(triton_kernel, "_attend_parts", kernel)
    monkeypatch.setattr(triton_kernel, "_merge_parts", kernel)
    queries, runs, own = problem.queries, problem.runs, problem.own
    layer = LayerShape(len(problem.held), len(problem.held) * problem.group, *problem.dims, None)
    output = queries.shape[0] * queries.shape[1] * problem.dims[1] * queries.element_size()

    allocated = peak_allocated(lambda: triton_kernel.attend(queries, runs, own, 0.25)) - output

    planned = parts.kernel_bytes(layer, problem.tokens, max(problem.held))
    assert len(launches) == 2 * -(-problem.tokens // parts.TOKENS)
    assert planned / 2 < allocated <= planned


def test_attention_on_cuda_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton is installed, and unless weights are wanted; a tensor that says it is on CUDA stands for one."""
    problem = Problem((5, 3), tokens=2, fresh=True)
    calls: list[object] = []

    def attend(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(arguments)
        return torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(triton_kernel, "attend", attend)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)

    ragged.attend(problem.queries, problem.runs, problem.own, 0.25)
    ragged.attend(problem.queries, problem.runs, problem.own, 0.25, explicit=True)
    monkeypatch.setattr(ragged, "TRITON", False)
    ragged.attend(problem.queries, problem.runs, problem.own, 0.25)

    assert len(calls) == 1
