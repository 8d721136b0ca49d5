"""Which forward is running: how an attention call finds its memory, and reaches the original function otherwise."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from agentmem.errors import UnsupportedModel
from agentmem.memory.torch_state import computing_dtype, own_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

    from agentmem.engine import Engine
    from agentmem.memory.owner import Hold


class Step(Protocol):
    """What a layer's attention call is handed to."""

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``queries [B, Hq, q, d]`` → ``[B, q, Hq, dv]``; ``sinks [Hq]`` are one more logit of each query head."""


@dataclass(slots=True)
class Frame:
    """A forward in progress on an attached model; ``step`` is ``None`` when it is not ours."""

    outer: Frame | None
    step: Step | None = None
    engine: Engine | None = None
    """That of the memory whose tokens the forward appends."""
    hold: Hold | None = None
    """That its thread owns the memory meanwhile."""
    attended: int = 0
    """Layers whose attention call came here so far."""


FRAME: ContextVar[Frame | None] = ContextVar("agentmem_frame", default=None)
SCOPE: ContextVar[tuple[Cache, ...]] = ContextVar("agentmem_scope", default=())
"""The memories of the capped blocks that this context is in: only here is growing another cache a bypass."""


def _attention(original: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        frame = FRAME.get()
        if frame is None or frame.step is None:
            function = AttentionInterface._global_mapping.get(original)  # noqa: SLF001  # the public mapping has no getter by name
            if function is None:  # eager lives in the modelling file
                function = sys.modules[type(module).__module__].eager_attention_forward
            return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]  # the registry's functions are Any
        _refuse_changes(module, attention_mask, kwargs)
        frame.attended += 1
        layer: int = module.layer_idx  # type: ignore[assignment]  # every attention module has it
        # Under autocast rotary embeddings make keys float32 and leave values alone; stock attention casts all of them.
        dtype = computing_dtype(key)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        with own_state():
            output = frame.step.attend(layer, query, key, value, scale, _sinks(frame, layer, kwargs.get("s_aux")))
        return output.to(dtype), None

    return forward


def _sinks(frame: Frame, layer: int, given: torch.Tensor | None) -> torch.Tensor | None:
    """Attention sinks ``[Hq]``, refused where the plan has not counted what they cost."""
    if given is not None and frame.engine is not None and not frame.engine.memory.shape.layers[layer].sinks:
        raise UnsupportedModel(
            f"layer {layer} passes attention sinks (s_aux), of which its self-check knew nothing; open the memory with "
            "the model that is run"
        )
    return given


_CHANGES = {
    "softcap": "a soft cap on the logits of attention",
    "position_bias": "a bias on the logits of attention",
}
"""What a model may pass to its attention that changes it, and what that is."""


def _refuse_changes(module: torch.nn.Module, mask: object, passed: Mapping[str, Any]) -> None:
    """Refuse attention that is not causal, over all keys as they are."""
    change = next((f"{name}: {what}" for name, what in _CHANGES.items() if passed.get(name) is not None), None)
    if mask is not None:  # ours is None: what a memory holds is seen by all, causally and in windows
        change = "a mask of its own"
    if getattr(module, "is_causal", True) is False:
        change = "is_causal=False, so tokens attend to later ones"
    if change is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} passes to its attention {change}, which is not handled; docs/models.md lists "
            "families that are"
        )


def _mask(original: str) -> Callable[..., torch.Tensor | None]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        frame = FRAME.get()
        if frame is None or frame.step is None:
            function: Any = AttentionMaskInterface._global_mapping[original]  # noqa: SLF001
            return function(*args, **kwargs)  # type: ignore[no-any-return]  # the same
        return None  # our attention knows causality, windows and pads by itself

    return create


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, never traced by ``torch.compile``."""
    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable  # torch leaves it untyped
    return disable(function)


def _register(original: str) -> str:
    """The name under which ``original`` is wrapped; with the mask too, or sdpa would be handed no mask silently."""
    name = f"agentmem_{original}"
    if name not in AttentionInterface._global_mapping:  # noqa: SLF001
        # never traced: a compiled forward would hand the addresses of tensors that do not exist to compiled code
        AttentionInterface.register(name, untraced(_attention(original)))
        AttentionMaskInterface.register(name, untraced(_mask(original)))
    return _Renamed(name, original)


class _Renamed(str):
    """Our name of an attention implementation; a copy of the config, or a pickle, has the original's."""

    __slots__ = ("original",)
    original: str

    def __new__(cls, name: str, original: str) -> Self:
        """``original`` is the name that was there."""
        made = super().__new__(cls, name)
        made.original = original
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """The original name, for ``copy.deepcopy`` and ``pickle``."""
        return str, (self.original,)


_RENAMED: dict[int, list[str]] = {}
"""By identity of a config: the original name, once for every model on it that is attached."""


def rename(config: PreTrainedConfig) -> Callable[[], None]:
    """Put our attention under a config that models may share; the last undoing restores it, in whatever order."""
    originals = _RENAMED.setdefault(id(config), [])
    originals.append(originals[0] if originals else config._attn_implementation)  # noqa: SLF001  # the only name it has
    config._attn_implementation = _register(originals[0])  # noqa: SLF001

    def undo() -> None:
        original = originals.pop()
        if not originals:
            config._attn_implementation = original  # noqa: SLF001
            del _RENAMED[id(config)]

    return undo


def require_all(attended: int, layers: int) -> None:
    """Refuse what a forward did that some layers ended without asking the memory.

    Raises:
        UnsupportedModel: so many did not.

    """
    if attended != layers:
        raise UnsupportedModel(
            f"{attended} of {layers} layers called the memory in this forward: the attention implementation was "
            "changed under it; set it before the capped block begins"
        )


@contextmanager
def own_frame() -> Iterator[None]:
    """Leave no frame behind: an interrupt, which torch's hooks do not see, would."""
    frame = FRAME.get()
    try:
        yield
    finally:
        left = FRAME.get()
        while left is not None and left is not frame:
            left.hold, left = None, left.outer  # a traceback that is kept would go on owning the memory
        FRAME.set(frame)
