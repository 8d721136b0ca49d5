"""Check whether a family of models (a ``model_type``) can be capped, with a tiny random model of its class.

As long as nothing was compacted, the tiny model's logits must equal those of unchanged ("stock") transformers. After a
compaction, each slot must hold the key of its position, and the logits must equal those of a reference computation that
attends to the same slots. The package's own tests cover the families in :data:`agentmem.hf.support.COVERED`; others are
checked before their first use, once per process.
"""

from __future__ import annotations

import inspect
import json
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from agentmem import plugins
from agentmem.engine import Want, feed
from agentmem.errors import AgentmemError, UnsupportedModel
from agentmem.hf.attach import attach, detach, scope
from agentmem.hf.capture import AttentionCall, reading
from agentmem.hf.check_models import VOCABULARY, causal_class, tiny_model
from agentmem.hf.fork_lock import fork_lock
from agentmem.hf.forward_context import FRAME, Frame, own_frame, rename, restore
from agentmem.hf.rebase_check import check_rebase
from agentmem.hf.rope import follows_positions
from agentmem.hf.support import COVERED, SINKS, describe
from agentmem.memory.memory import Memory
from agentmem.memory.state import take
from agentmem.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from agentmem.hf.cache import CappedCache
    from agentmem.planning.model_shape import ModelShape

SECONDS = 30.0
"""The most seconds that a self-check may take; the family is refused after that. Most take less than one second."""
LIMIT = 1e-4
"""The greatest allowed difference between float32 logits, relative to the larger of 1 and the largest absolute logit.

Rounding alone gives about a hundredth of this."""
_TOKENS, _SLOTS = 56, 32
_SINKS = "attention calls, with sinks"
_ROOMY: dict[str, Any] = {"cap": 1 << 28, "chunk": 16, "keep_first": 4, "keep_recent": 8, "min_reclaim": 4}


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one step of a self-check.

    ``difference`` is the relative difference from the expected result; ``None`` if the step compares no numbers.
    """

    name: str
    difference: float | None = None

    @property
    def passed(self) -> bool:
        """Return True if the difference is at most :data:`LIMIT`, so small that rounding can cause it."""
        return self.difference is None or self.difference <= LIMIT


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The result of the self-check of one model family: ``checks`` are the steps that were finished.

    ``reason`` is the reason why the family is refused; ``None`` if the family passed.
    """

    family: str
    checks: tuple[Check, ...]
    reason: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Return True if models of this family can be capped."""
        return self.reason is None

    @property
    def sinks(self) -> bool:
        """Return True if models of this family have attention sinks, as the self-check has seen."""
        return any(each.name == _SINKS for each in self.checks)


def check(model: Any) -> CheckReport:
    """Run the self-check for the family of ``model``, which is a model or its config, and return a report.

    A tiny random model of the same class is run, not the given model. The global random state is not changed.
    """
    began, config, found = time.monotonic(), getattr(model, "config", model), list[Check]()
    reason = None
    try:
        describe(config, itemsize=4)
        for each in _checks(model, config):
            found.append(each)
            _require_passed(each, time.monotonic() - began)
    except AgentmemError as error:
        reason = str(error)
    except Exception as error:  # noqa: BLE001  # an error in the model's own code is the reason to refuse it
        after = f"having passed {found[-1].name!r}" if found else "before anything could be checked"
        reason = f"a tiny model of its class raised {type(error).__name__}: {str(error)[:200]}, {after}"
    return CheckReport(config.model_type, tuple(found), reason, time.monotonic() - began)


def _require_passed(check: Check, seconds: float) -> None:
    if not check.passed:
        raise UnsupportedModel(
            f"{check.name}: a tiny model of its class differs from stock by {check.difference:.2g}, where at most "
            f"{LIMIT:.0e} is rounding"
        )
    if seconds > SECONDS:
        raise UnsupportedModel(f"the self-check was not done after {SECONDS:.0f} seconds")


_REPORTS: dict[str, CheckReport] = {}
"""The reports of this process, by a key made of the kind of check, the model's class and its config."""
_LOCK = fork_lock()


def require_checked(model: Any) -> bool:
    """Refuse a model or config whose family fails the self-check; return True if the model has attention sinks.

    Families that the package's tests cover are not checked. The results of checks are kept for the process.

    Raises:
        UnsupportedModel: the self-check failed; the message has the reason.

    """
    config = getattr(model, "config", model)
    if config.model_type in COVERED and type(config).__module__.startswith("transformers."):
        return config.model_type in SINKS
    report = _kept(model, config, "use", check)
    if report.reason is not None:
        raise UnsupportedModel(
            f"model_type {report.family!r} is refused, since its self-check failed: {report.reason}. Use a model of "
            "another family (docs/models.md lists those that pass), or see `agentmem check`"
        )
    return report.sinks


def require_turning(model: Any) -> None:
    """Check that a model's stored keys can be rotated exactly, as re-basing needs; keep the result for the process.

    Raises:
        UnsupportedModel: the keys cannot be rotated exactly; the message names the layer, or the ``rope_type``.

    """
    report = _kept(model, model.config, "re-base", _turning)
    if report.reason is not None:
        raise UnsupportedModel(report.reason)


def packs(model: Any) -> bool:
    """Return True if one forward can run several sequences concatenated to one row, each at its own positions.

    This is impossible if the positions of one sequence affect the computation of another, or if a layer other than
    attention mixes neighbouring tokens. Families that the package's tests do not cover are checked once per process.
    """
    config = model.config
    if follows_positions(config) or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if config.model_type in COVERED and type(config).__module__.startswith("transformers."):
        return True
    return _kept(model, config, "pack", check_packing).passed


def check_packing(model: Any) -> CheckReport:
    """Check that two sequences get the same logits in shared (packed) forwards as in separate stock forwards.

    If they do, the report's ``passed`` is true. A tiny model of the same class is run, not the given model.
    """
    family = model.config.model_type
    try:
        with torch.inference_mode(mode=False), torch.no_grad(), _plain():
            tiny = tiny_model(type(model), model.config)
            shape = _as_called(tiny, describe(tiny.config, itemsize=4))
            check = Check("packed", _packed_apart(tiny, shape))
            _require_passed(check, 0.0)
    except Exception as error:  # noqa: BLE001  # after any error, sequences are fed one at a time
        return CheckReport(family, (), str(error))
    return CheckReport(family, (check,))


def _packed_apart(model: Any, shape: ModelShape) -> float:
    generator, worst = torch.Generator().manual_seed(3), 0.0
    texts = [torch.randint(3, VOCABULARY, (1, count), generator=generator) for count in (12, 9)]
    cuts = ((7, 4), (1, 3), (1, 1), (3, 1))
    with _capped(model, shape) as first, _capped(model, shape) as second:
        for view in (first, second):
            view.memory.bind(1)
        starts = [0, 0]
        for cut in cuts:
            spans = [slice(start, start + count) for start, count in zip(starts, cut, strict=True)]
            pieces = [text[0, span].tolist() for text, span in zip(texts, spans, strict=True)]
            wants = [Want(view.engine, ids) for view, ids in zip((first, second), pieces, strict=True)]
            feed([(want, len(want.ids)) for want in wants])
            for want, text, span in zip(wants, texts, spans, strict=True):
                stock = model(text[:, : span.stop], use_cache=False).logits[0, -1]
                worst = max(worst, _apart(want.result()[1], stock))
                want.engine.commit()
            starts = [span.stop for span in spans]
    return worst


def _turning(model: Any) -> CheckReport:
    try:
        check_rebase(model)
    except UnsupportedModel as error:
        return CheckReport(model.config.model_type, (), str(error))
    return CheckReport(model.config.model_type, ())


def _kept(model: Any, config: Any, what: str, run: Callable[[Any], CheckReport]) -> CheckReport:
    fields = {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "dtype")}
    key = f"{what} {type(model)} {json.dumps(fields, sort_keys=True, default=str)}"
    with _LOCK:
        if key not in _REPORTS:
            _REPORTS[key] = run(model)
        return _REPORTS[key]


def _checks(model: Any, config: Any) -> Iterator[Check]:
    kind = type(model) if hasattr(model, "get_decoder") else causal_class(config)
    with torch.inference_mode(mode=False), torch.no_grad(), _plain():
        tiny = tiny_model(kind, config)
        shape = describe(tiny.config, itemsize=4)
        shape = _as_called(tiny, shape)
        yield Check(_SINKS if shape.layers[0].sinks else "attention calls")
        ids = torch.randint(3, VOCABULARY, (1, _TOKENS), generator=torch.Generator().manual_seed(1))
        yield from _below_the_cap(tiny, shape, ids)
        if shape.compactable:
            yield from _after_a_compaction(tiny, shape, ids)


@contextmanager
def _plain() -> Iterator[None]:
    """Disable autocast and use the CPU as default device in the block, whatever the caller has set."""
    # a default device in force, be it the CPU, makes every call of torch slower
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.autocast("cpu", enabled=False), device:
        yield


# ---- the arguments of attention calls


class _Witness:
    """A stand-in for attention that records the shapes of its arguments and returns zeros."""

    memories = ()

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[int, ...]]] = []
        self.sinks = False

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Record a call with ``queries [B, Hq, q, d]``; return zeros ``[B, q, Hq, dv]``."""
        del scale
        self.sinks |= sinks is not None
        self.calls.append((layer, (keys.shape[1], queries.shape[1], keys.shape[-1], values.shape[-1])))
        return queries.new_zeros(queries.shape[0], queries.shape[2], queries.shape[1], values.shape[-1])


def _as_called(model: Any, shape: ModelShape) -> ModelShape:
    """Check the attention calls of a model by running it; return its shape, with sinks if the calls pass sinks.

    Raises:
        UnsupportedModel: the model breaks this rule: each layer must call attention exactly once, through transformers'
            AttentionInterface, with the numbers of heads and dims that the model's config states.

    """
    ids = torch.full((1, 5), 3)
    model(ids, use_cache=False)
    witness, config = _Witness(), model.get_decoder().config
    try:
        rename(config, witness)
        with own_frame():
            FRAME.set(Frame(None, witness))
            model(ids, use_cache=False)
    except UnsupportedModel:
        raise
    except Exception:
        if witness.calls:
            raise  # else the model's own attention failed because it got no mask
    finally:
        restore(config, witness)
    layers = [layer for layer, _ in witness.calls]
    if layers != list(range(len(shape.layers))):
        raise UnsupportedModel(
            f"of {len(shape.layers)} layers, those that call attention through transformers' AttentionInterface are "
            f"{str(layers)[:100] if layers else 'none'}: a memory stands in for calls that come there once a layer"
        )
    for layer, found in witness.calls:
        each = shape.layers[layer]
        wanted = (each.kv_heads, each.query_heads, each.key_dim, each.value_dim)
        if found != wanted:
            raise UnsupportedModel(
                f"layer {layer} calls attention with (KV heads, query heads, key dim, value dim) = {found}, where its "
                f"config says {wanted}"
            )
    return shape.with_sinks() if witness.sinks else shape


# ---- below the cap


@contextmanager
def _capped(model: Any, shape: ModelShape) -> Iterator[CappedCache]:
    memory = Memory(shape, Settings.of(**_ROOMY), plugins.policy("am-halving"))
    view = attach(model, memory)
    try:
        with scope(model):
            yield view
    finally:
        detach(model)
        memory.close()


def _below_the_cap(model: Any, shape: ModelShape, ids: torch.Tensor) -> Iterator[Check]:
    cuts: dict[str, Sequence[int]] = {
        "prefill": (16,),
        "prefill in chunks": (16, 5, 16, 16, 3),
        "decode": (16, 16, 16, 1, 1, 1, 1, 1, 1, 1, 1),
    }
    stock = _logits(model, ids, (_TOKENS,))
    for name, cut in cuts.items():
        part = ids[:, : sum(cut)]
        with _capped(model, shape) as memory:
            yield Check(name, _apart(_logits(model, part, cut, memory), stock[:, : sum(cut)]))
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :6] = 0
    rows = ids[:, :30].reshape(2, 15) * mask
    cut, seen = (12, 1, 1, 1), mask.bool()
    stock = _logits(model, rows, (15,), None, mask)
    with _capped(model, shape) as memory:
        yield Check("left-padded batch", _apart(_logits(model, rows, cut, memory, mask)[seen], stock[seen]))
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    wanted = model.generate(ids[:, :20], **options)
    with _capped(model, shape) as memory:
        found = model.generate(ids[:, :20], past_key_values=memory, **options)
    yield Check("generate", _apart(torch.stack(found.logits), torch.stack(wanted.logits)))


def _logits(
    model: Any, ids: torch.Tensor, cuts: Sequence[int], cache: Any = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Feed ``ids [rows, columns]`` in pieces, and return the logits ``[rows, columns, V]``.

    ``cuts`` has the number of columns of each piece; without ``cache`` there must be a single piece.
    """
    given = torch.ones_like(ids) if mask is None else mask
    places = (given.cumsum(-1) - 1).clamp_(min=0)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    pieces, start = [], 0
    for count in cuts:
        span = slice(start, start + count)
        more: dict[str, Any] = {"position_ids": places[:, span]} if takes else {}
        more |= {"use_cache": False} if cache is None else {"past_key_values": cache}
        output = model(ids[:, span], attention_mask=given[:, : span.stop], **more)
        pieces.append(output.logits)
        start += count
    return torch.cat(pieces, 1)


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the greatest absolute difference of two tensors, divided by a scale.

    The scale is the largest absolute value in ``wanted``, but at least 1.
    """
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


# ---- after a compaction


def _after_a_compaction(model: Any, shape: ModelShape, ids: torch.Tensor) -> Iterator[Check]:
    more = torch.randint(3, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(2))
    with _capped(model, shape) as memory:
        model(ids, past_key_values=memory, logits_to_keep=1)
        found = []
        for _ in range(2):
            memory.compact(slots=_SLOTS - 12)
            slots = _slots(memory, shape)
            found.append((slots, model(more, past_key_values=memory).logits[0]))
    with reading(model, [layer.window for layer in shape.layers]) as reader:
        yield Check("keys of compacted slots", _misplaced(found[0][0], reader.read(ids[0]).layers, shape))
        for times, (slots, logits) in enumerate(found):
            past, start = [each.asked for each in slots], _TOKENS + times * more.shape[1]
            wanted = reader.read(more[0], start=start, past=past, logits=True).logits
            assert wanted is not None  # noqa: S101  # they were asked for
            yield Check(f"logits after {times + 1} compaction{'s' * times}", _apart(logits, wanted))


@dataclass(frozen=True, slots=True)
class _Slots:
    """A copy of one layer's slots, made so that the tokens of a later forward can attend to them.

    ``asked`` can be passed to :meth:`agentmem.hf.capture.Reader.read` as ``past``. Its ``keys [H, n, d]``,
    ``values [H, n, dv]`` and ``bias [H, n]`` are the keys, values and β of the slots. Its queries and its output are
    not needed, so they are empty tensors. ``positions [H, n]`` are the positions of the slots; ``None`` for a layer
    with a sliding window.
    """

    asked: AttentionCall
    positions: torch.Tensor | None


def _slots(memory: CappedCache, shape: ModelShape) -> list[_Slots]:
    """Return a copy of the slots of every layer; the memory has one sequence."""
    (sequence,) = memory.memory.sequences
    memory.engine.finish(sequence)
    _, tensors = take(memory.memory)
    found = []
    for index, layer in enumerate(shape.layers):

        def column(name: str, index: int = index, heads: int = layer.kv_heads) -> torch.Tensor:
            return torch.stack([tensors[f"layer.{index}.head.{head}.{name}"] for head in range(heads)]).clone()

        empty = torch.empty(0)
        asked = AttentionCall(empty, column("keys"), column("values"), empty, 1.0, column("bias"))
        found.append(_Slots(asked, None if layer.window is not None else column("positions").long()))
    return found


def _misplaced(slots: Sequence[_Slots], stock: Sequence[AttentionCall], shape: ModelShape) -> float:
    """Return the greatest relative difference between the slots' keys and the keys of stock transformers.

    ``stock`` has the attention call of each layer over the whole text. Each slot is compared with the key at the slot's
    position; in layers with a sliding window, the last keys are compared.
    """
    worst = 0.0
    for each, whole, layer in zip(slots, stock, shape.layers, strict=True):
        keys = whole.keys
        if each.positions is None:
            last = min(keys.shape[1], (layer.window or 1) - 1)
            found, wanted = each.asked.keys[:, -last:], keys[:, -last:]
        else:
            if each.asked.keys.shape[1] != _SLOTS:
                raise UnsupportedModel(f"a compaction to {_SLOTS} slots per head left {each.asked.keys.shape[1]}")
            found = each.asked.keys
            wanted = keys.gather(1, each.positions[..., None].expand_as(found))
        worst = max(worst, _apart(found, wanted))
    return worst
