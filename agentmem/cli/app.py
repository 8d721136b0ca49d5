"""The command line: one typer application with one file per command; errors become one-line messages and exit codes.

Exit codes: 0 done, 1 refused input, 2 wrong usage, 130 interrupted. Results go to stdout; logs, progress and warnings
go to stderr.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from agentmem import __version__
from agentmem.cli.console import refuse
from agentmem.errors import AgentmemError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + the number of SIGINT, as shells report it."""
_SHOWN = 80
"""Largest number of characters of an argument that an error message quotes."""


COMMANDS = {
    "run": ("agentmem.cli.run.command:run", "Generate text while the KV memory stays under a hard cap."),
    "chat": (
        "agentmem.cli.chat.command:chat",
        "Talk with a model, one line a turn. /help lists the commands; lines may come from a pipe.",
    ),
    "serve": (
        "agentmem.cli.serve:serve",
        "Serve chat completions, responses and compaction items whose memory is latent; Ctrl-C ends it.",
    ),
    "plan": (
        "agentmem.cli.plan:plan",
        "Show how many slots a cap holds, where its bytes go, and what other policies and slots would hold.",
    ),
    "policies": ("agentmem.cli.policies:policies", "List the installed policies."),
    "check": ("agentmem.cli.check:check", "Run a tiny random model of a model's class beside stock transformers."),
    "ablate": (
        "agentmem.cli.ablate:ablate",
        "Measure every combination of policies, caps and settings, and write a table, CSV and one HTML report.",
    ),
    "calibrate": (
        "agentmem.cli.calibrate:calibrate",
        "Measure how many slots each head needs, and write a table for the calibrated and sensitivity budgets.",
    ),
    "model": ("agentmem.cli.model:app", "The default model."),
    "eval": ("agentmem.cli.evaluate.app:app", "Measure what a policy costs."),
}
"""Each command with its place (a function or a typer application) and its summary.

The modules import torch and transformers, which takes seconds, so each is imported when its command is used.
"""


class Later(TyperCommand):
    """A command whose module is imported when the command is used; before, only name and summary are known."""

    def __init__(self, name: str, place: str, summary: str) -> None:
        """Note where the command is; ``place`` is a module and, after a colon, a name in it."""
        super().__init__(name, help=summary)
        self.place = place

    def loaded(self) -> Any:
        """Import the command."""
        module, _, attribute = self.place.partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            return get_command(found)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        alone.command(self.name)(found)
        return get_command(alone)

    def make_context(self, info_name: Any, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and let it read its arguments; the context that is returned runs it."""
        return self.loaded().make_context(info_name, args, parent=parent, **extra)


class Refusing(TyperGroup):
    """Command group that turns an AgentmemError into one line on stderr and exit code 1.

    Ctrl-C ends a command with exit code 130. In both cases, no traceback is printed.
    """

    def __init__(self, **attributes: Any) -> None:
        """Make the group with all commands of :data:`COMMANDS`."""
        super().__init__(**attributes)
        for name, (place, summary) in COMMANDS.items():
            self.add_command(Later(name, place, summary))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse arguments that are not UTF-8 before any option is read.

        Python represents each byte of an argument that is not valid UTF-8 as a lone surrogate, which cannot be encoded.
        """
        for word in args:
            try:
                word.encode()
            except UnicodeEncodeError as error:
                raise typer.BadParameter(
                    f"the argument {ascii(word)[:_SHOWN]} is not UTF-8 at {error.start}; convert it first, for example "
                    "with iconv, or rename the file",
                    ctx,
                ) from None
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn errors into exit codes."""
        try:
            return super().invoke(ctx)
        except AgentmemError as error:
            refuse(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Refusing,
    help="A hard cap in bytes on the KV memory of a Hugging Face model, compacted in mid-thought.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001  # typer calls it so
    if wanted:
        typer.echo(f"agentmem {__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help="Log to stderr: -v compactions, -vv everything.")
    ] = 0,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Apply the options that stand before the command."""
    from agentmem.cli.logs import configure  # it imports transformers

    configure(verbose)


def main() -> int:
    """Run the command line; return its exit code."""
    try:
        app(prog_name="agentmem")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0
