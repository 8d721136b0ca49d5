"""Conversion between a memory's sequence and a snapshot, and the identity of the model that a snapshot belongs to."""

from __future__ import annotations

import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from agentmem import hf
from agentmem.errors import AgentmemError, MemoryCapExceeded, SnapshotRefused, UnsupportedModel
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
"""Most tokens of a sequence that is read from a snapshot. Their ids (512 MiB at 8 bytes each) do not count towards the
cap, so they need a limit of their own."""


class Identity:
    """Fingerprints of the model, its weights, the tokenizer and the chat template.

    A runtime reads a snapshot only if the snapshot was saved with the same fingerprints as the runtime's own. This is
    necessary because the attention keys in the snapshot depend on the model, weights, tokenizer and template.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        """Compute the fingerprints of the weights and the vocabulary, which is slow."""
        self._model, self._tokenizer = model, tokenizer
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        self._vocabulary = _digest(json.dumps([vocabulary, tokenizer.all_special_tokens]))
        self._unknown = ""
        self._weights = ("", "")
        self.now()

    def now(self) -> dict[str, str]:
        """Return the fingerprint of each part by the part's name.

        The fingerprint of the vocabulary is the one computed at the start; that of the weights too, if a sample of them
        is the same. All others are computed now; for those of the model see
        :func:`agentmem.hf.model_identity.model_identity`.
        """
        if (sample := hf.weights_sample(self._model)) != self._weights[0]:
            self._weights = (sample, self._all_weights())
        return {
            **hf.model_identity(self._model),
            "weights": self._weights[1],
            "tokenizer": self._vocabulary,
            "chat template": _digest(str(self._tokenizer.chat_template)),
        }

    def lasting(self) -> dict[str, str]:
        """Return :meth:`now` for a snapshot that other processes read.

        Raises:
            SnapshotRefused: some weights cannot be read, so that a snapshot could not be told from another model's.

        """
        said = self.now()
        if self._unknown:
            raise SnapshotRefused(f"sessions of this model cannot be saved or loaded: {self._unknown}")
        return said

    def _all_weights(self) -> str:
        try:
            found, self._unknown = hf.weights(self._model), ""
        except UnsupportedModel as error:
            found, self._unknown = "unknown", str(error)
        return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def take_sequence(memory: Memory, dtype: torch.dtype | None) -> tuple[SavedSequence, dict[str, torch.Tensor]]:
    """Return the sequence of a memory as plain values, and views of its tensors, for a snapshot.

    The sequence gets the checks that :func:`read_sequence` makes, so that the snapshot can be read again. ``dtype`` is
    the dtype of keys and values that will be required when the snapshot is read; ``None`` stands for the dtype that
    they have now. The sequence must have no unfinished compaction or re-basing.

    Raises:
        AgentmemError: a snapshot of the sequence could not be read again, for example because a key is infinite; the
            memory stays as it is.

    """
    saved, tensors = take(memory)
    if dtype is not None and saved.dtype not in (None, dtype):
        made, wanted = (str(each).removeprefix("torch.") for each in (saved.dtype, dtype))
        raise AgentmemError(
            f"this memory cannot be saved: its keys and values are {made}, as under torch.autocast, and the model is "
            f"{wanted}, so that no runtime could go on from them. It stays usable as it is; load the model in {made}, "
            "or run the session without autocast from its beginning"
        )
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with loadable():
        check_sizes(memory, saved, kinds, dtype or saved.dtype or torch.float32)
        if saved.tokens > MAX_TOKENS:
            raise ValueError(f"it has {saved.tokens} tokens; {MAX_TOKENS} are read")
        check_values(memory, saved, tensors)
    return saved, tensors


@contextmanager
def loadable() -> Iterator[None]:
    """Return a context manager for checks before a save; it turns a ValueError into an AgentmemError.

    Raises:
        AgentmemError: a check in the block raised ValueError.

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
    """Fill an empty memory with the sequence of a snapshot and return the snapshot's state.

    Args:
        memory: the empty memory. It is changed only after all checks, by a step that can fail only for lack of room.
        url: path or URL of the snapshot.
        identity: the fingerprints that the snapshot must have.
        dtype: the dtype of keys and values.
        check: a function that is called with the sequence and the state before any tensor is read; it raises
            ValueError to refuse the snapshot.

    Raises:
        SnapshotRefused: the snapshot is of another model, damaged, hostile, or larger than the memory's cap.

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
    """Read the saved sequence, without its tensors, from the state in a snapshot.

    Raises:
        ValueError: the state has no sequence, or an invalid one.

    """
    try:
        return SavedSequence.model_validate(tuples(state["row"]))
    except KeyError:
        raise ValueError("it has no sequence's state") from None
    except ValidationError as error:
        raise ValueError(f"the sequence's state cannot be read: {faults(error, state['row'])}") from None


@contextmanager
def refusing(url: str | os.PathLike[str], *errors: type[Exception], remedy: str = _OTHER) -> Iterator[None]:
    """Return a context manager that turns the given errors into SnapshotRefused with the place of the snapshot.

    Raises:
        SnapshotRefused: the block raised one of ``errors``.

    """
    try:
        yield
    except errors as error:
        raise SnapshotRefused(f"the snapshot in {shown(url)} is not used: {error}. {remedy}") from error
