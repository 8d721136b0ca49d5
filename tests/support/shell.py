"""The command line in this process, and a tiny model on disk to give it."""

from __future__ import annotations

import logging
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from agentmem.cli.app import app
from agentmem.testing import tiny_model

SMALL = ("--keep-first", "4", "--keep-recent", "8", "--chunk", "16")
CAP = ("--cap", "128KiB")
CAP_BYTES = 128 * 1024
END = "<end>"


def agentmem(*arguments: str, stdin: str | bytes | None = None, home: Path | None = None) -> Result:
    """Run the command line. It configures logging for a whole process, so that is given back; no real cache is read."""
    logger = logging.getLogger("agentmem")
    before = logger.handlers, logger.level, logger.propagate, transformers_logging.get_verbosity()
    try:
        return CliRunner(env={"AGENTMEM_HOME": str(home or "no-such-home")}).invoke(app, list(arguments), input=stdin)
    finally:
        logger.handlers, logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
        transformers_logging.set_verbosity(before[3])


def refused(result: Result, *parts: str) -> None:
    """Assert exit code 1, nothing on stdout, one or two lines with all ``parts`` on stderr, no traceback."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("agentmem: ")
    assert result.stderr.count("\n") <= 2
    for part in parts:
        assert part in result.stderr


def save_tokenizer(folder: Path) -> None:
    """A tokenizer with one token per byte and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = "{% for m in messages %}User: {{ m.content }}\n{% endfor %}Answer:"
    fast.save_pretrained(folder)


def save_model(folder: Path) -> str:
    """A tiny random model with that tokenizer, as an ordinary Hugging Face folder."""
    save_tokenizer(folder)
    tiny_model("llama", vocab_size=257, eos_token_id=0, bos_token_id=0).save_pretrained(folder)
    return str(folder)
