"""A server as its own process, and those who use it at once: many conversations, and an agent with two tools."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

from agentmem.errors import SettingsRefused
from agentmem.settings import format_bytes

MODEL = "gpt-agentmem"
"""A name as the Agents SDK wants it of a model that compacts."""
SHARE = 0.333
"""Three conversations have room at once."""
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gia", "Hugo")
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
UNPINNED = {"agentmem": {"pin_roles": []}}
"""Schemas of tools are long, beside a cap as small as this demo's: they are compacted like anything else."""
WEATHER = {"type": "function", "function": {"name": "weather", "description": "Of a city", "parameters": CITY}}


@contextmanager
def server(given: argparse.Namespace, state: str) -> Iterator[OpenAI]:
    """The server, and a client of what it printed; it ends by SIGTERM."""
    command = [sys.executable, "-c", "import sys; from agentmem.cli import main; sys.exit(main())", "serve"]
    options = ["--cap", given.cap, "--share", str(SHARE), "--port", "0", "--state", state, "--keep-recent", "32"]
    options += ["--chat-template", "chatml-tools", "--alias", MODEL, *(["--model", given.model] if given.model else [])]
    with (
        Path(state, "log").open("a+", encoding="utf-8") as log,
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, stderr=log) as process,
    ):
        lines = process.stdout or ()
        url = next((found[1] for line in lines if (found := re.search(r'base_url="(.*?)"', line))), None)
        if url is None:
            raise SettingsRefused(Path(state, "log").read_text(encoding="utf-8").strip().removeprefix("agentmem: "))
        print(f"serving at {url}, the dashboard at {url.removesuffix('v1')}")
        with OpenAI(base_url=url, api_key="none") as client:
            try:
                yield client
            finally:
                process.send_signal(signal.SIGTERM)


def row(what: str, facts: list[dict[str, Any]], tokens: int, said: str) -> int:
    """One row of the table; the peak."""
    peak, compactions = max(each["peak_bytes"] for each in facts), sum(len(each["compactions"]) for each in facts)
    read, slots = (sum(each[name] for each in facts) for name in ("read_tokens", "total_slots"))
    counts = f"{tokens:6} {read:6} {slots:7} {compactions:11} {format_bytes(peak):>9}"
    print(f"{what:9} {counts}  {' '.join(said.split())[:40]!r}")
    return int(peak)


async def crowd(url: str, tokens: int, turns: int = 3) -> list[list[Any]]:
    """All names talk at once, each in a conversation of its own; the completions of each."""
    async with AsyncOpenAI(base_url=url, api_key="none") as client:

        async def talk(name: str) -> list[Any]:
            told: list[Any] = [{"role": "user", "content": f"My name is {name}. Say hello."}]
            made: list[Any] = []
            for _ in range(turns):
                made.append(
                    await client.chat.completions.create(model=MODEL, messages=told, temperature=0, max_tokens=tokens)
                )
                told += [made[-1].choices[0].message, {"role": "user", "content": "What is my name?"}]
            return made

        return await asyncio.gather(*map(talk, NAMES))


def called(client: OpenAI, tokens: int) -> tuple[str, str]:
    """A call that the model is made to write, streamed, and the reply to its result."""
    told: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    fields: dict[str, Any] = {"model": MODEL, "temperature": 0, "tools": [WEATHER], "max_tokens": tokens}
    with client.chat.completions.stream(messages=told, tool_choice="required", **fields) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or ()
    told += [
        message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "Rain."},
    ]
    more = client.chat.completions.create(messages=told, **fields)
    return f"{call.function.name}({call.function.arguments})", more.choices[0].message.content or ""


async def agent(url: str) -> list[str]:
    """What an agent of the OpenAI Agents SDK does in two runs of one session, which the server compacts in between."""
    import agents
    from agents import OpenAIResponsesCompactionSession as Compacted

    agents.set_tracing_disabled(disabled=True)

    @agents.function_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"Rain in {city}."

    @agents.function_tool
    def clock(city: str) -> str:
        """The time in a city."""
        return f"Noon in {city}."

    done: list[str] = []
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        session = Compacted("demo", agents.SQLiteSession("demo"), client=client, model=MODEL)
        one = agents.Agent(
            "demo",
            instructions="Be brief.",
            model=agents.OpenAIResponsesModel(MODEL, client),
            tools=[weather, clock],
            tool_use_behavior="stop_on_first_tool",
        )
        for tool, question in (("weather", "How is the weather in Paris?"), ("clock", "And what time is it there?")):
            how = agents.ModelSettings(tool_choice=tool, temperature=0, max_tokens=256, extra_body=UNPINNED)
            try:
                made = await agents.Runner.run(one.clone(model_settings=how), question, session=session)
            except agents.AgentsException as error:
                return [*done, f"ended early: {error}"]  # a model that writes without an end
            done.append(f"{tool}: {made.final_output}")
            await session.run_compaction({"force": True, "compaction_mode": "input"})
        kept = [str(item.get("type", item.get("role"))) for item in await session.get_items()]
    return [*done, f"kept as {kept[-1]}"]
