"""A session as a snapshot: what of it is tensors, what is state, and whose it is."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from agentmem import hf
from agentmem.errors import AgentmemError, MemoryCapExceeded, SnapshotRefused
from agentmem.memory.state import SavedSequence, give, take
from agentmem.sessions.snapshots.files import read_manifest, read_snapshot, shown
from agentmem.sessions.snapshots.sequence_check import check_sizes, check_values
from agentmem.untrusted.json_text import tuples
from agentmem.untrusted.texts import faults

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping

    from agentmem.memory.memory import Memory
    from agentmem.sessions.snapshots.files import TensorSpec

_OTHER = "Load another snapshot, or begin a new session."
MAX_TOKENS = 1 << 26
"""Ids of a sequence are outside the cap, so something else must bound what is read: 512 MiB of them."""


class Identity:
    """Whose snapshots a runtime writes and reads: what makes keys what they are, part by part."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Read all weights and the vocabulary, once: what takes long and is not expected to change."""
        self._model, self._tokenizer = model, tokenizer
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        self._read = {
            "weights": hf.weights(model),
            "tokenizer": _digest(json.dumps([vocabulary, tokenizer.all_special_tokens])),
        }

    def now(self) -> dict[str, str]:
        """Each part as it is now, by its name; see :func:`agentmem.hf.model_identity.model_identity`."""
        template = _digest(str(self._tokenizer.chat_template))
        return {**hf.model_identity(self._model), **self._read, "chat template": template}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def take_sequence(memory: Memory, dtype: torch.dtype | None) -> tuple[SavedSequence, dict[str, torch.Tensor]]:
    """The sequence of a memory as values and views of its tensors; they pass the checks of :func:`read_sequence`.

    ``dtype`` is what it will be read with; ``None``: that of the keys.

    Raises:
        AgentmemError: a snapshot of it could not be read again, e.g. for an infinite number among its keys; the
            memory stays as it is.
        CompactionFailed: see :func:`agentmem.memory.state.take`.

    """
    saved, tensors = take(memory)
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with loadable():
        check_sizes(memory, saved, kinds, dtype or saved.dtype or torch.float32)
        if saved.tokens > MAX_TOKENS:
            raise ValueError(f"it has {saved.tokens} tokens; {MAX_TOKENS} are read")
        check_values(memory, saved, tensors)
    return saved, tensors


@contextmanager
def loadable() -> Iterator[None]:
    """Say of what is checked in the block that it could not be loaded.

    Raises:
        AgentmemError: a check raised ValueError.

    """
    try:
        yield
    except ValueError as error:
        raise AgentmemError(
            f"this memory cannot be saved, since no runtime could load it again: {error}. It stays usable as it is; "
            "numbers that are not finite come from the model: load it in float32 or bfloat16"
        ) from None


def read_sequence(
    memory: Memory,
    url: str | os.PathLike[str],
    *,
    identity: Mapping[str, str],
    dtype: torch.dtype,
    check: Callable[[SavedSequence, dict[str, Any]], None] = lambda _saved, _state: None,
) -> dict[str, Any]:
    """Fill a memory that has read nothing with the sequence of a snapshot; returns the snapshot's state.

    Args:
        memory: it is changed by the last step alone, when nothing can be refused any more but for want of room.
        url: the snapshot's.
        identity: whose it must be.
        dtype: of keys and values.
        check: refuses a state by ValueError, before any tensor is read.

    Raises:
        SnapshotRefused: another model's, damaged, hostile, or larger than the memory's cap.

    """

    def sizes(state: dict[str, Any], specs: Mapping[str, TensorSpec]) -> None:
        kinds = {name: (spec.torch_dtype, tuple(spec.shape)) for name, spec in specs.items()}
        check_sizes(memory, saved := _sequence_of(state), kinds, dtype)
        check(saved, state)

    ids = read_manifest(url).tensors.get("ids")
    most = memory.plan.cap_bytes + min(8 * MAX_TOKENS, 0 if ids is None else ids.nbytes) + (1 << 16)
    tensors, state = read_snapshot(url, identity=identity, max_bytes=most, check=sizes)
    saved = _sequence_of(state)
    with refusing(url, ValueError, MemoryCapExceeded):
        check_values(memory, saved, tensors)
        give(memory, saved, tensors)
    return state


def _sequence_of(state: Mapping[str, Any]) -> SavedSequence:
    """The sequence's saved in a snapshot's state.

    Raises:
        ValueError: there is none, or it is none.

    """
    try:
        return SavedSequence.model_validate(tuples(state["row"]))
    except KeyError:
        raise ValueError("it has no sequence's state") from None
    except ValidationError as error:
        raise ValueError(f"the sequence's state cannot be read: {faults(error, state['row'])}") from None


@contextmanager
def refusing(url: str | os.PathLike[str], *errors: type[Exception], remedy: str = _OTHER) -> Iterator[None]:
    """Say of which snapshot something is wrong."""
    try:
        yield
    except errors as error:
        raise SnapshotRefused(f"the snapshot in {shown(url)} is not used: {error}. {remedy}") from error
