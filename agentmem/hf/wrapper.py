"""Pass the ids and the mask given to a multimodal model on to its text model; only text is supported.

Here the multimodal model is called the *outer model*. It embeds the ids and builds attention masks itself, so its text
model gets neither ids nor a 2-D mask. A memory needs both: a probe runs the ids again, and the 2-D mask marks pads.

A hook (:class:`Around`) therefore stores the inputs of each forward of the outer model before the forward runs. They
are stored in a :class:`Frame`, the object with the state of one running forward. When the text model runs,
:func:`with_wrapper_inputs` takes the ids and the mask from the stored inputs. While inputs are stored, the outer model
builds no 4-D mask; see :class:`Told`.
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
"""Inputs that have a type for every token; type 0 is text."""


@dataclass(frozen=True, slots=True)
class Told:
    """The inputs of the outer model's forward, kept for the forward of the text model that runs inside it.

    The *outer model* is the whole multimodal model. It calls its *text model* with embeddings, not with ids and a 2-D
    mask. The memory of the text model needs the ids and the mask. :func:`with_wrapper_inputs` takes them from
    ``inputs``.

    While the outer forward runs, this object is the ``step`` of the forward's :class:`Frame`. A frame is the state of
    one running forward, and its ``step`` is called to compute attention. This has two effects. The outer model builds
    no 4-D mask, because a memory needs none. Attention outside the text model calls :meth:`attend`, which refuses it.
    """

    inputs: Mapping[str, Any]

    @property
    def memories(self) -> tuple[()]:
        """The empty tuple: it has no slots."""
        return ()

    def attend(self, layer: int, queries: torch.Tensor, *_: Any) -> torch.Tensor:
        """Refuse attention outside the text model, such as that of a vision tower.

        Raises:
            UnsupportedGeneration: always.

        """
        raise UnsupportedGeneration(
            f"layer {layer} attends outside the text model ({list(queries.shape)}); only text is handled, so pass ids"
        )


class Around:
    """Two hooks that run before each forward of the outer model, so that its text model finds the forward's inputs.

    The *outer model* is the whole multimodal model around the text model. The hook ``enter`` runs first. It opens a
    :class:`Frame`, the object with the state of one running forward. It also drops arguments that have no effect on
    text: empty dicts, and token types that are all 0 (text). The hook ``tell`` runs last: it stores the inputs of the
    forward in the frame. Between the two hooks, another hook cuts a long prompt into pieces. ``hooks`` holds the two
    hooks in this order.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.signature = inspect.signature(model.forward)
        self.hooks: tuple[Callable[..., Any], ...] = (self.enter, self.tell)

    def enter(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a forward of the outer model: open its :class:`Frame`, and drop arguments that have no effect on text.

        A :class:`Frame` is the state of one running forward. Two kinds of arguments are dropped: empty dicts, and token
        types that are all 0 (text). With these arguments, :func:`agentmem.hf.generate_checks.check_forward` would
        refuse the forward. Returns the remaining arguments by name. If the forward uses no memory of agentmem, no
        argument is dropped and the result is ``None``.
        """
        outer = FRAME.get()
        FRAME.set(Frame(outer))
        inputs = named(self.signature, args, kwargs)
        if not _ours(inputs):
            return None
        return (), {name: value for name, value in inputs.items() if not _plain_text(name, value)}

    def tell(
        self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Store the inputs of the outer model's forward in the forward's :class:`Frame`, for the text model's forward.

        Returns the inputs, with position ids added if the caller gave none. Without position ids, some models compute
        the positions from values that an earlier forward has stored. The earlier forward may have run another batch.
        The result is ``None`` if the forward uses no memory of agentmem.
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
    """Return True if an input has no effect on text: it is an empty dict, or token types that are all 0 (text)."""
    return value == {} if isinstance(value, dict) else name in _TYPES and value is not None and not bool(value.any())


def _ours(inputs: Mapping[str, Any]) -> bool:
    return isinstance(inputs.get("past_key_values"), CappedCache | TransientCache)


def with_wrapper_inputs(frame: Frame | None, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a text model's forward, completed with the ids and the 2-D mask of the outer forward.

    The outer forward is the forward of the multimodal model around the text model. ``frame`` is the outer forward's
    :class:`Frame`; ``None`` if there is no outer forward. Position ids with several equal axes, as multimodal RoPE has
    them, are reduced to one axis.
    """
    places = inputs.get("position_ids")
    if places is not None and places.ndim > 2:  # noqa: PLR2004  # for text, all axes of a multimodal RoPE have equal positions
        inputs = {**inputs, "position_ids": places[0]}
    if frame is None or not isinstance(frame.step, Told) or inputs.get("input_ids") is not None:
        return inputs
    around = frame.step.inputs
    return {**inputs, "input_ids": around.get("input_ids"), "attention_mask": around.get("attention_mask")}


def named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, given the ``signature`` of the called function."""
    if not args:
        return kwargs
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    return given
