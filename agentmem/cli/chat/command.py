"""``agentmem chat``: a conversation in the terminal; its KV memory stays under a hard cap."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agentmem import plugins
from agentmem.cli.arguments import Cap, Device, Model, Temperature
from agentmem.cli.chat.commands import obey
from agentmem.cli.chat.conversation import Conversation
from agentmem.cli.chat.input import read_lines
from agentmem.cli.console import note, refuse
from agentmem.cli.loading import Dtype, load_model
from agentmem.errors import AgentmemError, SettingsRefused
from agentmem.sessions import Runtime
from agentmem.settings import Settings, SlotDtype, format_bytes

if TYPE_CHECKING:
    from agentmem.sessions import Session

_POLICY = "am-halving"


def chat(
    *,
    model: Model = None,
    cap: Cap = "24MiB",
    policy: Annotated[
        str | None,
        typer.Option(help=f"An installed policy, or with options; without it {_POLICY}.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system prompt; it is never compacted.", show_default=False)
    ] = None,
    temperature: Temperature = 0.0,
    top_p: Annotated[float, typer.Option(min=1e-6, max=1.0, help="Nucleus of the sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one reply at most.")] = 512,
    keep_recent: Annotated[
        int | None,
        typer.Option(min=0, help="Last tokens that are never compacted; without it 96.", show_default=False),
    ] = None,
    rebase: Annotated[
        bool | None,
        typer.Option(help="Go on past the model's positions by moving slots to lower ones.", show_default=False),
    ] = None,
    slot_dtype: Annotated[
        SlotDtype | None,
        typer.Option(help="What slots hold: the model's own numbers, or codes of 8 or 4 bits.", show_default=False),
    ] = None,
    pin_request: Annotated[
        bool | None,
        typer.Option(help="Do not compact a line before it is answered, where it fits.", show_default=False),
    ] = None,
    load: Annotated[
        str | None,
        typer.Option(help="Go on with a saved conversation; its own settings hold.", show_default=False),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto is the checkpoint's own.")] = Dtype.AUTO,
    device: Device = "cpu",
) -> None:
    """Talk with a model, one line a turn. /help lists the commands; lines may come from a pipe."""
    if load is not None and system is not None:
        raise typer.BadParameter("--system belongs to a new conversation; leave it out with --load")
    given = {"keep_recent": keep_recent, "rebase": rebase, "slot_dtype": slot_dtype}
    settings = {name: value for name, value in given.items() if value is not None}
    plugins.policy(policy or _POLICY)  # options that need no model are checked before the model is loaded
    Settings.of(cap=cap, seed=seed, **settings)
    if pin_request is not None:
        settings["pin_request"] = pin_request
    loaded, tokenizer = load_model(model, dtype, device)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    # Idle branches are written to disk rather than compacted further, so that they lose nothing.
    with Runtime(loaded, tokenizer, cap=cap, policy=_POLICY, pressure=("trim", "disk"), seed=seed) as runtime:
        session = _begin(runtime, policy, settings, system, load)
        refusals = talk(Conversation(runtime, session, options))
    if refusals and not sys.stdin.isatty():
        raise typer.Exit(1)  # the input is no terminal, so the exit code reports the refusals


def _begin(
    runtime: Runtime, policy: str | None, settings: dict[str, Any], system: str | None, load: str | None
) -> Session:
    """Return the first session: a saved session if ``load`` names one, else a new session."""
    if load is not None:
        return runtime.load(load, policy=policy, **settings)
    session = runtime.session(policy, name="main", **settings)
    if session.template is None:
        raise SettingsRefused(
            "chat: this model's tokenizer has no chat template, so there are no roles to talk in; choose a chat model "
            "with --model, or continue a text with `agentmem run --raw`"
        )
    if system is not None:
        session.append("system", system)
    return session


def talk(conversation: Conversation) -> int:
    """Run turns and commands until /quit or the end of the input; return the number of refused lines."""
    stats, refusals = conversation.session.stats, 0
    note(
        f"{stats.policy}: {stats.capacity} slots per head under {format_bytes(stats.lease_bytes)}, {stats.tokens} "
        "tokens so far; /help lists the commands"
    )
    for line in read_lines(lambda: conversation.prompt):
        try:
            if not line.startswith("/") or line.startswith("//"):
                conversation.turn(line.removeprefix("/"))
            elif not obey(conversation, line):
                break
        except AgentmemError as error:
            refusals += 1
            refuse(error)
        except KeyboardInterrupt:  # Ctrl-C came outside a turn, or twice during one
            if not sys.stdin.isatty():
                raise
            note("stopped")
    return refusals
