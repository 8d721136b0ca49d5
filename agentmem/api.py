"""Cap a model's ``generate`` with :func:`capped` or :func:`wrap`, and show beforehand with :func:`plan` what fits."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, Unpack
from weakref import finalize

from agentmem import hf, plugins
from agentmem.contracts import Budgets
from agentmem.errors import CompactionFailed, CopyRefused, MemoryUnused, SettingsRefused
from agentmem.language import Language
from agentmem.memory.memory import Memory
from agentmem.planning.capacity import make_plan
from agentmem.settings import Settings, SettingsOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from agentmem.contracts import Policy
    from agentmem.planning.model_shape import ModelShape
    from agentmem.planning.pricing import Plan
    from agentmem.reference_queries.probe import Words
    from agentmem.reporting.report import RunReport


def plan(
    model: Any,
    tokenizer: Any = None,  # noqa: ARG001  # the arguments of capped can be passed on as they are
    *,
    cap: int | str,
    policy: str | Policy = "am-halving",
    rows: int = 1,
    itemsize: int | None = None,
    policy_options: Mapping[str, Any] | None = None,
    **settings: Unpack[SettingsOptions],
) -> Plan:
    """Return the plan for a cap on a model: how many slots fit, and how many bytes each use takes.

    ``model`` is a model or only its config; no weights are needed. ``tokenizer`` changes nothing in a plan; it is there
    so that the arguments of :func:`capped` can be passed on. ``rows`` is the number of sequences in a batch.
    ``itemsize`` is the number of bytes of one element of K and V; by default it is that of the model's own dtype. All
    other arguments are those of :func:`capped`.

    Raises:
        SettingsRefused: a setting cannot work; this includes the subclasses that :func:`capped` lists.

    """
    for name, count in (("rows", rows), ("itemsize", itemsize)):
        if count is not None and (type(count) is not int or count < 1):
            raise SettingsRefused(f"{name}: {count!r} is no whole number of at least 1; give one")
    chosen = plugins.policy(policy, **(policy_options or {}))
    wished = Settings.of(cap=cap, **settings)
    shape = _shape(model, chosen, itemsize or _itemsize(model)).with_slots(wished.slot_dtype)
    return make_plan(shape, wished, chosen, rows)


@contextmanager
def capped(
    model: Any,
    tokenizer: Any = None,
    *,
    cap: int | str,
    policy: str | Policy = "am-halving",
    policy_options: Mapping[str, Any] | None = None,
    extra_policies: Sequence[str | Policy] = (),
    **settings: Unpack[SettingsOptions],
) -> Iterator[hf.CappedCache]:
    """Cap the KV memory of a model while the block runs: ``model.generate`` in the block runs under the cap.

    Use it as ``with capped(model, cap="24MiB") as memory:``. ``generate`` uses this memory if it is called without
    ``past_key_values``. Pass ``past_key_values=memory`` to every direct forward of the model, and also to ``generate``
    if several blocks cap the same model at once. All calls that use one memory continue one conversation.

    Args:
        model: a transformers causal language model in eval mode.
        tokenizer: needed by policies with a probe of text (``repeat``, ``focus``, ``self-study``), with a ``pattern``
            (such as ``am-recall``) or with a summary.
        cap: the cap in bytes, as an integer or a text such as ``"24MiB"``.
        policy: the name of an installed policy, or a :class:`agentmem.contracts.Policy`.
        policy_options: options for the policy that is named by ``policy``.
        extra_policies: further policies that ``memory.compact(policy=...)`` may name; the plan reserves workspace for
            them.
        settings: see :class:`agentmem.settings.Settings`.

    Raises:
        SettingsRefused: a setting cannot work (``CapTooSmall``, ``UnknownPolicy``, ``UnsupportedModel``).
        MemoryUnused: the block ended without an error, but no forward ever used the memory.

    """
    inner = hf.text_model(model)
    chosen = plugins.policy(policy, **(policy_options or {}))
    memory = open_memory(inner, cap, chosen, tokenizer, settings, extra_policies)
    view = hf.attach(inner, memory)
    try:
        with hf.scope(view):
            yield view
    finally:
        try:
            hf.detach(inner)
        finally:
            memory.close()
    if not memory.used:
        raise MemoryUnused(
            "no forward used the memory of this capped block; call model.generate in it, or pass the memory to a "
            "forward: model(..., past_key_values=memory)"
        )


class CappedModel:
    """A model whose ``generate`` runs under a cap. The memory stays until :meth:`reset` or :meth:`close`.

    A ``CappedModel`` can be used in place of the model: attributes that it does not define itself are the model's, and
    ``isinstance`` sees the model's class. ``transformers.pipeline`` accepts a ``CappedModel``. All calls continue one
    conversation; call :meth:`reset` before a prompt that starts another conversation.
    """

    def __init__(self, model: Any, memory: Memory) -> None:
        """Attach ``memory`` to ``model``. Callers use :func:`wrap` instead of this constructor."""
        self._model = model
        self._open(memory)

    def _open(self, memory: Memory) -> None:
        self._template = memory
        self.memory = hf.attach(self._model, memory)
        self._leash = finalize(self, hf.detach_later, self._model)  # detaches if nobody closes it
        self._leash.atexit = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``model.generate`` with these arguments under the cap; ``past_key_values`` must not be among them.

        Returns:
            The ids ``[rows, columns]``, prompt included; with ``return_dict_in_generate``, transformers' own output
            object, whose ``sequences`` are these ids. :meth:`report` returns what the memory did.

        Raises:
            UnsupportedGeneration: an argument asks for something that a capped memory cannot do.
            MemoryCapExceeded: the policy never compacts and the cap is reached.
            CompactionFailed: a compaction failed and the setting is ``on_failure="raise"``. With ``"stop"``, the ids
                up to the failure are returned instead.

        """
        if kwargs.get("past_key_values") is not None:
            raise SettingsRefused(
                "past_key_values: this model brings its own memory; leave it out, or use agentmem.capped"
            )
        try:
            return self._model.generate(*args, past_key_values=self.memory, **kwargs)
        except CompactionFailed:
            if self.memory.memory.stopped is None:
                raise
            return hf.returned(self._model, kwargs, self.memory.padded_transcripts())

    def report(self) -> RunReport:
        """Return a report of everything that the memory has done since it was opened or last reset."""
        return self.memory.report()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward. It uses the memory only if ``past_key_values=wrapped.memory`` is passed."""
        return self._model(*args, **kwargs)

    @property  # type: ignore[misc]  # isinstance and transformers' pipelines read it
    def __class__(self) -> type[Any]:
        """Return the model's class, so that ``isinstance`` checks pass."""
        return type(self._model)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied by ``copy`` or pickled."""
        raise CopyRefused.of(self)

    def __getattr__(self, name: str) -> Any:
        """Return the model's attribute of that name: ``config``, ``device``, ``generation_config`` and so on.

        Methods that return the model itself, such as ``to``, ``eval`` and ``half``, return this capped model instead.
        """
        if name.startswith("__") or name == "_model":
            raise AttributeError(name)
        found = getattr(self._model, name)
        if getattr(found, "__self__", None) is not self._model:
            return found

        @functools.wraps(found)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            return self if result is self._model else result

        return method

    def reset(self) -> None:
        """Drop the conversation and start with an empty memory under the same settings."""
        old = self._template
        self.close()
        self._open(old.empty())

    def close(self) -> None:
        """Free the memory and leave the model as it was; closing twice does nothing."""
        if not self._template.closed:
            self._leash.detach()
            hf.detach(self._model)
            self._template.close()

    def __enter__(self) -> Self:
        """Begin a ``with`` block, at whose end the memory is closed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the memory."""
        self.close()


def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    cap: int | str,
    policy: str | Policy = "am-halving",
    policy_options: Mapping[str, Any] | None = None,
    extra_policies: Sequence[str | Policy] = (),
    **settings: Unpack[SettingsOptions],
) -> CappedModel:
    """Return a model whose ``generate`` runs under a cap. The arguments and errors are those of :func:`capped`."""
    inner = hf.text_model(model)
    chosen = plugins.policy(policy, **(policy_options or {}))
    return CappedModel(inner, open_memory(inner, cap, chosen, tokenizer, settings, extra_policies))


def open_memory(
    model: Any,
    cap: int | str,
    policy: str | Policy,
    tokenizer: Any,
    settings: Mapping[str, Any],
    extra_policies: Sequence[str | Policy] = (),
) -> Memory:
    """Make a memory for a model without attaching it to the model; arguments and errors are as in :func:`capped`."""
    chosen = plugins.policy(policy)
    beside = plugins.beside(extra_policies)
    wished = Settings.of(cap=cap, **settings)
    shape = _shape(model, chosen, _itemsize(model)).with_slots(wished.slot_dtype)
    if wished.rebase:
        hf.require_turning(model)
    for other in beside:
        shape = replace(shape, fingerprint=_shape(model, other, shape.itemsize).fingerprint or shape.fingerprint)
    return Memory(
        shape,
        wished,
        chosen,
        extra_policies=beside,
        words={each.name: _words(each, tokenizer, shape) for each in (chosen, *beside)},
        language=None if tokenizer is None else _language(tokenizer, hf.end_ids(model)),
        device=hf.input_device(model),
        positions=hf.positions(model, shape.positions) if wished.rebase and shape.positions else None,
    )


def _shape(model: Any, policy: Policy, itemsize: int) -> ModelShape:
    """Return the sizes of a model, or of a config alone.

    Raises:
        UnsupportedModel: agentmem or the policy cannot serve this model.

    """
    config = getattr(model, "config", model)
    device = hf.input_device(model).type if hasattr(model, "get_input_embeddings") else "cpu"
    shape = hf.describe(config, itemsize=itemsize, fused=device in ("cpu", "meta"))
    if hf.require_checked(model):
        shape = shape.with_sinks()
    if policy.queries.probing:
        hf.refuse_probe(config, policy.name)
    if policy.rewrite is not None or any(part.source == "self-study" for part in policy.queries.parts):
        hf.refuse_scratch(shape, policy.name)
    if policy.budgets is not None and type(policy.budgets).check is not Budgets.check and hasattr(model, "get_decoder"):
        shape = replace(shape, fingerprint=hf.fingerprint(model))
    return shape


def _words(policy: Policy, tokenizer: Any, shape: ModelShape) -> Words:
    """Return the token ids of the texts that the policy's probe uses, as a dictionary with the sources as keys.

    Raises:
        SettingsRefused: there is no tokenizer, or it turns a text of the policy into ids that the model does not know.

    """
    worded = [part for part in policy.queries.probing if part.texts]
    needs: str | None = worded[0].source if worded else "pattern" if policy.queries.pattern else None
    needs = "a summary" if policy.rewrite is not None else needs
    if needs and tokenizer is None:
        raise SettingsRefused(
            f"policy {policy.name!r} with {needs!r} reads or writes text and needs a tokenizer; pass tokenizer=..., or "
            "use probe='replay' without a pattern or summary"
        )

    def known(text: str) -> tuple[int, ...]:
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        shape.check_ids(f"policy {policy.name!r} with the text {text[:40]!r}", ids)
        return ids

    for text in () if policy.rewrite is None else (policy.rewrite.instruction, policy.rewrite.lead):
        known(text)
    return {part.source: tuple(map(known, part.texts)) for part in worded}


def _language(tokenizer: Any, ends: tuple[int, ...]) -> Language:
    def write(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def ask(text: str) -> list[int]:
        if not getattr(tokenizer, "chat_template", None):
            return write(f"\n\n{text}\n")
        said = [{"role": "user", "content": text}]
        return write(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))

    return Language(_reader(tokenizer), write, ask, ends)


def _reader(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """Return a function that converts ids to a list with the text of each id, leading spaces included.

    Each id is decoded behind an anchor token, because some decoders drop the space before the first id of a text.
    """

    def read(ids: Sequence[int]) -> list[str]:
        anchor = tokenizer(".", add_special_tokens=False)["input_ids"][-1]
        skip = len(tokenizer.decode([anchor]))
        return [text[skip:] for text in tokenizer.batch_decode([[anchor, each] for each in ids])]

    return read


def _itemsize(model: Any) -> int:
    dtype = getattr(model, "dtype", None)
    return int(dtype.itemsize) if dtype is not None else 4
