"""A soak of many sessions that are fed together: 500 turns by 12, who join, leave, cancel, swap, fail and compact.

    python -m benchmarks.crowd [--turns 500] [--sessions 12] [--leases 5] [--elastic] [--tiny] [--seed 0]

The cap has room for ``--leases`` sessions, so idle ones are swapped out. After every forward that feeds sessions each
memory's account is compared with its storages, and the leases with the cap; the exit status is 1 where one is off, a
turn ends with an error that was not meant, or a session cannot go on at the end. With ``--elastic`` the turns that run
divide the cap, instead of a lease each. ``--tiny`` takes a random model.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
import time
from collections import Counter
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList

from agentmem import models
from agentmem.engine import scheduler
from agentmem.errors import MemoryClosed
from agentmem.sessions import Runtime, Session
from agentmem.testing import tiny_model
from benchmarks.sessions import LEASE, SETTINGS, message

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from agentmem.engine import Want

TOKENS = 24
"""Of a reply at most."""
KINDS = ("reply",) * 8 + ("cancel",) * 4 + ("deadline", "fault", "compact", "fork", "renew", "saved") * 2
"""What a turn may be, as often as it stands here."""


class Fault(Exception):
    """What a logits processor raises on purpose."""


class Crowd:
    """Some sessions of one runtime, and what was seen of them."""

    def __init__(self, runtime: Runtime, sessions: int, seed: int, folder: Path) -> None:
        """All of them begin empty."""
        self.runtime, self.folder = runtime, folder
        self.dice = random.Random(seed)  # noqa: S311  # no secret
        self.sessions = [runtime.session() for _ in range(sessions)]
        self.turns, self.audits, self.wrong = 0, 0, list[str]()
        self.kinds, self.fed = Counter[str](), Counter[int]()

    # ---- turns

    async def agent(self, index: int, turns: int) -> None:
        """Have one session take its turns, until all have been taken."""
        kinds: dict[str, Callable[[int], Awaitable[None]]] = {
            "reply": self._reply, "cancel": self._cancel, "deadline": self._deadline, "fault": self._fault,
            "compact": self._compact, "fork": self._fork, "renew": self._renew, "saved": self._saved,
        }  # fmt: skip
        while self.turns < turns:
            self.turns += 1
            kind = self.dice.choice(KINDS)
            self.kinds[kind] += 1
            try:
                await kinds[kind](index)
            except Exception as error:  # noqa: BLE001  # the subject
                self.wrong.append(f"{kind}: {type(error).__name__}: {error}")

    async def _say(self, index: int) -> None:
        await self.sessions[index].aappend("user", message(index, self.turns))

    async def _reply(self, index: int, **options: Any) -> None:
        await self._say(index)
        await consumed(self.sessions[index], **options)

    async def _cancel(self, index: int) -> None:
        task = asyncio.create_task(self._reply(index))
        await asyncio.sleep(self.dice.uniform(0, 3))
        task.cancel()
        await asyncio.wait([task])

    async def _deadline(self, index: int) -> None:
        await self._say(index)
        await consumed(self.sessions[index], deadline=self.dice.uniform(0, 2) + self.runtime.wait)

    async def _fault(self, index: int) -> None:
        left = self.dice.randint(1, TOKENS)

        def failing(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Fault
            return scores

        try:
            await self._reply(index, logits_processor=LogitsProcessorList([failing]))
        except Fault:
            return

    async def _compact(self, index: int) -> None:
        await self._say(index)
        await asyncio.to_thread(patiently, self.sessions[index].compact)

    async def _fork(self, index: int) -> None:
        old = self.sessions[index]
        self.sessions[index] = old.fork()
        if self.dice.random() < 0.5:
            old.close()
            await self._reply(index)
        else:
            await self._reply(index)
            old.close()

    async def _renew(self, index: int) -> None:
        self.sessions[index].close()
        self.sessions[index] = self.runtime.session()
        await self._reply(index)

    async def _saved(self, index: int) -> None:
        place = self.folder / f"{index}-{self.turns}"
        await self._reply(index)
        old = self.sessions[index]
        await asyncio.to_thread(patiently, lambda: old.save(place))
        old.close()
        self.sessions[index] = await asyncio.to_thread(patiently, lambda: self.runtime.load(place))
        await self._reply(index)

    # ---- what must hold

    def audit(self, shares: Sequence[tuple[Want, int]]) -> None:
        """After a forward: accounts are storages, and the leases are within the cap."""
        self.audits += 1
        self.fed[len(shares)] += 1
        if self.runtime.leases.charged > self.runtime.cap:
            self.wrong.append(f"{self.runtime.leases.charged} bytes are charged of {self.runtime.cap}")
        for session in list(self.runtime.sessions):
            memory = session.holding.memory
            if memory is None:
                continue
            stores = [store for row in memory.sequences for store in row.stores if store is not None]
            samples = [sample for row in memory.sequences for layer in row.samples for sample in layer]
            held = sum(each.allocated_bytes for each in (*stores, *samples))
            ledger = memory.ledger
            if ledger.resident != held or held > ledger.cap or ledger.peak > memory.report().cap_bytes:
                self.wrong.append(
                    f"{session.name}: {ledger.resident} in the account, {held} held, {ledger.peak} at most"
                )


def patiently(call: Callable[[], Any]) -> Any:
    """Call what needs a lease at once, until it has one."""
    from agentmem.errors import RuntimeBusy

    while True:
        try:
            return call()
        except RuntimeBusy:
            time.sleep(0.05)


async def consumed(session: Session, **options: Any) -> None:
    """Read a reply to its end."""
    chosen: dict[str, Any] = {"max_new_tokens": TOKENS, "do_sample": True, **options}
    async with aclosing(session.astream(**chosen)) as events:  # type: ignore[type-var]  # a generator
        async for _ in events:
            pass


def watched(crowd: Crowd) -> None:
    """Audit after every forward."""
    feed = scheduler.feed

    def audited(shares: Sequence[tuple[Want, int]]) -> None:
        feed(shares)
        crowd.audit(shares)

    scheduler.feed = audited


async def run(crowd: Crowd, turns: int) -> None:
    """All agents at once; then each of them must be able to go on."""
    await asyncio.gather(*(crowd.agent(index, turns) for index in range(len(crowd.sessions))))
    for session in crowd.sessions:
        try:
            await session.aappend("user", "One more word, please.")
            await consumed(session)
        except MemoryClosed as error:
            crowd.wrong.append(f"{session.name} cannot go on: {error}")


def main() -> int:
    """Print what happened; 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--sessions", type=int, default=12)
    parser.add_argument("--leases", type=float, default=5)
    parser.add_argument("--elastic", action="store_true", help="turns that run divide the cap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a random model")
    given = parser.parse_args()
    model, tokenizer = models.load(dtype=torch.float32)
    lease, settings = LEASE, dict(SETTINGS)
    if given.tiny:
        size = len(tokenizer)
        model = tiny_model("llama", num_hidden_layers=3, vocab_size=size, eos_token_id=tokenizer.eos_token_id)
        lease = 2 << 20
    began = time.perf_counter()
    share = None if given.elastic else lease
    options: dict[str, Any] = {"cap": int(given.leases * lease), "share": share, "seed": 0, "wait": 3600.0}
    with tempfile.TemporaryDirectory() as folder, Runtime(model, tokenizer, **options, **settings) as runtime:
        crowd = Crowd(runtime, given.sessions, given.seed, Path(folder))
        watched(crowd)
        asyncio.run(run(crowd, given.turns))
        stats = runtime.stats
        compactions = sum(each.stats.compactions for each in crowd.sessions)
    fed = sum(count * times for count, times in crowd.fed.items()) / max(1, crowd.audits)
    print(
        f"{crowd.turns} turns by {given.sessions} sessions in {time.perf_counter() - began:.0f} s: {dict(crowd.kinds)}"
    )
    print(f"{crowd.audits} forwards audited, {fed:.1f} sessions each on average, {max(crowd.fed)} at most")
    pauses = f"{stats.pause_p50_seconds:.2f}, {stats.pause_p95_seconds:.2f}, {stats.pause_max_seconds:.2f} s"
    print(
        f"compactions of those that are left: {compactions}; the newest took {pauses} (median, 95th percentile, most)"
    )
    for line in crowd.wrong[:20]:
        print("WRONG", line)
    return bool(crowd.wrong)


if __name__ == "__main__":
    raise SystemExit(main())
