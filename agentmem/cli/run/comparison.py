"""One run of ``agentmem run``: generation under a cap, and generation with full memory for comparison."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache

from agentmem.api import capped
from agentmem.cli.display import Display
from agentmem.cli.run.generation import Generated, Sampling, generate
from agentmem.cli.run.outcome import FullRun, Outcome
from agentmem.errors import AgentmemError
from agentmem.reporting.trace import Trace, TraceWriter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.hf import CappedCache


@dataclass
class Job:
    """The model, prompt and settings of one run.

    ``prompt`` is ``[1, n]``; ``settings`` are passed to :func:`agentmem.capped`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompt: torch.Tensor
    sampling: Sampling
    cap: str
    policy: str
    policy_options: dict[str, object]
    settings: dict[str, Any]
    streaming: bool
    trace: Path | None = None

    def execute(self) -> Outcome:
        """Generate under the cap. An error during the run becomes part of the outcome, so that no result is lost.

        Raises:
            AgentmemError: an error occurred before the first token was read.
            KeyboardInterrupt: Ctrl-C came before the first token was read.

        """
        generated, trace = Generated(), Trace()
        error: AgentmemError | None = None
        with (
            capped(
                self.model,
                cap=self.cap,
                policy=self.policy,
                tokenizer=self.tokenizer,
                policy_options=self.policy_options,
                **self.settings,
            ) as memory,
            ExitStack() as files,
        ):
            display = self._display(memory.plan.cap_bytes)
            self._subscribe(memory, trace, display, files)
            try:
                generate(
                    self.model, self.tokenizer, self.prompt, self.sampling, display, generated, past_key_values=memory
                )
            except AgentmemError as failure:
                error = failure
            if not trace.points:
                raise error or KeyboardInterrupt
            return Outcome(generated, memory.report(), trace, int(self.prompt.shape[1]), error)

    def compare(self, capped_run: Outcome) -> FullRun:
        """Generate with full memory from the same prompt, seed and sampling, and compare with ``capped_run``.

        Full memory is a stock cache of transformers.
        """
        generated, cache = Generated(), DynamicCache(config=self.model.config)
        display = self._display(None)
        generate(self.model, self.tokenizer, self.prompt, self.sampling, display, generated, past_key_values=cache)
        held = [
            tensor
            for layer in cache.layers
            for name in ("keys", "values")
            if (tensor := getattr(layer, name)) is not None
        ]
        pairs = zip(generated.ids, capped_run.generated.ids, strict=False)
        common = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
        shorter = min(len(generated.ids), len(capped_run.generated.ids))
        return FullRun(generated, sum(tensor.nbytes for tensor in held), shorter if common is None else common)

    def _display(self, cap_bytes: int | None) -> Display:
        streaming = self.streaming and cap_bytes is not None
        return Display(streaming=streaming, cap_bytes=cap_bytes, max_new_tokens=self.sampling.max_new_tokens)

    def _subscribe(self, memory: CappedCache, trace: Trace, display: Display, files: ExitStack) -> None:
        trace.cap_bytes, trace.policy = memory.plan.cap_bytes, memory.plan.policy
        trace.full_bytes = memory.memory.shape.full_bytes
        if self.trace is not None:
            cap_bytes, policy = memory.plan.cap_bytes, memory.plan.policy
            memory.subscribe(files.enter_context(TraceWriter(self.trace, cap_bytes=cap_bytes, policy=policy)))
        memory.subscribe(trace)
        memory.subscribe(display.event)
