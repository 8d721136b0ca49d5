"""A session as a snapshot: what of it is tensors, what is state, and whose it is."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from agentmem import hf
from agentmem.image import RowImage, check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agentmem.memory import Memory
    from agentmem.sessions.snapshot_files import TensorSpec


def identity(model: Any, tokenizer: Any) -> dict[str, str]:
    """Whose snapshots these are: 64 hexadecimal digits for the model's weights, and for the tokenizer."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    said = json.dumps([vocabulary, str(tokenizer.chat_template), tokenizer.all_special_tokens])
    return {"model": hf.fingerprint(model), "tokenizer": hashlib.sha256(said.encode()).hexdigest()}


def row_of(state: Mapping[str, Any]) -> RowImage:
    """The row's image in a snapshot's state.

    Raises:
        ValueError: there is none, or it is none.

    """
    try:
        return RowImage.model_validate_json(json.dumps(state["row"]))
    except (KeyError, ValidationError) as error:
        raise ValueError(f"the row's state cannot be read: {error}") from error


def check_row(memory: Memory, state: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> None:
    """Refuse what the memory cannot hold, before a tensor is read.

    Raises:
        ValueError: what is wrong, with the value and the limit.

    """
    kinds = {name: (spec.torch_dtype, tuple(spec.shape)) for name, spec in specs.items()}
    check(memory, row_of(state), kinds)
