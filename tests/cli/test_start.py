"""The command line starts quickly: what a command imports is imported when it runs."""

from __future__ import annotations

import subprocess
import sys
from inspect import getdoc

import pytest

from agentmem.cli.app import COMMANDS, Later
from support.shell import agentmem

HEAVY = ("torch", "transformers", "matplotlib", "structlog", "numpy")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["polices"]])
def test_help_and_version_import_no_model_library(arguments: list[str]) -> None:
    """In a fresh process none of the libraries that take seconds is loaded."""
    program = (
        f"import sys; sys.argv = ['agentmem', *{arguments!r}]\n"
        "from agentmem.cli import main\n"
        "main()\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert ended.stdout.splitlines()[-1] == "[]"


def test_the_list_says_what_the_commands_say() -> None:
    """The summary of each command in the list is the beginning of its own help."""
    for name, (place, summary) in COMMANDS.items():
        command = Later(name, place, summary).loaded()
        assert " ".join(command.help.split()).startswith(summary), name
        assert name in agentmem("--help").stdout
        assert getdoc(Later)


def test_a_misspelt_command_is_told_what_it_may_have_meant() -> None:
    """The list knows all names without importing them."""
    assert "Did you mean 'policies'?" in agentmem("polices").stderr
