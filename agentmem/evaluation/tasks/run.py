"""Run a task in this process on a loaded model, for ``agentmem ablate``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, get_type_hints

import inspect_ai
from inspect_ai import Task
from inspect_ai.model import get_model
from inspect_ai.scorer import value_to_float
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from agentmem.errors import AgentmemError, SettingsRefused
from agentmem.evaluation.tasks import registry
from agentmem.evaluation.tasks.attempt import Attempt

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from inspect_ai.log import EvalSample
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from agentmem.evaluation.terms import Terms

TASKS: dict[str, Callable[..., Task]] = {
    name: getattr(registry, name)
    for name in registry.__all__
    if name != "agentmem"  # the provider
}
_SHOWN = 80


def check(name: str, arguments: dict[str, Any]) -> None:
    """Check that a task of this name exists and accepts these arguments.

    Raises:
        SettingsRefused: there is no such task, or an argument is unknown or has the wrong type.

    """
    if name not in TASKS:
        raise SettingsRefused(f"there is no task {name[:_SHOWN]!r}; choose from {', '.join(sorted(TASKS))}")
    try:
        _settings(name).model_validate(arguments)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise SettingsRefused(f"{field}: {first['msg']} (got {repr(first['input'])[:_SHOWN]})") from None


def _settings(name: str) -> type[BaseModel]:
    """Return a pydantic model of a task's arguments, made from the task's signature."""
    function = inspect.unwrap(TASKS[name])
    hints = get_type_hints(function)
    fields: dict[str, Any] = {
        each.name: (hints[each.name], each.default) for each in inspect.signature(function).parameters.values()
    }
    return create_model(name, __config__=ConfigDict(extra="forbid", strict=True), **fields)


def attempts(
    name: str,
    arguments: dict[str, Any],
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    terms: Terms | None,
    policy: str,
    seed: int,
    logs: Path,
) -> tuple[Attempt, ...]:
    """Run every sample of a task, and return its scored answers.

    ``loaded`` are the model and its tokenizer. ``terms`` are the settings of the memory; ``None`` means full memory.
    inspect_ai writes its log into the folder ``logs``.

    Raises:
        AgentmemError: the task cannot be made, or a sample failed; the message is that of the first error.

    """
    chosen = {"seed": seed} | arguments if "seed" in _settings(name).model_fields else arguments
    task = TASKS[name](**chosen)
    given: dict[str, Any] = {"loaded": loaded, "policy": policy, "seed": seed}
    if terms is not None:
        given |= {
            key: getattr(terms, key) for key in ("slots", "keep_first", "keep_recent", "target", "chunk", "slot_dtype")
        }
        given["cap"] = terms.cap_bytes
    model = get_model("agentmem/loaded", memoize=False, **given)
    (log,) = inspect_ai.eval(
        task, model=model, log_dir=str(logs), display="none", log_level="error", score_display=False
    )
    model.api.close()
    if log.status != "success" or not log.samples:
        reason = "no sample" if log.error is None else log.error.message
        raise AgentmemError(f"{name}: {reason}")
    return tuple(_attempt(sample) for sample in log.samples)


def _attempt(sample: EvalSample) -> Attempt:
    scores = list((sample.scores or {}).values())
    facts = sample.metadata["memory"]
    return Attempt(
        sample=str(sample.id),
        epoch=sample.epoch,
        score=float(value_to_float()(scores[0].value)) if scores else 0.0,
        bytes=facts["peak_bytes"],
        **{
            key: facts[key]
            for key in (
                "fresh",
                "compactions",
                "seconds",
                "compact_seconds",
                "tokens_read",
                "tokens_generated",
                "forced",
            )
        },
    )
