"""Attaching a memory to a model: hooks, the renamed attention, the guard of ``generate``; and undoing it all."""

from __future__ import annotations

import functools
import inspect
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from agentmem.errors import CapBypassed, UnsupportedModel
from agentmem.hf.cache import CappedCache, TransientCache, mask_columns, size, transient_forward
from agentmem.hf.forward_context import FRAME, SCOPE, Frame, own_frame, rename, untraced
from agentmem.hf.generate_checks import check_generate, chosen
from agentmem.hf.rope import rotations
from agentmem.hf.support import input_device
from agentmem.memory.forwards import Adopt, Append, Scratch, Transient
from agentmem.memory.positions import Positions
from agentmem.memory.torch_state import own_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedModel

    from agentmem.memory.memory import Memory


@dataclass(eq=False)
class _Attachment:
    """What is changed on one model while it is capped, and how to undo it."""

    model: PreTrainedModel
    users: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)

    def install(self) -> None:
        """Rename the attention implementation, set the hooks, guard ``generate``."""
        decoder = self.model.get_decoder()
        self.undo.append(rename(decoder.config))
        split = functools.partial(self._split, inspect.signature(self.model.forward))
        enter = functools.partial(self._enter, inspect.signature(decoder.forward))
        handles = [
            self.model.register_forward_pre_hook(untraced(split), with_kwargs=True),
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
            given = _named(signature, args, kwargs)
            cache, hold = given.get("past_key_values"), None
            if isinstance(cache, CappedCache):
                cache.open_for(model)
                check_generate(cache, model, given)
                hold = cache.memory.owner.take()
            elif cache is None and chosen(model, given).get("use_cache", True):
                self._refuse_bypass("generate without past_key_values")
            try:
                with own_frame():
                    return original(*args, **kwargs)
            finally:
                del hold  # the thread owns the memory until now; a traceback that is kept must not keep it

        def undo() -> None:
            del model.generate
            if own is not None:
                model.generate = own

        generate.agentmem_own = own  # type: ignore[attr-defined]  # what a copy of the model is to have
        model.generate = generate  # on the instance only
        self.undo.append(undo)

    def _split(
        self, signature: inspect.Signature, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Feed all but the last piece of a long prompt before the forward itself, which then sees that piece only."""
        inputs = _named(signature, args, kwargs)
        cache = inputs.get("past_key_values")
        if not isinstance(cache, CappedCache):
            return None
        rows, count = size(inputs)
        keep = inputs.get("logits_to_keep", 0)
        if count == 1 or not isinstance(keep, int) or keep < 1 or inputs.get("output_hidden_states"):
            return None  # every position's output is wanted: the forward must fit as it is
        cache.open_for(self.model)
        valid = mask_columns(inputs, cache.columns, count) or [[True] * count] * rows
        cache.refuse_pads_at_the_end(valid)
        cache.memory.bind(rows)
        decoder, start = self.model.get_decoder(), 0
        while (start := start + (width := cache.memory.piece([row[start:] for row in valid], count - start))) < count:
            with own_frame(holds=False), torch.no_grad():
                decoder(**_cut(inputs, start - width, start, cache.columns))
        return (), {**inputs, **_cut(inputs, start - width, count, cache.columns)}

    def _enter(
        self, signature: inspect.Signature, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a decoder's forward, masks included: make room and say whose forward it is."""
        frame = Frame(FRAME.get())
        FRAME.set(frame)  # first of all: _leave runs even when what follows raises
        inputs = _named(signature, args, kwargs)
        cache, wanted = inputs.get("past_key_values"), inputs.get("use_cache")
        if isinstance(cache, CappedCache):
            cache.open_for(self.model)
            frame.hold = cache.memory.owner.take()
            frame.memory = cache
            with own_state():
                frame.step = cache.begin(inputs)
                moved = cache.moved(inputs)
            return None if moved is None else ((), moved)
        if isinstance(cache, TransientCache):
            frame.step = cache.step
        elif cache is None and (decoder.config.use_cache if wanted is None else wanted):
            self._refuse_bypass("a forward without past_key_values")
        return None

    def _refuse_bypass(self, what: str) -> None:
        if id(self.model) in SCOPE.get():
            raise CapBypassed(
                f"{what} inside a capped block would grow a cache outside the cap; pass past_key_values=memory, "
                "or use_cache=False if no memory is wanted"
            )


def _leave_out_of_copies(module: Any, hooks: set[int]) -> Callable[[], None]:
    """Have ``copy.deepcopy`` and ``pickle`` see a module as it is without us; returns what undoes this."""

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


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return kwargs
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    given.update(given.pop("kwargs", {}))
    return given


def _cut(inputs: dict[str, Any], start: int, stop: int, columns: int) -> dict[str, Any]:
    """The arguments of one piece of a forward: columns ``start .. stop`` of it; ``columns`` came before."""
    piece: dict[str, Any] = {"past_key_values": inputs["past_key_values"], "use_cache": True}
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if inputs.get(name) is not None:
            piece[name] = inputs[name][:, start:stop]
    if inputs.get("attention_mask") is not None:
        piece["attention_mask"] = inputs["attention_mask"][:, : columns + stop - start]
    elif "attention_mask" in inputs:
        piece["attention_mask"] = None
    return piece


def _leave(module: torch.nn.Module, args: tuple[Any, ...], output: object) -> None:  # noqa: ARG001  # torch's signature
    """After a decoder's forward: commit, or roll back when it raised (``output`` is ``None`` then)."""
    frame = FRAME.get()
    if frame is None:
        return
    FRAME.set(frame.outer)
    frame.hold = None
    if not isinstance(frame.step, Append) or frame.memory is None:
        return
    layers = len(frame.memory.layers)
    if output is not None and frame.attended == layers:
        if not frame.outer or not frame.outer.holds:
            frame.step.commit()
        return
    frame.step.rollback()
    if output is not None:
        raise UnsupportedModel(
            f"{frame.attended} of {layers} layers asked the memory in this forward: the attention implementation was "
            "changed under it; set it before the capped block begins"
        )


@contextmanager
def scope(model: PreTrainedModel) -> Iterator[None]:
    """In this context, growing another cache on the model by default is a bypass."""
    token = SCOPE.set((*SCOPE.get(), id(model)))
    try:
        with own_frame():
            yield
    finally:
        SCOPE.reset(token)


_ATTACHMENTS: WeakKeyDictionary[PreTrainedModel, _Attachment] = WeakKeyDictionary()
_LOCK = threading.Lock()


def attach(model: PreTrainedModel, memory: Memory) -> CappedCache:
    """Connect a memory to a model; every attach needs one :func:`detach`."""
    if memory.settings.rebase:  # first of all: it refuses models, which are then left as they were
        turning = rotations(model)
        assert memory.shape.positions is not None  # noqa: S101  # a config with RoPE says how many
        memory.positions = Positions(memory.shape.positions, turning)
    with _LOCK:
        attachment = _ATTACHMENTS.setdefault(model, _Attachment(model))
        if attachment.users == 0:
            attachment.install()
        attachment.users += 1
    view = CappedCache(memory, model)
    decoder = model.get_decoder()

    def run_transient(ids: Sequence[int], start: int, step: Adopt | Transient) -> None:
        transient_forward(decoder, memory, ids, start, step)

    def run_scratch(ids: Sequence[int], start: int, step: Scratch) -> torch.Tensor:
        logits: torch.Tensor = transient_forward(model, memory, ids, start, step, logits_to_keep=1).logits[0, -1]
        return logits

    def run_logits(ids: Sequence[int], start: int, step: Transient) -> torch.Tensor:
        logits: torch.Tensor = transient_forward(model, memory, ids, start, step).logits[0]
        return logits

    memory.run_transient, memory.run_scratch, memory.run_logits = run_transient, run_scratch, run_logits
    memory.device = input_device(model)
    return view


def detach(model: PreTrainedModel) -> None:
    """Undo one :func:`attach`; the last one restores the model."""
    with _LOCK:
        attachment = _ATTACHMENTS[model]
        attachment.users -= 1
        if attachment.users == 0:
            for undo in reversed(attachment.undo):
                undo()
            del _ATTACHMENTS[model]
