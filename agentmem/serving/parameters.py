"""Fields that the request bodies of several routes share, and the refusal of fields that a route does not support."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from agentmem.errors import RequestRefused
from agentmem.serving.recipes import Extension
from agentmem.serving.turns import Sampling

_LEAST_TEMPERATURE = 1e-30
"""Smallest accepted temperature above 0: dividing the logits of any model by it gives finite float32 numbers."""
_STOPS = 4
Stop = Annotated[str, Field(min_length=1, max_length=500)]


class Parameters(BaseModel):
    """Base of all request bodies. Unknown fields are refused; unsupported fields may only have values without effect.

    Raises:
        RequestRefused: a field is refused; the error is raised during validation and names the field.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "safety_identifier", "service_tier", "prompt_cache_retention", "prompt_cache_options"}
    )
    """Names of fields that are accepted and have no effect on the answer."""
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    """Unsupported fields, each with the neutral values that are accepted, because they ask for nothing."""

    model: str
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    agentmem: Extension = Extension()

    @model_validator(mode="before")
    @classmethod
    def _served(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.neutral:
                _check_neutral(name, value, cls.neutral[name])
            elif name not in cls.model_fields and name not in cls.ignored:
                raise RequestRefused(
                    f"{str(name)[:80]!r} is no field of this route; leave it out", code="unknown_parameter", param=name
                )
            elif name in cls.model_fields and value is not None:
                kept[name] = value
        return kept

    @model_validator(mode="after")
    def _divisible(self) -> Any:
        if self.temperature is not None and 0 < self.temperature < _LEAST_TEMPERATURE:
            raise RequestRefused(
                f"temperature: {self.temperature} is too small to divide logits by; give at least "
                f"{_LEAST_TEMPERATURE}, or 0 for greedy decoding",
                param="temperature",
            )
        return self

    def sampling(self, tokens: int, *, seed: int | None = None, stop: tuple[str, ...] = ()) -> Sampling:
        """Return the sampling parameters for a reply of at most ``tokens`` tokens."""
        return Sampling(
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            seed,
            tokens,
            stop,
        )


def _check_neutral(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if value is None or any((value == each and type(value) is not bool) or value is each for each in allowed):
        return
    offered = ", ".join(repr(each) for each in allowed)
    remedy = f"this server takes {offered} alone" if allowed else "this server has no such thing"
    raise RequestRefused(
        f"{name}: {str(value)[:80]} is not supported; {remedy}, or leave it out",
        code="unsupported_parameter",
        param=name,
    )


def stops(given: str | list[str] | None) -> tuple[str, ...]:
    """Return the stop sequences of the field ``stop`` as a tuple.

    Raises:
        RequestRefused: there are too many sequences, or a sequence is empty.

    """
    made = (given,) if isinstance(given, str) else tuple(given or ())
    if len(made) > _STOPS or not all(made):
        raise RequestRefused(f"stop: {len(made)} sequences; give 1 to {_STOPS} of one character at least", param="stop")
    return made
