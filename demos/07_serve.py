"""A model under a cap behind OpenAI's interface, driven by the `openai` package and by an agent of `openai-agents`.

    python demos/07_serve.py [--model NAME_OR_PATH] [--cap 72MiB] [--times 5] [--tokens 40]

Starts `agentmem serve`, streams a chat, has it call a tool, lets eight conversations talk at once where three have
room, talks on until a conversation is several times as long as its memory, compacts it into one item, ends the server,
starts it again, goes on from the item, and runs an agent. Look at the column `read`: only what is new is read, and
after the restart the item stands for everything before it; and at `peak`, which stays below a share of the cap.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from itertools import count
from typing import Any

from openai import OpenAI

from agentmem.settings import parse_bytes
from support import served
from support.refusals import positive, run

FACT = "Remember this: the colour of my door is green."
TOPICS = ("animals", "rivers", "colours", "trees", "cities", "fruits", "tools", "birds", "metals", "dances")


def chat(client: OpenAI, tokens: int) -> None:
    """A streamed chat, and a call of a tool."""
    question: Any = [{"role": "user", "content": "What is the capital of France?"}]
    stream = client.chat.completions.create(model=served.MODEL, messages=question, temperature=0, stream=True)
    parts = [part.choices[0].delta.content or "" for part in stream]
    print(f"streamed in {len(parts)} parts: {''.join(parts)!r}")
    call, reply = served.called(client, tokens)
    print(f"called {call}, then said {reply!r}\n")


def crowd(client: OpenAI, tokens: int) -> int:
    """Eight conversations at once; the peak."""
    peaks = []
    for name, made in zip(served.NAMES, asyncio.run(served.crowd(str(client.base_url), tokens)), strict=True):
        said = made[-1].choices[0].message.content
        peaks.append(served.row(name, [each.agentmem for each in made], made[-1].usage.total_tokens, said))
    return max(peaks)


def long(client: OpenAI, times: int, fields: dict[str, Any]) -> tuple[int, str]:
    """Talk for so many times what the memory holds; the peak, and the id of the last response."""
    peaks, previous = [], None
    for turn in count():
        text = f"{'' if turn else FACT} Name three {TOPICS[turn % len(TOPICS)]}, and say a word about each."
        made: Any = client.responses.create(input=text, previous_response_id=previous, **fields)
        previous, facts, tokens = made.id, made.agentmem, made.usage.total_tokens
        peaks.append(served.row(f"turn {turn + 1}", [facts], tokens, made.output_text))
        if tokens >= times * facts["capacity"]:
            print(f"{tokens} tokens are {tokens / facts['capacity']:.1f} times the {facts['capacity']} slots of a head")
            break
    return max(peaks), str(previous)


def main() -> None:
    """Chat, talk, compact, restart, go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or path; default: the embedded model")
    parser.add_argument("--cap", default="72MiB")
    parser.add_argument("--times", type=positive, default=5, help="how long the long conversation is, in memories")
    parser.add_argument("--tokens", type=positive, default=40, help="of one reply, at most")
    given = parser.parse_args()
    fields: dict[str, Any] = {"model": served.MODEL, "temperature": 0, "max_output_tokens": given.tokens}
    with tempfile.TemporaryDirectory() as state:
        with served.server(given, state) as client:
            chat(client, given.tokens)
            print("          tokens   read   slots compactions      peak")
            peak = crowd(client, given.tokens)
            most, previous = long(client, given.times, fields)
            compact: Any = client.responses.compact(model=served.MODEL, previous_response_id=previous)
            item = compact.output[-1].model_dump()
            served.row("compact", [compact.agentmem], compact.usage.total_tokens, item["encrypted_content"])
        with served.server(given, state) as client:
            asked: Any = [item, {"role": "user", "content": "What is the colour of my door?"}]
            made: Any = client.responses.create(input=asked, **fields)
            served.row("after it", [made.agentmem], made.usage.total_tokens, made.output_text)
            usage = made.usage
            print(f"\n{usage.input_tokens_details.cached_tokens} of {usage.input_tokens} tokens came out of the item")
            print("agent: " + ", ".join(asyncio.run(served.agent(str(client.base_url)))))
    share = int(parse_bytes(given.cap, "cap") * served.SHARE)
    print(f"peak {max(peak, most)} of {share} bytes, a share of the cap")


if __name__ == "__main__":
    run(main)
