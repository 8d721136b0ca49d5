"""A server under clients that misbehave, killed at random moments, and with a thousand connections.

    python -m benchmarks.serving [load|kills|connections] [--clients 200] [--kills 50] [--connections 1000] [--seed 0]

``load``: conversations go on while clients send garbage, leave in mid-stream or do not read; what a turn of theirs
took without and with them, the server's memory, and what is at work at the end. ``kills``: SIGKILL at random moments of
turns, compactions and saves; after each the server must start again, and a conversation and an item that were saved
must go on. ``connections``: silent connections, bodies of 100 MB and half-sent ones, while a client is answered. A
random model of the default one's vocabulary; the exit status is 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openai import AsyncOpenAI, OpenAI

from agentmem import models
from agentmem.testing import tiny_model

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
)
STREAM = b'{"model":"it","messages":[{"role":"user","content":"x"}],"stream":true,"max_tokens":400}'


def saved_model(folder: Path) -> str:
    """A random model with the default one's tokenizer."""
    _, tokenizer = models.load()
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=2, bos_token_id=1).save_pretrained(folder)
    return str(folder)


@contextmanager
def server(model: str, state: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and its base URL; killed at the end if it has not ended."""
    command = [sys.executable, "-c", "import sys; from agentmem.cli import main; sys.exit(main())", "serve"]
    options = [
        "--model",
        model,
        "--alias",
        "it",
        "--cap",
        "6MiB",
        "--share",
        "0.33",
        "--port",
        "0",
        "--keep-recent",
        "8",
    ]
    with (
        (state / "log").open("a", encoding="utf-8") as log,
        subprocess.Popen(
            [*command, *options, "--max-requests", "300", "--state", str(state)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as run,
    ):
        try:
            yield run, next(found[1] for line in run.stdout or () if (found := re.search(r'base_url="(.*?)"', line)))
        finally:
            run.kill()


def resident(run: subprocess.Popen[str]) -> float:
    """MiB."""
    said = Path(f"/proc/{run.pid}/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+)", said)[0]) / 1024


# ---- load


async def bad(port: int, rng: random.Random) -> None:
    """One client: nonsense, half a body, or a stream that is left or not read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    sent = [rng.randbytes(300), HEAD % (500, b'{"model": '), HEAD % (len(STREAM), STREAM), HEAD % (10**9, b"{")]
    try:
        writer.write(rng.choice(sent))
        await writer.drain()
        if rng.random() < 0.5:
            await asyncio.wait_for(reader.read(200), rng.random())
        await asyncio.sleep(rng.random() * 3)  # one that does not read
    except (OSError, TimeoutError):
        pass
    finally:
        writer.transport.abort()


async def talk(client: AsyncOpenAI, at: int, turns: int) -> list[float]:
    """Seconds of each turn; each goes on from the one before it."""
    told: list[Any] = [{"role": "user", "content": f"I am number {at}."}]
    seconds = []
    for turn in range(turns):
        start = time.monotonic()
        made: Any = await client.chat.completions.create(model="it", messages=told, temperature=0, max_tokens=16)
        seconds.append(time.monotonic() - start)
        if turn and not made.agentmem["continued"]:
            raise SystemExit(f"conversation {at} was lost in turn {turn}")
        told += [made.choices[0].message, {"role": "user", "content": "Go on."}]
    return seconds


async def load(url: str, run: subprocess.Popen[str], given: argparse.Namespace) -> bool:
    """Three conversations alone, then beside the bad clients."""
    rng, port = random.Random(given.seed), urlsplit(url).port or 0  # noqa: S311  # no secret
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600) as client:

        async def talks(first: int) -> float:
            made = await asyncio.gather(*(talk(client, first + at, 6) for at in range(3)))
            return statistics.median(each for one in made for each in one)

        await talks(0)
        alone, before = await talks(10), resident(run)
        crowd = asyncio.gather(*(bad(port, rng) for _ in range(given.clients)))
        beside = await talks(20)
        await crowd
        state = await settled(url)
        print(f"a turn: {alone:.2f} s alone, {beside:.2f} s beside {given.clients} bad clients, {beside / alone:.2f} x")
        print(f"resident: {before:.0f} MiB before, {resident(run):.0f} MiB after; still at work: {state['requests']}")
    return state["requests"] == state["active"] == 0


async def settled(url: str) -> dict[str, Any]:
    """The runtime when nothing runs any more, or after half a minute."""
    async with AsyncOpenAI(base_url=url.removesuffix("v1"), api_key="none") as client:
        for _ in range(60):
            state: dict[str, Any] = (await client.get("/dashboard/state", cast_to=object))["runtime"]  # type: ignore[index]
            if not state["requests"] and not state["active"]:
                break
            await asyncio.sleep(0.5)
    return state


# ---- kills


def kills(model: str, state: Path, given: argparse.Namespace) -> bool:
    """Save a conversation and an item by a graceful end; then kill again and again, and go on from both."""
    rng, told = random.Random(given.seed), [{"role": "user", "content": "The first words."}]  # noqa: S311  # no secret
    with server(model, state) as (run, url), OpenAI(base_url=url, api_key="none") as client:
        made: Any = client.chat.completions.create(model="it", messages=told, temperature=0, max_tokens=8)  # type: ignore[call-overload]
        told += [made.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "And now?"}]
        item = client.responses.compact(model="it", input="Other words").output[-1].model_dump()
        run.send_signal(signal.SIGTERM)
        run.wait()
    for number in range(given.kills + 1):
        with server(model, state) as (run, url), OpenAI(base_url=url, api_key="none", timeout=600) as client:
            going = went_on(client, told)
            again: Any = client.responses.create(
                model="it", input=[item, {"role": "user", "content": "x"}], max_output_tokens=4
            )  # type: ignore[list-item]
            if not (going and again.agentmem["continued"]):
                print(f"after {number} kills: conversation {going}, item {again.agentmem['continued']}")
                return False
            if number < given.kills:
                killed(run, url, rng)
    print(f"{given.kills} kills: each time it started again, and the saved conversation and item went on")
    return not traced((state / "log").read_text(encoding="utf-8"))


def traced(log: str) -> bool:
    """Whether a server's log has a traceback; the first one is printed, since the log goes with its folder."""
    at = log.find("Traceback")
    if at >= 0:
        print(f"the server wrote a traceback:\n{log[max(0, at - 500) : at + 6000]}")
    return at >= 0


def went_on(client: OpenAI, told: list[Any]) -> bool:
    """Whether the saved conversation goes on from where it was saved last, which a kill leaves open; ``told`` grows."""
    for length in range(len(told), 2, -2):
        said = told[:length]
        made: Any = client.chat.completions.create(model="it", messages=said, temperature=0, max_tokens=8)
        if made.agentmem["continued"]:
            reply = made.choices[0].message.model_dump(exclude_none=True)
            told[length:] = [reply, {"role": "user", "content": "And now?"}]
            return True
    return False


def killed(run: subprocess.Popen[str], url: str, rng: random.Random) -> None:
    """SIGKILL at a random moment of talk and compactions, or of the graceful end that saves them."""

    async def busy() -> None:
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            work: list[Any] = [talk(client, at, 50) for at in range(3)]
            work += [client.responses.compact(model="it", input=f"Words {at} " * 20) for at in range(6)]
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), rng.random() * 2)
            if rng.random() < 0.5:
                run.send_signal(signal.SIGTERM)
                await asyncio.sleep(rng.random())
            run.kill()

    asyncio.run(busy())
    run.wait()


# ---- connections


async def connections(url: str, run: subprocess.Popen[str], given: argparse.Namespace) -> bool:
    """Silent connections, large and half bodies; a client is answered beside them."""
    port, before, held = urlsplit(url).port or 0, resident(run), []
    for at in range(given.connections):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD % (500, b"{") if at % 4 == 0 else b"POST /v1" if at % 4 == 1 else b"")
        held.append(writer)
    statuses = await asyncio.gather(*(large(port) for _ in range(8)))
    async with AsyncOpenAI(base_url=url, api_key="none", timeout=600, max_retries=50) as client:
        await talk(client, 0, 3)
    print(f"{given.connections} connections: answered; bodies of 100 MB: {sorted(set(statuses))}")
    print(f"resident: {before:.0f} MiB before, {resident(run):.0f} MiB beside them")
    for writer in held:
        writer.transport.abort()
    state = await settled(url)
    return set(statuses) <= {"413", "closed"} and not state["requests"]


async def large(port: int) -> str:
    """The status of a body of 100 MB without a length."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(100):
            writer.write(b"%x\r\n%s\r\n" % (1 << 20, b"x" * (1 << 20)))
            await writer.drain()
        return (await reader.readline()).split()[1].decode()
    except (OSError, IndexError):
        return "closed"
    finally:
        writer.transport.abort()


def main() -> None:
    """Run one part, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=["load", "kills", "connections"])
    for name, count in (("clients", 200), ("kills", 50), ("connections", 1000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given, held = parser.parse_args(), {}
    with tempfile.TemporaryDirectory() as folder:
        model = saved_model(Path(folder, "model"))
        for part in (given.part,) if given.part else ("load", "connections", "kills"):
            (state := Path(folder, part)).mkdir()
            if part == "kills":
                held[part] = kills(model, state, given)
                continue
            with server(model, state) as (run, url):
                held[part] = asyncio.run({"load": load, "connections": connections}[part](url, run, given))
    print(json.dumps(held))
    sys.exit(not all(held.values()))


if __name__ == "__main__":
    main()
