"""Provide functions that several tasks use: names, the solver, and the messages and settings of shared contexts.

A shared context is a text that is read once for several questions.
"""

from __future__ import annotations

from typing import Any

from inspect_ai.model import ChatMessage, ChatMessageUser, GenerateConfig
from inspect_ai.solver import Generate, Solver, TaskState, solver


def named(name: str) -> str:
    """Return the name under which a task must be registered, so that inspect_ai finds the task as ``agentmem/NAME``.

    inspect_ai itself adds ``agentmem/`` to the names in a normal installation, but not in an editable installation,
    because the distribution has another name than the package.
    """
    return name if "site-packages" in __file__ else f"agentmem/{name}"


@solver
def reply() -> Solver:
    """Return the solver, which generates a reply and stores its bytes, seconds and tokens in the sample's metadata."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        state.metadata["memory"] = state.output.metadata or {}
        return state

    return solve


def question(context: str, text: str) -> list[ChatMessage]:
    """Return the messages of one question: the shared context, and ``text``, the question."""
    return [ChatMessageUser(content=context), ChatMessageUser(content=text)]


def shared(max_tokens: int, *, stop: str | None = None) -> GenerateConfig:
    """Return the settings for answering questions about a shared context: greedily, and without a chat template.

    ``max_tokens`` is the most tokens of an answer, and ``stop`` a text that ends the answer.
    """
    body: dict[str, Any] = {"completion": True, "shared": True}
    return GenerateConfig(
        temperature=0.0, max_tokens=max_tokens, stop_seqs=None if stop is None else [stop], extra_body=body
    )
