"""Record in a context variable which memory the running forward uses, so that attention calls find it.

Attention calls of a forward without a memory go to the model's original attention function.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from agentmem.errors import UnsupportedGeneration, UnsupportedModel
from agentmem.memory.torch_state import computing_dtype, own_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from transformers import PreTrainedConfig
    from transformers.cache_utils import Cache

    from agentmem.engine import Engine
    from agentmem.memory.memory import Memory
    from agentmem.memory.owner import Hold


class Step(Protocol):
    """An object that computes the attention of every layer during one forward, in place of the model's own function."""

    @property
    def memories(self) -> Sequence[Memory]:
        """The memories whose slots the forward attends to."""

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute one layer's attention for ``queries [B, Hq, q, d]``; return ``[B, q, Hq, dv]``.

        ``sinks [Hq]`` are attention sinks: one extra logit per query head, without a key or value.
        """


@dataclass(slots=True)
class Frame:
    """The state of one running forward of an attached model.

    ``outer`` is the forward that encloses this one, if any. ``step`` computes the attention; ``None`` leaves it to the
    model.
    """

    outer: Frame | None
    step: Step | None = None
    module: torch.nn.Module | None = None
    """The decoder that runs."""
    engine: Engine | None = None
    """The engine of the memory to which the forward appends its tokens."""
    hold: Hold | None = None
    """A hold that makes the forward's thread the owner of the memory while the forward runs."""
    attended: int = 0
    """The number of layers whose attention ``step`` has computed so far."""


FRAME: ContextVar[Frame | None] = ContextVar("agentmem_frame", default=None)
SCOPE: ContextVar[tuple[Cache, ...]] = ContextVar("agentmem_scope", default=())
"""The memories of the capped blocks that enclose the running code.

Forwards of their models that would create another cache are refused.
"""


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
            if function is None:  # eager attention is defined in the modelling file
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
    """Return the sinks ``given`` by the model; raise UnsupportedModel if the memory was planned without sinks."""
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
"""Arguments with which a model changes its attention, and descriptions for error messages."""


def _refuse_changes(module: torch.nn.Module, mask: object, passed: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel unless the call is plain causal attention over all keys."""
    change = next((f"{name}: {what}" for name, what in _CHANGES.items() if passed.get(name) is not None), None)
    if mask is not None:  # our mask function returns None; the memory itself applies causality and windows
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
        return None  # our attention handles causality, windows and pads itself

    return create


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that ``torch.compile`` never traces it."""
    disable: Callable[..., Callable[..., Any]] = torch.compiler.disable  # torch leaves it untyped
    return disable(function)


def _register(original: str) -> str:
    """Register an attention function and a mask function with transformers under one name, and return this name.

    transformers uses both functions if a config names them as its attention implementation. ``original`` is the name of
    the implementation that they replace, such as ``sdpa``. In a forward without a memory, both functions call those of
    ``original``. Such a forward needs the mask function: without it, transformers would silently pass no mask.
    """
    name = f"agentmem_{original}"
    if name not in AttentionInterface._global_mapping:  # noqa: SLF001
        # never traced: a traced forward would pass addresses of fake tensors to our C code
        AttentionInterface.register(name, untraced(_attention(original)))
        AttentionMaskInterface.register(name, untraced(_mask(original)))
    return _Renamed(name, original)


class _Renamed(str):
    """agentmem's name for an attention implementation, a string that is copied and pickled as the original name."""

    __slots__ = ("original",)
    original: str

    def __new__(cls, name: str, original: str) -> Self:
        """Make the string ``name``; ``original`` is the name that it replaces."""
        made = super().__new__(cls, name)
        made.original = original
        return made

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Make ``copy`` and ``pickle`` replace this string by the original name."""
        return str, (self.original,)


_RENAMED: dict[int, tuple[str, set[object]]] = {}
"""For each renamed config, by its ``id``: the original name, and the keys of those for whom it is renamed."""


def rename(config: PreTrainedConfig, key: object) -> None:
    """Set the attention implementation of a config to agentmem's own, until :func:`restore` is called with ``key``.

    transformers reads the name of the implementation from the config. Several models may share one config, so this
    function may be called for it with several keys. The original name is restored with the last key, in any order.
    """
    found = config._attn_implementation  # noqa: SLF001  # the only name it has
    original, keys = _RENAMED.setdefault(id(config), (getattr(found, "original", found), set()))
    keys.add(key)
    config._attn_implementation = _register(original)  # noqa: SLF001


def restore(config: PreTrainedConfig, key: object) -> None:
    """Undo :func:`rename` for one key, if there is something to undo; an interrupted call can be repeated."""
    original, keys = _RENAMED.get(id(config), ("", set[object]()))
    keys.discard(key)
    if original and not keys:
        config._attn_implementation = original  # noqa: SLF001
        _RENAMED.pop(id(config), None)


def require_all(attended: int, layers: int) -> None:
    """Check that all ``layers`` layers of a forward used the memory; ``attended`` of them did.

    Raises:
        UnsupportedModel: the two numbers differ, because the attention implementation was changed meanwhile.

    """
    if attended != layers:
        raise UnsupportedModel(
            f"{attended} of {layers} layers called the memory in this forward: the attention implementation was "
            "changed under it; set it before the capped block begins"
        )


def refuse_in_forward(memory: Memory, what: str, *, calls: int = 0) -> None:
    """Check that the calling code does not run within a forward that uses ``memory``, as a hook of the model does.

    ``what`` is what the caller asks for. It would drop the tokens of the forward that is running. ``calls`` is the
    number of calls of the decoder that the caller belongs to, which do not count.

    Raises:
        UnsupportedGeneration: a forward with this memory is running in this thread.

    """
    frame = FRAME.get()
    while frame is not None:
        known = frame.step is not None and memory in frame.step.memories
        if known and _calls(frame.module) > calls:  # none: an interrupt ended the forward and left its frame
            raise UnsupportedGeneration(
                f"{what} of a memory within a forward of the same memory would drop the tokens of that forward; call "
                "it after the forward has ended, not from a hook of the model"
            )
        frame = frame.outer


def _calls(module: torch.nn.Module | None) -> int:
    """Return how many calls of a module are running in this thread."""
    code, found, call = torch.nn.Module._call_impl.__code__, 0, sys._getframe()  # noqa: SLF001  # no public way to ask
    while (call := call.f_back) is not None:  # type: ignore[assignment]  # the last one has none
        found += call.f_code is code and call.f_locals.get("self") is module
    return found


@contextmanager
def own_frame() -> Iterator[None]:
    """Restore the current :class:`Frame` at the end of the block.

    After an interrupt, such as Ctrl-C, torch does not run the hooks that would close the frames opened in the block.
    """
    frame = FRAME.get()
    try:
        yield
    finally:
        left = FRAME.get()
        while left is not None and left is not frame:
            left.hold, left = None, left.outer  # else a stored traceback would go on owning the memory
        FRAME.set(frame)
