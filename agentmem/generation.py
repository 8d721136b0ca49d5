"""Which calls of ``generate`` a capped memory can serve; everything else is refused before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agentmem.errors import PromptMismatch, UnsupportedGeneration

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from agentmem.hf import CappedMemory

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda value: value > 1, "beams reorder whole memories; use num_beams=1"),
    "assistant_model": (lambda value: value is not None, "assisted decoding takes tokens back; leave it out"),
    "prompt_lookup_num_tokens": (bool, "prompt lookup takes tokens back; leave it out"),
    "penalty_alpha": (bool, "contrastive search repeats rows in mid-run; use sampling"),
    "dola_layers": (lambda value: value is not None, "DoLa decoding is not handled; leave it out"),
    "cache_implementation": (lambda value: value is not None, "the memory is the cache; leave it out"),
    "guidance_scale": (lambda value: value not in (None, 1, 1.0), "classifier-free guidance grows a second cache"),
    "use_cache": (lambda value: value is False, "without a cache there is nothing to cap; leave use_cache out"),
    "output_attentions": (bool, "attention weights are never materialised; leave it out"),
}
"""Arguments of ``generate`` that are refused: when, and what to do instead."""


def check_generate(cache: CappedMemory, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what cannot be served.

    Raises:
        UnsupportedGeneration: a generation mode or argument of :data:`REFUSED`, or a Phi-3 run past its rope switch.
        PromptMismatch: the prompt does not extend what the memory has seen.
        MemoryClosed: the memory's block has ended.

    """
    cache.memory.open_or_raise()
    config = kwargs.get("generation_config") or model.generation_config
    for name, (refused, remedy) in REFUSED.items():
        value = kwargs[name] if name in kwargs else getattr(config, name, None)
        if value is not None and refused(value):
            raise UnsupportedGeneration(f"{name}={value!r}: {remedy}")
    if isinstance(kwargs.get("custom_generate"), str):
        raise UnsupportedGeneration("custom_generate from a repository manages caches of its own; pass a callable")
    prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if prompt is None:
        return
    _check_prompt(cache, prompt, kwargs.get("attention_mask"), kwargs.get("num_return_sequences"))
    _check_rope_switch(cache, model, int(prompt.shape[1]), kwargs, config)


def _check_prompt(cache: CappedMemory, prompt: torch.Tensor, mask: torch.Tensor | None, copies: int | None) -> None:
    """A later prompt holds the whole conversation, or its new tokens under a mask over the whole conversation."""
    rows = cache.memory.rows
    if not rows:
        return
    if len(rows) != prompt.shape[0] * (copies or 1):
        raise PromptMismatch(
            f"the memory holds {len(rows)} row(s), the prompt makes {prompt.shape[0] * (copies or 1)}; "
            "open a new memory"
        )
    count = int(prompt.shape[1])
    if mask is not None and mask.shape[1] == cache.columns + count:
        return
    if count <= cache.columns:
        raise PromptMismatch(
            f"the prompt has {count} column(s), the memory has seen {cache.columns}: pass the whole conversation so "
            "far with new tokens at its end, or open a new memory"
        )
    for index, row in enumerate(rows):
        line = index // (copies or 1)
        ids = prompt[line] if mask is None else prompt[line][mask[line].bool()]
        seen = list(row.ids)
        given = ids[: len(seen)].tolist()
        if given != seen:
            pairs = enumerate(zip(given, seen, strict=False))
            at = next((place for place, (new, old) in pairs if new != old), len(given))
            raise PromptMismatch(
                f"row {index}: the prompt departs from what the memory has seen at token {at} of {len(seen)}; "
                "a prompt must extend the conversation so far, or open a new memory"
            )


def _check_rope_switch(cache: CappedMemory, model: Any, prompt: int, kwargs: dict[str, Any], config: Any) -> None:
    """Phi-3 drops the cache and starts its own when it crosses ``original_max_position_embeddings`` ids."""
    text = model.config.get_text_config(decoder=True)
    limit = getattr(text, "original_max_position_embeddings", None)
    if text.model_type != "phi3" or limit is None or cache.columns > limit:
        return
    new = kwargs.get("max_new_tokens") or config.max_new_tokens
    longest = prompt + new if new else kwargs.get("max_length") or config.max_length or prompt
    longest += cache.memory.plan.probe_tokens
    if longest > limit:
        raise UnsupportedGeneration(
            f"this run may reach {longest} ids (probe included), but at {limit + 1} Phi-3 drops its cache to switch "
            f"rope factors; keep prompt + max_new_tokens + probe at most {limit}"
        )
