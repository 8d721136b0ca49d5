"""One call of ``generate`` for the command line; it streams text, can be interrupted, and has a seed."""

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
"""Number of earlier tokens that are decoded again with new tokens, because a token's text depends on its neighbours."""


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing tokens. A ``temperature`` of 0 means greedy decoding."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    ignore_eos: bool

    def arguments(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the keyword arguments for ``model.generate``."""
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
    """The tokens and the text generated so far, which stay valid if generation ends early."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    finish: str = "length"
    """Reason for the end: ``length``, ``eos``, ``interrupted`` or ``failed``."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second; the time includes reading the prompt and all compactions."""
        return len(self.ids) / self.seconds if self.seconds else 0.0


class Interrupt:
    """Handler of Ctrl-C: the first Ctrl-C ends generation after the present token, the second at once."""

    def __init__(self) -> None:
        """Begin with ``wanted`` false: Ctrl-C was not pressed yet."""
        self.wanted = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Handle SIGINT while the block runs; outside the main thread, do nothing."""
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
    """Logits processor that raises an error if a logit is NaN, where greedy decoding alone would choose token 0."""

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
    """Streamer that decodes and shows new tokens as they come.

    With each new token, only a few earlier tokens are decoded again. A character is shown only when it is complete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generated: Generated, display: Display) -> None:
        self.tokenizer, self.generated, self.display = tokenizer, generated, display
        self.shown = 0
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take new token ids and show their text; the first call is ignored, because it brings the prompt."""
        if self.prompt:
            self.prompt = False
            return
        self.generated.ids += value.flatten().tolist()
        self.display.token()
        self._show(final=False)

    def end(self) -> None:
        """Show the text that was held back because its last character was incomplete."""
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
    """Generate text, show it on ``display``, and store the results in ``generated``.

    ``prompt`` is ``[1, n]``; ``arguments`` are passed to ``model.generate``. If an error ends the call, the results so
    far are stored before the error is raised. Ctrl-C only sets ``generated.finish``; no exception is raised.
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
