"""Getting a model for a command: quietly, with a spinner on a terminal."""

from __future__ import annotations

from enum import StrEnum

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentmem import models
from agentmem.cli.console import ERR


class Dtype(StrEnum):
    """Number formats of weights and memory."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def load_model(name: str | None, dtype: Dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; ``None`` is the default model.

    Raises:
        ModelUnavailable: there is no such model, or it cannot be read.

    """
    with ERR.status(f"loading {name or 'the default model'}"):
        chosen: torch.dtype | None = None if dtype is Dtype.AUTO else getattr(torch, dtype.value)
        return models.load(name, dtype=chosen)
