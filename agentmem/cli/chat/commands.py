"""The slash commands of ``agentmem chat``: one function per command, and the table of all commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agentmem.cli.chat.conversation import stopping
from agentmem.cli.console import note, show, table
from agentmem.errors import SettingsRefused
from agentmem.settings import format_bytes
from agentmem.untrusted.texts import did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from agentmem.cli.chat.conversation import Conversation
    from agentmem.reporting.report import CompactionReport


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command of the chat.

    ``run`` receives the conversation and the text after the command's name. If ``run`` returns False, the chat ends.
    """

    usage: str
    summary: str
    run: Callable[[Conversation, str], object]

    @property
    def name(self) -> str:
        """The command's name, including its slash."""
        return self.usage.partition(" ")[0]

    def check(self, argument: str) -> None:
        """Refuse a missing or an unexpected argument.

        Raises:
            SettingsRefused: the argument does not match the usage, which the message quotes.

        """
        wanted = self.usage.partition(" ")[2]
        if argument and not wanted:
            raise SettingsRefused(f"{self.name} takes nothing, and {argument!r} was given; write {self.name}")
        if not argument and wanted and not wanted.startswith("["):
            raise SettingsRefused(f"{self.name} needs {wanted}; write {self.usage}")


def obey(conversation: Conversation, line: str) -> bool:
    """Run a line that begins with a slash as a command; return False if the conversation shall end.

    Raises:
        SettingsRefused: the command does not exist, or its argument is wrong.
        AgentmemError: the command failed; the conversation is unchanged.

    """
    name, argument = (*line.split(maxsplit=1), "")[:2]
    command = COMMANDS.get(name)
    if command is None:
        raise SettingsRefused(
            f"{name} is no command; {did_you_mean(name, COMMANDS)}/help lists them. A message that begins with a slash "
            f"is written with two: /{name}"
        )
    command.check(argument.strip())
    return command.run(conversation, argument.strip()) is not False


def _help(_conversation: Conversation, _argument: str) -> None:
    lines = [(command.usage, command.summary) for command in COMMANDS.values()]
    show(table(None, ("command", "what it does"), lines, left=(0, 1)))


def _compact(conversation: Conversation, focus: str) -> None:
    with stopping(conversation.session) as stop:
        report = conversation.session.compact(focus=focus)
    heads = sum(layer.kv_heads for layer in conversation.session.memory.shape.layers)
    note(
        _told(report, heads) if report is not None else "stopped" if stop.wanted else "there is nothing to reclaim yet"
    )
    note(conversation.bar())


def _told(report: CompactionReport, heads: int) -> str:
    slots = f"{report.slots_before // heads} slots per head to {report.slots_after // heads}"
    parts = [f"compacted {slots} in {report.seconds:.1f} s"]
    if report.output_error is not None:
        parts.append(f"output error {report.output_error:.3f}")
    return " · ".join([*parts, *report.faults])


def _stats(conversation: Conversation, _argument: str) -> None:
    lines = _lines(conversation.session.stats)
    show(table(None, ("session", ""), lines, left=(0, 1)))
    lines = _lines(conversation.runtime.stats)
    show(table(None, ("runtime", ""), lines, left=(0, 1)))
    if len(conversation.sessions) > 1:
        _list(conversation)


def _lines(stats: BaseModel) -> list[tuple[str, str]]:
    return [(name, _for_people(name, value)) for name, value in stats.model_dump().items()]


def _for_people(name: str, value: object) -> str:
    if isinstance(value, int) and name.endswith("_bytes"):
        return f"{value} ({format_bytes(value)})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _list(conversation: Conversation) -> None:
    found = [session.stats for session in conversation.sessions.values()]
    lines = [
        (
            "*" if stats.name == conversation.session.name else "",
            stats.name,
            stats.state,
            str(stats.tokens),
            format_bytes(stats.charged_bytes),
        )
        for stats in found
    ]
    show(table(None, ("", "name", "state", "tokens", "charged"), lines, left=(0, 1, 2)))


def _save(conversation: Conversation, path: str) -> None:
    conversation.session.save(_expanded(path))
    pasted = shlex.quote(_expanded(path))
    note(f"saved to {path}; /load {path}, or `agentmem chat --load {pasted}`, goes on from here")


def _load(conversation: Conversation, path: str) -> None:
    name = conversation.free_name(Path(path).stem or "loaded")
    conversation.enter(conversation.runtime.load(_expanded(path), name=name))
    note(f"now in {name!r}, loaded from {path}")
    note(conversation.bar())


def _expanded(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser())


def _fork(conversation: Conversation, name: str) -> None:
    before = conversation.session.name
    if name in conversation.sessions:
        raise SettingsRefused(f"/fork: there is a session {name!r} already; choose another name, or /switch {name}")
    conversation.enter(conversation.session.fork(name or conversation.free_name(f"{before}-fork")))
    note(f"now in {conversation.session.name!r}, with the same past; /switch {before} goes back")


def _switch(conversation: Conversation, name: str) -> None:
    if not name:
        _list(conversation)
        return
    session = conversation.sessions.get(name)
    if session is None:
        hint = did_you_mean(name, conversation.sessions)
        raise SettingsRefused(f"/switch: no session {name!r}; {hint}there are {', '.join(conversation.sessions)}")
    conversation.enter(session)
    note(f"now in {name!r}")


def _quit(_conversation: Conversation, _argument: str) -> bool:
    return False


COMMANDS = {
    command.name: command
    for command in (
        Command("/help", "this list", _help),
        Command("/compact [FOCUS]", "compact the memory now; FOCUS is a text that must stay recallable", _compact),
        Command("/stats", "this session and the runtime in numbers", _stats),
        Command("/save PATH", "save this session into a folder, or under an fsspec URL", _save),
        Command("/load PATH", "go on with a saved session, beside those that are open", _load),
        Command("/fork [NAME]", "go on in a copy of this session", _fork),
        Command("/switch [NAME]", "go on in another session; without NAME list them", _switch),
        Command("/quit", "leave, as at the end of the input", _quit),
    )
}
