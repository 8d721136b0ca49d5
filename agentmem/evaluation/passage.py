"""Read and tokenize the text that an evaluation feeds to the model: a file, or the pages shipped with the package."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import torch

from agentmem.errors import SettingsRefused

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def default_text() -> str:
    """Return the pages that ship with the package as one text, in the order of their file names."""
    folder = resources.files("agentmem.evaluation").joinpath("texts")
    pages = sorted((page for page in folder.iterdir() if page.name.endswith(".txt")), key=lambda page: page.name)
    return "\n\n".join(page.read_text(encoding="utf-8").strip() for page in pages) + "\n"


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        SettingsRefused: the file cannot be read, or is not UTF-8.

    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsRefused(f"text: cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsRefused(
            f"text: {path} is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}); convert it first"
        ) from error


def passage(tokenizer: PreTrainedTokenizerBase, text: str, *, offset: int, tokens: int) -> torch.Tensor:
    """Tokenize ``text`` from character ``offset`` on and return its first ``tokens + 1`` ids, ``[tokens + 1]`` int64.

    Evaluations feed all ids except the last, which is only predicted.

    Raises:
        SettingsRefused: the text has too few tokens after the offset, or ``tokens`` or ``offset`` is out of range.

    """
    if tokens < 1 or offset < 0:
        raise SettingsRefused(f"tokens must be at least 1 and offset at least 0, but they are {tokens} and {offset}")
    ids = tokenizer(text[offset:], return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) <= tokens:
        raise SettingsRefused(
            f"text: {len(ids)} tokens from character {offset} on, but {tokens + 1} are needed to predict {tokens}; "
            "lower --tokens or --offset, or give a longer --text"
        )
    return torch.as_tensor(ids[: tokens + 1], dtype=torch.int64)
