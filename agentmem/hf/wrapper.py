"""Models around a text model, as multimodal ones are: what the text model is not passed, for text alone.

Such a model embeds the ids and builds the masks itself, so its text model sees neither the ids, which a probe runs
again, nor the mask of columns. Both are passed on beside the call, and no mask is built.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from agentmem.errors import UnsupportedGeneration
from agentmem.hf.cache import CappedCache, TransientCache, size
from agentmem.hf.forward_context import FRAME, Frame

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs that say of every token what it stands for: zeros are text."""


@dataclass(frozen=True, slots=True)
class Told:
    """The inputs of the forward around a text model's: stands where a frame has its step, so that no mask is built."""

    inputs: Mapping[str, Any]

    def attend(self, layer: int, queries: torch.Tensor, *_: Any) -> torch.Tensor:
        """Refuse attention outside the text model.

        Raises:
            UnsupportedGeneration: always.

        """
        raise UnsupportedGeneration(
            f"layer {layer} attends outside the text model ({list(queries.shape)}); only text is handled, so pass ids"
        )


class Around:
    """The hooks of a model around a text model: ``hooks`` are to run before and after prompts are cut."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.signature = inspect.signature(model.forward)
        self.hooks: tuple[Callable[..., Any], ...] = (self.enter, self.tell)

    def enter(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a forward, without inputs that say no more than that there is text; leaving the frame ends it."""
        outer = FRAME.get()
        FRAME.set(Frame(outer))
        inputs = named(self.signature, args, kwargs)
        if not _ours(inputs):
            return None
        return (), {name: value for name, value in inputs.items() if not _plain_text(name, value)}

    def tell(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Keep the inputs for the text model's forward, positions included: some models would guess them by the last.

        What they keep of it may be another batch's, where a prompt was cut.
        """
        frame, inputs = FRAME.get(), named(self.signature, args, kwargs)
        if frame is None or not _ours(inputs):
            return None
        if inputs.get("position_ids") is None and "position_ids" in self.signature.parameters:
            (rows, count), start = size(inputs), inputs["past_key_values"].get_seq_length()
            given = inputs.get("input_ids")
            device = (given if given is not None else inputs["inputs_embeds"]).device
            places = torch.arange(start, start + count, device=device).expand(rows, -1)
            inputs = {**inputs, "position_ids": places}
        frame.step = Told(inputs)
        return (), inputs


def _plain_text(name: str, value: Any) -> bool:
    """Whether an input says nothing but that there is text: no images, or no token that stands for one."""
    return value == {} if isinstance(value, dict) else name in _TYPES and value is not None and not bool(value.any())


def _ours(inputs: Mapping[str, Any]) -> bool:
    return isinstance(inputs.get("past_key_values"), CappedCache | TransientCache)


def with_wrapper_inputs(frame: Frame | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a text model's forward, with what the forward around it was passed where there is one."""
    places = inputs.get("position_ids")
    if places is not None and places.ndim > 2:  # noqa: PLR2004  # of text, all rows of a multimodal RoPE are alike
        inputs = {**inputs, "position_ids": places[0]}
    if frame is None or not isinstance(frame.step, Told) or inputs.get("input_ids") is not None:
        return inputs
    around = frame.step.inputs
    return {**inputs, "input_ids": around.get("input_ids"), "attention_mask": around.get("attention_mask")}


def named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return kwargs
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    return given
