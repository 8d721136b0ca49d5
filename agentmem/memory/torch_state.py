"""Torch's thread state (autocast, default device): the caller's state must apply to the model but not to our code."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_TYPES = ("cpu", "cuda", "mps", "xpu")
"""Device types for which autocast can be enabled."""


class _State(NamedTuple):
    """The autocast dtype of each device type that has autocast enabled, and the default device of new tensors."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    device: torch.device


_CALLER: ContextVar[_State | None] = ContextVar("agentmem_ambient", default=None)
"""The caller's state, saved inside :func:`own_state`; otherwise ``None``."""


def own_state() -> AbstractContextManager[None]:
    """Disable autocast and make the CPU the default device in a ``with`` block, for our own code and the policies'.

    This takes almost no time if the caller has set neither. The default dtype belongs to the whole process and is not
    changed: our code gives every new tensor an explicit dtype.
    """
    state = torch_state()
    return nullcontext() if not state.autocast and state.device.type == "cpu" else _put_aside(state)


@contextmanager
def callers_state() -> Iterator[None]:
    """Restore the caller's state in a ``with`` block inside :func:`own_state`, to run the model with that state."""
    state = _CALLER.get()
    if state is None:
        yield
        return
    token = _CALLER.set(None)
    try:
        with ExitStack() as stack:
            stack.enter_context(state.device)
            for kind, dtype in state.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            yield
    finally:
        _CALLER.reset(token)


def computing_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which stock attention uses ``tensor``: that of autocast if enabled, except for float64."""
    kind = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def torch_state() -> _State:
    """Return the autocast state and the default device of the current thread."""
    on = tuple((kind, torch.get_autocast_dtype(kind)) for kind in _TYPES if torch.is_autocast_enabled(kind))
    return _State(on, torch.get_default_device())


@contextmanager
def _put_aside(state: _State) -> Iterator[None]:
    token = _CALLER.set(state)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.device("cpu"))
            for kind, _ in state.autocast:
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        _CALLER.reset(token)
