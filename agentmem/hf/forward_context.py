"""Which forward is running: how an attention call finds its memory, and reaches the original function otherwise."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from agentmem.memory.torch_state import computing_dtype, own_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedConfig

    from agentmem.hf.cache import CappedCache
    from agentmem.memory.owner import Hold


class Step(Protocol):
    """What a layer's attention call is handed to."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """``queries [B, Hq, q, d]`` → ``[B, q, Hq, dv]``."""


@dataclass(slots=True)
class Frame:
    """A forward in progress on an attached model; ``step`` is ``None`` when it is not ours."""

    outer: Frame | None
    step: Step | None = None
    memory: CappedCache | None = None
    hold: Hold | None = None
    """That its thread owns the memory meanwhile."""
    attended: int = 0
    """Layers whose attention call came here so far."""
    holds: bool = False
    """Whether forwards right inside it wait for :meth:`agentmem.memory.memory.Memory.commit`."""


FRAME: ContextVar[Frame | None] = ContextVar("agentmem_frame", default=None)
SCOPE: ContextVar[tuple[int, ...]] = ContextVar("agentmem_scope", default=())
"""Identities of the models that this context has capped: only here is growing another cache a bypass."""


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
        frame.attended += 1
        layer: int = module.layer_idx  # type: ignore[assignment]  # every attention module has it
        # Under autocast rotary embeddings make keys float32 and leave values alone; stock attention casts all of them.
        dtype = computing_dtype(key)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        with own_state():
            output = frame.step.attend(layer, query, key, value, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        return output.to(dtype), None

    return forward


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


@contextmanager
def own_frame(*, holds: bool | None = None) -> Iterator[None]:
    """Leave no frame behind: an interrupt, which torch's hooks do not see, would.

    ``holds`` says whether a forward in the block is committed later, by whoever uses its output.
    """
    frame = FRAME.get()
    try:
        if holds is not None:
            FRAME.set(Frame(frame, holds=holds))
        yield
    finally:
        left = FRAME.get()
        while left is not None and left is not frame:
            left.hold, left = None, left.outer  # a traceback that is kept would go on owning the memory
        FRAME.set(frame)
