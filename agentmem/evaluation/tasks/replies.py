"""What all tasks share: a reply with its costs in the sample's metadata, and how messages are to be read."""

from __future__ import annotations

from typing import Any

from inspect_ai.model import ChatMessage, ChatMessageUser, GenerateConfig
from inspect_ai.solver import Generate, Solver, TaskState, solver


def named(name: str) -> str:
    """What to register a task as, so that it is found as ``agentmem/NAME``.

    Inspect puts the package's name before it, but not in an editable installation of a distribution whose name is not
    the package's.
    """
    return name if "site-packages" in __file__ else f"agentmem/{name}"


@solver
def reply() -> Solver:
    """Generate once, and note what it took: compactions, peak bytes, tokens and seconds."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        state = await generate(state)
        state.metadata["memory"] = state.output.metadata or {}
        return state

    return solve


def question(context: str, text: str) -> list[ChatMessage]:
    """A context that many questions share, and one of them."""
    return [ChatMessageUser(content=context), ChatMessageUser(content=text)]


def shared(max_tokens: int, *, stop: str | None = None) -> GenerateConfig:
    """Greedy answers to questions behind a context that is read once, without a chat template."""
    body: dict[str, Any] = {"completion": True, "shared": True}
    return GenerateConfig(
        temperature=0.0, max_tokens=max_tokens, stop_seqs=None if stop is None else [stop], extra_body=body
    )
