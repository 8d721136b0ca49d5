"""Refuse, before any work, calls of ``generate`` and forwards that a capped memory cannot serve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

from agentmem.errors import PromptMismatch, UnsupportedGeneration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from agentmem.hf.cache import CappedCache

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda value: value > 1, "beams reorder whole memories; use num_beams=1"),
    "constraints": (bool, "constrained beams reorder whole memories; leave it out"),
    "force_words_ids": (bool, "constrained beams reorder whole memories; leave it out"),
    "assistant_model": (lambda _: True, "assisted decoding takes tokens back; leave it out"),
    "assistant_early_exit": (lambda _: True, "self-speculation takes tokens back; leave it out"),
    "use_mtp": (bool, "multi-token prediction takes tokens back; leave it out"),
    "prompt_lookup_num_tokens": (bool, "prompt lookup takes tokens back; leave it out"),
    "penalty_alpha": (bool, "contrastive search repeats rows in mid-run; use sampling"),
    "dola_layers": (lambda _: True, "DoLa decoding is not handled; leave it out"),
    # transformers itself drops "hybrid", which the configs of older Gemma and Mistral models carry.
    "cache_implementation": (lambda value: value != "hybrid", "the memory is the cache; leave it out"),
    "guidance_scale": (lambda value: value != 1, "classifier-free guidance grows a second cache; leave it out"),
    "use_cache": (lambda value: not value, "without a cache there is nothing to cap; leave use_cache out"),
    "output_attentions": (bool, "attention weights are never materialised; leave it out"),
    "custom_generate": (lambda value: isinstance(value, str), "a repository's loop manages caches; pass a callable"),
}
"""Arguments of ``generate`` that may be refused, each with a test and the remedy for the error message.

The test is called with the value, which is not ``None``, and returns True if the value is refused.
"""

FORWARD = frozenset(
    (
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "return_dict",
        "output_hidden_states",
        "labels",
        "shift_labels",
        "num_items_in_batch",
    )
)
"""Allowed arguments of a forward: those that each piece of a long prompt gets too, and those of the output alone."""

DEFAULT_NEW_TOKENS = 20
"""The number of tokens that ``generate`` generates if no length is set."""


def chosen(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call of ``generate`` with the arguments ``given``, except options that are ``None``.

    Arguments override those in ``generation_config``, which override those in the model's own config.
    """
    config = given.get("generation_config")
    options: dict[str, Any] = {}
    for source in (vars(model.generation_config), {} if config is None else vars(config), given):
        options.update((name, value) for name, value in source.items() if value is not None)
    return options


def returned(model: Any, given: Mapping[str, Any], sequences: torch.Tensor) -> Any:
    """Return what ``generate`` would have returned, for a run that ended early with the ids in ``sequences``.

    ``sequences`` is ``[rows, columns]``. The result is a tensor, or an output object if ``return_dict_in_generate`` is
    set.
    """
    ids = sequences.to(model.device)
    rich = chosen(model, given).get("return_dict_in_generate", False)
    if not rich:
        return ids
    return GenerateDecoderOnlyOutput(sequences=ids)  # type: ignore[arg-type]  # asks for a LongTensor by name


def check_generate(cache: CappedCache, model: Any, given: Mapping[str, Any]) -> None:
    """Check that a capped memory can serve a call of ``generate``; ``given`` has the call's arguments by name.

    Raises:
        UnsupportedGeneration: :data:`REFUSED`, :func:`check_adapters` or :func:`check_ends` refuses an argument, or the
            model is a Phi-3 that may reach the length at which it changes its RoPE frequencies.
        PromptMismatch: the prompt does not extend the tokens that the memory has seen.

    """
    check_adapters(model)
    options = chosen(model, given)
    for name, (refused, remedy) in REFUSED.items():
        if name in options and refused(options[name]):
            value = repr(options[name]).partition("\n")[0].rstrip("(")  # only the name, if the value is a model
            raise UnsupportedGeneration(f"{name}={value}: {remedy}")
    ids = options.get("input_ids", options.get("inputs"))
    prompt = options.get("inputs_embeds", ids)
    if prompt is None:
        return
    mask = options.get("attention_mask")
    if mask is not None and mask.ndim == 2:  # noqa: PLR2004  # other masks are refused by the forward
        check_ends(mask[:, -1:].bool().tolist())
    if not _only_new(cache, options, prompt):
        _check_extends(cache, prompt, ids if prompt is ids else None, options)
        _check_rope_switch(cache, model, int(prompt.shape[1]), 0, options)
    else:
        _check_rope_switch(cache, model, int(prompt.shape[1]), cache.columns, options)


def check_forward(inputs: Mapping[str, Any]) -> None:
    """Check that a forward has only arguments that a capped memory can handle; ``inputs`` maps names to arguments.

    Other arguments would be lost when a long prompt is cut into pieces and when a probe is run. The values ``None`` and
    ``False`` are always allowed.

    Raises:
        UnsupportedGeneration: an argument is not in :data:`FORWARD`; the message names the first such argument.

    """
    for name, value in inputs.items():
        if name not in FORWARD and value is not None and value is not False:
            raise UnsupportedGeneration(
                f"a forward with {name[:40]} (a value of type {type(value).__name__}): neither the pieces of a long "
                "prompt nor probes would be given it; leave it out, or run this forward without the memory"
            )


def check_ends(valid: Sequence[Sequence[bool]], seen: Sequence[int] | None = None) -> None:
    """Check that no row is padded on the right, because its next token would be predicted from a pad.

    ``valid`` has one list per row, which is true in each column that holds a token. ``seen`` has the number of tokens
    that each row has read before, if this is one forward of a prompt: a row without any token may still get pads alone,
    which are the left padding of its tokens to come.

    Raises:
        UnsupportedGeneration: a row ends with a pad; the message names the first such row.

    """
    for index, row in enumerate(valid):
        if row[-1:] == [False] and (seen is None or seen[index] or any(row)):
            raise UnsupportedGeneration(
                f"row {index} ends with a pad, and what follows is wanted of its last column; pad on the left "
                "(tokenizer.padding_side='left')"
            )


def check_adapters(model: torch.nn.Module) -> None:
    """Check that the running forward does not use PEFT's ``adapter_names``, by which each row has its own adapter.

    Forwards that agentmem itself runs, such as probes, have a single row, but would get the adapter names of all rows.
    PEFT passes the names by hooks of the layers, so this function looks at the hooks.

    Raises:
        UnsupportedGeneration: ``adapter_names`` was passed to PEFT's ``generate`` or forward.

    """
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():  # noqa: SLF001  # torch has no getter
            if getattr(hook, "keywords", {}).get("adapter_names") is not None:
                raise UnsupportedGeneration(
                    "adapter_names: probes and replays run one row and would be given the adapters of all; leave it "
                    "out, choose one with set_adapter, and open one memory for each adapter"
                )


def _only_new(cache: CappedCache, options: Mapping[str, Any], prompt: torch.Tensor) -> bool:
    """Return True if the prompt has only new tokens, False if it is the whole conversation.

    The attention mask decides, because it must cover the whole conversation. If the mask is as long as the prompt,
    the prompt is the whole conversation. If the mask is longer, it also has the columns that the memory has already
    seen; the prompt then has only the tokens after these columns. Without a mask, the prompt is the whole conversation.

    Raises:
        UnsupportedGeneration: the mask is not 2-D.
        PromptMismatch: the mask covers neither the prompt alone nor the earlier columns and the prompt.

    """
    mask, count = options.get("attention_mask"), int(prompt.shape[1])
    if mask is None:
        return False
    if getattr(mask, "ndim", None) != 2:  # noqa: PLR2004
        raise UnsupportedGeneration("attention_mask must be 2-D [batch, columns]; prepared 4-D masks are not handled")
    whole = cache.columns + count
    if mask.shape[1] not in (count, whole):
        raise PromptMismatch(
            f"attention_mask has {mask.shape[1]} columns for a prompt of {count}; give it {count} if the prompt "
            f"is the whole conversation, or {whole} if it holds new tokens alone"
        )
    return bool(mask.shape[1] != count)


def _check_extends(
    cache: CappedCache, prompt: torch.Tensor, ids: torch.Tensor | None, options: Mapping[str, Any]
) -> None:
    """Check that a prompt given to a memory in use begins with the whole conversation so far.

    ``ids`` are the prompt's ids; ``None`` means that the prompt consists of embeddings, which are not compared.

    Raises:
        PromptMismatch: the prompt has another number of rows, adds no column, or differs from the earlier ids.

    """
    rows, count, copies = cache.memory.sequences, int(prompt.shape[1]), options.get("num_return_sequences", 1)
    if not rows:
        return
    if len(rows) != prompt.shape[0] * copies:
        raise PromptMismatch(
            f"the memory holds {len(rows)} row(s), the prompt makes {prompt.shape[0] * copies}; open a new memory"
        )
    if count <= cache.columns:
        raise PromptMismatch(
            f"the prompt has {count} column(s), the memory has seen {cache.columns}: pass the whole conversation "
            "and new tokens at its end, or new tokens alone under an attention_mask over everything, or a new memory"
        )
    mask = options.get("attention_mask")
    for row in rows if ids is not None else ():
        line = row.index // copies
        given = (ids[line] if mask is None else ids[line][mask[line].bool()])[: row.seen].tolist()  # type: ignore[index]  # rows: there are ids
        if given != list(row.ids):
            pairs = enumerate(zip(given, row.ids, strict=False))
            at = next((place for place, (now, then) in pairs if now != then), len(given))
            raise PromptMismatch(
                f"row {row.index}: the prompt departs from what the memory has seen at token {at} of {row.seen}; it "
                "must extend the conversation so far (with its attention_mask if it has pads), or open a new memory"
            )


def _check_rope_switch(cache: CappedCache, model: Any, prompt: int, earlier: int, options: Mapping[str, Any]) -> None:
    """Refuse runs of Phi-3 that may exceed ``original_max_position_embeddings``, where Phi-3 discards its cache.

    ``prompt`` and ``earlier`` are the numbers of columns in the prompt and before it.

    Raises:
        UnsupportedGeneration: the run may become too long; the message has the number of ids it may reach.

    """
    text = model.config.get_text_config(decoder=True)
    limit = getattr(text, "original_max_position_embeddings", None)
    if text.model_type != "phi3" or limit is None:
        return
    if (new := options.get("max_new_tokens")) is not None:
        longest = prompt + new
    else:
        longest = options.get("max_length", prompt + DEFAULT_NEW_TOKENS)
    longest += earlier + cache.memory.plan.probe_tokens
    if longest > limit:
        raise UnsupportedGeneration(
            f"this run may reach {longest} ids (earlier turns and the probe included), but at {limit + 1} Phi-3 drops "
            f"its cache to switch rope factors; keep their sum at most {limit}"
        )
