"""Torch's ambient state: what a caller has set for its thread must reach the model, and not our own arithmetic."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_TYPES = ("cpu", "cuda", "mps", "xpu")
"""Device types whose autocast may be on."""


class _State(NamedTuple):
    """Autocast by device type, where it is on, and the device of tensors that name none."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    device: torch.device


_CALLER: ContextVar[_State | None] = ContextVar("agentmem_ambient", default=None)
"""The state that :func:`own_state` put aside; ``None`` while nothing is."""


def own_state() -> AbstractContextManager[None]:
    """Our arithmetic and the policies': no autocast, and tensors that name no device are on the CPU.

    Costs next to nothing where the caller has set neither. The default dtype belongs to the whole process, so it is
    left alone: our code names the dtype of what it makes.
    """
    state = torch_state()
    return nullcontext() if not state.autocast and state.device.type == "cpu" else _put_aside(state)


@contextmanager
def callers_state() -> Iterator[None]:
    """Inside :func:`own_state`: the model runs as its caller has it."""
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
    """The dtype in which stock attention computes with ``tensor``: that of autocast, which spares float64."""
    kind = tensor.device.type
    if tensor.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def torch_state() -> _State:
    """What the thread has set now."""
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
