"""Attach memories to a model and detach them again.

Attaching adds hooks to the model, replaces its attention implementation, and makes ``generate`` check its arguments.
"""

from __future__ import annotations

import functools
import inspect
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from agentmem.engine import Engine
from agentmem.errors import CapBypassed
from agentmem.hf.cache import CappedCache, TransientCache, mask_columns, size
from agentmem.hf.fork_lock import fork_lock
from agentmem.hf.forward_context import FRAME, SCOPE, Frame, own_frame, rename, require_all, untraced
from agentmem.hf.forwards import ModelForwards
from agentmem.hf.generate_checks import check_adapters, check_ends, check_forward, check_generate, chosen
from agentmem.hf.support import refuse_training
from agentmem.hf.wrapper import Around, named, with_wrapper_inputs
from agentmem.memory.torch_state import own_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from agentmem.memory.memory import Memory


@dataclass(eq=False)
class _Attachment:
    """The changes made to one model while memories are attached to it, with the functions that undo the changes."""

    model: PreTrainedModel
    users: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)

    def install(self) -> None:
        """Register the hooks, set agentmem's attention implementation, and make ``generate`` check its arguments."""
        decoder = self.model.get_decoder()
        self.undo.append(rename(decoder.config))
        split = functools.partial(self._split, inspect.signature(self.model.forward))
        enter = functools.partial(self._enter, inspect.signature(decoder.forward))
        around = () if decoder.config is self.model.config else Around(self.model).hooks
        handles = [
            *(self.model.register_forward_pre_hook(untraced(hook), with_kwargs=True) for hook in around[:1]),
            self.model.register_forward_pre_hook(untraced(split), with_kwargs=True),
            *(self.model.register_forward_pre_hook(untraced(hook), with_kwargs=True) for hook in around[1:]),
            *(self.model.register_forward_hook(untraced(_leave), always_call=True) for _ in around[:1]),
            decoder.register_forward_pre_hook(untraced(enter), with_kwargs=True),
            decoder.register_forward_hook(untraced(_leave), always_call=True),
        ]
        self.undo.extend(handle.remove for handle in handles)
        self._guard_generate()
        hooks = {handle.id for handle in handles}
        self.undo.extend(_leave_out_of_copies(module, hooks) for module in (self.model, decoder))

    def _guard_generate(self) -> None:
        model: Any = self.model
        original = model.generate
        signature, own = inspect.signature(original), vars(model).get("generate")

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = named(signature, args, kwargs)
            cache = given.get("past_key_values")
            if cache is None and chosen(model, given).get("use_cache", True):
                cache = self._in_scope()
                if cache is not None:
                    kwargs = {**kwargs, "past_key_values": cache}
                    given = {**given, "past_key_values": cache}
            if not isinstance(cache, CappedCache):
                with own_frame():
                    return original(*args, **kwargs)
            cache.open_for(model)
            with cache.memory.owner.take(), own_frame():
                check_generate(cache, model, given)
                return original(*args, **kwargs)

        def undo() -> None:
            del model.generate
            if own is not None:
                model.generate = own

        generate.agentmem_own = own  # type: ignore[attr-defined]  # a copy of the model gets this one
        model.generate = generate  # on the instance only
        self.undo.append(undo)

    def _split(
        self, signature: inspect.Signature, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Cut a long prompt into pieces that fit the memory, and run the decoder on all pieces except the last.

        This is a forward pre-hook of the model. It returns the arguments of the last piece, on which the forward then
        runs, or ``None`` if the prompt is not cut.
        """
        inputs = named(signature, args, kwargs)
        cache = inputs.get("past_key_values")
        if not isinstance(cache, CappedCache):
            return None
        check_forward(inputs)
        count = size(inputs)[1]
        if count > 1 or not cache.memory.sequences:  # not at every token, because it visits every module
            check_adapters(self.model)
        keep = inputs.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep < 1:
            return None  # the caller wants every position's output, so the forward may end with pads and is not cut
        cache.open_for(self.model)
        valid = mask_columns(inputs, cache.columns, count)
        if valid is not None:
            check_ends(valid, [row.seen for row in cache.memory.sequences] or [0] * len(valid))
        if count == 1 or inputs.get("output_hidden_states"):
            return None
        with cache.memory.owner.take():
            return (), {**inputs, **self._run_all_but_last(cache, inputs)}

    def _run_all_but_last(self, cache: CappedCache, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run the decoder on all pieces of a long prompt except the last; return the arguments of the last piece."""
        rows, count = size(inputs)
        valid = mask_columns(inputs, cache.columns, count) or [[True] * count] * rows
        cache.memory.bind(rows)
        decoder, start = self.model.get_decoder(), 0
        while (start := start + (width := cache.engine.piece([row[start:] for row in valid], count - start))) < count:
            with own_frame(), torch.no_grad():
                decoder(**_cut(inputs, start - width, start, cache.columns))
        return _cut(inputs, start - width, count, cache.columns)

    def _enter(
        self, signature: inspect.Signature, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Prepare a forward of the decoder: make room in its memory, and open a :class:`Frame` that names the memory.

        This is a forward pre-hook of the decoder. It returns new arguments if re-based rows need other positions, and
        ``None`` otherwise.
        """
        frame = Frame(FRAME.get())
        FRAME.set(frame)  # first, because _leave runs even if the following lines raise
        inputs = named(signature, args, kwargs)
        cache, wanted = inputs.get("past_key_values"), inputs.get("use_cache")
        if isinstance(cache, CappedCache):
            check_forward(inputs)  # again: the decoder may be called by itself
            cache.open_for(self.model)
            frame.hold = cache.memory.owner.take()
            frame.engine = cache.engine
            complete = with_wrapper_inputs(frame.outer, inputs)
            with own_state():
                frame.step = cache.begin(complete)
                moved = cache.moved(complete)
            return None if moved is None else ((), {**inputs, "position_ids": moved["position_ids"]})
        if isinstance(cache, TransientCache):
            refuse_training(decoder)
            frame.step = cache.step
        elif cache is None and (decoder.config.use_cache if wanted is None else wanted):
            self._refuse_bypass("a forward without past_key_values")
        return None

    def _in_scope(self) -> CappedCache | None:
        """Return the memory that a ``generate`` without ``past_key_values`` uses; ``None`` if there is none.

        This is the memory whose ``with agentmem.capped(…)`` block encloses the call of ``generate``.

        Raises:
            CapBypassed: several such blocks for this model enclose the call.

        """
        found = self._open_here()
        if len(found) > 1:
            raise CapBypassed(
                f"generate without past_key_values where {len(found)} blocks cap this model; pass the memory that is "
                "meant: past_key_values=memory"
            )
        return found[0] if found else None

    def _open_here(self) -> list[CappedCache]:
        """Return this model's memories that are in scope: their ``with agentmem.capped(…)`` blocks enclose this call.

        Closed memories are left out. An asyncio task may outlive the ``with`` block in which it was started, and that
        block's memory is then closed.
        """
        caches = (cache for cache in SCOPE.get() if isinstance(cache, CappedCache))
        return [cache for cache in caches if cache.model is self.model and not cache.memory.closed]

    def _refuse_bypass(self, what: str) -> None:
        if self._open_here():
            raise CapBypassed(
                f"{what} inside a capped block would grow a cache outside the cap; pass past_key_values=memory, "
                "or use_cache=False if no memory is wanted"
            )


def _leave_out_of_copies(module: Any, hooks: set[int]) -> Callable[[], None]:
    """Make copies and pickles of ``module`` leave out agentmem's hooks and ``generate``.

    ``hooks`` are the ids of agentmem's hooks. The returned function makes the module copy and pickle as before.
    """

    def reduce(protocol: Any) -> tuple[Any, ...]:
        own: Any = type(module)
        made, arguments, state, *rest = own.__reduce_ex__(module, protocol)
        clean = {name: each for name, each in state.items() if name not in ("generate", "__reduce_ex__")}
        original = getattr(state.get("generate"), "agentmem_own", None)
        if original is not None:
            clean["generate"] = original
        for name, each in state.items():
            if "_hooks" in name and isinstance(each, dict):
                clean[name] = type(each)((key, hook) for key, hook in each.items() if key not in hooks)
        return (made, arguments, clean, *rest)

    def undo() -> None:
        del module.__reduce_ex__

    module.__reduce_ex__ = reduce  # copy and pickle look it up on the instance
    return undo


def _cut(inputs: dict[str, Any], start: int, stop: int, columns: int) -> dict[str, Any]:
    """Return the arguments of a forward that gets only the columns from ``start`` up to ``stop`` of ``inputs``.

    ``columns`` is the number of columns that the memory has seen before. The returned attention mask covers these
    columns and the new ones.
    """
    piece: dict[str, Any] = {"past_key_values": inputs["past_key_values"], "use_cache": True}
    for name in ("input_ids", "inputs_embeds"):
        if inputs.get(name) is not None:
            piece[name] = inputs[name][:, start:stop]
    if inputs.get("position_ids") is not None:
        piece["position_ids"] = inputs["position_ids"][..., start:stop]
    if inputs.get("attention_mask") is not None:
        piece["attention_mask"] = inputs["attention_mask"][:, : columns + stop - start]
    elif "attention_mask" in inputs:
        piece["attention_mask"] = None
    return piece


def _leave(module: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:  # noqa: ARG001  # torch's signature
    """End a forward: commit its tokens to the memory, or discard them if the forward raised.

    This is a forward hook, which torch also calls after an error, with ``None`` as ``output``.
    """
    frame = FRAME.get()
    if frame is None:
        return
    FRAME.set(frame.outer)
    frame.hold = None
    engine = frame.engine
    if engine is None or frame.step is None:  # None: the forward was refused before it began
        return
    layers = len(engine.memory.shape.layers)
    if output is not None and frame.attended == layers:
        engine.commit()
        return
    engine.abandon()
    if output is not None:
        require_all(frame.attended, layers)


@contextmanager
def scope(cache: CappedCache) -> Iterator[None]:
    """Make ``cache`` the default ``past_key_values`` of its model's ``generate`` in a ``with`` block.

    In the ``with`` block, a forward of this model raises CapBypassed if it would create a cache of its own.
    """
    token = SCOPE.set((*SCOPE.get(), cache))
    try:
        with own_frame():
            yield
    finally:
        SCOPE.reset(token)


_ATTACHMENTS: WeakKeyDictionary[PreTrainedModel, _Attachment] = WeakKeyDictionary()
_LOCK = fork_lock()
_DROPPED: deque[PreTrainedModel] = deque()
"""Models still to be detached, one entry for each call of :func:`detach_later`."""


def attach(model: PreTrainedModel, memory: Memory) -> CappedCache:
    """Connect a memory to a model and return its cache; for every call, :func:`detach` must be called once later."""
    with _LOCK:
        attachment = _ATTACHMENTS.setdefault(model, _Attachment(model))
        if attachment.users == 0:
            attachment.install()
        attachment.users += 1
    _detach_dropped()
    return CappedCache(Engine(memory, ModelForwards(model, memory.shape)), model)


def detach(model: PreTrainedModel) -> None:
    """Undo one call of :func:`attach`; once all calls are undone, the model is as before."""
    with _LOCK:
        _undo(model)
    _detach_dropped()


def detach_later(model: PreTrainedModel) -> None:
    """Undo one call of :func:`attach` from within garbage collection, which must not wait for this module's lock.

    The garbage collector may run in a thread that holds the lock. If the lock is held, the model is detached when the
    lock has been released.
    """
    _DROPPED.append(model)
    _detach_dropped()


def _detach_dropped() -> None:
    while _DROPPED and _LOCK.acquire(blocking=False):
        try:
            while _DROPPED:
                _undo(_DROPPED.popleft())
        finally:
            _LOCK.release()


def _undo(model: PreTrainedModel) -> None:
    attachment = _ATTACHMENTS[model]
    attachment.users -= 1
    if attachment.users == 0:
        for undo in reversed(attachment.undo):
            undo()
        del _ATTACHMENTS[model]
