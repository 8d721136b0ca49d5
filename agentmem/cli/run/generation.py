"""One call of ``generate`` for the command line: streamed, interruptible, seeded."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from agentmem.cli.console import note
from agentmem.errors import AgentmemError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.cli.display import Display

_LOOK_BACK = 8
"""Tokens that are decoded again before the new ones, because a token's text depends on its neighbours."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool

    def arguments(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """The keyword arguments of ``generate``."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.ignore_eos:
            chosen["min_new_tokens"] = self.max_new_tokens
        if model.generation_config.pad_token_id is None:
            chosen["pad_token_id"] = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
        return chosen


@dataclass
class Generated:
    """What came out, also when it ended early."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    finish: str = "length"
    """``length``, ``eos``, ``interrupted`` or ``failed``."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens over the whole time, prompt and compactions included."""
        return len(self.ids) / self.seconds if self.seconds else 0.0


class Interrupt:
    """Ctrl-C: the first ends generation after the running token, the second at once."""

    def __init__(self) -> None:
        """Not interrupted."""
        self.wanted = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Take over SIGINT while the block runs; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._signalled)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _signalled(self, _number: int, _frame: object) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        note("ending after this token (Ctrl-C again: at once)")


class _Ends(StoppingCriteria):
    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002
        return torch.full((input_ids.shape[0],), self.interrupt.wanted, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Greedy decoding would take the first token of a row of NaN for its best and go on."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if bool(torch.isnan(scores).any()):
            step = input_ids.shape[1] - self.prompt_tokens + 1
            raise AgentmemError(
                f"step {step}: the model's logits are NaN, so no token can be chosen; try --dtype float32, and full "
                "memory (--policy full with a larger --cap) to see whether the model itself overflows"
            )
        return scores


class _Stream(BaseStreamer):
    """Decodes tokens as they come, a few at a time: never the whole text again, never half a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generated: Generated, display: Display) -> None:
        self.tokenizer, self.generated, self.display = tokenizer, generated, display
        self.shown = 0
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take new ids; the first call brings the prompt."""
        if self.prompt:
            self.prompt = False
            return
        self.generated.ids += value.flatten().tolist()
        self.display.token()
        self._show(final=False)

    def end(self) -> None:
        """Show what was held back."""
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        ids = self.generated.ids
        start = max(0, self.shown - _LOOK_BACK)
        before, now = self._decode(ids[start : self.shown]), self._decode(ids[start:])
        if now.endswith("\N{REPLACEMENT CHARACTER}") and not final:
            return  # the rest of a character is still to come
        self.shown = len(ids)
        self.generated.text += now[len(before) :]
        self.display.text(now[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    sampling: Sampling,
    display: Display,
    generated: Generated,
    **arguments: Any,
) -> None:
    """Fill ``generated``, whatever happens; errors pass through after that.

    ``prompt`` is ``[1, n]``; ``arguments`` go on to ``model.generate``.
    """
    torch.manual_seed(sampling.seed)
    interrupt, stream = Interrupt(), _Stream(tokenizer, generated, display)
    started = time.perf_counter()
    generated.finish = "failed"
    try:
        with interrupt.watch(), display:
            model.generate(  # type: ignore[operator]  # a module's attributes may be tensors, for all mypy knows
                prompt.to(model.device),
                attention_mask=torch.ones_like(prompt).to(model.device),
                streamer=stream,
                logits_processor=LogitsProcessorList([_Finite(int(prompt.shape[1]))]),
                stopping_criteria=StoppingCriteriaList([_Ends(interrupt)]),
                **sampling.arguments(model, tokenizer),
                **arguments,
            )
        full = len(generated.ids) >= sampling.max_new_tokens
        generated.finish = "interrupted" if interrupt.wanted else "length" if full else "eos"
    except KeyboardInterrupt:
        generated.finish = "interrupted"
    finally:
        generated.seconds = time.perf_counter() - started
