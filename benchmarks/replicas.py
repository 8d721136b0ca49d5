"""Conversations on two Ray Serve replicas, one of which is killed in the middle.

    python -m benchmarks.replicas [--tiny] [--conversations 20] [--turns 5] [--cap 64MiB] [--share 0.25] [--seed 0]

Conversations of two API keys go on turn by turn: chats that send all messages (every other one streamed), chains of
responses, and responses that begin with a compaction item. In the midst of the middle turn one replica's process gets
SIGKILL. What must hold: every conversation goes on in all its turns, each of which finds in the memory all that the
turn before it had left; a turn that failed is repeated once and nothing else is; no conversation, response or item
answers to the other key. It needs the extra ``ray``; ``--tiny`` takes a random model of the default one's vocabulary.
The exit status is 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import APIError, APIStatusError, AsyncOpenAI

from benchmarks.serving import saved_model

KEYS = ("key-of-alice", "key-of-bob")
KINDS = ("chat", "stream", "chain", "item")
REPLICA = b"ray::ServeReplica:agentmem:model"
WORDS = "It was a bright cold day in April and the clocks were striking thirteen while the wind blew over the hills "


@dataclass
class Turn:
    """What one answer says of its tokens."""

    session: str
    total: int
    cached: int
    prompt: int
    compactions: int
    """Of the conversation so far."""


@dataclass
class Talk:
    """One conversation of a client: what it has to send for the next turn, and what came of those before."""

    number: int
    model: str
    client: AsyncOpenAI
    told: list[Any] = field(default_factory=list)
    last: str | None = None
    turns: list[Turn] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def key(self) -> int:
        """Index of the API key."""
        return self.number // len(KINDS) % 2

    @property
    def kind(self) -> str:
        """How it is led."""
        return KINDS[self.number % len(KINDS)]

    def says(self) -> dict[str, str]:
        """The user's next message."""
        return {"role": "user", "content": f"Conversation {self.number}, message {len(self.turns)}. {WORDS * 2}"}

    async def begin(self) -> None:
        """Have the item made that a conversation of that kind begins with."""
        if self.kind == "item":
            made: Any = await self.client.responses.compact(model=self.model, input=self.says()["content"])
            self.told = [made.output[-1].model_dump(exclude_none=True)]
            self.turns.append(_turn(made.agentmem, made.usage.total_tokens, 0, made.usage.total_tokens))

    async def turn(self) -> None:
        """One turn; once more if it failed."""
        for tries in range(2):
            try:
                made = await getattr(self, f"_{self.kind}")(self.says())
                break
            except (APIError, OSError) as error:
                self.repeated.append(len(self.turns))
                if tries:
                    self.faults.append(f"turn {len(self.turns)} failed twice: {type(error).__name__}: {error}")
                    return
                await asyncio.sleep(1)
        if self.turns and made.cached != self.turns[-1].total:
            self.faults.append(f"turn {len(self.turns)} found {made.cached} of {self.turns[-1].total} tokens")
        if self.turns and made.session != self.turns[-1].session:
            self.faults.append(f"turn {len(self.turns)} is of another session")
        self.turns.append(made)

    async def _chat(self, said: dict[str, str]) -> Turn:
        messages = [*self.told, said]
        made: Any = await self.client.chat.completions.create(
            model=self.model, messages=messages, temperature=0, max_tokens=16
        )
        self.told = [*messages, made.choices[0].message.model_dump(exclude_none=True)]
        return _of_chat(made.agentmem, made.usage)

    async def _stream(self, said: dict[str, str]) -> Turn:
        messages, text, facts, usage = [*self.told, said], "", None, None
        made: Any = await self.client.chat.completions.create(
            model=self.model,
            messages=messages,
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in made:
            for choice in chunk.choices:
                text += choice.delta.content or ""
            facts, usage = getattr(chunk, "agentmem", facts), chunk.usage or usage
        if facts is None or usage is None:
            raise OSError("the stream ended early")
        self.told = [*messages, {"role": "assistant", "content": text}]
        return _of_chat(facts, usage)

    async def _chain(self, said: dict[str, str]) -> Turn:
        return await self._respond([said])

    async def _item(self, said: dict[str, str]) -> Turn:
        return await self._respond([*self.told, said])

    async def _respond(self, given: list[Any]) -> Turn:
        before = {"previous_response_id": self.last} if self.kind == "chain" and self.last else {}
        made: Any = await self.client.responses.create(
            model=self.model, input=given, temperature=0, max_output_tokens=16, **before
        )
        self.last, self.told = made.id, [*given, *(each.model_dump(exclude_none=True) for each in made.output)]
        usage = made.usage
        return _turn(made.agentmem, usage.total_tokens, usage.input_tokens_details.cached_tokens, usage.input_tokens)


def _of_chat(facts: dict[str, Any], usage: Any) -> Turn:
    return _turn(facts, usage.total_tokens, usage.prompt_tokens_details.cached_tokens, usage.prompt_tokens)


def _turn(facts: dict[str, Any], total: int, cached: int, prompt: int) -> Turn:
    return Turn(facts["session"], total, cached, prompt, facts["total_compactions"])


# ---- Ray


@contextmanager
def served(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str]]:
    """Two replicas behind a front on a port of this machine; yields its base URL and the model's name."""
    import ray
    from ray import serve

    from agentmem import models
    from agentmem.serving.ray_app import build

    (folder / "keys").write_text("\n".join(KEYS), encoding="utf-8")
    settings = {"state": str(folder / "state"), "api_key_file": str(folder / "keys"), "cap": given.cap}
    settings |= {"share": str(given.share), "replicas": "2", "keep_recent": "32"}
    if given.tiny:
        settings["model"] = saved_model(folder / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(settings), name="agentmem")
        yield f"http://127.0.0.1:{port}/v1", "model" if given.tiny else models.DEFAULT.name
    finally:
        serve.shutdown()
        ray.shutdown()


def replicas() -> list[int]:
    """Process numbers of the replicas of this process's own Ray."""
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    mine = [pid for pid, parent in parents.items() if parents.get(parent) == os.getpid() and _is_replica(pid)]
    return sorted(mine)


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _is_replica(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(REPLICA)
    except OSError:
        return False


# ---- the experiment


async def experiment(url: str, model: str, given: argparse.Namespace) -> list[Talk]:
    """All conversations, turn by turn; in the midst of the middle turn one replica is killed."""
    clients = [AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=600) for key in KEYS]
    talks = [Talk(at, model, clients[at // len(KINDS) % 2]) for at in range(given.conversations)]
    rng, few = random.Random(given.seed), asyncio.Semaphore(6)  # noqa: S311  # no secret
    await asyncio.gather(*(each.begin() for each in talks))
    for number in range(given.turns):
        done, third = list[int](), asyncio.Event()

        async def one(talk: Talk, done: list[int] = done, third: asyncio.Event = third) -> None:
            async with few:
                await talk.turn()
            done.append(talk.number)
            if len(done) >= len(talks) // 3:
                third.set()

        running = asyncio.gather(*(one(each) for each in rng.sample(talks, len(talks))))
        if number == given.turns // 2:
            await third.wait()
            print(f"killed replica {kill(rng)}; {len(done)} of {len(talks)} conversations had had this turn")
        start = time.monotonic()
        await running
        print(
            f"turn {number}: {time.monotonic() - start:.1f} s{' after the kill' if number == given.turns // 2 else ''}"
        )
    await crossed(talks, clients)
    for client in clients:
        await client.close()
    return talks


def kill(rng: random.Random) -> int:
    """SIGKILL to one of the two replicas; returns its process number."""
    found = replicas()
    if len(found) != 2:
        raise SystemExit(f"{len(found)} replicas are there to be killed; 2 are wanted")
    os.kill(chosen := rng.choice(found), signal.SIGKILL)
    return chosen


async def crossed(talks: list[Talk], clients: list[AsyncOpenAI]) -> None:
    """Ask for every conversation, response and item by the other key: nothing may be found."""
    for talk in talks:
        other = clients[1 - talk.key]
        said = [*talk.told, {"role": "user", "content": "What did I say?"}]
        try:
            if talk.kind in ("chat", "stream"):
                made: Any = await other.chat.completions.create(
                    model=talk.model,
                    messages=said,
                    max_tokens=2,
                    extra_headers={"X-Agentmem-Session": talk.turns[-1].session},
                )
                found = made.usage.prompt_tokens_details.cached_tokens
            else:
                before = {"previous_response_id": talk.last} if talk.kind == "chain" else {}
                made = await other.responses.create(
                    model=talk.model, input=said if talk.kind == "item" else "x", max_output_tokens=2, **before
                )
                found = "an answer"
        except APIStatusError as error:
            found = 0 if error.code in ("previous_response_not_found", "compaction_foreign") else error.code
        if found:
            talk.faults.append(f"the other key found {found}")


def report(talks: list[Talk], turns: int) -> bool:
    """Print a table by kind, and all faults; whether there were none."""
    print(
        f"\n{'kind':8}{'conversations':>14}{'turns':>7}{'repeated':>10}{'prompt':>9}{'found':>9}{'read':>8}{'compactions':>13}"
    )
    for kind in KINDS:
        of = [each for each in talks if each.kind == kind]
        made = [turn for each in of for turn in each.turns]
        prompt, cached = sum(each.prompt for each in made), sum(each.cached for each in made)
        repeated, compacted = sum(len(each.repeated) for each in of), sum(each.turns[-1].compactions for each in of)
        print(f"{kind:8}{len(of):14}{len(made):7}{repeated:10}{prompt:9}{cached:9}{prompt - cached:8}{compacted:13}")
    for talk in talks:
        if len(talk.turns) != turns + (talk.kind == "item"):
            talk.faults.append(f"{len(talk.turns)} turns were answered")
        if set(talk.repeated) - {turns // 2 + (talk.kind == "item")}:
            talk.faults.append(f"turns {talk.repeated} were repeated")
    sessions = [{turn.session for turn in each.turns} for each in talks]
    if len(set.union(*sessions)) != sum(map(len, sessions)):
        talks[0].faults.append("two conversations share a session")
    for talk in talks:
        for fault in talk.faults:
            print(f"FAULT: conversation {talk.number} ({talk.kind}, key {talk.key}): {fault}")
    went_on, again = sum(not each.faults for each in talks), sum(bool(each.repeated) for each in talks)
    print(f"\n{went_on} of {len(talks)} conversations went on; clients sent {again} turns again")
    return went_on == len(talks)


def main() -> None:
    """Serve, talk, kill, and say what held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    for name, count in (("conversations", 20), ("turns", 5), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--cap", default="64MiB")
    parser.add_argument("--share", type=float, default=0.25)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, served(given, Path(folder)) as (url, model):
        talks = asyncio.run(experiment(url, model, given))
    sys.exit(not report(talks, given.turns))


if __name__ == "__main__":
    main()
