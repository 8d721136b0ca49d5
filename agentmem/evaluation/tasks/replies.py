"""Provide parts that tasks share: names, the solver, and the messages and settings of shared contexts."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import ChatMessage, ChatMessageUser, GenerateConfig
from inspect_ai.solver import Generate, Solver, TaskState, solver


def named(name: str) -> str:
    """Return the name to register a task by, so that inspect_ai finds the task as ``agentmem/NAME``.

    Inspect puts the package's name before the task's name by itself, except in an editable installation of a
    distribution whose name differs from the package's name.
    """
    return name if "site-packages" in __file__ else f"agentmem/{name}"


@solver
def reply() -> Solver:
    """Generate one reply and store its compactions, peak bytes, tokens and seconds in the sample's metadata."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        state.metadata["memory"] = state.output.metadata or {}
        return state

    return solve


def question(context: str, text: str) -> list[ChatMessage]:
    """Return the messages of one question: the context, which many questions share, and the question's text."""
    return [ChatMessageUser(content=context), ChatMessageUser(content=text)]


def shared(max_tokens: int, *, stop: str | None = None) -> GenerateConfig:
    """Return the settings for greedy answers to questions that share a context, without a chat template.

    The context is read once for all questions.
    """
    body: dict[str, Any] = {"completion": True, "shared": True}
    return GenerateConfig(
        temperature=0.0, max_tokens=max_tokens, stop_seqs=None if stop is None else [stop], extra_body=body
    )
