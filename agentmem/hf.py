"""The only file that names transformers' cache, attention, mask and hook internals.

A model is *attached* while at least one capped block uses it: its attention implementation is renamed on its config,
its forward is watched by hooks, and ``generate`` checks its arguments first. All of it is per instance, counted, and
undone with the last block. Forwards that are not ours reach the original functions.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from agentmem.errors import CapBypassed, MemoryCapExceeded, UnsupportedGeneration, UnsupportedModel
from agentmem.generation import check_generate, chosen
from agentmem.memory import Append, Arriving, Memory, Transient, Usage
from agentmem.shape import LayerShape, ModelShape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedConfig, PreTrainedModel

    from agentmem.budget import Plan
    from agentmem.report import CompactionReport, RunReport

FAMILIES = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Values of ``config.model_type`` that the tests cover."""


# ---- which models


def text_model(model: object) -> PreTrainedModel:
    """The causal language model inside whatever was passed (PEFT adapters are looked through).

    Raises:
        UnsupportedModel: not a transformers causal model, compiled, or in training mode.

    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = type(inner).__name__
    if hasattr(inner, "_orig_mod") or getattr(inner, "_compiled_call_impl", None) is not None:
        raise UnsupportedModel(f"{name} is compiled, which freezes the attention call; pass the uncompiled model")
    if not hasattr(inner, "generate") or not hasattr(inner, "get_decoder") or not hasattr(inner, "config"):
        raise UnsupportedModel(f"{name} is no transformers causal language model; load one with AutoModelForCausalLM")
    if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:  # type: ignore[attr-defined]
        raise UnsupportedModel(
            "prompt-learning adapters put their own keys into the cache; merge or disable the adapter"
        )
    if inner.training:
        raise UnsupportedModel(
            f"{name} is in training mode, whose dropout no replay can repeat; call model.eval() first"
        )
    return inner  # type: ignore[no-any-return]  # duck-typed above


def describe(config: PreTrainedConfig, *, itemsize: int, fused: bool = True) -> ModelShape:
    """The shape of a model, from its config alone; ``fused`` says whether it runs where attention has a fused path.

    Raises:
        UnsupportedModel: names what is not handled.

    """
    text, family = config.get_text_config(decoder=True), config.model_type
    if config.is_encoder_decoder or family not in FAMILIES:
        raise UnsupportedModel(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    for name in ("attn_logit_softcapping", "use_bidirectional_attention"):
        if getattr(text, name, None):
            raise UnsupportedModel(f"{name}={getattr(text, name)!r} changes attention in a way that is not handled")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = tuple(
        LayerShape(text.num_key_value_heads, text.num_attention_heads, head_dim, head_dim, _window(layer, index))
        for index, layer in enumerate(DynamicCache(config=config).layers)
    )
    return ModelShape(
        name=str(getattr(config, "_name_or_path", "") or family),
        layers=layers,
        itemsize=itemsize,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        fused=fused,
    )


def _window(layer: object, index: int) -> int | None:
    if type(layer) is DynamicLayer:
        return None
    if type(layer) is DynamicSlidingWindowLayer:
        return int(layer.sliding_window)
    raise UnsupportedModel(
        f"layer {index} keeps its state in a {type(layer).__name__}; only full and sliding-window attention are handled"
    )


def refuse_probe(config: PreTrainedConfig, policy: str) -> None:
    """Refuse RoPE whose frequencies follow the largest position: a probe would not meet the kept keys' phases."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "rope_parameters", None) or {}
    nested = [kinds] if "rope_type" in kinds else [kind for kind in kinds.values() if isinstance(kind, dict)]
    if any(kind.get("rope_type") == "dynamic" for kind in nested):
        raise UnsupportedModel(
            f"rope_type 'dynamic' changes frequencies with the largest position, so the probe of {policy!r} is not "
            "exact; use a policy without a probe (window, heavy-hitters) or probe='live'"
        )


# ---- which forward is running


class Step(Protocol):
    """What a layer's attention call is handed to."""

    def attend(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """``queries [B, Hq, q, d]`` → ``[B, q, Hq, dv]``."""


@dataclass(slots=True)
class _Frame:
    """A forward in progress on an attached model; ``step`` is ``None`` when it is not ours."""

    outer: _Frame | None
    step: Step | None = None
    memory: CappedMemory | None = None
    attended: int = 0
    """Layers whose attention call came here so far."""


_FRAME: ContextVar[_Frame | None] = ContextVar("agentmem_frame", default=None)
_SCOPE: ContextVar[tuple[int, ...]] = ContextVar("agentmem_scope", default=())
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
        frame = _FRAME.get()
        if frame is None or frame.step is None:
            function = AttentionInterface._global_mapping.get(original)  # noqa: SLF001  # the public mapping has no getter by name
            if function is None:  # eager lives in the modelling file
                function = sys.modules[type(module).__module__].eager_attention_forward
            return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
        frame.attended += 1
        layer: int = module.layer_idx  # type: ignore[assignment]  # every attention module has it
        # Under autocast rotary embeddings make keys float32 and leave values alone; the dtype of the keys counts.
        query, value = query.to(key.dtype), value.to(key.dtype)
        return frame.step.attend(layer, query, key, value, kwargs.get("scaling") or query.shape[-1] ** -0.5), None

    return forward


def _mask(original: str) -> Callable[..., torch.Tensor | None]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        frame = _FRAME.get()
        if frame is None or frame.step is None:
            function: Any = AttentionMaskInterface._global_mapping[original]  # noqa: SLF001
            return function(*args, **kwargs)  # type: ignore[no-any-return]
        return None  # our attention knows causality, windows and pads by itself

    return create


def _register(original: str) -> str:
    """The name under which ``original`` is wrapped; with the mask too, or sdpa would be handed no mask silently."""
    name = f"agentmem_{original}"
    if name not in AttentionInterface._global_mapping:  # noqa: SLF001
        AttentionInterface.register(name, _attention(original))
        AttentionMaskInterface.register(name, _mask(original))
    return name


_RENAMED: dict[int, list[str]] = {}
"""By identity of a config: the original name, once for every model on it that is attached."""


def _rename(config: PreTrainedConfig) -> Callable[[], None]:
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


# ---- what is passed as past_key_values


class _Layer(CacheLayerMixin):
    """Answers a model's questions about one layer; the slots are in the memory."""

    is_croppable = False

    def __init__(self, owner: CappedMemory | _TransientCache, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner, self.is_sliding, self.is_initialized = owner, window is not None, True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the memory allocates."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hand the fresh keys and values on to the attention call, which appends them."""
        frame = _FRAME.get()
        if frame is None or frame.step is None:
            if isinstance(self.owner, CappedMemory):
                self.owner.memory.open_or_raise()
            raise UnsupportedGeneration(_FOREIGN)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys seen by a forward of ``query_length`` columns, and their offset."""
        return self.owner.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far, pads included."""
        return self.owner.get_seq_length()

    def get_max_length(self) -> int:
        """No maximum: compaction makes room."""
        return -1


_FOREIGN = (
    "this memory was passed to a model that it was not opened for; pass it to the model that was given to "
    "agentmem.capped, or open another memory for this one"
)


class _TransientCache(Cache):
    """What a transient forward passes to the model."""

    def __init__(self, step: Transient, windows: Sequence[int | None]) -> None:
        super().__init__(layers=[_Layer(self, window) for window in windows])
        self.step = step

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  # transformers' signature
        """A transient forward starts from nothing, as far as columns go."""
        return 0


class CappedMemory(Cache):
    """A memory under a hard cap, as ``past_key_values``: a thin view over an ordered list of rows.

    ``get_seq_length()`` counts columns (pads and compacted tokens included), so that ``generate`` never feeds a token
    twice. Beams, cropping and past recording are refused.
    """

    def __init__(self, memory: Memory, model: PreTrainedModel) -> None:
        """View a memory that was opened for ``model``; :func:`attach` connects the two."""
        super().__init__(layers=[_Layer(self, layer.window) for layer in memory.shape.layers])
        self.memory, self.model = memory, model
        self.columns = 0

    # what happened

    @property
    def plan(self) -> Plan:
        """What the cap came to."""
        return self.memory.plan

    @property
    def compactions(self) -> tuple[CompactionReport, ...]:
        """One report per compaction so far."""
        return tuple(self.memory.compactions)

    def report(self) -> RunReport:
        """Everything so far."""
        return self.memory.report()

    def usage(self) -> Usage:
        """The memory now, summed over rows."""
        return self.memory.usage()

    def subscribe(self, callback: Callable[[CompactionReport | Usage], None]) -> None:
        """Call ``callback`` with a Usage after every forward and with every compaction's report."""
        self.memory.subscribe(callback)

    def room(self, row: int = 0) -> int:
        """Tokens that a row can take before it has to be compacted."""
        return self.memory.rows[row].room if self.memory.rows else self.memory.plan.capacity

    def compact(self) -> tuple[CompactionReport, ...]:
        """Compact every row now, down to the target; rows below it are left alone."""
        reports = (self.memory.compact(row) for row in self.memory.rows)
        return tuple(report for report in reports if report is not None)

    def transcript(self, row: int = 0) -> list[int]:
        """The ids that a row has consumed, in order, pads left out."""
        return list(self.memory.rows[row].ids) if self.memory.rows else []

    def padded_transcripts(self) -> torch.Tensor:
        """What all rows have consumed, ``[rows, columns]``, left-padded with 0: for a run that was stopped."""
        longest = max((row.seen for row in self.memory.rows), default=0)
        return torch.tensor([[0] * (longest - row.seen) + list(row.ids) for row in self.memory.rows])

    # what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  # transformers' signature
        """Columns so far, pads included."""
        return self.columns

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: assisted decoding would take tokens back.

        Raises:
            UnsupportedGeneration: always.

        """
        raise UnsupportedGeneration(
            f"crop({tokens_to_remove}): a compacted memory cannot take tokens back; use greedy decoding or sampling"
        )

    def activate_past_recording(self) -> None:
        """Refused: see :meth:`crop`."""
        self.crop(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Refused: beam search."""
        raise UnsupportedGeneration(f"beam search reorders rows (beam_idx {list(beam_idx.shape)}); use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: contrastive search."""
        raise UnsupportedGeneration(
            f"repeating every row {repeats} times in mid-run is not handled; batch the prompt instead"
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused: contrastive search."""
        raise UnsupportedGeneration(
            f"selecting rows in mid-run ({list(indices.shape)}) is not handled; open a new memory"
        )

    def reset(self) -> None:
        """Refused: a memory serves one conversation."""
        raise UnsupportedGeneration("reset() is not handled; open a new memory with agentmem.capped(...)")

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return len(self.memory.rows) or -1

    # a forward

    def open_for(self, model: PreTrainedModel) -> None:
        """Refuse a model that this memory was not opened for.

        Raises:
            MemoryClosed: the memory's block has ended.
            UnsupportedGeneration: it is another model's.

        """
        self.memory.open_or_raise()
        if model is not self.model:
            raise UnsupportedGeneration(_FOREIGN)

    def begin(self, inputs: dict[str, Any]) -> Append:
        """Read one forward's arguments and start it.

        Raises:
            MemoryCapExceeded: more tokens at once than the plan has counted scratch for.
            UnsupportedGeneration: see :func:`_mask_columns`; or embeddings where a probe needs ids.

        """
        count, most = _size(inputs)[1], self.memory.slack()
        if count > most:
            raise MemoryCapExceeded(
                f"a forward of {count} tokens that wants every position's output cannot be cut, and at most {most} fit "
                f"at once (chunk={self.memory.plan.chunk}); pass logits_to_keep=1 and no output_hidden_states, feed "
                "fewer at once, or raise chunk"
            )
        step = self.memory.begin(self._arriving(inputs))
        step.columns = count
        return step

    def _arriving(self, inputs: dict[str, Any]) -> list[Arriving]:
        rows, count = _size(inputs)
        self.memory.bind(rows)
        ids = self._ids(inputs, rows, count)
        places = inputs.get("position_ids")
        if places is None:
            positions = [list(range(self.columns, self.columns + count))] * rows
        else:
            positions = places.expand(rows, -1).tolist()
        mask = _mask_columns(inputs, self.columns, count)
        if mask is None:
            return [Arriving(ids[row], positions[row], slice(None)) for row in range(rows)]
        return [_present(ids[row], positions[row], valid) for row, valid in enumerate(mask)]

    def _ids(self, inputs: dict[str, Any], rows: int, count: int) -> list[list[int]]:
        given = inputs.get("input_ids")
        if given is not None:
            return given.tolist()  # type: ignore[no-any-return]
        if self.memory.policy.queries.probes:
            raise UnsupportedGeneration(
                f"inputs_embeds have no token ids to replay, which policy {self.memory.policy.name!r} needs; "
                "pass input_ids, or choose probe='live' or a policy without a probe"
            )
        return [[-1] * count for _ in range(rows)]


def _size(inputs: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a forward."""
    given = inputs.get("input_ids")
    shape = (given if given is not None else inputs["inputs_embeds"]).shape
    return int(shape[0]), int(shape[1])


def _mask_columns(inputs: dict[str, Any], columns: int, count: int) -> list[list[bool]] | None:
    """Which of a forward's ``count`` columns are no pads, per row; ``None`` when all are.

    Raises:
        UnsupportedGeneration: a mask that was prepared already, or that does not cover everything since the start.

    """
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:  # noqa: PLR2004
        raise UnsupportedGeneration("attention_mask must be 2-D [batch, columns]; prepared 4-D masks are not handled")
    if mask.shape[1] != columns + count:
        raise UnsupportedGeneration(
            f"attention_mask has {mask.shape[1]} columns; it must cover the {columns} seen so far and the {count} new"
        )
    present: list[list[bool]] = mask[:, columns:].bool().tolist()
    return present


def _present(ids: list[int], positions: list[int], valid: list[bool]) -> Arriving:
    """The tokens of one row that are no pads."""
    if all(valid):
        return Arriving(ids, positions, slice(None))
    columns = [column for column, present in enumerate(valid) if present]
    return Arriving([ids[each] for each in columns], [positions[each] for each in columns], torch.tensor(columns))


# ---- attaching


@dataclass(eq=False)
class _Attachment:
    """What is changed on one model while it is capped, and how to undo it."""

    model: PreTrainedModel
    users: int = 0
    undo: list[Callable[[], None]] = field(default_factory=list)

    def install(self) -> None:
        """Rename the attention implementation, set the hooks, guard ``generate``."""
        decoder = self.model.get_decoder()
        self.undo.append(_rename(decoder.config))
        split = functools.partial(self._split, inspect.signature(self.model.forward))
        enter = functools.partial(self._enter, inspect.signature(decoder.forward))
        handles = [
            self.model.register_forward_pre_hook(split, with_kwargs=True),
            decoder.register_forward_pre_hook(enter, with_kwargs=True),
            decoder.register_forward_hook(_leave, always_call=True),
        ]
        self.undo.extend(handle.remove for handle in handles)
        self._guard_generate()

    def _guard_generate(self) -> None:
        model: Any = self.model
        original = model.generate
        signature, own = inspect.signature(original), vars(model).get("generate")

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = _named(signature, args, kwargs)
            cache = given.get("past_key_values")
            if isinstance(cache, CappedMemory):
                cache.open_for(model)
                check_generate(cache, model, given)
            elif cache is None and chosen(model, given).get("use_cache", True):
                self._refuse_bypass("generate without past_key_values")
            return original(*args, **kwargs)

        def undo() -> None:
            del model.generate
            if own is not None:
                model.generate = own

        model.generate = generate  # on the instance only
        self.undo.append(undo)

    def _split(
        self, signature: inspect.Signature, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Feed all but the last piece of a long prompt before the forward itself, which then sees that piece only."""
        inputs = _named(signature, args, kwargs)
        cache = inputs.get("past_key_values")
        if not isinstance(cache, CappedMemory):
            return None
        rows, count = _size(inputs)
        keep = inputs.get("logits_to_keep", 0)
        if count == 1 or not isinstance(keep, int) or keep < 1 or inputs.get("output_hidden_states"):
            return None  # every position's output is wanted: the forward must fit as it is
        cache.open_for(self.model)
        valid = _mask_columns(inputs, cache.columns, count) or [[True] * count] * rows
        cache.memory.bind(rows)
        decoder, start = self.model.get_decoder(), 0
        while (start := start + (size := cache.memory.piece([row[start:] for row in valid], count - start))) < count:
            with torch.no_grad():
                decoder(**_cut(inputs, start - size, start, cache.columns))
        return (), {**inputs, **_cut(inputs, start - size, count, cache.columns)}

    def _enter(self, signature: inspect.Signature, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a decoder's forward, masks included: make room and say whose forward it is."""
        frame = _Frame(_FRAME.get())
        _FRAME.set(frame)  # first of all: _leave runs even when what follows raises
        inputs = _named(signature, args, kwargs)
        cache, wanted = inputs.get("past_key_values"), inputs.get("use_cache")
        if isinstance(cache, CappedMemory):
            cache.open_for(self.model)
            frame.memory = cache
            frame.step = cache.begin(inputs)
        elif isinstance(cache, _TransientCache):
            frame.step = cache.step
        elif cache is None and (decoder.config.use_cache if wanted is None else wanted):
            self._refuse_bypass("a forward without past_key_values")

    def _refuse_bypass(self, what: str) -> None:
        if id(self.model) in _SCOPE.get():
            raise CapBypassed(
                f"{what} inside a capped block would grow a cache outside the cap; pass past_key_values=memory, "
                "or use_cache=False if no memory is wanted"
            )


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
    frame = _FRAME.get()
    if frame is None:
        return
    _FRAME.set(frame.outer)
    if not isinstance(frame.step, Append) or frame.memory is None:
        return
    layers = len(frame.memory.layers)
    if output is not None and frame.attended == layers:
        frame.memory.columns += frame.step.columns
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
    frame, token = _FRAME.get(), _SCOPE.set((*_SCOPE.get(), id(model)))
    try:
        yield
    finally:
        _SCOPE.reset(token)
        _FRAME.set(frame)  # an interrupt may have left a frame behind


_ATTACHMENTS: WeakKeyDictionary[PreTrainedModel, _Attachment] = WeakKeyDictionary()
_LOCK = threading.Lock()


def attach(model: PreTrainedModel, memory: Memory) -> CappedMemory:
    """Connect a memory to a model; every attach needs one :func:`detach`."""
    with _LOCK:
        attachment = _ATTACHMENTS.setdefault(model, _Attachment(model))
        if attachment.users == 0:
            attachment.install()
        attachment.users += 1
    view = CappedMemory(memory, model)
    windows = [layer.window for layer in memory.shape.layers]
    decoder = model.get_decoder()

    def run_transient(ids: Sequence[int], start: int, step: Transient) -> None:
        device: Any = model.get_input_embeddings().weight.device
        with torch.no_grad():
            decoder(
                input_ids=torch.tensor([list(ids)], device=device),
                position_ids=torch.arange(start, start + len(ids), device=device)[None],
                past_key_values=_TransientCache(step, windows),
                use_cache=True,
            )

    memory.run_transient = run_transient
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
