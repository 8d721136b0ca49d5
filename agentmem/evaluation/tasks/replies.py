"""Provide what the definitions of several inspect_ai tasks need.

:func:`named` returns the name under which a task is registered. :func:`reply` lets the model reply to a sample.
:func:`question` and :func:`shared` are for tasks that ask several questions about one text. This text is the shared
context: it is read once, and then all questions are answered from it.
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
    """Return a solver (inspect_ai's function that runs one sample), which generates the reply to the sample.

    The reply's bytes, seconds and tokens are stored in the sample's metadata under ``memory``.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        state.metadata["memory"] = state.output.metadata or {}
        return state

    return solve


def question(context: str, text: str) -> list[ChatMessage]:
    """Return two messages: the first has the context, the second has the question ``text`` about this context."""
    return [ChatMessageUser(content=context), ChatMessageUser(content=text)]


def shared(max_tokens: int, *, stop: str | None = None) -> GenerateConfig:
    """Return the settings for answering several questions about one context, which is read only once.

    The answers are generated greedily. The prompt is made without a chat template. ``max_tokens`` is the most tokens of
    an answer, and ``stop`` is a text that ends the answer.
    """
    body: dict[str, Any] = {"completion": True, "shared": True}
    return GenerateConfig(
        temperature=0.0, max_tokens=max_tokens, stop_seqs=None if stop is None else [stop], extra_body=body
    )
