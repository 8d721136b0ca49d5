"""Sessions of tiny models that speak a family's chat template, audited after every forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from pydantic import TypeAdapter
from transformers import LogitsProcessor

from agentmem import Runtime
from agentmem.sessions import Event, Session, TurnFinished
from agentmem.testing import tiny_model
from support import chat_templates, tiny

ROOMY: dict[str, Any] = {"keep_first": 4, "keep_recent": 8, "min_reclaim": 4, "chunk": 16}
"""Short forwards, and a cap that no test reaches."""
TIGHT: dict[str, Any] = ROOMY | {"max_slots": 64}
"""64 slots per head, halved whenever they are full."""
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)


@cache
def model(family: str = "chatml") -> Any:
    """A random model with a family's vocabulary and ends; leave it as you found it."""
    tokenizer, ends = chat_templates.tokenizer(family), chat_templates.FAMILIES[family].end_ids
    made = tiny_model("llama", vocab_size=len(tokenizer), tie_word_embeddings=True)
    made.generation_config.eos_token_id = ends(tokenizer)
    return made


def ids(text: str, family: str = "chatml") -> list[int]:
    """The ids of a text, control tokens included."""
    return list(chat_templates.tokenizer(family).encode(text, add_special_tokens=False))


@cache
def runtime(family: str = "chatml") -> Runtime:
    """A runtime over a family's model and tokenizer with room for four sessions that hold all they may."""
    return Runtime(model(family), chat_templates.tokenizer(family), cap="256MiB", share=0.25, **ROOMY)


@contextmanager
def session(family: str = "chatml", policy: Any = "window", **settings: Any) -> Iterator[Session]:
    """A conversation; the ledger is audited after every forward and every compaction."""
    with runtime(family).session(policy, **settings) as made:
        yield audited(made)


def audited(talk: Session) -> Session:
    """The session, whose ledger is audited from now on while its memory stays the same."""
    memory = talk.memory
    memory.subscribe(lambda _: tiny.audit(memory))
    return talk


def ended(events: Sequence[Event]) -> TurnFinished:
    """The end of a turn, which is its last event and the only one of its kind."""
    (last,) = [event for event in events if isinstance(event, TurnFinished)]
    assert events[-1] is last
    return last


def stock(talk: Session, tokens: int, family: str = "chatml", **options: Any) -> list[int]:
    """What ``model.generate`` would write after everything that a session holds, without a memory."""
    prompt = torch.tensor([talk.transcript.ids])
    made = model(family).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, **({"do_sample": False} | options)
    )
    return list(made[0, prompt.shape[1] :].tolist())


def stock_logits(talk: Session, lm: Any) -> torch.Tensor:
    """The logits ``[V]`` after everything that a session holds, by one prefill without a memory."""
    with torch.no_grad():
        logits: torch.Tensor = lm(torch.tensor([talk.transcript.ids]), use_cache=False).logits[0, -1]
    return logits


def next_logits(talk: Session) -> torch.Tensor:
    """The session's own logits ``[V]`` after everything that it holds; nothing of it changes."""
    return talk.view.peek(talk.pending)[-1]


def greedy(talk: Session, tokens: int, **options: Any) -> list[int]:
    """The ids of the next reply."""
    return talk.generate(max_new_tokens=tokens, **({"do_sample": False} | options)).ids


class Dictated(LogitsProcessor):
    """Has the model write given ids, one after the other, and go on by itself after them."""

    def __init__(self, written: Sequence[int]) -> None:
        self.written, self.start = list(written), -1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Leave nothing but the next id."""
        self.start = input_ids.shape[1] if self.start < 0 else self.start
        at = input_ids.shape[1] - self.start
        if at < len(self.written):
            scores = torch.full_like(scores, float("-inf"))  # type: ignore[assignment]
            scores[:, self.written[at]] = 0.0
        return scores


def dictate(text: str | Sequence[int], family: str = "chatml", **options: Any) -> dict[str, Any]:
    """Options of ``generate`` that write just this text (or these ids)."""
    written = ids(text, family) if isinstance(text, str) else list(text)
    return {"logits_processor": [Dictated(written)], "max_new_tokens": len(written), "do_sample": False} | options
