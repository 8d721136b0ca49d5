"""Eight agents, one cap that holds two or three of them: the others wait, or sleep on disk.

    python demos/04_many_agents.py [--model NAME_OR_PATH] [--cap 32MiB] [--agents 8] [--turns 2] [--tokens 24]

Every agent is a coroutine with a session of its own. Look at the table: who is reading or writing (A), idle in memory
(i), on disk (d); at how the charge stays below the cap; and at the answers: an agent that has been on disk still knows
what it was told.
"""

from __future__ import annotations

import argparse
import asyncio
import time

import agentmem
from agentmem import models
from agentmem.sessions import TextEvent
from agentmem.settings import format_bytes
from support.refusals import positive, run

LETTERS = {"active": "A", "idle": "i", "on disk": "d", "closed": " "}
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "purple", "orange")


async def agent(session: agentmem.Session, colour: str, given: argparse.Namespace) -> str:
    """Be told something, talk of other things, and be asked for it."""
    said = ""
    topics = ["Say hello.", "Name three animals.", "Name two rivers.", "Count to five."]
    questions = [f"Remember this: the colour of my door is {colour}. {topics[0]}"]
    questions += [topics[turn % len(topics)] for turn in range(1, given.turns - 1)]
    for question in [*questions, "What is the colour of my door?"]:
        await session.aappend("user", question)
        said = ""
        async for event in session.astream(max_new_tokens=given.tokens, do_sample=False):
            said += event.text if isinstance(event, TextEvent) else ""
    return said


async def watch(runtime: agentmem.Runtime, done: asyncio.Event) -> int:
    """Print a line whenever somebody's state changes; the largest charge that was seen."""
    start, shown, peak = time.monotonic(), "", 0
    while not done.is_set():
        states, stats = await asyncio.to_thread(look, runtime)  # it waits for the forward that runs
        peak = max(peak, stats.charged_bytes)
        if states != shown:
            print(f"{time.monotonic() - start:6.1f} s   {states}   {format_bytes(stats.charged_bytes):>9}", end="")
            print(f"   {stats.active} active, {stats.idle} idle, {stats.on_disk} on disk, {stats.waiting} waiting")
        shown = states
        await asyncio.sleep(0.1)
    return peak


def look(runtime: agentmem.Runtime) -> tuple[str, agentmem.sessions.RuntimeStats]:
    """One moment."""
    with runtime.scheduler.lock:
        return " ".join(LETTERS[session.stats.state] for session in runtime.sessions), runtime.stats


async def work(runtime: agentmem.Runtime, given: argparse.Namespace) -> tuple[list[str], int]:
    """All agents at once, and somebody who watches."""
    sessions = [runtime.session(share=given.share, name=f"agent-{at}") for at in range(1, given.agents + 1)]
    done = asyncio.Event()
    watching = asyncio.create_task(watch(runtime, done))
    try:
        talks = [agent(session, COLOURS[at % len(COLOURS)], given) for at, session in enumerate(sessions)]
        answers = await asyncio.gather(*talks)
    finally:
        done.set()
    return answers, await watching


def main() -> None:
    """Run them, then say what it came to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or path; default: the embedded model")
    parser.add_argument("--cap", default="32MiB")
    parser.add_argument("--policy", default="am-halving")
    parser.add_argument("--agents", type=positive, default=8)
    parser.add_argument("--share", type=float, default=0.4, help="of the cap, for an agent at work")
    parser.add_argument("--turns", type=positive, default=2, help="of each agent")
    parser.add_argument("--tokens", type=positive, default=24, help="of one reply, at most")
    given = parser.parse_args()

    model, tokenizer = models.load(given.model)
    with agentmem.Runtime(
        model, tokenizer, cap=given.cap, policy=given.policy, pressure=("trim", "disk"), wait=600.0, keep_recent=32
    ) as runtime:
        answers, peak = asyncio.run(work(runtime, given))
        print(f"\n{runtime.stats}")
        cap = runtime.cap
    for at, answer in enumerate(answers):
        print(f"agent-{at + 1} ({COLOURS[at % len(COLOURS)]}): {' '.join(answer.split())}")
    right = sum(COLOURS[at % len(COLOURS)] in answer.lower() for at, answer in enumerate(answers))
    print(f"{right} of {len(answers)} remember; most that was charged: {format_bytes(peak)} of {format_bytes(cap)}")


if __name__ == "__main__":
    run(main)
