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
    """The device types for which autocast is enabled, with their dtypes, and the default device of new tensors."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    device: torch.device


_CALLER: ContextVar[_State | None] = ContextVar("agentmem_ambient", default=None)
"""The caller's state that :func:`own_state` has changed for its ``with`` block; ``None`` if nothing was changed."""


def own_state() -> AbstractContextManager[None]:
    """Disable autocast and make the CPU the default device inside a ``with`` block.

    Run agentmem's own code and policies in such a block. It costs almost no time if the caller uses neither autocast
    nor another default device. The default dtype is not changed, because it belongs to the whole process; agentmem
    gives every new tensor an explicit dtype.
    """
    state = torch_state()
    return nullcontext() if not state.autocast and state.device.type == "cpu" else _put_aside(state)


@contextmanager
def callers_state() -> Iterator[None]:
    """Restore the autocast state and the default device of agentmem's caller in a ``with`` block.

    agentmem runs the model in such a block, so that the model computes as in the caller's own forwards. The block is
    for use inside a ``with`` block of :func:`own_state`, which has changed that state; elsewhere it changes nothing.
    """
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
    """Return the dtype in which torch's stock attention would compute with ``tensor``.

    This is the dtype of autocast if autocast is enabled and the tensor is not float64; otherwise the tensor's dtype.
    """
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
