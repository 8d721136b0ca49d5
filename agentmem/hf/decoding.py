"""Decode token by token in agentmem's own loop, with logits processors and stopping criteria from transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria

from agentmem.errors import AgentmemError, UnsupportedGeneration
from agentmem.hf.support import input_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LogitsProcessorList

    from agentmem.hf.cache import CappedCache

_OURS = ("input_ids", "inputs", "past_key_values", "attention_mask", "position_ids", "custom_generate", "streamer")


@dataclass(slots=True)
class Decoding:
    """The state of decoding one reply: the ids so far, and transformers' objects that process and end it.

    ``ids [1, n]`` is a buffer; its first ``length`` ids are in use.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    ids: torch.Tensor
    length: int

    @property
    def so_far(self) -> torch.Tensor:
        """Return a view of the ids so far, ``[1, length]``."""
        return self.ids[:, : self.length]

    def add(self, token: int) -> None:
        """Append the id ``token``; the buffer is doubled if it is full."""
        if self.length == self.ids.shape[1]:
            self.ids = torch.cat((self.ids, torch.empty_like(self.ids)), 1)
        self.ids[0, self.length] = token
        self.length += 1

    def stops(self, scores: torch.Tensor) -> bool:
        """Check whether a stopping criterion ends the reply now; ``scores [1, V]`` are those of its last token."""
        done: torch.Tensor = self.criteria(self.so_far, scores)
        return bool(done.any())

    @property
    def ends(self) -> frozenset[int]:
        """Return the end-of-text ids of the generation config, which end a reply."""
        found = self.config.eos_token_id
        return frozenset(found if isinstance(found, list) else () if found is None else (int(found),))


def prepare(view: CappedCache, ids: Sequence[int], tokenizer: Any, options: dict[str, Any]) -> Decoding:
    """Return a :class:`Decoding` of a reply to the prompt ``ids``; run no forward.

    ``options`` are options of ``generate``. Transformers itself turns them into logits processors and stopping
    criteria.

    Raises:
        UnsupportedGeneration: the session sets an option itself, or a capped memory cannot serve an option.

    """
    _check(options)
    held: list[Decoding] = []

    def hold(
        model: Any,  # noqa: ARG001  # transformers' signature
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **_: Any,
    ) -> torch.Tensor:
        held.append(Decoding(logits_processor, stopping_criteria, generation_config, input_ids, input_ids.shape[1]))
        return input_ids

    device = input_device(view.model)
    given = torch.tensor([list(ids)], device=device)
    model: Any = view.model
    rest = {name: value for name, value in options.items() if name not in _OURS}
    stop, mask = _stop_strings(rest), torch.ones_like(given)
    try:
        model.generate(given, attention_mask=mask, past_key_values=view, custom_generate=hold, **rest)
        stops = [StopStringCriteria(tokenizer, stop)] if stop else []
    except AgentmemError:
        raise
    except (TypeError, ValueError) as error:
        raise UnsupportedGeneration(f"generate: transformers refuses these options: {error}") from error
    (decoding,) = held
    for each in decoding.criteria:
        if view.memory.positions is not None and isinstance(each, MaxLengthCriteria):
            each.max_position_embeddings = None  # it would warn of positions that are never reached with re-basing
    decoding.criteria = StoppingCriteriaList([*decoding.criteria, *stops])
    return decoding


def _check(options: dict[str, Any]) -> None:
    for name in _OURS:
        if options.get(name) is not None:
            raise UnsupportedGeneration(
                f"{name}: a session brings its own; leave it out (events: session.stream, astream)"
            )
    if (options.get("num_return_sequences") or 1) != 1:
        raise UnsupportedGeneration("num_return_sequences: a session is one row; fork it for more replies")
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise UnsupportedGeneration(f"generation_config: {config!r} is no transformers.GenerationConfig; give one")


def _stop_strings(options: dict[str, Any]) -> Any:
    """Remove the stop strings from the options and return them; ``None`` if there are none.

    agentmem handles these strings itself, because transformers handles stop strings only in its own decoding loop.
    """
    found, config = options.pop("stop_strings", None), options.get("generation_config")
    if config is not None and config.stop_strings:
        options["generation_config"] = own = copy.deepcopy(config)
        found, own.stop_strings = found or own.stop_strings, None
    return found


def choose(decoding: Decoding, logits: torch.Tensor, generator: torch.Generator | None) -> tuple[int, torch.Tensor]:
    """Choose the next id from the model's ``logits [V]``; return the id and the processed scores ``[1, V]``."""
    scores: torch.Tensor = decoding.processors(decoding.so_far, logits[None].float())  # type: ignore[arg-type]  # asks for a LongTensor by name
    if not decoding.config.do_sample:
        return int(scores.argmax(-1)), scores
    weights = scores.softmax(-1)
    return int(torch.multinomial(weights.cpu(), 1, generator=generator)), scores
