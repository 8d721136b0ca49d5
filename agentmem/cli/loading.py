"""Loading of a model for a command, with a spinner on a terminal and no other output."""

from __future__ import annotations

from enum import StrEnum

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentmem import models
from agentmem.cli.console import ERR


class Dtype(StrEnum):
    """Number formats of a model's weights and KV memory."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def load_model(name: str | None, dtype: Dtype, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model to a device, with its tokenizer; the name ``None`` stands for the default model.

    Raises:
        ModelUnavailable: the model does not exist or cannot be read.
        SettingsRefused: the device cannot be used on this machine.

    """
    with ERR.status(f"loading {name or 'the default model'}"):
        chosen: torch.dtype | None = None if dtype is Dtype.AUTO else getattr(torch, dtype.value)
        return models.load(name, dtype=chosen, device_map=None if device == "cpu" else device)
