"""Reading of the prompt from an option, a file or stdin."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import typer
from transformers import PreTrainedTokenizerBase

from agentmem.cli.console import STDOUT, note
from agentmem.errors import SettingsRefused

STDIN = STDOUT


def read_prompt(text: str | None, file: str | None, positional: str | None) -> str:
    """Return the prompt: the text of ``--prompt``, the contents of a file, or stdin.

    If one of the three arguments is ``-``, the prompt is read from stdin as UTF-8. If no argument is given and stdin is
    a pipe, the prompt is read from the pipe.

    Raises:
        typer.BadParameter: no prompt is given, or more than one.
        SettingsRefused: the prompt is empty, unreadable, or not UTF-8.

    """
    given = [source for source in (text, file, positional) if source is not None]
    if len(given) > 1:
        raise typer.BadParameter("give one of --prompt, --prompt-file and -")
    if positional not in (None, STDIN):
        raise typer.BadParameter(f"unexpected argument {positional!r}; write --prompt {positional!r}")
    if not given and sys.stdin.isatty():
        raise typer.BadParameter("give --prompt TEXT, --prompt-file PATH, or pipe the prompt in")
    if text is not None and text != STDIN:
        return _present(text, "--prompt")
    if file is not None and file != STDIN:
        return _present(_decode(_read(file), file), file)
    return _present(_decode(sys.stdin.buffer.read(), "stdin"), "stdin")


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, *, raw: bool) -> torch.Tensor:
    """Return the token ids ``[1, n]`` of the prompt.

    The prompt becomes a user's message in the model's chat format. With ``raw``, or if the tokenizer has no chat
    template, the prompt is tokenised unchanged.

    Raises:
        SettingsRefused: the tokenizer turns the prompt into no tokens.

    """
    if not raw and tokenizer.chat_template is None:
        note("the tokenizer has no chat template: the prompt is used as it is (as with --raw)")
        raw = True
    if raw:
        ids = tokenizer(prompt, verbose=False)["input_ids"]
    else:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    if not ids:
        raise SettingsRefused("prompt: the tokenizer makes no token of it; give more text")
    return torch.tensor([ids], dtype=torch.int64)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsRefused(f"--prompt-file: cannot read {path}: {error.strerror or error}") from error


def _decode(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsRefused(
            f"prompt: {source} is not UTF-8 (byte 0x{data[error.start]:02x} at {error.start}); convert it first, "
            "for example with iconv"
        ) from error


def _present(text: str, source: str) -> str:
    if not text.strip():
        raise SettingsRefused(f"prompt: {source} is empty; give some text")
    return text
