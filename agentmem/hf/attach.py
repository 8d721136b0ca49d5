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
from agentmem.hf.forward_context import (
    FRAME,
    SCOPE,
    Frame,
    own_frame,
    refuse_in_forward,
    rename,
    require_all,
    restore,
    untraced,
)
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
    """The changes made to one model while memories are attached to it.

    What was changed is read from the model itself, where each change can be recognised. An interrupt therefore leaves
    nothing that a later :meth:`remove` does not find.
    """

    model: PreTrainedModel
    users: int = 0
    key: object = field(default_factory=object)

    def install(self) -> None:
        """Register the hooks, set agentmem's attention implementation, and make ``generate`` check its arguments."""
        self.remove()  # what an interrupted call left
        model, decoder = self.model, self.model.get_decoder()
        rename(decoder.config, self.key)
        split = functools.partial(self._split, inspect.signature(model.forward))
        enter = functools.partial(self._enter, inspect.signature(decoder.forward))
        around = () if decoder.config is model.config else Around(model).hooks
        hooks: tuple[Callable[..., Any], ...] = (*around[:1], split, *around[1:])
        for hook in hooks:
            model.register_forward_pre_hook(_ours(hook), with_kwargs=True)
        for _ in around[:1]:
            model.register_forward_hook(_ours(_leave), always_call=True)
        decoder.register_forward_pre_hook(_ours(enter), with_kwargs=True)
        decoder.register_forward_hook(_ours(_leave), always_call=True)
        self._guard_generate()
        for module in (model, decoder):
            _leave_out_of_copies(module)

    def remove(self) -> None:
        """Undo all changes that are found on the model."""
        model: Any = self.model
        decoder = model.get_decoder()
        for module in (model, decoder):
            if hasattr(vars(module).get("__reduce_ex__"), _MARK):
                del module.__reduce_ex__
            _remove_hooks(module)
        generate = vars(model).get("generate")
        if hasattr(generate, "agentmem_own") and generate.agentmem_own is not None:
            model.generate = generate.agentmem_own
        elif hasattr(generate, "agentmem_own"):
            del model.generate
        restore(decoder.config, self.key)

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
            refuse_in_forward(cache.memory, "a generate")
            with cache.memory.owner.take(), own_frame():
                check_generate(cache, model, given)
                return original(*args, **kwargs)

        generate.agentmem_own = own  # type: ignore[attr-defined]  # a copy of the model gets this one
        model.generate = generate  # on the instance only

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
        frame = Frame(FRAME.get(), module=decoder)
        FRAME.set(frame)  # first, because _leave runs even if the following lines raise
        inputs = named(signature, args, kwargs)
        cache, wanted = inputs.get("past_key_values"), inputs.get("use_cache")
        if isinstance(cache, CappedCache):
            check_forward(inputs)  # again: the decoder may be called by itself
            cache.open_for(self.model)
            refuse_in_forward(cache.memory, "a forward", calls=1)
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


_MARK = "agentmem_hook"
"""The attribute by which functions that agentmem puts on a model are recognised."""


def _ours(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook as a function that is never traced by ``torch.compile`` and that :func:`_own_keys` recognises."""
    made = untraced(functools.partial(hook))  # a partial: the mark must not be on the function that is wrapped
    setattr(made, _MARK, True)
    return made


def _own_keys(module: Any) -> list[int]:
    """Return the keys of agentmem's hooks in the dictionaries of hooks of a module."""
    both = (module._forward_pre_hooks, module._forward_hooks)  # noqa: SLF001  # torch has no public list of them
    return [key for hooks in both for key, hook in hooks.items() if hasattr(hook, _MARK)]


def _remove_hooks(module: Any) -> None:
    """Remove agentmem's hooks from a module, and then the flags of hooks that are no more."""
    every = (module._forward_pre_hooks, module._forward_hooks)  # noqa: SLF001
    for key in _own_keys(module):
        for hooks in every:
            hooks.pop(key, None)
    for name in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        flags = getattr(module, name)
        for key in [each for each in flags if not any(each in hooks for hooks in every)]:
            flags.pop(key, None)


def _leave_out_of_copies(module: Any) -> None:
    """Make copies and pickles of ``module`` leave out agentmem's hooks and ``generate``."""

    def reduce(protocol: Any) -> tuple[Any, ...]:
        own: Any = type(module)
        made, arguments, state, *rest = own.__reduce_ex__(module, protocol)
        clean = {name: each for name, each in state.items() if name not in ("generate", "__reduce_ex__")}
        original = getattr(state.get("generate"), "agentmem_own", None)
        if original is not None:
            clean["generate"] = original
        hooks = _own_keys(module)
        for name, each in state.items():
            if "_hooks" in name and isinstance(each, dict):
                clean[name] = type(each)((key, hook) for key, hook in each.items() if key not in hooks)
        return (made, arguments, clean, *rest)

    setattr(reduce, _MARK, True)
    module.__reduce_ex__ = reduce  # copy and pickle look it up on the instance


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


@contextmanager
def _locked(*, wait: bool) -> Iterator[bool]:
    """Hold this module's lock in a ``with`` block, unless another thread holds it and ``wait`` is false.

    After an interrupt at the end of the block, when nothing would call the lock's ``__exit__``, the lock is released
    because this generator is garbage.
    """
    held = False
    try:
        held = _LOCK.acquire(blocking=wait)
        yield held
        held = held and _LOCK.release() is not None  # type: ignore[func-returns-value]  # one line: both or none
    finally:
        if held:
            _LOCK.release()


def attach(model: PreTrainedModel, memory: Memory) -> CappedCache:
    """Connect a memory to a model and return its cache; for every call, :func:`detach` must be called once later.

    If an error or an interrupt ends this call, the model is as it was before.
    """
    cache, counted = CappedCache(Engine(memory, ModelForwards(model, memory.shape)), model), False
    try:
        with _locked(wait=True):
            attachment = _ATTACHMENTS.setdefault(model, _Attachment(model))
            if attachment.users == 0:
                attachment.install()
            attachment.users, counted = attachment.users + 1, True
        _detach_dropped()
        return cache  # noqa: TRY300  # an interrupt at this line is one of the caller's, who has no cache yet
    except BaseException:
        with _locked(wait=True):
            _remove_unused(model, 1 if counted else 0)
        raise


def detach(model: PreTrainedModel) -> None:
    """Undo one call of :func:`attach`; once all calls are undone, the model is as before."""
    _DROPPED.append(model)
    try:
        with _locked(wait=True):
            _undo_dropped()
    finally:
        _detach_dropped()  # what came meanwhile, or what an interrupt left


def detach_later(model: PreTrainedModel) -> None:
    """Undo one call of :func:`attach` from within garbage collection, which must not wait for this module's lock.

    The garbage collector may run in a thread that holds the lock. If the lock is held, the model is detached when the
    lock has been released.
    """
    _DROPPED.append(model)
    _detach_dropped()


def _detach_dropped() -> None:
    while _DROPPED:
        with _locked(wait=False) as held:
            if not held:
                return
            _undo_dropped()


def _undo_dropped() -> None:
    """Undo one call of :func:`attach` for each entry of :data:`_DROPPED`; the caller holds the lock.

    After an interrupt, the removal is done again from its start: it finds what is left.
    """
    while _DROPPED:
        attachment = _ATTACHMENTS[_DROPPED[0]]
        try:
            attachment.users, _ = attachment.users - 1, _DROPPED.popleft()  # one line: interrupts come before or after
            _remove_unused(attachment.model, 0)
        except BaseException:
            _remove_unused(attachment.model, 0)
            raise


def _remove_unused(model: PreTrainedModel, fewer: int) -> None:
    """Count down the users of a model by ``fewer``, and undo all changes to it if it has no users left."""
    attachment = _ATTACHMENTS.get(model)
    if attachment is None:
        return
    attachment.users -= fewer
    if attachment.users == 0:
        attachment.remove()
        _ATTACHMENTS.pop(model, None)
