"""Sessions that reply at once, fed together, against one session alone and stock ``generate`` with as many rows.

    python -m benchmarks.batched [--sessions 1 4 8 16] [--held 512] [--tokens 24] [--rounds 5]

Greedy replies of the default model in float32, by asyncio. Each round times one session, all of them, and stock
``generate`` on a batch of as many rows that hold as much, in turns; figures are medians over rounds. ``speedup`` is all
sessions' tokens a second by one session's, ``stock`` by those of the batch; ``batch`` is the sessions that a forward
fed on average. Long texts: ``--reader N`` has another session read N tokens meanwhile, and prints the longest time
between two tokens of a reply beside that of a forward of ``max_batch_tokens``. ``--equal N`` compares, instead of
timing: N stretches of the shipped texts are read and continued by all sessions at once, and each by one alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

import agentmem
from agentmem import models
from benchmarks.decode import CHUNK, feed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agentmem.sessions import Session

TEXTS = Path(agentmem.__file__).parent / "evaluation" / "texts"
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": -1}


def ids_of(row: int, count: int) -> list[int]:
    """Deterministic ids, other ones for each row: what they say does not matter to the clock."""
    return torch.randint(1000, 40000, (count,), generator=torch.Generator().manual_seed(row)).tolist()


async def reply(session: Session, tokens: int) -> list[float]:
    """Have a session write; when each token came, on the monotonic clock."""
    stream = session.astream(max_new_tokens=tokens, **OPTIONS)
    return [time.monotonic() async for event in stream if event.type == "token"]


async def replies(sessions: Sequence[Session], tokens: int) -> list[list[float]]:
    """Have sessions write at once."""
    return list(await asyncio.gather(*(reply(each, tokens) for each in sessions)))


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def stock(model: Any, rows: int, held: int) -> Callable[[int], None]:
    """Greedy ``generate`` of a batch whose cache holds ``held`` tokens a row."""
    ids = torch.tensor([ids_of(row, held) for row in range(rows)])
    cache = DynamicCache(config=model.config)
    feed(model, cache, ids[:, :-1])
    state = {"ids": ids}

    def run(tokens: int) -> None:
        state["ids"] = model.generate(
            state["ids"], attention_mask=torch.ones_like(state["ids"]), past_key_values=cache, max_new_tokens=tokens,
            pad_token_id=0, **OPTIONS,
        )  # fmt: skip

    return run


def measure(model: Any, tokenizer: Any, count: int, given: argparse.Namespace) -> dict[str, float]:
    """One size: medians over rounds."""
    options = {"cap": "2GiB", "policy": "window", "share": 1 / (count + 2), "chunk": CHUNK}
    with agentmem.Runtime(model, tokenizer, **options) as runtime:
        sessions = [runtime.session() for _ in range(count)]
        for row, session in enumerate(sessions):
            session.read(ids_of(row, given.held))
        single = runtime.session()
        single.read(ids_of(99, given.held))
        batch = stock(model, count, given.held)
        seconds: dict[str, list[float]] = {"one": [], "all": [], "stock": []}
        sizes = []
        for number in range(given.rounds + 1):
            took = {"one": timed(lambda: asyncio.run(replies([single], given.tokens)))}
            runtime.scheduler.recent.clear()
            took["all"] = timed(lambda: asyncio.run(replies(sessions, given.tokens)))
            sizes.append(mean(each.sequences for each in runtime.scheduler.recent))
            took["stock"] = timed(lambda: batch(given.tokens))
            for name, value in took.items():
                seconds[name] += [value] * (number > 0)
    one, every, rows = (median(seconds[name]) for name in ("one", "all", "stock"))
    total = count * given.tokens
    return {
        "sessions": count, "one_tokens_s": given.tokens / one, "tokens_s": total / every,
        "stock_tokens_s": total / rows,
        "speedup": count * one / every, "stock": rows / every, "batch": mean(sizes),
    }  # fmt: skip


def compared(model: Any, tokenizer: Any, count: int, given: argparse.Namespace) -> dict[str, float]:
    """How many greedy replies to stretches of text are the same from ``count`` sessions at once as from one alone."""
    words = [
        each
        for path in sorted(TEXTS.glob("*.txt"))
        for each in tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    ]
    step = (len(words) - given.held) // given.equal
    prompts = [
        words[step * number : step * number + given.held // 2 + 7 * number % 64] for number in range(given.equal)
    ]

    async def written(session: Session, ids: list[int]) -> list[int]:
        await session.aread(ids)
        await session.agenerate(max_new_tokens=given.tokens, **OPTIONS)
        return list(session.ids[len(ids) :])

    async def at_once(group: list[list[int]]) -> list[list[int]]:
        sessions = [runtime.session() for _ in group]
        found = await asyncio.gather(*(written(*each) for each in zip(sessions, group, strict=True)))
        for each in sessions:
            each.close()
        return list(found)

    same, sizes = 0, []
    options = {"cap": "2GiB", "policy": "window", "share": 1 / (count + 2), "chunk": CHUNK}
    with agentmem.Runtime(model, tokenizer, **options) as runtime:
        for at in range(0, given.equal, count):
            group = prompts[at : at + count]
            runtime.scheduler.recent.clear()
            together = asyncio.run(at_once(group))
            sizes.append(mean(each.sequences for each in runtime.scheduler.recent))
            alone = [asyncio.run(at_once([each]))[0] for each in group]
            same += sum(map(list.__eq__, together, alone))
    return {"sessions": count, "replies": given.equal, "equal": same, "tokens": given.tokens, "batch": mean(sizes)}


def delayed(model: Any, tokenizer: Any, count: int, given: argparse.Namespace) -> dict[str, float]:
    """The longest gaps between tokens of replies while another session reads, and without it."""
    options = {"cap": "4GiB", "policy": "window", "share": 1 / (count + 2), "chunk": CHUNK}

    async def both(reader: Session | None) -> float:
        writing = asyncio.create_task(replies(sessions, given.tokens))
        if reader is not None:
            await asyncio.sleep(0.5)
            await asyncio.to_thread(reader.read, ids_of(99, given.reader))
        return max(later - one for times in await writing for one, later in pairwise(times))

    with agentmem.Runtime(model, tokenizer, **options) as runtime:
        sessions = [runtime.session() for _ in range(count)]
        for row, session in enumerate(sessions):
            session.read(ids_of(row, given.held))
        alone, beside = asyncio.run(both(None)), asyncio.run(both(runtime.session()))
        forward = max(each.seconds for each in runtime.scheduler.recent if each.tokens >= runtime.max_batch_tokens)
    return {"sessions": count, "gap_alone_s": alone, "gap_s": beside, "forward_s": forward}


def main() -> None:
    """Print a line of JSON for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--held", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reader", type=int, default=0, help="tokens that another session reads meanwhile")
    parser.add_argument("--equal", type=int, default=0, help="replies to compare instead of timing")
    given = parser.parse_args()
    model, tokenizer = models.load(dtype=torch.float32)
    for count in given.sessions:
        run = compared if given.equal else delayed if given.reader else measure
        print(
            json.dumps({key: round(value, 3) for key, value in run(model, tokenizer, count, given).items()}), flush=True
        )


if __name__ == "__main__":
    main()
