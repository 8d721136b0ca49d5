"""A model under a cap behind OpenAI's interface, driven by the real `openai` client (`pip install openai`).

    python demos/07_serve.py [--model NAME_OR_PATH] [--cap 12MiB] [--turns 12] [--tokens 40]

Starts `agentmem serve`, streams a chat, talks for several times the cap, compacts that conversation into one item, ends
the server, starts it again, and goes on from the item. Look at the column `read`: only what is new is read, and after
the restart the item stands for everything before it; and at `peak`, which stays below the cap.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import OpenAI

from agentmem.errors import SettingsRefused
from agentmem.settings import format_bytes, parse_bytes
from support.refusals import positive, run

FACT = "Remember this: the colour of my door is green."
TOPICS = ("animals", "rivers", "colours", "trees", "cities", "fruits", "tools", "birds", "metals", "dances")


@contextmanager
def server(given: argparse.Namespace, state: str) -> Iterator[OpenAI]:
    """The server as its own process, and a client of what it printed; it ends by SIGTERM."""
    command = [sys.executable, "-c", "import sys; from agentmem.cli import main; sys.exit(main())", "serve"]
    options = ["--cap", given.cap, "--share", "1", "--port", "0", "--state", state, "--keep-recent", "32"]
    options += ["--alias", "it", *(["--model", given.model] if given.model else [])]
    with (
        Path(state, "log").open("a+", encoding="utf-8") as log,
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, stderr=log) as process,
    ):
        lines = process.stdout or ()
        url = next((found[1] for line in lines if (found := re.search(r'base_url="(.*?)"', line))), None)
        if url is None:
            raise SettingsRefused(Path(state, "log").read_text(encoding="utf-8").strip().removeprefix("agentmem: "))
        print(f"serving at {url}")
        with OpenAI(base_url=url, api_key="none") as client:
            try:
                yield client
            finally:
                process.send_signal(signal.SIGTERM)


def row(what: str, made: Any, said: str) -> int:
    """One row of the table; the peak."""
    facts, usage = made.agentmem, made.usage
    peak = format_bytes(facts["peak_bytes"])
    counts = f"{usage.input_tokens:6} {facts['read_tokens']:6} {facts['held_slots']:7} {facts['total_compactions']:11}"
    print(f"{what:8} {counts} {peak:>9}  {' '.join(said.split())[:40]!r}")
    return int(facts["peak_bytes"])


def main() -> None:
    """Chat, talk, compact, restart, go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face id or path; default: the embedded model")
    parser.add_argument("--cap", default="12MiB")
    parser.add_argument("--turns", type=positive, default=12)
    parser.add_argument("--tokens", type=positive, default=40, help="of one reply, at most")
    given = parser.parse_args()
    cap, peak, previous = parse_bytes(given.cap, "cap"), 0, None
    fields: dict[str, Any] = {"model": "it", "temperature": 0, "max_output_tokens": given.tokens}
    with tempfile.TemporaryDirectory() as state:
        with server(given, state) as client:
            question: Any = [{"role": "user", "content": "What is the capital of France?"}]
            stream = client.chat.completions.create(model="it", messages=question, temperature=0, stream=True)
            parts = [part.choices[0].delta.content or "" for part in stream]
            print(f"streamed in {len(parts)} parts: {''.join(parts)!r}\n")
            print("         tokens   read   slots compactions      peak")
            for turn in range(given.turns):
                text = f"{'' if turn else FACT} Name three {TOPICS[turn % len(TOPICS)]}, and say a word about each."
                made: Any = client.responses.create(input=text, previous_response_id=previous, **fields)
                previous, peak = made.id, max(peak, row(f"turn {turn + 1}", made, made.output_text))
            compact: Any = client.responses.compact(model="it", previous_response_id=previous)
            item = compact.output[-1].model_dump()
            row("compact", compact, item["encrypted_content"])
        with server(given, state) as client:
            asked: Any = [item, {"role": "user", "content": "What is the colour of my door?"}]
            made = client.responses.create(input=asked, **fields)
            row("after it", made, made.output_text)
    usage = made.usage
    print(f"\n{usage.input_tokens_details.cached_tokens} of {usage.input_tokens} tokens came out of the item")
    print(f"peak {peak} of {cap} bytes")


if __name__ == "__main__":
    run(main)
