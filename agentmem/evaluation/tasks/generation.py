"""Generate a model's replies with a capped memory, and record the bytes, seconds and tokens that each reply took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from transformers import StoppingCriteria, StoppingCriteriaList

from agentmem.errors import SettingsRefused
from agentmem.evaluation.recall import FULL
from agentmem.evaluation.terms import Frozen, Reader, Terms

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.hf import CappedCache

Stop = Literal["end", "tokens", "budget"]


class Forced(Frozen):
    """Settings of forcing an answer from a model that did not end its reasoning by itself."""

    text: str
    """Text that is appended to the reply before the answer is generated."""
    end: str = ""
    """Text that ends the reasoning, such as ``</think>``; if the reply contains this text, no answer is forced."""
    tokens: int = Field(default=16, ge=1)
    """The most tokens of the forced answer, which is decoded greedily."""


class Sampling(Frozen):
    """Settings of decoding; with a temperature of 0, decoding is greedy."""

    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """Number of most likely tokens to sample from; 0 is all tokens."""
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts that end the reply as soon as it contains one of them."""


class Reply(Frozen):
    """The text of a reply, with the bytes, seconds and tokens that the reply took."""

    text: str
    stop: Stop
    """Why generation ended.

    ``end``: the model or a stop text ended the reply. ``tokens``: the reply has ``max_tokens`` tokens. ``budget``: the
    memory was full and no further compaction was allowed.
    """
    forced: bool
    """True if an answer was forced."""
    tokens_read: int
    """Tokens of the prompt that were read for this reply."""
    tokens_generated: int
    """Tokens that the model generated, including a forced answer but not the text appended before it."""
    fresh: bool
    """True if a memory was opened for this reply; False if it used the open memory of a shared context."""
    compactions: int
    """Compactions of the reply's memory so far."""
    peak_bytes: int
    """Peak of resident and temporary bytes of the reply's memory so far."""
    seconds: float
    compact_seconds: float
    """Seconds spent compacting; like ``seconds``, counted for this reply alone."""
    capacity: int
    """Slots per KV head that a full memory holds."""


@dataclass
class Writer:
    """A generator of replies; all its memories have the settings ``terms``, where ``None`` means full memory.

    :meth:`reply` opens a new memory for each prompt. :meth:`answer` is for questions that share a context: the context
    is read once, and its memory stays open until a question has another context. Answering does not change this memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    terms: Terms | None
    policy: str
    max_compactions: int | None = None
    chunk: int = 1024
    """The most tokens of one forward pass with full memory; other memories have the ``chunk`` of their settings."""
    _shared: _Shared | None = field(default=None, repr=False)
    _context: Context = field(default_factory=copy_context, repr=False)
    """Python context (of ``contextvars``) in which every memory is opened and closed.

    Without this context, each asyncio task would do so in a context of its own.
    """

    def reply(self, ids: Sequence[int], sampling: Sampling, forced: Forced | None = None) -> Reply:
        """Read the prompt ``ids`` into a new memory and generate a reply.

        If ``forced`` is given and the model does not end its reasoning, an answer is forced.

        Raises:
            AgentmemError: the memory settings :attr:`terms` of this writer do not fit the model, or generation failed.

        """
        return self._context.run(self._reply, ids, sampling, forced)

    def answer(self, context: Sequence[int], question: Sequence[int], sampling: Sampling) -> Reply:
        """Answer a question about a context greedily, without changing the memory that holds the context.

        If the previous question had the same context, the memory of this context is still open and is used again. If
        not, the open memory is closed, and the context is read into a new memory.

        Raises:
            SettingsRefused: ``sampling`` is not greedy.
            AgentmemError: the memory settings :attr:`terms` of this writer do not fit the model, or question and answer
                together have more tokens than the memory's setting ``chunk``.

        """
        if sampling.temperature:
            raise SettingsRefused(
                f"temperature: {sampling.temperature} has no meaning where questions share a context; give 0"
            )
        return self._context.run(self._answer, context, question, sampling)

    def close(self) -> None:
        """Close the memory of the shared context, if one is open."""
        self._context.run(self._close)

    def _reply(self, ids: Sequence[int], sampling: Sampling, forced: Forced | None) -> Reply:
        began = time.perf_counter()
        words = self._encode(forced.text) if forced else []
        reserve = len(words) + forced.tokens if forced else 0
        with self._memory(len(ids) + sampling.max_tokens + reserve) as memory:
            prompt = torch.tensor([list(ids)], device=self.model.device)
            budget = _Budget(memory, self.max_compactions, reserve)
            written = self._write(memory, prompt, sampling, budget)[len(ids) :]
            stop: Stop = "budget" if budget.spent else "tokens" if len(written) >= sampling.max_tokens else "end"
            if written and written[-1] in self._ends:
                stop = "end"
            text, answer = self._decode(written), list[int]()
            if forced and stop != "end" and not (forced.end and forced.end in text):
                longer = torch.tensor([[*ids, *written, *words]], device=self.model.device)
                greedy = Sampling(max_tokens=forced.tokens)
                answer = self._write(memory, longer, greedy, _Budget(memory, None, 0))[longer.shape[1] :]
                text += forced.text + self._decode(answer)
            return self._account(memory, began, text, stop, len(ids), len(written) + len(answer), forced=bool(answer))

    def _answer(self, context: Sequence[int], question: Sequence[int], sampling: Sampling) -> Reply:
        began = time.perf_counter()
        fresh = self._shared is None or self._shared.context != tuple(context)
        shared = self._open(context) if fresh or self._shared is None else self._shared
        written, text, stop = list[int](), "", "tokens"
        while len(written) < sampling.max_tokens and stop == "tokens":
            written.append(int(shared.memory.peek([*question, *written])[-1].argmax()))
            text = self._decode(written)
            if written[-1] in self._ends or any(end in text for end in sampling.stop):
                stop = "end"
        read = len(question) + (len(context) if fresh else 0)
        return self._account(
            shared.memory, began, text, "end" if stop == "end" else "tokens", read, len(written), fresh=fresh
        )

    def _open(self, context: Sequence[int]) -> _Shared:
        """Close the memory of the previous context, and read a context into a new memory that stays open."""
        self._close()
        stack = ExitStack()
        memory = stack.enter_context(self._memory(len(context)))
        self._shared = _Shared(tuple(context), memory, stack)
        for _ in Reader(self.model, memory).read(torch.tensor(list(context)), every=False):
            pass
        return self._shared

    def _close(self) -> None:
        if self._shared is not None:
            self._shared.stack.close()
            self._shared = None

    @contextmanager
    def _memory(self, tokens: int) -> Iterator[CappedCache]:
        """Return a context manager that opens a new memory for a ``with`` block, with the settings ``self.terms``.

        If these are ``None``, the memory has slots for ``tokens`` tokens and one more chunk, so it never compacts.
        """
        terms, policy = self.terms, self.policy
        if terms is None:
            terms = Terms(slots=tokens + self.chunk, keep_first=0, keep_recent=0, chunk=self.chunk)
            policy = FULL
        with terms.memory(self.model, terms.policy(policy), self.tokenizer) as memory:
            yield memory

    def _write(self, memory: CappedCache, ids: torch.Tensor, sampling: Sampling, budget: _Budget) -> list[int]:
        settings: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if settings["do_sample"]:
            settings |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        if sampling.stop:
            settings |= {"stop_strings": list(sampling.stop), "tokenizer": self.tokenizer}
        with torch.random.fork_rng(devices=self._devices()), torch.no_grad():
            torch.manual_seed(sampling.seed)
            found = self.model.generate(  # type: ignore[operator]  # transformers types it as a tensor or module
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=memory,
                max_new_tokens=sampling.max_tokens,
                stopping_criteria=StoppingCriteriaList([budget]),
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0,
                **settings,
            )
        return [int(token) for token in found[0]]

    def _devices(self) -> list[torch.device]:
        return [self.model.device] if self.model.device.type == "cuda" else []

    @property
    def _ends(self) -> set[int]:
        chosen = getattr(self.model.generation_config, "eos_token_id", None)
        ends = chosen if isinstance(chosen, list) else [chosen]
        return {token for token in (*ends, self.tokenizer.eos_token_id) if token is not None}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode([token for token in ids if token not in self._ends]))

    def _account(
        self,
        memory: CappedCache,
        began: float,
        text: str,
        stop: Stop,
        read: int,
        written: int,
        *,
        forced: bool = False,
        fresh: bool = True,
    ) -> Reply:
        report = memory.report()
        return Reply(
            text=text,
            stop=stop,
            forced=forced,
            tokens_read=read,
            tokens_generated=written,
            fresh=fresh,
            compactions=report.num_compactions,
            peak_bytes=report.peak_bytes,
            seconds=time.perf_counter() - began,
            compact_seconds=report.seconds_compacting if fresh else 0.0,
            capacity=memory.plan.capacity,
        )


@dataclass
class _Shared:
    """The ids of a shared context, and the open memory into which they were read."""

    context: tuple[int, ...]
    memory: CappedCache
    stack: ExitStack


class _Budget(StoppingCriteria):
    """A stopping criterion for memories with a limited number of compactions.

    Generation stops when the memory has been compacted ``most`` times and has at most ``reserve`` free slots left.
    These slots are for a forced answer. If ``most`` is ``None``, the number of compactions is not limited. ``spent`` is
    true once generation was stopped.
    """

    def __init__(self, memory: CappedCache, most: int | None, reserve: int) -> None:
        self.memory, self.most, self.reserve, self.spent = memory, most, reserve, False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002  # transformers' signature
        """Return a boolean tensor ``[rows]``: all true if generation must stop, else all false.

        Generation must stop if ``most`` compactions have happened and at most ``reserve`` slots are free. The newest
        token is not in the memory yet, so one free slot is set aside for it and not counted.
        """
        done = self.most is not None and len(self.memory.compactions) >= self.most
        self.spent = self.spent or (done and self.memory.room() - 1 <= self.reserve)
        return torch.full((input_ids.shape[0],), self.spent, device=input_ids.device, dtype=torch.bool)
