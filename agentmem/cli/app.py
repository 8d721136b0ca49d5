"""The command line: one typer application with one file per command; errors become one-line messages and exit codes.

Exit codes: 0 done, 1 refused input, 2 wrong usage, 130 interrupted. Results go to stdout; logs, progress and warnings
go to stderr.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from agentmem import __version__
from agentmem.cli import ablate, calibrate, check, model, plan, policies
from agentmem.cli.chat.command import chat
from agentmem.cli.console import refuse
from agentmem.cli.evaluate.app import app as evaluate
from agentmem.cli.logs import configure
from agentmem.cli.run.command import run
from agentmem.cli.serve import serve
from agentmem.errors import AgentmemError

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + the number of SIGINT, as shells report it."""
_SHOWN = 80
"""Largest number of characters of an argument that an error message quotes."""


class Refusing(TyperGroup):
    """Command group that turns an AgentmemError into one line on stderr and exit code 1.

    Ctrl-C ends a command with exit code 130. In both cases, no traceback is printed.
    """

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
app.command("run")(run)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("plan")(plan.plan)
app.command("policies")(policies.policies)
app.command("check")(check.check)
app.command("ablate")(ablate.ablate)
app.command("calibrate")(calibrate.calibrate)
app.add_typer(model.app, name="model")
app.add_typer(evaluate, name="eval")


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
    configure(verbose)


def main() -> int:
    """Run the command line; return its exit code."""
    try:
        app(prog_name="agentmem")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0
    return 0
