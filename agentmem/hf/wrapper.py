"""Models around a text model, as multimodal ones are: what the text model is not passed, for text alone.

Such a model embeds the ids and builds the masks itself, so its text model sees neither the ids, which a probe runs
again, nor the mask of columns. Both are passed on beside the call, and no mask is built.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from agentmem.errors import UnsupportedGeneration
from agentmem.hf.cache import CappedMemory, TransientCache, size
from agentmem.hf.forward_context import FRAME, Frame

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

_OTHER = re.compile("pixel|image|video|audio|input_features|mm_encoder")
"""Names of inputs that are no text."""
_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Inputs with a number for every token that only a model around a text model has."""


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

    def enter(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a forward; whoever leaves a frame ends it.

        Raises:
            UnsupportedGeneration: it has inputs other than text.

        """
        outer = FRAME.get()
        FRAME.set(Frame(outer, holds=outer is not None and outer.holds))
        inputs = named(self.signature, args, kwargs)
        if _ours(inputs):
            other = next((name for name, value in inputs.items() if _OTHER.search(name) and _given(value)), None)
            if other is not None:
                raise UnsupportedGeneration(
                    f"{other} was passed: a memory holds text alone, since a probe runs ids again; leave it out, or "
                    "use the model without a memory"
                )

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


def _given(value: object) -> bool:
    return any(map(_given, value.values())) if isinstance(value, dict) else value is not None


def _ours(inputs: Mapping[str, Any]) -> bool:
    return isinstance(inputs.get("past_key_values"), CappedMemory | TransientCache)


def told_by_wrapper(frame: Frame | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a text model's forward, with what the forward around it was passed where there is one."""
    places = inputs.get("position_ids")
    if places is not None and places.ndim > 2:  # noqa: PLR2004  # of text, all rows of a multimodal RoPE are alike
        inputs = {**inputs, "position_ids": places[0]}
    if frame is None or not isinstance(frame.step, Told) or inputs.get("input_ids") is not None:
        return inputs
    around = frame.step.inputs
    return {**inputs, "input_ids": around.get("input_ids"), "attention_mask": around.get("attention_mask")}


def last_types(inputs: dict[str, Any], start: int) -> dict[str, Any]:
    """The types of the tokens from ``start`` on, where a forward has them."""
    return {name: inputs[name][:, start:] for name in _TYPES if inputs.get(name) is not None}


def named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return kwargs
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    return given
